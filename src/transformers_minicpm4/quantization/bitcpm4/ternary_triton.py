"""
Products with packed ternary weights on GPUs, in Triton.

Few rows are a sum over inputs without matrix units, for any group size; more rows multiply the codes, which every
16-bit type holds exactly, on matrix units and scale each group's sum. Sums are float32 in both.

With `TRITON_INTERPRET=1` in the environment before the first import, CPU tensors go through Triton's interpreter.

Shape letters: `M` rows, `O` outputs, `I` inputs, `B` bytes of a packed row (`2 * ceil(I / 8)`), `Q` groups
(`ceil(I / group_size)`). In kernels: `BM`, `BO`, `BI` rows, outputs and inputs of one step.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch
import triton
import triton.language as tl


# Up to so many rows, matrix units would be mostly idle.
FEW_ROWS = 4
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


@triton.jit
def _codes(packed, rows, start, O, B, BO: tl.constexpr, BI: tl.constexpr):
    """int32 `[BO, BI]`: the codes of outputs `rows` (`[BO]`) from input `start` on, 0 where there are none."""
    byte = start // 4 + tl.arange(0, BI // 4)
    inside = (rows < O)[:, None] & (byte < B)[None, :]
    at = packed + rows.to(tl.int64)[:, None] * B + byte[None, :]
    four = tl.load(at, mask=inside, other=0).to(tl.int32)
    place = 30 - 2 * tl.arange(0, 4)
    # To the top of the integer and back down: the shift to the right repeats the sign.
    return tl.reshape((four[:, :, None] << place[None, None, :]) >> 30, [BO, BI])


@triton.jit
def _few_rows_kernel(
    x, packed, scales, bias, out, O, I, B, Q, GROUP: tl.constexpr, BIAS: tl.constexpr, BO: tl.constexpr,
    BI: tl.constexpr,
):  # fmt: skip
    """Program: some outputs of one row."""
    o, m = tl.program_id(0) * BO + tl.arange(0, BO), tl.program_id(1).to(tl.int64)
    total = tl.zeros([BO, BI], tl.float32)
    for start in range(0, I, BI):
        i = start + tl.arange(0, BI)
        inputs = tl.load(x + m * I + i, mask=i < I, other=0.0).to(tl.float32)
        code = _codes(packed, o, start, O, B, BO, BI).to(tl.float32)
        at = scales + o.to(tl.int64)[:, None] * Q + (i // GROUP)[None, :]
        scale = tl.load(at, mask=(o < O)[:, None] & (i < I)[None, :], other=0.0).to(tl.float32)
        total += code * scale * inputs[None, :]
    result = tl.sum(total, 1)
    if BIAS:
        result += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)
    tl.store(out + m * O + o, result.to(out.dtype.element_ty), mask=o < O)


@triton.jit
def _many_rows_kernel(
    x, packed, scales, bias, out, M, O, I, B, Q, GROUP: tl.constexpr, BIAS: tl.constexpr, WIDEN: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Program: a tile of outputs. A step never crosses a group's end."""
    o, m = tl.program_id(0) * BO + tl.arange(0, BO), tl.program_id(1) * BM + tl.arange(0, BM)
    total = tl.zeros([BM, BO], tl.float32)
    for start in range(0, I, BI):
        i = start + tl.arange(0, BI)
        at = x + m.to(tl.int64)[:, None] * I + i[None, :]
        inputs = tl.load(at, mask=(m < M)[:, None] & (i < I)[None, :], other=0.0)
        code = _codes(packed, o, start, O, B, BO, BI)
        if WIDEN:
            part = tl.dot(inputs.to(tl.float32), tl.trans(code.to(tl.float32)), input_precision="ieee")
        else:
            part = tl.dot(inputs, tl.trans(code.to(inputs.dtype)))
        scale = tl.load(scales + o.to(tl.int64) * Q + start // GROUP, mask=o < O, other=0.0).to(tl.float32)
        total += part * scale[None, :]
    if BIAS:
        total += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    at = out + m.to(tl.int64)[:, None] * O + o[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (o < O)[None, :])


def takes(in_features: int, group_size: int) -> bool:
    """Whether the kernels serve: their steps of 16 inputs or more lie within one group."""
    return group_size % 16 == 0 or group_size >= in_features


def plan(x, packed, scales, group_size, bias, out) -> tuple:
    """The launch `ternary_matmul` makes, as (kernel, grid, arguments, options)."""
    rows, inputs = x.shape
    outputs, width = packed.shape
    groups = scales.shape[1]
    # One group: a step may be of any width.
    group = triton.next_power_of_2(max(inputs, 64)) if groups == 1 else group_size
    unused = x if bias is None else bias
    if rows <= FEW_ROWS:
        return _few_rows_kernel, (triton.cdiv(outputs, 8), rows), (
            x, packed, scales, unused, out, outputs, inputs, width, groups, group, bias is not None, 8, 256,
        ), {"num_warps": 4}  # fmt: skip
    step = 64 if group % 64 == 0 else 32 if group % 32 == 0 else 16
    tile_rows, tile_outputs = (16, 32) if rows <= 16 else (32, 64) if rows <= 32 else (64, 64)
    # Triton's interpreter multiplies bfloat16 matrices wrongly; float32 holds the same values.
    widen = INTERPRET or x.dtype == torch.float32
    return _many_rows_kernel, (triton.cdiv(outputs, tile_outputs), triton.cdiv(rows, tile_rows)), (
        x, packed, scales, unused, out, rows, outputs, inputs, width, groups, group, bias is not None, widen,
        tile_rows, tile_outputs, step,
    ), {"num_warps": 4}  # fmt: skip


def ternary_matmul(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, group_size: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """
    `x @ W.T + bias` on packed ternary weights; the caller has checked what `ternary_linear` checks, and `takes`.

    Args:
        x: `[M, I]`, float32, bfloat16 or float16.
        packed: uint8 `[O, B]`, contiguous.
        scales: float16 or float32 `[O, Q]`, contiguous.
        group_size: consecutive inputs that share a scale, a multiple of 16 unless there is one group.
        bias: `[O]` or `None`.

    Returns:
        `[M, O]` in the dtype of `x`.
    """
    x = x.contiguous()
    out = x.new_empty((len(x), len(packed)))
    if out.numel():
        kernel, grid, arguments, options = plan(x, packed, scales, group_size, bias, out)
        # Triton launches on the current device, which need not be the layer's.
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            kernel[grid](*arguments, **options)
    return out
