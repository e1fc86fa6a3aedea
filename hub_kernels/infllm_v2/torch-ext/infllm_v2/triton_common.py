"""
What several kernels share. Shapes follow `ops`; a tile holds some queries of one row times the heads of one
group.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl


INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INTERPRET = tl.constexpr(INTERPRET)
LOG2E = 1.4426950408889634
# float32 products as three TF32 ones on NVIDIA's tensor cores (error near float32's own): with plain float32
# arithmetic the tiles do not fit the registers.
_PRECISION = tl.constexpr("ieee" if INTERPRET or torch.version.hip else "tf32x3")


@triton.jit
def dot(a, b):
    """Matrix product with float32 accumulation; float32 inputs keep their precision."""
    if _INTERPRET:  # the interpreter's product of bfloat16 operands is wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision=_PRECISION)
    else:
        return tl.dot(a, b)


@triton.jit
def inside_of(rows, feature, D: tl.constexpr, DP: tl.constexpr):
    """Mask of `[rows, DP]`, without the features where there are no padded ones: it costs registers."""
    if D == DP:
        return rows[:, None]
    else:
        return rows[:, None] & (feature < D)[None, :]


@triton.jit
def count_windows(tokens, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Complete windows of that many tokens; of position + 1 tokens: the windows its query sees."""
    return tl.where(tokens >= SIZE, (tokens - SIZE) // STRIDE + 1, 0)


# Compute capability (major) to choose launches for; None asks the device. `scripts/aot.py` sets it for GPUs not here.
CAPABILITY: int | None = None


@functools.cache
def _capability(index: int | None) -> int:
    return 8 if torch.version.hip else torch.cuda.get_device_capability(index)[0]


def attention_warps(tensor: torch.Tensor) -> int:
    """
    Warps of a 64-row tile: a warpgroup instruction takes four; older tensor cores need eight to hold the
    accumulators.
    """
    if CAPABILITY is None:
        major = _capability(tensor.device.index) if tensor.is_cuda else 8
    else:
        major = CAPABILITY
    return 4 if major in (9, 10, 11) and tensor.element_size() == 2 else 8


def power_of_two(number: int) -> int:
    return triton.next_power_of_2(number)


def tile(group: int, row_bytes: int) -> tuple[int, int]:
    """
    Queries a tile and heads a query (padded). Their product is 64 where the group allows: what a tensor core
    instruction fills, and few enough that the accumulators stay in registers; fewer where a row has more than 256
    bytes.
    """
    heads = power_of_two(group)
    rows = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    return min(max(rows // heads, 1), 16), heads
