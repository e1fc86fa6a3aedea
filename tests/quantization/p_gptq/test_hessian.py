"""Which positions count, and that the Hessian is the sum it says."""

import pytest
import torch

from transformers_minicpm4.quantization.p_gptq.hessian import HALF_WIDTH, Hessian, position_weights
from transformers_minicpm4.quantization.p_gptq.solver import solve


def test_positions_are_counted_from_the_first_real_token():
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    expected = torch.tensor([[0.25, 0.25, 1, 1, 0], [0, 0, 0.25, 0.25, 1], [0, 0.25, 0.25, 0, 0]])
    assert torch.equal(position_weights(mask, 2, 0.25), expected)


@pytest.mark.parametrize("inputs", [48, HALF_WIDTH, HALF_WIDTH + 30])
def test_is_the_weighted_sum_of_outer_products(inputs):
    rows, weights = torch.randn(2, 9, inputs), torch.rand(2, 9)
    weights[0, :3] = 0
    hessian = Hessian(inputs)
    hessian.add(rows[:, :5], weights[:, :5])
    hessian.add(rows[:, 5:], weights[:, 5:])
    expected = torch.einsum("bs,bsi,bsj->ij", weights.double(), rows.double(), rows.double())
    matrix = hessian.finish()
    assert torch.allclose(matrix.double(), expected, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(matrix, matrix.t())
    assert torch.allclose(hessian.magnitude, torch.einsum("bs,bsi->i", weights, rows.abs()), atol=1e-4)


def test_what_counts_nothing_is_never_read():
    rows, weights = torch.randn(1, 6, 8), torch.tensor([[0, 0, 1, 1, 1, 0.0]])
    clean = Hessian(8)
    clean.add(rows, weights)
    rows[0, 0], rows[0, 5] = torch.nan, torch.inf
    hessian = Hessian(8)
    hessian.add(rows, weights)
    assert torch.equal(hessian.finish(), clean.finish())


@pytest.mark.parametrize(("skip_first", "prefix_weight"), [(0, 0.0), (4, 1.0)])
def test_with_nothing_left_out_it_is_plain_gptq_bit_for_bit(skip_first, prefix_weight):
    rows, weight = torch.randn(3, 20, 32) * torch.rand(32), torch.randn(8, 32)
    ours = Hessian(32)
    ours.add(rows, position_weights(torch.ones(3, 20), skip_first, prefix_weight))
    flat = rows.reshape(-1, 32)
    plain = torch.zeros(32, 32).addmm_(flat.t(), flat)
    assert torch.equal(ours.finish(), plain)
    assert torch.equal(
        solve(weight, ours.finish(), group_size=16)[0].codes, solve(weight, plain, group_size=16)[0].codes
    )
