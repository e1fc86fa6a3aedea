"""The kernel as a module, straight from its sources and with torch and triton alone: for the benchmark and for `aot.py`."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
from build import build  # noqa: E402


def load(backend: str):
    """Assemble into a temporary folder and import from there; the folder is gone afterwards."""
    with tempfile.TemporaryDirectory() as target:
        (folder,) = [folder for folder in build(Path(target)) if folder.name == f"torch-{backend}"]
        name = json.loads((folder / "metadata.json").read_text())["id"]
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        if backend != "cpu" or os.environ.get("TRITON_INTERPRET") == "1":
            module.ops._triton()  # while the files are there
        return module
