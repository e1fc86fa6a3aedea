"""The definition of ternary weights, against the formula written out and against what must hold for any weight."""

import pytest
import torch

from transformers_minicpm4.quantization.bitcpm4.ternary import (
    EPS,
    dequantize,
    detect_group_size,
    fake_quantize,
    fused_codes_and_scales,
    inputs_per_group,
    ternary_codes_and_scales,
)


def one_by_one(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """The formula in plain Python numbers, one weight after the other."""
    out = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group_size):
            group = weight[row, start : start + group_size].tolist()
            scale = max(sum(map(abs, group)) / len(group), EPS)
            scale = torch.tensor(scale, dtype=torch.float64).to(torch.float32).half().item()
            for place, value in enumerate(group):
                out[row, start + place] = min(max(round(value / scale), -1), 1) * scale
    return out


@pytest.mark.parametrize("group_size", [4, 16, -1])
def test_fake_quantize_is_the_formula(group_size):
    weight = torch.randn(6, 48, dtype=torch.float64)
    torch.testing.assert_close(
        fake_quantize(weight, group_size), one_by_one(weight, 48 if group_size == -1 else group_size), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_identity(dtype):
    weight = torch.randn(5, 32, dtype=dtype, requires_grad=True)
    gradient = torch.randn(5, 32, dtype=dtype)
    fake_quantize(weight, 8).backward(gradient)
    assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_stand_for_the_fake_quantized_weight(dtype):
    """Else freezing would change the model."""
    weight = torch.randn(7, 64).to(dtype)
    codes, scales = ternary_codes_and_scales(weight, 16)
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float16
    assert set(codes.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(dequantize(codes, scales, 16, dtype), fake_quantize(weight, 16))


def test_a_group_of_zeros_stays_zero_and_finite():
    weight = torch.zeros(2, 16, requires_grad=True)
    out = fake_quantize(weight, 8)
    assert torch.equal(out, torch.zeros(2, 16))
    out.sum().backward()
    assert torch.equal(weight.grad, torch.ones(2, 16))


def test_groups_do_not_see_each_other():
    weight = torch.randn(3, 32)
    larger = weight.clone()
    larger[:, 8:16] *= 100
    before, after = fake_quantize(weight, 8), fake_quantize(larger, 8)
    untouched = torch.ones(32, dtype=torch.bool)
    untouched[8:16] = False
    assert torch.equal(before[:, untouched], after[:, untouched])
    assert not torch.equal(before[:, 8:16], after[:, 8:16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [8, 32, 96, 192])
def test_fake_quantized_weights_give_back_their_codes_and_scales(group_size, dtype):
    codes, scales = ternary_codes_and_scales(0.02 * torch.randn(24, 192), group_size)
    scales = scales.to(dtype).float()  # as a file in that dtype has them
    weight = dequantize(codes, scales, group_size, dtype)
    assert detect_group_size(weight) == group_size
    found_codes, found_scales = fused_codes_and_scales(weight, group_size)
    assert torch.equal(found_codes, codes)
    assert found_scales.dtype == torch.float16
    assert torch.equal(found_scales.float(), scales)


def test_absmean_of_ternary_weights_would_shrink_them():
    """Why an import takes the largest magnitude."""
    codes, scales = ternary_codes_and_scales(torch.randn(24, 192), 64)
    again = ternary_codes_and_scales(dequantize(codes, scales, 64), 64)[1]
    assert (again.float() / scales.float()).mean() < 0.8


def test_scales_that_float16_cannot_hold_stay_float32():
    weight = 0.1234567 * torch.randn(4, 16).sign()
    codes, scales = fused_codes_and_scales(weight, -1)
    assert scales.dtype == torch.float32
    assert torch.equal(dequantize(codes, scales, -1), weight)


def test_dense_weights_have_no_group_size():
    assert detect_group_size(torch.randn(16, 64)) is None
    assert detect_group_size(torch.zeros(16, 64)) is None
    almost = dequantize(*ternary_codes_and_scales(torch.randn(16, 64), 64), 64)
    place = almost[11].abs().argmax()
    almost[11, place] *= 1.01
    assert detect_group_size(almost) != 64


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"mlp\.up_proj has 60 inputs, which group_size=16 does not divide"):
        inputs_per_group(60, 16, "mlp.up_proj")
    with pytest.raises(ValueError, match="60 inputs"):
        fake_quantize(torch.randn(2, 60), 16)
    with pytest.raises(ValueError, match="not ternary in groups of 32"):
        fused_codes_and_scales(torch.randn(4, 64), 32)
