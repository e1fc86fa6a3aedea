"""pass@k equals enumeration; only the too easy rows are dropped."""

import itertools
import math

import pytest
from datasets import Dataset

from transformers_minicpm4.data.ultrachat.difficulty import DifficultyFilter, pass_at_k


def test_pass_at_k_equals_enumeration():
    """The share of all draws of k samples that hold a right one, and the mean of any other estimator's truth."""
    for samples in range(1, 9):
        for correct in range(samples + 1):
            for k in range(1, samples + 1):
                draws = list(itertools.combinations(range(samples), k))
                share = sum(any(place < correct for place in draw) for draw in draws) / len(draws)
                assert pass_at_k(samples, correct, k) == pytest.approx(share, abs=1e-15)


def test_pass_at_k_is_unbiased():
    """Its mean over binomial samples is 1 - (1 - p)^k, the true chance."""
    for p in (0.1, 0.5, 0.9):
        for k in (1, 3, 6):
            mean = sum(math.comb(6, c) * p**c * (1 - p) ** (6 - c) * pass_at_k(6, c, k) for c in range(7))
            assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_the_recipe_drops_all_right_and_keeps_all_wrong():
    results = [
        [1, 1, 1, 1],
        [0, 0, 0, 0],
        [1, 0, 1, 1],
        [1, 1, 1],
        [],
        None,
        [1, 1, 1, 1, 0],
        [0.5, 1, 1, 1],
        [1, 1, 1, 7],
    ]
    dataset = Dataset.from_dict({"id": list(range(9)), "results": [r and [float(v) for v in r] for r in results]})
    judged = dataset.map(DifficultyFilter())
    codes = [reason.split(":")[0] for reason in judged["difficulty_reason"]]
    few = "too_few_samples"
    assert codes == ["all_right", "ok", "ok", few, few, few, "ok", "ok", "bad_result"]
    assert judged["pass_at_k"][:3] == [1.0, 0.0, 0.75]
    assert judged.filter(lambda row: row["difficulty_passed"])["id"][:] == [1, 2, 6, 7]
    two = dataset.map(DifficultyFilter(), num_proc=2)
    assert two["difficulty_reason"][:] == judged["difficulty_reason"][:]
    bools = Dataset.from_dict({"results": [[True] * 4, [True, False, False, False]]}).map(DifficultyFilter(k=2))
    assert bools["difficulty_passed"][:] == [False, True]
    assert bools["pass_at_k"][:] == [1.0, 0.5]


@pytest.mark.parametrize("numbers", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_impossible_numbers_are_refused(numbers):
    with pytest.raises(ValueError, match="samples"):
        pass_at_k(*numbers)
    with pytest.raises(ValueError, match="k = 5 of 4"):
        DifficultyFilter(k=5)
