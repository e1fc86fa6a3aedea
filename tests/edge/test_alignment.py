"""The report against what is known beforehand: equal models, planted scales, planted noise, another token."""

import json

import pytest
import torch

from conftest import make_config
from transformers_minicpm4 import MiniCPM4ForCausalLM
from transformers_minicpm4.edge.alignment import Divergence, align
from transformers_minicpm4.edge.executors import Executor, Scores
from transformers_minicpm4.edge.executors.torch_executor import TorchExecutor


IDS = torch.randint(0, 127, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def executor(**changes):
    torch.manual_seed(0)
    return TorchExecutor(MiniCPM4ForCausalLM(make_config(**changes)).double().eval(), context=64)


class Given(Executor):
    """Scores of given logits `[S - 1, V]`."""

    name, calls, context = "given", frozenset({"score"}), 64

    def __init__(self, logits):
        self.logits, self.vocab_size = logits, logits.shape[1]

    def _score(self, token_ids, top):
        return Scores.of_logits(self.logits, token_ids[1:], top)


def test_a_model_is_aligned_with_itself():
    found = align(executor(), executor(), IDS)
    assert (found.slope, found.max_difference, found.agreement, found.divergence) == (1, 0, 1, None)
    assert found.candidates == len(found.pairs)
    assert 39 * 16 <= found.candidates <= 39 * 17


@pytest.mark.parametrize("base", [8, 32])
def test_a_wrong_logit_scale_is_the_slope_and_leaves_the_likeliest(base):
    # Logits are divided by hidden_size / dim_model_base; 16 is right.
    found = align(executor(), executor(dim_model_base=base), IDS)
    assert found.slope == pytest.approx(base / 16, abs=1e-12)
    assert found.agreement == 1
    assert found.divergence is None
    assert not found.within(0.01)
    assert found.within(2)


def test_the_slope_is_that_of_centred_least_squares():
    draw = torch.Generator().manual_seed(2)
    first = torch.randn(39, 20, generator=draw, dtype=torch.float64)
    second = 1.1 * first + 0.2 * torch.randn(39, 20, generator=draw, dtype=torch.float64)
    found = align(Given(first), Given(second), [token % 20 for token in IDS], top=20)
    one, other = (logits.log_softmax(-1) - logits.log_softmax(-1).mean(-1, keepdim=True) for logits in (first, second))
    slope = torch.linalg.lstsq(one.reshape(-1, 1), other.reshape(-1, 1)).solution.item()
    assert found.slope == pytest.approx(slope, abs=1e-12)
    difference = (first.log_softmax(-1) - second.log_softmax(-1)).abs()
    assert found.max_difference == pytest.approx(difference.max().item(), abs=1e-12)
    assert found.mean_difference == pytest.approx(difference.mean().item(), abs=1e-12)


def test_the_first_other_token_is_named_with_both_gaps():
    first = torch.zeros(3, 4, dtype=torch.float64)
    first[:, 2], first[:, 1] = 2.0, 1.5
    second = first.clone()
    second[1:, 3] = 5.0
    found = align(Given(first), Given(second), [0, 1, 1, 1], top=4)
    assert found.agreement == pytest.approx(1 / 3)
    where = found.divergence
    assert (where.position, where.first, where.second) == (2, 2, 3)
    assert where.first_gap == pytest.approx(0.5, abs=1e-12)
    assert where.second_gap == pytest.approx(3.0, abs=1e-12)
    assert "place 2: token 2 (ahead by 5.00e-01) and 3 (by 3.00e+00)" in found.report()
    assert Divergence(**json.loads(found.json())["divergence"]) == where


def test_what_cannot_be_compared_is_refused():
    some = torch.eye(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="4 tokens and given 5"):
        align(Given(some), Given(torch.zeros(4, 5)), [0, 1, 2, 3, 3])
    first, second = (torch.tensor([[5.0, 4, 0, 0, 0]]), torch.tensor([[0, 0, 5.0, 4, 0]]))
    with pytest.raises(ValueError, match="raise `top`"):
        align(Given(first), Given(second), [0, 4], top=2)


def test_the_plot_replaces_its_file_when_it_is_whole(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    found = align(executor(), executor(dim_model_base=8), IDS[:6])
    found.plot(tmp_path / "pairs.svg")
    before = (tmp_path / "pairs.svg").read_bytes()
    assert b"<svg" in before
    with pytest.raises(ValueError, match="Format"):
        found.plot(tmp_path / "pairs.nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.svg"]
    assert (tmp_path / "pairs.svg").read_bytes() == before
