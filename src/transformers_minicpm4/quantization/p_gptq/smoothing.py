"""
AWQ's scaling (arXiv 2306.00978, equation 4) before GPTQ: "S" of S-P-GPTQ (MiniCPM4, arXiv 2506.07900, table 4).

Input channels that carry large activations are enlarged in the weight and made smaller in what feeds them, so that
rounding hits them less. The factors fold into the layer before, and the checkpoint stays a plain one.

Shape letters: `O` outputs, `I` inputs.
"""

from __future__ import annotations

import torch

from .solver import output_error, round_to_nearest


GRID = 20


def search_factors(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    magnitude: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
) -> tuple[torch.Tensor, float]:
    """
    The factors `s = magnitude ** alpha` (alpha of 0, 0.05, ..., 0.95) whose rounded `weight * s` errs least.

    Args:
        weight: `[O, I]`, of all layers that read the input.
        hessian: `[I, I]` over the rows that count; the error is measured with it, so no activation is kept.
        magnitude: `[I]`, mean `|x|` over the same rows.

    Returns:
        float32 `[I]` with geometric middle 1 (all ones where nothing is gained), and alpha.
    """
    weight = weight.detach().to(torch.float32)
    known = magnitude.to(torch.float32).clamp(min=1e-4 * float(magnitude.max().clamp(min=1e-12)))
    best, best_factors, best_alpha = torch.inf, torch.ones_like(known), 0.0
    for step in range(GRID):
        alpha = step / GRID
        factors = known**alpha
        factors = factors / (factors.max() * factors.min()).sqrt()
        scaled = round_to_nearest(weight * factors, bits=bits, group_size=group_size, symmetric=symmetric)
        # Of (W s + d) (x / s) only d (x / s) is error, and its Hessian is H / (s s^T).
        error = output_error(weight * factors, scaled, hessian / (factors[:, None] * factors))
        if error < best:
            best, best_factors, best_alpha = error, factors, alpha
    return best_factors, best_alpha
