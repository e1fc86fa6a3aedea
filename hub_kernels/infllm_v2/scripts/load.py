"""
The kernel as a module, straight from its sources and with torch and triton alone: for the benchmark and for
`aot.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
from build import build


# The C++ kernel is built from its source on first use: the files stay until the process ends.
_folder = tempfile.TemporaryDirectory(prefix="infllm_v2-")


@functools.cache
def load(backend: str):
    """Assemble into a temporary folder and import from there, once a process."""
    (folder,) = [folder for folder in build(Path(_folder.name)) if folder.name == f"torch-{backend}"]
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
