"""
`TernaryLinear`: a linear layer that holds its weight in 2 bits and multiplies by it without unpacking it whole.

Shape letters: `O` outputs, `I` inputs, `Q` groups (`I / group_size`).
"""

from __future__ import annotations

import torch
from torch import nn

from .ternary import inputs_per_group
from .ternary_linear import dequantize_ternary, ternary_linear
from .ternary_packing import check_packed, pack_ternary, packed_bytes


class TernaryLinear(nn.Linear):
    """
    A linear layer with packed ternary weights. A subclass of `nn.Linear` so that PEFT's `"all-linear"` and hooks find
    it; `weight` is not a matrix of `[O, I]`, though: see `dequantize` for that.

    Args:
        in_features: `I`.
        out_features: `O`.
        group_size: inputs that share a scale, or -1; must divide `I`.
        bias: whether there is one.
        scale_dtype: float16 or float32; `.to(dtype)`, `.half()` and `dtype=` leave it alone.
        device: of the tensors.
        dtype: of the bias.
        name: of the layer, for errors.

    Attributes:
        weight: uint8 parameter `[O, packed_bytes(I)]` in the layout of `ternary_packing`, never trained.
        weight_scale: buffer `[O, Q]`.
        bias: `[O]` or `None`.

    Raises:
        ValueError: the inputs are not divisible by `group_size`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        bias: bool = False,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        name: str = "this layer",
    ):
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self._inputs_per_group = inputs_per_group(in_features, group_size, name)
        packed = torch.zeros((out_features, packed_bytes(in_features)), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        groups = in_features // self._inputs_per_group
        self.register_buffer("weight_scale", torch.zeros((out_features, groups), dtype=scale_dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_codes(
        cls, codes: torch.Tensor, scales: torch.Tensor, group_size: int, bias: nn.Parameter | None = None
    ) -> TernaryLinear:
        """
        The layer of int8 codes `[O, I]` and float16 or float32 scales `[O, Q]`, on their device.

        Raises:
            TypeError, ValueError: other codes or shapes.
        """
        outputs, inputs = codes.shape
        layer = cls(inputs, outputs, group_size, scale_dtype=scales.dtype, device="meta")
        layer.weight = nn.Parameter(pack_ternary(codes), requires_grad=False)
        layer.weight_scale = scales
        layer.bias = bias
        layer.check()
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., I]` to `[..., O]` in the dtype of `x`; differentiable in `x`."""
        return ternary_linear(x, self.weight, self.weight_scale, self._inputs_per_group, self.bias)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense weight `[O, I]`, made anew at each call."""
        return dequantize_ternary(self.weight, self.weight_scale, self._inputs_per_group, self.in_features).to(dtype)

    def check(self, name: str = "this layer") -> None:
        """
        Whether the tensors are whole; Transformers does not compare shapes when it loads quantized ones.

        Raises:
            ValueError: a shape or dtype is wrong, codes are none, or a scale is not finite; names the layer.
        """
        groups = self.in_features // self._inputs_per_group
        if tuple(self.weight_scale.shape) != (self.out_features, groups) or len(self.weight) != self.out_features:
            raise ValueError(
                f"{name}: weight {list(self.weight.shape)} and weight_scale {list(self.weight_scale.shape)} do not "
                f"fit {self.out_features} outputs of {self.in_features} inputs in {groups} group(s): the checkpoint "
                "is damaged, or its group_size is another one."
            )
        if self.weight.device.type == "meta":
            return
        try:
            check_packed(self.weight.data, self.in_features)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
        if not bool(torch.isfinite(self.weight_scale).all()):
            raise ValueError(f"{name}: a scale is NaN or infinite; the checkpoint is damaged, or training diverged.")

    def reset_parameters(self) -> None:
        """Nothing: there is no random ternary weight."""

    def _apply(self, fn, recurse=True):
        scales = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scales.dtype:
            # A cast of the model. Moved, but not rounded: bfloat16 scales would be other weights.
            self.weight_scale = scales.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}, 2 bits"
