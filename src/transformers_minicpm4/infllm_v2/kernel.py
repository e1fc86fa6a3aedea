"""
The Hub kernel of InfLLM v2: which one is named, loading it through the `kernels` library, and what it can run.

No name is built in: an id that nobody owns yet would invite somebody else to own it.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.integrations import use_kernel_forward_from_hub

from .configuration import InfLLMv2Config


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Fields of the config that are arguments of the kernel.
RULE = (
    "kernel_size",
    "kernel_stride",
    "init_blocks",
    "block_size",
    "window_size",
    "topk",
    "dense_len",
    "dense_switch",
)


@use_kernel_forward_from_hub("InfLLMv2Attention")
def kernelized(query, key, value, **options):
    """Where `kernelize` puts the kernel's layer, for the whole process; never called before that."""
    raise RuntimeError("No kernel was put in the place of InfLLMv2Attention.")


def find(config: InfLLMv2Config) -> tuple[Callable | None, str | None]:
    """
    The kernel's `infllm_v2_attention`, or why it could not be loaded, or neither where none is named.

    What `kernelize` put in comes first, then `INFLLM_V2_KERNEL`, then `config.kernel`.
    """
    if hasattr(kernelized, "forward") and kernelized.forward.__func__ is not type(kernelized).forward:
        return kernelized, None
    name = os.environ.get("INFLLM_V2_KERNEL")
    if name:
        return load(name, by_user=True)
    if config.kernel is not None:
        return load(config.kernel, by_user=False)
    return None, None


@torch.compiler.disable
@functools.cache
def load(name: str, by_user: bool) -> tuple[Callable | None, str | None]:
    """
    Load a kernel once a process, and remember a failure.

    Args:
        name: `"owner/repo"`, `"owner/repo@revision"` (`@v1` and no revision are version 1), or a local folder, which
            begins with `/`, `./`, `../` or `~`: a mistyped folder must not become a repository of somebody's.
        by_user: named in the environment, which is consent to run it. A name from a config may come with a checkpoint,
            so it is never a folder, and the Hub must list its owner as a trusted publisher.
    """
    try:
        from kernels import get_kernel, get_local_kernel

        # Elsewhere (Metal, XPU) `kernels` would look for a build of that device only; ours still serves CPU tensors.
        backend = None if torch.version.cuda or torch.version.hip else "cpu"
        if by_user and name.startswith(("/", "./", "../", "~")):
            folder = Path(name).expanduser().resolve()
            if not any((folder / part).is_dir() for part in ("build", "torch-cpu", "torch-cuda", "torch-rocm")):
                raise ValueError("it holds no build/, run `make kernels`" if folder.is_dir() else "no such folder")
            kernel = get_local_kernel(folder, backend=backend)
        else:
            repo, _, revision = name.partition("@")
            if not re.fullmatch(r"[^/]+/[^/]+", repo):
                raise ValueError("neither owner/repo or owner/repo@revision nor a folder, /... or ./...")
            if by_user and repo not in os.environ.get("LOCAL_KERNELS", "") and Path(repo).parent.is_dir():
                raise ValueError(f"a folder {Path(repo).parent}/ is here; ./{repo} names one in it")
            version = re.fullmatch(r"v(\d+)", revision or "v1")
            which = {"version": int(version[1])} if version else {"revision": revision}
            kernel = get_kernel(repo, **which, backend=backend, trust_remote_code=[repo] if by_user else False)
        return kernel.infllm_v2_attention, None
    except Exception as error:  # whatever a foreign module raises on import
        advice = "" if by_user else "; if you trust it, name it yourself: INFLLM_V2_KERNEL"
        return None, f"the kernel {name!r} could not be loaded ({type(error).__name__}: {error}){advice}"


def refusal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, config: InfLLMv2Config) -> str | None:
    """Why the kernel cannot answer for these tensors (`[B, H, S, D]`, `[B, G, N, D]` twice); `None` where it can."""
    device = query.device.type
    if device not in ("cuda", "cpu"):
        return f"the kernel runs on cuda (NVIDIA and ROCm) and cpu, the tensors are on {device}"
    if device == "cuda" and (missing := _lacks_triton()):
        return f"on a GPU the kernel needs triton 3.3 or newer, {missing}"
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in (query, key, value)}
    if len(dtypes) > 1 or query.dtype not in DTYPES:
        given = ", ".join(sorted(dtypes))
        return f"the kernel takes float32, bfloat16 or float16, one for all, the tensors are {given}"
    group = query.shape[1] // key.shape[1]
    for what, given, limit in (
        ("head sizes", query.shape[-1], 256),
        ("query heads a key/value head", group, 32),
        ("block_size", config.block_size, 128),
    ):
        if given > limit:
            return f"the kernel takes {what} up to {limit}, not {given}"
    return None


def slower(attend: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why `blockwise` is the faster one where the kernel could answer too, which happens on a CPU alone."""
    if query.device.type != "cpu":
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return "on a CPU its backward pass is faster than the kernel's"
    if attend is not kernelized and not _is_compiled(attend, query):
        return "the kernel found no C++ compiler, and its plain form is slower"
    return None


@torch.compiler.disable
def _is_compiled(attend: Callable, query: torch.Tensor) -> bool:
    package = sys.modules.get(attend.__module__.partition(".")[0])
    return getattr(package, "is_compiled", lambda _: True)(query)


@functools.cache
def _lacks_triton() -> str | None:
    try:
        import triton
    except ImportError:
        return "which is not installed"
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if found >= (3, 3) else f"and {triton.__version__} is installed"
