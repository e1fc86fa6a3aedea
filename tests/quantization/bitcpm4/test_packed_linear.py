"""`TernaryLinear`: what it computes, what it holds, what may not change it."""

import pytest
import torch
from torch.nn import functional as F

from tolerances import relative_rms
from transformers_minicpm4.quantization.bitcpm4.packed_linear import TernaryLinear
from transformers_minicpm4.quantization.bitcpm4.ternary import dequantize, ternary_codes_and_scales


# Relative RMS of float32 sums of 96 terms in another order: 1.9e-7 measured.
FLOAT32 = 7e-7


def packed_layer(group_size=16, bias=True):
    codes, scales = ternary_codes_and_scales(torch.randn(40, 96), group_size)
    offset = torch.nn.Parameter(torch.randn(40)) if bias else None
    return TernaryLinear.from_codes(codes, scales, group_size, offset), dequantize(codes, scales, group_size)


@pytest.mark.parametrize("group_size", [16, 24, -1])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_layer_of_its_dense_weight(group_size, bias):
    layer, weight = packed_layer(group_size, bias)
    x = torch.randn(2, 5, 96, requires_grad=True)
    out = layer(x)
    assert relative_rms(out, F.linear(x, weight, layer.bias)) < FLOAT32
    (found,) = torch.autograd.grad(out.square().sum(), x)
    (wanted,) = torch.autograd.grad(F.linear(x, weight, layer.bias).square().sum(), x)
    assert relative_rms(found, wanted) < FLOAT32
    assert torch.equal(layer.dequantize(), weight)


def test_it_holds_two_bits_a_weight_and_the_scales_and_nothing_else():
    layer, _ = packed_layer(16, bias=False)
    layer(torch.randn(1, 96))
    held = {name: t.numel() * t.element_size() for name, t in (*layer.named_parameters(), *layer.named_buffers())}
    assert held == {"weight": 40 * 96 // 4, "weight_scale": 2 * 40 * 6}
    assert not [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_changes_neither_codes_nor_scales(dtype):
    layer, weight = packed_layer()
    layer.to(dtype)
    assert layer.weight.dtype == torch.uint8
    assert layer.weight_scale.dtype == torch.float16
    assert layer.bias.dtype == dtype
    assert torch.equal(layer.dequantize(), weight)


def test_the_weight_is_never_trained():
    layer, _ = packed_layer()
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad
    assert not layer.weight_scale.requires_grad


def test_damage_is_named():
    layer, _ = packed_layer()
    layer.weight_scale[3, 1] = float("nan")
    with pytest.raises(ValueError, match=r"mlp\.up: a scale is NaN"):
        layer.check("mlp.up")
    layer, _ = packed_layer()
    layer.weight_scale = layer.weight_scale[:, :-1]
    with pytest.raises(ValueError, match="do not fit 40 outputs of 96 inputs"):
        layer.check("mlp.up")
    layer, _ = packed_layer()
    layer.weight.data.fill_(0b10101010)  # 10 is no code
    with pytest.raises(ValueError, match=r"mlp\.up: "):
        layer.check("mlp.up")
    with pytest.raises(ValueError, match="group_size=36 does not divide"):
        TernaryLinear(96, 40, 36)
