"""
Which calibration positions count, and the Hessian that they make: P-GPTQ's one difference from GPTQ.

The first tokens of a sequence draw activations about ten times as large as all others (MiniCPM4, arXiv 2506.07900,
4.1.2), so squared they would rule the Hessian although an engine can keep their keys and values. P-GPTQ leaves them
out.

Shape letters: `B` sequences, `S` positions, `I` inputs.
"""

from __future__ import annotations

import torch


# From this width on only blocks on and above the diagonal are multiplied.
HALF_WIDTH = 1024
PARTS = 4


def position_weights(attention_mask: torch.Tensor, skip_first: int, prefix_weight: float = 0.0) -> torch.Tensor:
    """
    How much each position counts in the Hessian.

    Args:
        attention_mask: `[B, S]`, nonzero at real tokens, padding on either side.
        skip_first: real tokens at the start of each sequence that count `prefix_weight`; 4 in the paper.
        prefix_weight: 0 as in the paper, 1 for plain GPTQ.

    Returns:
        float32 `[B, S]`: 0 at padding, `prefix_weight` at the first real tokens, 1 after them.
    """
    real = attention_mask != 0
    rank = real.long().cumsum(-1)  # 1 at the first real token
    return torch.where(rank <= skip_first, float(prefix_weight), 1.0).to(torch.float32) * real


class Hessian:
    """The sum of `w x x^T` and of `w |x|` over rows `x` given to `add`; float32 `[I, I]` and `[I]`."""

    def __init__(self, inputs: int, device: torch.device | str = "cpu"):
        self.matrix = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)
        self.magnitude = torch.zeros(inputs, dtype=torch.float32, device=device)
        self.rows = 0.0

    def add(self, inputs: torch.Tensor, weights: torch.Tensor) -> None:
        """
        Args:
            inputs: `[B, S, I]`.
            weights: float32 `[B, S]`, see `position_weights`; rows of weight 0 are never read, not even if they are
                NaN.
        """
        weights = weights.to(inputs.device)
        counted = weights > 0
        rows, weights = inputs[counted].to(torch.float32), weights[counted]
        self.rows += float(weights.sum())
        partial = bool((weights != 1).any())
        self.magnitude += (rows.abs() * weights[:, None]).sum(0) if partial else rows.abs().sum(0)
        if partial:
            rows = rows * weights.sqrt()[:, None]
        if rows.shape[1] < HALF_WIDTH:
            self.matrix.addmm_(rows.t(), rows)
            return
        size = -(-rows.shape[1] // PARTS)
        for start in range(0, rows.shape[1], size):
            self.matrix[start : start + size, start:].addmm_(rows[:, start : start + size].t(), rows[:, start:])

    def finish(self) -> torch.Tensor:
        """The whole symmetric matrix, and no more `add` after it."""
        if len(self.matrix) >= HALF_WIDTH:
            self.matrix = torch.triu(self.matrix)
            self.matrix += torch.triu(self.matrix, 1).t().clone()
        return self.matrix
