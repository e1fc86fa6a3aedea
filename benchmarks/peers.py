"""
Makes build/peers/gptqmodel: gptqmodel 7.7.0 in an environment where this package cannot be imported.

    python benchmarks/peers.py

It borrows torch, transformers and optimum from the environment of the Python that runs this (by path, so that editable
installs such as ours stay invisible) and adds gptqmodel and what it imports without their pins: gptqmodel asks for a
newer torch than it needs, and pip would fetch a CUDA build. Prints the environment's Python. About a minute.
"""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from pathlib import Path


FOLDER = Path(__file__).resolve().parents[1] / "build" / "peers" / "gptqmodel"
PEERS = ["gptqmodel==7.7.0", "pypcre", "tokenicer", "logbar", "device-smi", "defuser", "threadpoolctl", "protobuf"]
PEERS += ["pillow", "torchao", "ninja"]
WORKS = """
import gptqmodel, optimum.gptq, torch, transformers
import importlib.util
assert importlib.util.find_spec("transformers_minicpm4") is None, "our package can be imported here"
"""


def make_gptqmodel() -> Path:
    """The Python of the environment, made where it is missing or does not work."""
    python = FOLDER / "bin" / "python"
    if python.is_file() and not subprocess.run([python, "-I", "-c", WORKS], capture_output=True).returncode:
        return python
    venv.create(FOLDER, with_pip=True, clear=True)
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # A path in a .pth file is searched, but the .pth files there, such as editable installs, are not read.
    Path(own, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [python, "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*install, "setuptools", "wheel"], check=True)  # several of them are built here
    subprocess.run([*install, *PEERS], check=True)
    subprocess.run([python, "-I", "-c", WORKS], check=True, stdout=subprocess.DEVNULL)
    return python


if __name__ == "__main__":
    print(make_gptqmodel())
