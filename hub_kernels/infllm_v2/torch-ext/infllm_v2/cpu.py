"""
C++ kernels for the CPU, built on first use with the system's compiler and loaded with ctypes.

`kernels()` builds `cpu.cpp` (a few seconds, once a machine) and keeps the result in the folder `infllm_v2_kernel/`
under `$XDG_CACHE_HOME` or `~/.cache`; its name holds a digest of the source, the flags, the compiler and the
processor. Where that fails, one warning says why and plain PyTorch answers. The environment variable
`INFLLM_V2_CPU_KERNEL=0` turns the kernels off without a word; `CXX` names another compiler.

The threads are those of PyTorch's own OpenMP library, which lie ready after every operator; a pool of our own measured
1.7 times slower beside them. Where other programs keep all processors busy, set `OMP_WAIT_POLICY=passive`: OpenMP's
threads, PyTorch's too, otherwise spin while the one they wait for cannot run, up to 8 ms a call.

Results are the same bit for bit whatever the number of threads (`torch.get_num_threads()`). float32, bfloat16 and
float16; sums are float32.

Shape letters: `B` rows, `S` queries of all rows, `N` keys of all rows, `H` query heads, `G` key/value heads, `D` head
size, `M` blocks of the longest row, `T` selected blocks, `K` fine and `C` coarse compressed keys.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
import types
import warnings
from pathlib import Path

import torch

from . import plain


SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-Wno-psabi"]
# Tried in this order: not every compiler knows its processor or comes with OpenMP (then one thread does the work).
EXTRAS = [["-march=native", "-fopenmp"], ["-mcpu=native", "-fopenmp"], ["-march=native"], ["-mcpu=native"], []]
BUILD_SECONDS = 120

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# What the library writes; float16 leaves it as float32.
_WRITTEN = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}


class _CannotBuild(Exception):
    """Why there is no library, as the second half of a sentence."""


@functools.cache
def kernels() -> types.SimpleNamespace | None:
    """The operators of `plain` in C++ (all but the backward one), or `None` where plain PyTorch must do."""
    if os.environ.get("INFLLM_V2_CPU_KERNEL", "1") == "0":
        return None
    try:
        try:
            _load(_library())
        except OSError:  # what lies in the cache folder is damaged
            _load(_library(anew=True))
    except (_CannotBuild, OSError) as error:
        warnings.warn(
            f"infllm-v2: plain PyTorch, which is slower, answers instead of the C++ kernel: {error}; it needs a C++17 "
            "compiler such as g++ (in PATH or CXX) and a cache folder it can write to (XDG_CACHE_HOME), and "
            "INFLLM_V2_CPU_KERNEL=0 silences this.",
            stacklevel=2,
        )
        return None
    functions = (
        compress_keys, update_compressed_keys, block_scores, block_scores_decode, select_blocks, sparse_attention,
        sparse_attention_decode,
    )  # fmt: skip
    return types.SimpleNamespace(**{function.__name__: function for function in functions})


# ------------------------------------------------------------------------------------------------------------ building


def _library(anew: bool = False) -> Path:
    """The built library of this source, compiler and processor; built if absent or `anew`."""
    compiler = _compiler()
    try:
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, timeout=BUILD_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise _CannotBuild(f"the compiler {compiler[0]} does not run ({_reason(error)})") from error
    key = hashlib.sha256(SOURCE.read_bytes())
    for part in (repr((compiler, FLAGS, EXTRAS)).encode(), version, _processor()):
        key.update(hashlib.sha256(part).digest())
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(cache) if cache and Path(cache).is_absolute() else Path.home() / ".cache") / "infllm_v2_kernel"
    target = folder / f"cpu-{key.hexdigest()[:20]}.so"
    if folder.exists() and not _ours(folder):
        raise _CannotBuild(f"the cache folder {folder} belongs to another user, or anybody can write to it")
    if target.is_file() and not anew and _ours(target) and _is_whole(target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, partial = tempfile.mkstemp(dir=folder, suffix=".partial")
        os.close(descriptor)
    except OSError as error:
        raise _CannotBuild(f"the cache folder {folder} cannot be written to ({_reason(error)})") from error
    try:
        _build(compiler, partial)
        with open(partial, "rb") as built:
            os.fsync(built.fileno())
        os.replace(partial, target)  # two processes at once: the last one wins, both are whole
    finally:
        Path(partial).unlink(missing_ok=True)
    return target


def _ours(path: Path) -> bool:
    """Whether nobody else could have put there what is about to be run."""
    found = path.stat()
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o002)


def _is_whole(path: Path) -> bool:
    """Whether an ELF file reaches to its last header: loading one that was cut short kills the process."""
    with path.open("rb") as file:
        head = file.read(64)
    if head[:5] != b"\x7fELF\x02" or len(head) < 64:
        return head[:4] != b"\x7fELF"  # other systems' libraries are left to their loader
    (headers,), (size, count) = struct.unpack_from("=Q", head, 40), struct.unpack_from("=HH", head, 58)
    return path.stat().st_size >= headers + size * count


def _compiler() -> list[str]:
    given = os.environ.get("CXX")
    for name in [given] if given else ["c++", "g++", "clang++"]:
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return words
    raise _CannotBuild(f"CXX names {given}, which is not a program" if given else "there is no C++ compiler in PATH")


def _build(compiler: list[str], target: str) -> None:
    said = ""
    for extra in EXTRAS:
        command = [*compiler, *FLAGS, *extra, str(SOURCE), "-o", target]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS, check=False
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise _CannotBuild(f"the compiler {compiler[0]} failed ({_reason(error)})") from error
        if result.returncode == 0:
            return
        said = result.stderr.strip()
    first = said.splitlines()[0][:200] if said else "it said nothing"
    raise _CannotBuild(f"the compiler {compiler[0]} failed ({first})")


def _processor() -> bytes:
    """What `-march=native` depends on: a library built for one processor may not run on another."""
    lines = [platform.machine(), platform.processor()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = ("model name", "flags", "cpu family", "model", "CPU implementer", "CPU part", "Features", "isa")
        lines += sorted({line for line in cpuinfo.read_text().splitlines() if line.split(":")[0].strip() in names})
    return "\n".join(lines).encode()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


_functions: dict[str, ctypes._CFuncPtr] = {}


def _load(path: Path) -> None:
    library = ctypes.CDLL(str(path))
    for name in ("select", "compress", "update", "scores", "scores_decode", "attend", "decode"):
        try:
            function = getattr(library, f"infllm_{name}")
        except AttributeError as error:
            raise _CannotBuild(f"{path} is not the library expected; delete it") from error
        function.argtypes, function.restype = [ctypes.c_char_p], None
        _functions[name] = function


# ----------------------------------------------------------------------------------------------------------- operators


def _call(name: str, numbers: tuple, scaling: float | None = None) -> None:
    """One struct: 64-bit integers (pointers among them), then the factor on the logits where there is one."""
    packed = struct.pack(f"={len(numbers)}q", *numbers)
    _functions[name](packed if scaling is None else packed + struct.pack("=d", scaling))


def _at(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def compress_keys(key, cu_seqlens, max_seqlen, size, stride, ratio):
    """See `ops.compress_keys`."""
    shape, written = key.shape, _WRITTEN[key.dtype]
    fine, coarse = (torch.zeros((shape[0] // apart, *shape[1:]), dtype=written) for apart in (stride, stride * ratio))
    _call("compress", (
        torch.get_num_threads(), _TYPES[key.dtype], len(cu_seqlens) - 1, shape[1], shape[2], size, stride, ratio,
        *key.stride()[:2], *fine.stride()[:2], *coarse.stride()[:2],
        key.data_ptr(), cu_seqlens.data_ptr(), fine.data_ptr(), coarse.data_ptr(),
    ))  # fmt: skip
    return fine.to(key.dtype), coarse.to(key.dtype)


def update_compressed_keys(key, fine, coarse, starts, done, lengths, max_new, size, stride, ratio):
    """See `ops.update_compressed_keys`."""
    if key.dtype == torch.float16:
        return plain.update_compressed_keys(key, fine, coarse, starts, done, lengths, max_new, size, stride, ratio)
    _call("update", (
        torch.get_num_threads(), _TYPES[key.dtype], key.shape[0], key.shape[1], key.shape[3], size, stride, ratio,
        *key.stride()[:3], *fine.stride()[:3], *coarse.stride()[:3],
        key.data_ptr(), fine.data_ptr(), coarse.data_ptr(), starts.data_ptr(), done.data_ptr(), lengths.data_ptr(),
    ))  # fmt: skip
    return None


def block_scores(
    query,
    fine,
    coarse,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    block_size,
    size,
    stride,
    ratio,
    scaling,
):
    """See `ops.block_scores`."""
    queries, heads, width = query.shape
    groups, num_blocks = fine.shape[1], -(-max_seqlen_k // block_size)
    out = torch.empty((groups, queries, num_blocks), dtype=torch.float32)
    _call("scores", (
        torch.get_num_threads(), _TYPES[query.dtype], len(cu_seqlens_q) - 1, queries, heads, groups, width, num_blocks,
        block_size, size, stride, ratio,
        0, *query.stride()[:2], 0, fine.stride(1), fine.stride(0), 0, coarse.stride(1), coarse.stride(0),
        query.data_ptr(), fine.data_ptr(), coarse.data_ptr(), cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr(), 0, 0,
        out.data_ptr(),
    ), scaling)  # fmt: skip
    return out


def block_scores_decode(query, fine, coarse, lengths, positions, max_length, block_size, size, stride, ratio, scaling):
    """See `ops.block_scores_decode`."""
    batch, queries, heads, width = query.shape
    groups, num_blocks = fine.shape[1], -(-max_length // block_size)
    out = torch.empty((groups, batch * queries, num_blocks), dtype=torch.float32)
    _call("scores_decode", (
        torch.get_num_threads(), _TYPES[query.dtype], batch, queries, heads, groups, width, num_blocks,
        block_size, size, stride, ratio,
        *query.stride()[:3], *fine.stride()[:3], *coarse.stride()[:3],
        query.data_ptr(), fine.data_ptr(), coarse.data_ptr(), 0, 0, lengths.data_ptr(), _at(positions), out.data_ptr(),
    ), scaling)  # fmt: skip
    return out


def select_blocks(scores, positions, num_selected, init_blocks, window_blocks, block_size):
    """See `ops.select_blocks`."""
    groups, queries, num_blocks = scores.shape
    out = torch.empty((groups, queries, min(num_selected, num_blocks)), dtype=torch.int32)
    _call("select", (
        torch.get_num_threads(), groups, queries, num_blocks, num_selected, init_blocks, window_blocks, block_size,
        scores.data_ptr(), positions.data_ptr(), out.data_ptr(),
    ))  # fmt: skip
    return out


def sparse_attention(
    query, key, value, blocks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size, scaling
):
    """See `ops.sparse_attention`."""
    queries, heads, width = query.shape
    output = torch.empty(query.shape, dtype=_WRITTEN[query.dtype])
    lse = torch.empty((queries, heads), dtype=torch.float32)
    _call("attend", (
        torch.get_num_threads(), _TYPES[query.dtype], len(cu_seqlens_q) - 1, queries, heads, key.shape[1], width,
        blocks.shape[2], block_size, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        query.data_ptr(), key.data_ptr(), value.data_ptr(), blocks.data_ptr(), cu_seqlens_q.data_ptr(),
        cu_seqlens_k.data_ptr(), output.data_ptr(), lse.data_ptr(),
    ), scaling)  # fmt: skip
    return output.to(query.dtype), lse


def sparse_attention_decode(
    query, key, value, blocks, scores, lengths, positions, starts, page_table, tree_mask, num_selected, init_blocks,
    window_blocks, block_size, scaling,
):  # fmt: skip
    """See `ops.sparse_attention_decode`."""
    batch, queries, heads, width = query.shape
    output = torch.empty(query.shape, dtype=_WRITTEN[query.dtype])
    num_blocks = 0 if scores is None else scores.shape[2]
    selected = blocks.shape[2] if scores is None else min(num_selected, num_blocks)
    page_size, pages = (0, 0) if page_table is None else (key.shape[2], page_table.shape[1])
    _call("decode", (
        torch.get_num_threads(), _TYPES[query.dtype], batch, queries, heads, key.shape[1], width, selected, num_blocks,
        block_size, num_selected, init_blocks, window_blocks, page_size, pages,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        query.data_ptr(), key.data_ptr(), value.data_ptr(), _at(blocks), _at(scores), lengths.data_ptr(),
        _at(positions), _at(starts), _at(page_table), _at(tree_mask), output.data_ptr(),
    ), scaling)  # fmt: skip
    return output.to(query.dtype)
