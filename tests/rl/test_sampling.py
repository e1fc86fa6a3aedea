"""A stream of its own for every rollout: the right distribution, and nothing but the place decides."""

import math

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from arithmetic import make_policy
from tolerances import within
from transformers_minicpm4.rl.sampling import Budgets, LogprobRecorder, TrajectorySampler, prefill, uniforms


# Chi-square: a right sampler fails one of these once in 10,000 runs of other seeds; the seeds are fixed.
Z = 3.719


def chi_square_limit(degrees: int) -> float:
    """Upper 1e-4 quantile, by Wilson and Hilferty (1931)."""
    return degrees * (1 - 2 / (9 * degrees) + Z * math.sqrt(2 / (9 * degrees))) ** 3


def chi_square(counts, expected) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("coordinate", range(4))
def test_uniform_numbers_are_uniform_and_independent_along_every_coordinate(coordinate):
    rows = 40_000
    place = [np.full(rows, 5), np.full(rows, 3), np.full(rows, 2), np.full(rows, 7)]
    place[coordinate] = np.arange(rows)
    if coordinate == 0:
        values = np.array([uniforms(seed, *(values[:1] for values in place[1:]))[0] for seed in range(rows)])
    else:
        values = uniforms(5, *place[1:])
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.histogram(values, bins=64, range=(0, 1))[0]
    assert chi_square(counts, rows / 64) < chi_square_limit(63)
    # Neighbours in pairs.
    pairs = np.histogram2d(values[:-1:2], values[1::2], bins=8, range=[(0, 1), (0, 1)])[0]
    assert chi_square(pairs, rows / 2 / 64) < chi_square_limit(63)


def draw(logits, rows=20_000, **changes):
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, **changes}
    sampler = TrajectorySampler(9, np.arange(rows), np.zeros(rows, int), np.zeros(rows, int), **options)
    scores = sampler(torch.zeros(rows, 1, dtype=torch.long), logits.expand(rows, -1))
    return scores.argmax(-1), sampler


@pytest.mark.parametrize(
    ("options", "probabilities"),
    [
        ({}, lambda x: x.softmax(-1)),
        ({"temperature": 0.7}, lambda x: (x / 0.7).softmax(-1)),
        ({"top_k": 3}, lambda x: x.masked_fill(x < x.topk(3).values.min(), -torch.inf).softmax(-1)),
    ],
)
def test_tokens_follow_the_models_distribution(options, probabilities):
    logits = torch.randn(8, generator=torch.Generator().manual_seed(4)) * 1.5
    tokens, _ = draw(logits, **options)
    expected = probabilities(logits).numpy() * len(tokens)
    counts = np.bincount(tokens, minlength=8)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    assert chi_square(counts[possible], expected[possible]) < chi_square_limit(possible.sum() - 1)


def test_a_wrong_temperature_would_be_noticed():
    logits = torch.randn(8, generator=torch.Generator().manual_seed(4)) * 1.5
    tokens, _ = draw(logits, temperature=0.9)
    assert chi_square(np.bincount(tokens, minlength=8), logits.softmax(-1).numpy() * len(tokens)) > chi_square_limit(7)


@pytest.mark.parametrize("kind", ["trajectory", "recorder"])
def test_noted_log_probabilities_are_those_of_another_forward_pass(kind):
    """At temperature 0.7 with top-k: of the whole distribution, as training sees it."""
    model = make_policy().eval()
    ids = torch.randint(2, 43, (5, 6), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0}
    if kind == "trajectory":
        sampler = TrajectorySampler(0, range(5), [0] * 5, [0] * 5, 0.7, 5, 1.0, None)
        options |= {"do_sample": False}
    else:
        sampler = LogprobRecorder(0.7)
        options |= {"do_sample": True, "temperature": 0.7, "top_k": 5}
    with torch.no_grad():
        sequences = model.generate(ids, logits_processor=LogitsProcessorList([sampler]), **options)
        want = (model(sequences).logits[:, 5:-1] / 0.7).log_softmax(-1).gather(-1, sequences[:, 6:, None])[..., 0]
    got = sampler.logprobs(sequences)
    assert got.shape == want.shape == (5, 9)
    assert within((got - want).abs().max().item(), "behavior_logprobs_float32")


@pytest.mark.parametrize("kind", ["llama", "minicpm4"])
def test_rows_prefilled_by_length_go_on_as_if_prefilled_together(kind, tiny_model):
    """Float64; the padding in front of a short row is long."""
    model = make_policy().double().eval() if kind == "llama" else tiny_model("sdpa")
    lengths = [3, 40, 9, 2, 38, 25]
    mask = torch.arange(40) >= 40 - torch.tensor(lengths)[:, None]
    ids = torch.randint(2, 43, (6, 40), generator=torch.Generator().manual_seed(1)) * mask
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": mask.long()}
    cache = prefill(model, ids, mask.long(), 12)
    assert cache.get_seq_length() == 39
    apart = model.generate(ids, past_key_values=cache, **options)
    together = model.generate(ids, **options)
    assert torch.equal(apart.sequences, together.sequences)
    errors = [(a - b).abs().max().item() for a, b in zip(apart.logits, together.logits, strict=True)]
    assert within(max(errors), "logits_float64")


def test_nothing_is_prefilled_apart_where_it_would_not_be_the_same(tiny_model, sparse_config):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :6] = 0
    ids = torch.ones(2, 9, dtype=torch.long)
    assert prefill(make_policy(), ids, mask, 4) is not None
    assert prefill(tiny_model("infllm_v2", sparse_config=sparse_config.to_dict()), ids, mask, 4) is None
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 10}
    assert prefill(make_policy(rope_parameters=scaled), ids, mask, 4) is None
    mask[0, :8] = 0
    assert prefill(make_policy(), ids, mask, 4) is None


def test_every_row_ends_at_its_own_budget():
    model = make_policy().eval()
    ids = torch.randint(2, 43, (3, 4), generator=torch.Generator().manual_seed(1))
    sequences = model.generate(
        ids,
        do_sample=False,
        max_new_tokens=7,
        eos_token_id=44,  # never sampled; `generate` pads finished rows only where an end is known
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([Budgets([2, 7, 5], 4, ids.device)]),
    )
    free = model.generate(ids, do_sample=False, max_new_tokens=7, eos_token_id=None, pad_token_id=0)
    for row, budget in enumerate([2, 7, 5]):
        assert sequences[row, 4 : 4 + budget].tolist() == free[row, 4 : 4 + budget].tolist()
        assert sequences[row, 4 + budget :].eq(0).all()
