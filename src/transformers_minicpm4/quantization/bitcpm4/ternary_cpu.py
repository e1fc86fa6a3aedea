"""
C++ kernels for packed ternary weights on CPUs, built on first use with the system's compiler and loaded with ctypes.

`kernels()` builds `ternary_cpu.cpp` (some seconds, once a machine) and keeps the library in the folder
`transformers_minicpm4/` under `$XDG_CACHE_HOME` or `~/.cache`; its name holds a digest of the source, the flags, the
compiler and the processor. Where that fails, one warning says why and plain PyTorch answers.
`MINICPM4_CPU_KERNEL=0` turns the kernels off without a word; `CXX` names another compiler.

The threads are those of PyTorch's own OpenMP library; results do not depend on their number.

Shape letters: `M` rows, `O` outputs, `I` inputs, `B` bytes of a packed row (`2 * ceil(I / 8)`), `Q`
groups (`ceil(I / group_size)`).
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
import warnings
from pathlib import Path

import torch


SOURCE = Path(__file__).with_name("ternary_cpu.cpp")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-Wno-psabi")
# Tried in this order: not every compiler knows its processor or comes with OpenMP (then one thread does the work).
VARIANTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
BUILD_SECONDS = 120
CODES = 16  # of one lane, which has one scale


class _CannotBuild(Exception):
    """Why there is no library, as the second half of a sentence."""


class Kernels:
    """The functions of one built library. Tensors are contiguous and on the CPU; nothing is checked here."""

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        try:
            self._product, self._dequantize = library.ternary_product, library.ternary_dequantize
        except AttributeError as error:
            raise _CannotBuild(f"{path} is not the library expected; delete it") from error
        for function in (self._product, self._dequantize):
            function.argtypes, function.restype = [ctypes.c_char_p], None

    @staticmethod
    def takes(in_features: int, group_size: int) -> bool:
        """Whether no 16 neighbouring inputs have two scales, which the C++ code takes for granted."""
        return group_size % CODES == 0 or group_size >= in_features

    def product(self, x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
        """float32 `[M, O]`, `x` (float32 `[M, I]`) times the transposed weight. Meant for few rows."""
        out = torch.empty((len(x), len(packed)), dtype=torch.float32)
        self._call(self._product, x, packed, scales, group_size, x.shape[1], out)
        return out

    def dequantize(
        self, packed: torch.Tensor, scales: torch.Tensor, group_size: int, in_features: int
    ) -> torch.Tensor:
        """float32 `[O, I]`, the weight."""
        out = torch.empty((len(packed), in_features), dtype=torch.float32)
        self._call(self._dequantize, None, packed, scales, group_size, in_features, out)
        return out

    @staticmethod
    def _call(function, x, packed, scales, group_size, inputs, out) -> None:
        function(struct.pack(
            "=12q", torch.get_num_threads(), 0 if x is None else len(x), len(packed), inputs, packed.shape[1],
            scales.shape[1], min(group_size, inputs), scales.dtype == torch.float16,
            0 if x is None else x.data_ptr(), packed.data_ptr(), scales.data_ptr(), out.data_ptr(),
        ))  # fmt: skip


@functools.cache
def kernels(variants: tuple[tuple[str, ...], ...] = VARIANTS) -> Kernels | None:
    """
    The kernels, or `None` where plain PyTorch must do.

    Args:
        variants: compiler flags to try, the first that compiles wins.
    """
    if os.environ.get("MINICPM4_CPU_KERNEL", "1") == "0":
        return None
    try:
        try:
            return Kernels(_library(variants))
        except OSError:  # what lies in the cache folder is damaged
            return Kernels(_library(variants, anew=True))
    except (_CannotBuild, OSError, ValueError, RuntimeError) as error:
        warnings.warn(
            f"transformers_minicpm4: plain PyTorch, which is slower, multiplies packed ternary weights instead of the "
            f"C++ kernel: {error}; it needs a C++17 compiler such as g++ (in PATH or CXX) and a cache folder it can "
            "write to (XDG_CACHE_HOME), and MINICPM4_CPU_KERNEL=0 silences this.",
            stacklevel=2,
        )
        return None


def _library(variants: tuple[tuple[str, ...], ...], anew: bool = False) -> Path:
    """The built library of this source, compiler and processor; built if absent or `anew`."""
    compiler = _compiler()
    try:
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, timeout=BUILD_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise _CannotBuild(f"the compiler {compiler[0]} does not run ({_reason(error)})") from error
    key = hashlib.sha256(SOURCE.read_bytes())
    for part in (repr((compiler, FLAGS, variants)).encode(), version, _processor()):
        key.update(hashlib.sha256(part).digest())
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(cache) if cache and Path(cache).is_absolute() else Path.home() / ".cache") / "transformers_minicpm4"
    target = folder / f"ternary-{key.hexdigest()[:20]}.so"
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
        _build(compiler, variants, partial)
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


def _build(compiler: list[str], variants: tuple[tuple[str, ...], ...], target: str) -> None:
    said = ""
    for extra in variants:
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
