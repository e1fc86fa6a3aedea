"""
One linear layer's quantized weight: what the solvers return and every writer takes.

Shape letters: `O` outputs, `I` inputs, `Q` groups of inputs (`ceil(I / group_size)`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class QuantizedWeight:
    """
    The weight is `scales[o, g_idx[i]] * (codes[o, i] - zeros[o, g_idx[i]])`.

    Args:
        codes: uint8 `[O, I]`, each in `0 .. 2**bits - 1`.
        scales: float `[O, Q]`, the step of each group.
        zeros: uint8 `[O, Q]`, the code that means 0. Symmetric quantization has `2 ** (bits - 1)` everywhere.
        bits: width of a code, 2 to 8.
        group_size: consecutive inputs that share a step; the last group may be shorter. Ternary per-channel and plain
            per-channel weights have `group_size == I`.
        symmetric: whether `zeros` is `2 ** (bits - 1)` by construction, which some readers take for granted.
        g_idx: int32 `[I]`, the group of each input where it is not `i // group_size` (activation order without static
            groups), else `None`.
        bias: float `[O]` or `None`; never quantized.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    group_size: int
    symmetric: bool = True
    g_idx: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def groups(self) -> torch.Tensor:
        """int64 `[I]`: the group of each input."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight `[O, I]`. In float16 this is what readers of the GPTQ format compute, bit for bit."""
        outputs, inputs = self.codes.shape
        steps = self.codes.to(dtype)
        if self.g_idx is None and inputs % self.group_size == 0:
            # Whole groups side by side: no gather. Codes and zeros are whole numbers up to 256, exact in any dtype.
            steps = steps.view(outputs, -1, self.group_size) - self.zeros.to(dtype)[:, :, None]
            return (steps * self.scales.to(dtype)[:, :, None]).view(outputs, inputs)
        groups = self.groups
        return (steps - self.zeros.to(dtype)[:, groups]) * self.scales.to(dtype)[:, groups]
