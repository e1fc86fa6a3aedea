"""
Ternary weights as GPTQ codes of 2 bits: -1, 0, 1 become 1, 2, 3 with zero point 2, exactly.

Shape letters: `O` outputs, `I` inputs, `Q` groups of inputs (`ceil(I / group_size)`).
"""

from __future__ import annotations

import torch

from ..quantized_weight import QuantizedWeight


def ternary_weight(
    codes: torch.Tensor, scales: torch.Tensor, group_size: int, bias: torch.Tensor | None = None
) -> QuantizedWeight:
    """
    The ternary weight `scales[o, i // group_size] * codes[o, i]` for the writers of this package.

    Args:
        codes: int8 `[O, I]` of -1, 0, 1.
        scales: float `[O, Q]`, kept as they are; files of the GPTQ format need them exact in float16.
        group_size: inputs that share a scale; -1 or `I` for one scale a row.
        bias: float `[O]` or `None`.

    Raises:
        ValueError: other codes, or a number of scales that does not fit the group size.
    """
    outputs, inputs = codes.shape
    group_size = inputs if group_size == -1 else group_size
    if codes.numel() and (codes.min() < -1 or codes.max() > 1):
        raise ValueError(f"ternary codes are -1, 0 and 1, got {int(codes.min())} .. {int(codes.max())}.")
    if group_size < 1 or tuple(scales.shape) != (outputs, -(-inputs // group_size)):
        raise ValueError(
            f"scales {list(scales.shape)} do not fit codes {[outputs, inputs]} with group_size {group_size}: "
            "one scale per output and group of inputs is expected."
        )
    return QuantizedWeight(
        codes=(codes + 2).to(torch.uint8),
        scales=scales,
        zeros=torch.full(tuple(scales.shape), 2, dtype=torch.uint8, device=codes.device),
        bits=2,
        group_size=group_size,
        bias=bias,
    )
