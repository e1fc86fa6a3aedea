"""
Quantized weights as blocks of llama.cpp's types, where a type holds them exactly.

A block is 32 (Q4_0, Q4_1, Q8_0) or 256 (TQ1_0, TQ2_0) consecutive inputs of one output with one float16 scale `d`
(layouts: ggml-common.h and ggml-quants.c of github.com/ggml-org/llama.cpp). A weight is `scale * step` with
`step = code - zero`, so a type is exact where it holds all steps and each of its blocks has one scale.

Shape letters: `O` outputs, `I` inputs, `N` blocks of a row.
"""

from __future__ import annotations

import numpy as np
import torch

from ..quantized_weight import QuantizedWeight


# Smallest first; TQ1_0 (1.69 bits a weight) comes on request only, since TQ2_0 (2.06) computes faster.
EXACT_TYPES = ("TQ2_0", "Q4_0", "Q4_1", "Q8_0")
QUANTIZATIONS = ("auto", "TQ1_0", *EXACT_TYPES, "F16", "F32")


class LossyExport(ValueError):
    """The type cannot hold the weight exactly; says why."""


def gguf_blocks(weight: QuantizedWeight, quantization: str = "auto") -> tuple[str, np.ndarray]:
    """
    One layer's blocks.

    Args:
        weight: codes uint8 `[O, I]`.
        quantization: "TQ1_0", "TQ2_0", "Q4_0", "Q4_1" or "Q8_0", or "auto" for the smallest of them that is exact.

    Returns:
        the type's name, and its bytes, uint8 `[O, N * bytes of a block]`.

    Raises:
        LossyExport: the type (for "auto": every type) would change values.
    """
    if quantization != "auto":
        reason, blocks = _encode(weight, quantization)
        if reason:
            raise LossyExport(f"{quantization} cannot hold this weight exactly: {reason}. Use quantization='auto'.")
        return quantization, blocks
    reasons = []
    for kind in EXACT_TYPES:
        reason, blocks = _encode(weight, kind)
        if not reason:
            return kind, blocks
        reasons.append(f"{kind}: {reason}")
    raise LossyExport(
        f"no block type holds this weight exactly ({'; '.join(reasons)}). Use quantization='F16' or 'F32' for dense "
        "values, or quantize symmetrically with a group_size divisible by 32."
    )


def _encode(weight: QuantizedWeight, kind: str) -> tuple[str | None, np.ndarray]:
    """(why not, nothing) or (None, blocks)."""
    nothing = np.empty(0, dtype=np.uint8)
    size = 256 if kind.startswith("TQ") else 32
    outputs, inputs = weight.codes.shape
    if inputs % size:
        return f"its blocks are {size} inputs and rows have {inputs}", nothing
    scales, zeros, reason = _block_scales(weight)
    if reason:
        return reason, nothing
    steps = weight.codes.to(torch.int16) - zeros.to(torch.int16).repeat_interleave(32, dim=1)
    low, high = int(steps.min()), int(steps.max())
    steps = steps.cpu().numpy()
    d = scales.cpu().numpy()  # [O, I / 32]
    if kind.startswith("TQ"):
        if low < -1 or high > 1:
            return f"steps lie in {low} .. {high} and ternary types hold -1 .. 1", nothing
        groups = d.reshape(outputs, -1, 8)
        if (groups != groups[..., :1]).any():
            return "a block of 256 inputs has several scales (group_size below 256)", nothing
        trits = (steps + 1).astype(np.uint8).reshape(outputs, -1, 256)
        tail = groups[..., :1].view(np.uint8)
        return None, _flat(_tq2(trits) if kind == "TQ2_0" else _tq1(trits), tail)
    steps = steps.reshape(outputs, -1, 32)
    head = d[..., None].view(np.uint8)
    if kind == "Q8_0":
        if low < -128 or high > 127:
            return f"steps lie in {low} .. {high} and it holds -128 .. 127", nothing
        return None, _flat(head, steps.astype(np.int8).view(np.uint8))
    if kind == "Q4_0":
        if low < -8 or high > 7:
            return f"steps lie in {low} .. {high} and it holds -8 .. 7", nothing
        return None, _flat(head, _nibbles((steps + 8).astype(np.uint8)))
    # Q4_1: code * d + m
    if weight.bits > 4:
        return f"codes have {weight.bits} bits and it holds 4", nothing
    exact = -(d.astype(np.float32) * zeros.cpu().numpy().astype(np.float32))
    m = exact.astype(np.float16)
    if (m.astype(np.float32) != exact).any():
        return "its block minimum, -zero * scale, is not a float16 number", nothing
    codes = weight.codes.cpu().numpy().reshape(outputs, -1, 32)
    return None, _flat(head, m[..., None].view(np.uint8), _nibbles(codes))


def _block_scales(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor, str | None]:
    """Scales float16 and zero points `[O, I / 32]` of runs of 32 inputs, or why there are none."""
    groups = weight.groups.reshape(-1, 32)
    if (groups != groups[:, :1]).any():
        what = "g_idx gives" if weight.g_idx is not None else f"group_size {weight.group_size} gives"
        return weight.scales, weight.zeros, f"{what} 32 consecutive inputs several scales"
    scales = weight.scales.to(torch.float16)
    if not torch.equal(scales.to(weight.scales.dtype), weight.scales):
        return weight.scales, weight.zeros, "its scales are not float16 numbers"
    return scales[:, groups[:, 0]], weight.zeros[:, groups[:, 0]], None


def _flat(*parts: np.ndarray) -> np.ndarray:
    joined = np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(joined.reshape(joined.shape[0], -1))


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Byte `j` of 16 holds codes `j` (low) and `j + 16`."""
    return codes[..., :16] | (codes[..., 16:] << 4)


def _tq2(trits: np.ndarray) -> np.ndarray:
    """Two halves of 128; byte `j` of a half's 32 holds elements `j`, `j + 32`, `j + 64`, `j + 96`, lowest first."""
    parts = trits.reshape(*trits.shape[:-1], 2, 4, 32)
    return np.bitwise_or.reduce(parts << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=-2).reshape(
        *trits.shape[:-1], 64
    )


def _tq1(trits: np.ndarray) -> np.ndarray:
    """32 and 16 bytes of five trits and 4 bytes of four, first trit most significant, as fractions of 256."""
    made = []
    for start, stop, count, width in ((0, 160, 5, 32), (160, 240, 5, 16), (240, 256, 4, 4)):
        digits = trits[..., start:stop].reshape(*trits.shape[:-1], count, width).astype(np.uint16)
        powers = 3 ** np.arange(4, 4 - count, -1, dtype=np.uint16)
        number = (digits * powers[:, None]).sum(axis=-2, dtype=np.uint16)
        made.append((number * 256 + 242) // 243)  # rounded up: the reader multiplies and takes the high byte
    return np.concatenate(made, axis=-1).astype(np.uint8)
