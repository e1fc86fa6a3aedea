"""One model in several runtimes, behind calls that each of them declares: PyTorch, llama.cpp (GGUF), OpenVINO."""

from __future__ import annotations

import os
from pathlib import Path

from ..trace import Trace
from .protocol import CALLS, CallNotOffered, Executor, Scores


def runtime_of(path: str | os.PathLike) -> str:
    """`"gguf"`, `"openvino"` or `"torch"`: what opens what lies at `path`."""
    path = Path(path)
    if path.suffix == ".gguf" or (path.is_file() and _begins(path, b"GGUF")):
        return "gguf"
    return "openvino" if (path / "openvino_model.xml").is_file() else "torch"


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def open_executor(
    path: str | os.PathLike, context: int = 2048, trace: Trace | None = None, name: str | None = None, **options
) -> Executor:
    """
    The executor for what lies at `path`: a GGUF file, a folder with `openvino_model.xml`, else a checkpoint (folder
    or Hub id) for PyTorch, to which `options` of `from_pretrained` are passed.

    Raises:
        ImportError: the runtime is not installed.
        ValueError: a file that its runtime does not take, or `options` with another runtime than PyTorch.
    """
    runtime = runtime_of(path)
    if runtime == "torch":
        from .torch_executor import TorchExecutor

        return TorchExecutor.open(path, context, name=name, trace=trace, **options)
    if runtime == "gguf":
        from .gguf_executor import GGUFExecutor as other
    else:
        from .openvino_executor import OpenVINOExecutor as other
    if options:
        raise ValueError(f"{', '.join(options)}: options of PyTorch, which {path} is not for.")
    return other(path, context, trace=trace, **({} if name is None else {"name": name}))


__all__ = ["CALLS", "CallNotOffered", "Executor", "Scores", "open_executor", "runtime_of"]
