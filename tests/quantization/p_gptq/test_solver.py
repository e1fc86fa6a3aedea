"""The solver against a textbook loop, brute force, and what must hold for any weight."""

import itertools

import pytest
import torch

from transformers_minicpm4.quantization.p_gptq import solver
from transformers_minicpm4.quantization.p_gptq.solver import (
    CannotFactor,
    group_scale,
    inverse_factor,
    output_error,
    round_to_nearest,
    solve,
)


def problem(outputs=24, inputs=64, rows=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.rand(inputs, generator=generator)
    rows = torch.randn(rows, inputs, generator=generator) @ mix
    return torch.randn(outputs, inputs, generator=generator), rows.t() @ rows


def textbook(weight, hessian, bits, group_size, damp=0.01, scales=None):
    """
    GPTQ as its paper's algorithm 1 reads, in float64: after each column the inverse Hessian of the columns left is
    formed anew, with no Cholesky factor and no blocks.
    """
    weight, hessian = weight.double().clone(), hessian.double().clone()
    hessian += damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    codes = torch.zeros(weight.shape, dtype=torch.int64)
    for column in range(weight.shape[1]):
        if column % group_size == 0:
            step, zero = group_scale(
                weight[:, column : column + group_size].t().float(), torch.ones(group_size), bits, True, False
            )
            step, zero = step.double(), zero.double()
        inverse = torch.linalg.inv(hessian[column:, column:])
        codes[:, column] = ((weight[:, column] / step).round() + zero).clamp(0, 2**bits - 1).long()
        error = weight[:, column] - (codes[:, column] - zero) * step
        weight[:, column:] -= torch.outer(error / inverse[0, 0], inverse[0])
    return codes


@pytest.mark.parametrize(("group_size", "inputs"), [(16, 64), (64, 64), (32, 160), (96, 192)])
def test_equals_the_textbook_loop(group_size, inputs):
    # 160 and 192 cross the border of the lazy blocks, 96 with a group on both of its sides.
    weight, hessian = problem(inputs=inputs, rows=600)
    solved, damp = solve(weight, hessian, bits=4, group_size=group_size, scale_search=False)
    assert damp == 0.01
    different = (solved.codes.long() != textbook(weight, hessian, 4, group_size)).double().mean()
    # float32 updates may round a value that lies on the border between two codes to the other one.
    assert different < 2e-3


@pytest.mark.parametrize("block", [1, 7, 64])
def test_lazy_blocks_change_nothing(monkeypatch, block):
    weight, hessian = problem(inputs=96)
    whole, _ = solve(weight, hessian, bits=3, group_size=32)
    monkeypatch.setattr(solver, "BLOCK", block)
    lazy, _ = solve(weight, hessian, bits=3, group_size=32)
    assert (lazy.codes != whole.codes).double().mean() < 2e-3


def test_a_diagonal_hessian_leaves_nothing_to_correct():
    weight, _ = problem()
    hessian = torch.diag(torch.rand(64) + 0.1)
    for search in (False, True):
        solved, _ = solve(weight, hessian, bits=4, group_size=16, scale_search=search)
        rounded = round_to_nearest(weight, bits=4, group_size=16, importance=hessian.diagonal(), scale_search=search)
        assert torch.equal(solved.codes, rounded.codes)
        assert torch.equal(solved.scales, rounded.scales)


def test_between_brute_force_and_plain_rounding():
    """All 4**5 choices of codes for one output, with the solver's scale: never better than the best, mostly close."""
    better, shares = [], []
    for seed in range(20):
        weight, hessian = problem(outputs=1, inputs=5, rows=30, seed=seed)
        solved, _ = solve(weight, hessian, bits=2, group_size=-1, scale_search=False)
        rounded = round_to_nearest(weight, bits=2, group_size=-1)
        choices = torch.tensor(list(itertools.product(range(4), repeat=5)))
        change = (choices - 2) * solved.scales.float() - weight
        best = float((change @ hessian * change).sum(1).min())
        energy = float((weight @ hessian * weight).sum())
        ours = output_error(weight, solved, hessian) * energy
        assert ours >= best * (1 - 1e-4)
        plain = output_error(weight, rounded, hessian) * energy
        better.append(ours <= plain * (1 + 1e-4))
        shares.append((ours - best) / max(plain - best, 1e-9))
    # Where rounding and the optimum differ, most of the way is gone in most problems.
    assert sum(better) >= 17
    assert sorted(shares)[10] < 0.5


@pytest.mark.parametrize("options", [{}, {"desc_act": True}, {"act_group_aware": True}, {"symmetric": False}])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_errs_less_than_plain_rounding(bits, options):
    weight, hessian = problem(outputs=32, inputs=128, rows=1000)
    solved, _ = solve(weight, hessian, bits=bits, group_size=32, **options)
    rounded = round_to_nearest(weight, bits=bits, group_size=32, symmetric=options.get("symmetric", True))
    assert output_error(weight, solved, hessian) < 0.7 * output_error(weight, rounded, hessian)
    assert solved.g_idx is None
    assert int(solved.codes.max()) < 2**bits


def test_order_changes_nothing_where_all_columns_weigh_the_same():
    weight, hessian = problem(inputs=64)
    scale = hessian.diagonal().rsqrt()
    hessian = hessian * scale[:, None] * scale
    hessian.fill_diagonal_(1.0)
    plain, _ = solve(weight, hessian, group_size=16)
    ordered, _ = solve(weight, hessian, group_size=16, act_group_aware=True)
    assert torch.equal(plain.codes, ordered.codes)


@pytest.mark.parametrize("options", [{"desc_act": True}, {"act_group_aware": True}])
def test_the_order_follows_the_inputs(options):
    """Renaming inputs within their groups, and whole groups, renames the codes and nothing else."""
    weight, hessian = problem(inputs=64)
    order = torch.cat([torch.randperm(16) + 16 * group for group in torch.randperm(4).tolist()])
    plain, _ = solve(weight, hessian, group_size=16, **options)
    moved, _ = solve(weight[:, order], hessian[order][:, order], group_size=16, **options)
    assert (moved.codes != plain.codes[:, order]).double().mean() < 2e-3


def test_scale_search_never_errs_more_than_the_range():
    weight, hessian = problem()
    importance = hessian.diagonal()
    for symmetric in (True, False):
        errors = []
        for search in (False, True):
            quantized = round_to_nearest(
                weight, bits=3, group_size=16, symmetric=symmetric, importance=importance, scale_search=search
            )
            errors.append(((quantized.dequantize() - weight).square() * importance).reshape(24, 4, 16).sum(-1))
        assert bool((errors[1] <= errors[0]).all())
        assert float(errors[1].sum()) < 0.9 * float(errors[0].sum())


def test_a_column_that_nothing_excites_is_rounded_by_itself():
    weight, hessian = problem()
    hessian[5], hessian[:, 5] = 0.0, 0.0
    solved, _ = solve(weight, hessian, bits=8, group_size=-1, scale_search=False)
    assert torch.allclose(solved.dequantize()[:, 5], weight[:, 5], atol=float(solved.scales.max()))


def test_deficient_hessians_are_damped_until_they_have_a_factor():
    weight, _ = problem()
    row = torch.randn(1, 64)
    solved, damp = solve(weight, row.t() @ row, bits=4, group_size=16)
    assert bool(torch.isfinite(solved.scales).all())
    _, zero_damp = solve(weight, torch.zeros(64, 64), bits=4, group_size=16)
    assert damp >= 0.01
    assert zero_damp == 0.01
    indefinite = torch.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = 1.5
    _, raised = inverse_factor(indefinite, torch.zeros(64, dtype=torch.bool), 0.01)
    assert raised == pytest.approx(1.0)
    with pytest.raises(CannotFactor, match="no Cholesky factor"):
        inverse_factor(indefinite - 3e5 * torch.ones(64, 64), torch.zeros(64, dtype=torch.bool), 0.01)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(3, 3), (3, 7)])
def test_a_hessian_that_is_not_finite_is_refused(bad, place):
    weight, hessian = problem()
    hessian[place] = bad
    with pytest.raises(CannotFactor, match="not finite"):
        solve(weight, hessian)


@pytest.mark.parametrize("outputs", [1, 24])  # with one output, a transposed copy may be no copy
def test_weight_and_hessian_stay_as_they_were(outputs):
    weight, hessian = problem(outputs)
    before = weight.clone(), hessian.clone()
    solve(weight, hessian, group_size=16, act_group_aware=True)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
