"""pass@k, and the filter by difficulty of the RL recipe (MiniCPM4, arXiv 2506.07900)."""

import math
from dataclasses import dataclass
from fractions import Fraction

from .reasons import OK, column_of, shorten


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """
    Chance that k samples drawn from `samples`, of which `correct` are right, hold a right one: the unbiased estimator
    1 - C(samples - correct, k) / C(samples, k) (Chen et al., arXiv 2107.03374).

    Raises:
        ValueError: not 0 <= correct <= samples, or not 1 <= k <= samples.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"{correct} right of {samples} samples; give 0 up to {samples}")
    if not 1 <= k <= samples:
        raise ValueError(f"k = {k} of {samples} samples; k is 1 up to the number of samples")
    return float(1 - Fraction(math.comb(samples - correct, k), math.comb(samples, k)))


@dataclass(frozen=True)
class DifficultyFilter:
    """
    For `map`, row by row: is a problem hard enough to learn from? All right: too easy, dropped; all wrong: it stays
    (the recipe: 4 samples of a small model). Adds `pass_at_k` (float, NaN where it cannot be said),
    `difficulty_passed` (bool) and `difficulty_reason`: `ok`, `all_right`, `too_few_samples` (fewer than `samples`, so
    not passed) or `bad_result`.

    Args:
        results_column: column of lists with a result per sample: true/false, or a reward from 0 to 1, right at 1.
        samples: how many results a row needs.
        k: the k of pass@k.
    Raises:
        ValueError: k above samples, or below 1.
        KeyError: the column is missing.
    """

    results_column: str = "results"
    samples: int = 4
    k: int = 1

    def __post_init__(self):
        if not 1 <= self.k <= self.samples:
            raise ValueError(f"k = {self.k} of {self.samples} samples; k is 1 up to the number of samples")

    def __call__(self, row: dict) -> dict:
        results = column_of(row, self.results_column, "DifficultyFilter")
        wrong = results is not None and (isinstance(results, str | bytes) or not hasattr(results, "__iter__"))
        kind = type(results).__name__
        results = [] if wrong or results is None else list(results)
        total, score = len(results), math.nan
        bad = [value for value in results if not isinstance(value, bool | int | float) or not 0 <= value <= 1]
        if wrong:
            reason = f"bad_result: {kind}, results are a list"
        elif bad:
            reason = f"bad_result: {shorten(repr(bad[0]))}, a result is true, false or from 0 to 1"
        elif total < self.samples:
            reason = f"too_few_samples: {total} of {self.samples}"
        else:
            correct = sum(value == 1 for value in results)
            score = pass_at_k(total, correct, self.k)
            reason = f"all_right: {correct} of {total}" if correct == total else OK
        return {"pass_at_k": score, "difficulty_passed": reason == OK, "difficulty_reason": reason}
