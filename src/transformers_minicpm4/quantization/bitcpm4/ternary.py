"""
The definition of BitCPM4's weights: absmean ternary in groups, trained through a straight-through estimator
(MiniCPM4, arXiv 2506.07900, section 4.2, which gives no formula; BitCPM-CANN of the same team does):

    s = max(mean |W_group|, EPS),    q = clamp(round(W / s), -1, 1),    y = x (W + stopgrad(q s - W))^T

Two readings are ours. The scale is rounded to float16 before W is divided by it, so that the checkpoint's scale is the
trained one and packing changes nothing. And 0.5 rounds to 0, as `torch.round` does.

Shape letters: `O` outputs, `I` inputs, `Q` groups (`I / group_size`).
"""

from __future__ import annotations

import torch


# A group of zeros needs a scale to divide by. A normal number of float16.
EPS = 1e-4

# Below this a "group with one magnitude" says nothing about a weight: at 1 every weight is one.
SMALLEST_GROUP = 8


def inputs_per_group(in_features: int, group_size: int, layer: str = "this layer") -> int:
    """
    Inputs that share a scale, with -1 resolved.

    Raises:
        ValueError: `in_features` is not divisible by `group_size`; names `layer`.
    """
    if group_size == -1:
        return in_features
    if group_size < 1 or in_features % group_size:
        raise ValueError(
            f"{layer} has {in_features} inputs, which group_size={group_size} does not divide. Choose a divisor, or "
            f"-1 (one scale an output row), or leave the layer out with modules_to_not_convert=[{layer!r}]."
        )
    return group_size


def ternary_codes_and_scales(
    weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Absmean rounding: `scales[o, i // group_size] * codes[o, i]` stands for `weight[o, i]`.

    Args:
        weight: float `[O, I]`. Never weights that are ternary already: their absmean is smaller than their scale by
            the share of nonzeros (see `fused_codes_and_scales`).
        group_size: inputs that share a scale, or -1.
        scale_dtype: what the scales are rounded to.

    Returns:
        codes, int8 `[O, I]` of -1, 0, 1; scales, `scale_dtype` `[O, Q]`, all above 0.

    Raises:
        ValueError: `I` is not divisible by the group size.
    """
    group_size = inputs_per_group(weight.shape[1], group_size)
    steps, scales = _steps(weight.detach(), group_size, scale_dtype)
    return steps.flatten(1).to(torch.int8), scales


def _steps(weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as floats `[O, Q, group_size]` and scales `[O, Q]`; computed in float32 or float64."""
    groups = weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(1, (-1, group_size))
    scales = groups.abs().mean(2).clamp(min=EPS).to(scale_dtype)
    return (groups / scales.to(groups.dtype)[..., None]).round_().clamp_(-1, 1), scales


def fake_quantize(weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """
    The ternary weight with the gradient of the identity.

    Args:
        weight: float `[O, I]`, the latents.
        group_size: inputs that share a scale, or -1.
        scale_dtype: what the scales are rounded to.

    Returns:
        `[O, I]` in the dtype of `weight`: `codes * scales`. Every gradient that arrives goes to `weight` unchanged.

    Raises:
        ValueError: `I` is not divisible by the group size.
    """
    return _StraightThrough.apply(weight, inputs_per_group(weight.shape[1], group_size), scale_dtype)


class _StraightThrough(torch.autograd.Function):
    # W + (q s - W).detach() would round twice and, in bfloat16, no longer be ternary.

    @staticmethod
    def forward(ctx, weight, group_size, scale_dtype):
        steps, scales = _steps(weight, group_size, scale_dtype)
        return steps.mul_(scales.to(steps.dtype)[..., None]).flatten(1).to(weight.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """
    The weight `[O, I]` in `dtype` of int8 codes `[O, I]` and scales `[O, Q]`: the values `fake_quantize` computes.
    """
    group_size = inputs_per_group(codes.shape[1], group_size)
    wide = torch.promote_types(dtype, torch.float32)
    groups = codes.unflatten(1, (-1, group_size)).to(wide)
    return groups.mul_(scales.to(wide)[..., None]).flatten(1).to(dtype)


def detect_group_size(weight: torch.Tensor, smallest: int = SMALLEST_GROUP) -> int | None:
    """
    The group size of a weight that is ternary already: the largest divisor of `I` for which the nonzeros of every
    group have one magnitude. Holds after rounding to bfloat16 or float16 too, which maps equal numbers to equal ones.

    Args:
        weight: float `[O, I]`.
        smallest: smallest group to look for, in inputs.

    Returns:
        inputs a group (`I` where a row has one scale), or `None`: the weight is not ternary.
    """
    inputs = weight.shape[1]
    if not weight.is_floating_point() or not bool(weight.any()):
        return None
    magnitudes = weight.detach().abs()
    for size in range(inputs, smallest - 1, -1):
        # A few rows rule out nearly every size.
        if inputs % size == 0 and _one_magnitude(magnitudes[:4], size) and _one_magnitude(magnitudes, size):
            return size
    return None


def _one_magnitude(magnitudes: torch.Tensor, size: int) -> bool:
    groups = magnitudes.unflatten(1, (-1, size))
    return bool(((groups == 0) | (groups == groups.amax(2, keepdim=True))).all())


def fused_codes_and_scales(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Codes and scales of a weight that is ternary already, exactly: the scale is the group's largest magnitude.

    Args:
        weight: float `[O, I]`, ternary in groups of `group_size`.
        group_size: inputs that share a scale, or -1; `detect_group_size` finds it.

    Returns:
        codes, int8 `[O, I]`; scales, `[O, Q]` in float16 if that holds them all exactly, else in float32. A group of
        zeros has scale 0.

    Raises:
        ValueError: a group has more than one magnitude besides 0, or `I` is not divisible by the group size.
    """
    group_size = inputs_per_group(weight.shape[1], group_size)
    magnitudes = weight.detach().abs()
    if not _one_magnitude(magnitudes, group_size):
        raise ValueError(
            f"this weight is not ternary in groups of {group_size}: a group has several magnitudes. Detect the group "
            "size with detect_group_size, or round latents with ternary_codes_and_scales."
        )
    scales = magnitudes.unflatten(1, (-1, group_size)).amax(2).float()
    half = scales.half()
    return weight.detach().sign().to(torch.int8), half if torch.equal(half.float(), scales) else scales
