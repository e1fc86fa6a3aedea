"""
Garbled completions, found from their tokens and their text.

MiniCPM4 (arXiv 2506.07900, section 3.2) leaves garbled trajectories out of the loss of chunk-wise RL and does not say
what garbled means. The definition here is our own: long exact loops, mostly repeated n-grams, and text with many
characters that are no text. Measured rates are in `docs/garble.md`.

Letters: `S` tokens of a completion.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


REASONS = ("token_run", "repetition", "repeated_ngrams", "invalid_text")

REPLACEMENT = "\ufffd"
# A cut character leaves one U+FFFD, or one a byte with tokenizers that decode byte by byte: at most 3 of 4 bytes.
CUT_CHARACTER = 3
# Control, surrogate, private use, unassigned. Format characters (Cf) are text: emoji and Arabic need them.
INVALID_CATEGORIES = {"Cc", "Cs", "Co", "Cn"}
WHITE_SPACE = "\t\n\v\f\r"

# Loops are looked for in every STRIDE-th token first, which is cheap and overlooks none.
STRIDE = 8


@dataclass(frozen=True)
class GarbleFilter:
    """
    Why a completion is garbled, or `None`: `GarbleFilter()(token_ids, text)`.

    - `"token_run"`: one token many times in a row (a loop of period 1).
    - `"repetition"`: a stretch anywhere in the completion that repeats itself exactly with one period.
    - `"repeated_ngrams"`: most n-grams of the completion occurred in it before, exact loop or not.
    - `"invalid_text"`: many characters are U+FFFD, control, surrogate, private use or unassigned ones.

    The first three see token ids only and do not depend on which id stands for what. The time is
    O(max_period S + S log S) for S tokens, whatever they are, and linear in the text.

    A loop counts by its *copied* tokens: those equal to the token one period earlier. It needs
    `loop_share` of the completion's tokens, though never fewer than `min_repeated_tokens` nor more than
    `enough_repeated_tokens`: a long completion that loops for 512 tokens is garbled, whatever came before.

    Args:
        min_repeated_tokens: fewest copied tokens of a loop, and fewest repeated n-grams. Shorter completions are never
            called repetitive.
        enough_repeated_tokens: copied tokens that make a loop in a completion of any length.
        loop_share: copied tokens of a loop as a share of the completion, between these two bounds.
        min_repeats: how often the period has to be there, the first time included.
        max_period: longest period that is looked for, in tokens.
        ngram: length of the n-grams, in tokens.
        ngram_share: a larger share of n-grams that occurred before is garble; 1 switches the criterion off.
        min_invalid_characters: fewest invalid characters.
        invalid_share: a larger share of invalid characters is garble; 1 switches the criterion off.

    Raises:
        ValueError: a threshold outside its range.
    """

    min_repeated_tokens: int = 80
    enough_repeated_tokens: int = 512
    loop_share: float = 0.25
    min_repeats: int = 3
    max_period: int = 512
    ngram: int = 8
    ngram_share: float = 0.8
    min_invalid_characters: int = 8
    invalid_share: float = 0.05

    def __post_init__(self):
        lowest = {
            "min_repeated_tokens": 2,
            "enough_repeated_tokens": self.min_repeated_tokens,
            "min_repeats": 2,
            "max_period": 1,
            "ngram": 1,
            "min_invalid_characters": 1,
        }
        for name, low in lowest.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                reason = " (min_repeated_tokens)" if name == "enough_repeated_tokens" else ""
                raise ValueError(f"{name}={value!r}: a whole number of at least {low}{reason} is needed.")
        for name in ("loop_share", "ngram_share", "invalid_share"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"{name}={value!r}: a share above 0 and at most 1 is needed.")

    def __call__(self, token_ids: Sequence[int], text: str) -> str | None:
        """
        Args:
            token_ids: the completion's ids, `[S]`, without padding.
            text: the same completion, decoded without special tokens.

        Returns:
            one of `REASONS`, or `None`.

        Raises:
            TypeError: ids that are not one row of integers, or a text that is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}: the decoded completion, a string, is needed.")
        ids = _ranks(_as_row(token_ids))
        period = self._loop_period(ids)
        if period:
            return "token_run" if period == 1 else "repetition"
        if self._mostly_repeated(ids):
            return "repeated_ngrams"
        return "invalid_text" if self._invalid(text) else None

    def _loop_period(self, ids: np.ndarray) -> int | None:
        """Smallest period of a loop that is long enough."""
        size = len(ids)
        share = int(np.ceil(self.loop_share * size))
        tokens = min(max(share, self.min_repeated_tokens), self.enough_repeated_tokens)
        for period in range(1, self.max_period + 1):
            needed = max(tokens, (self.min_repeats - 1) * period)
            if needed > size - period:
                return None
            # A run of `needed` copied tokens shows at least needed // STRIDE of them in a row here.
            if _longest_copy(ids, period, STRIDE) < needed // STRIDE:
                continue
            if _longest_copy(ids, period) >= needed:
                return period
        return None

    def _mostly_repeated(self, ids: np.ndarray) -> bool:
        total = len(ids) - self.ngram + 1
        if total < self.min_repeated_tokens:
            return False
        repeated = total - _distinct_ngrams(ids, self.ngram)
        return repeated >= self.min_repeated_tokens and repeated > self.ngram_share * total

    def _invalid(self, text: str) -> bool:
        # A completion that ran into its length limit may end within a character.
        text = text[: max(len(text.rstrip(REPLACEMENT)), len(text) - CUT_CHARACTER)]
        found = _invalid_characters(text)
        return found >= self.min_invalid_characters and found > self.invalid_share * len(text)


def _as_row(token_ids: Sequence[int]) -> np.ndarray:
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise TypeError(
            f"token_ids is an array of shape {list(ids.shape)} and type {ids.dtype}: one row of integers is needed."
        )
    return ids


def _ranks(values: np.ndarray) -> np.ndarray:
    """Each value's place among the distinct ones, `[S]`: the same array whatever the values are called..."""
    return np.unique(values, return_inverse=True)[1].astype(np.int32)


def _longest_copy(ids: np.ndarray, period: int, stride: int = 1) -> int:
    """Most tokens in a row, of every `stride`-th, that equal the one `period` earlier."""
    differ = np.flatnonzero(ids[period::stride] != ids[:-period:stride])
    edges = np.concatenate(([-1], differ, [-(-(len(ids) - period) // stride)]))
    return int(np.diff(edges).max()) - 1


def _distinct_ngrams(ids: np.ndarray, n: int) -> int:
    """
    Number of distinct n-grams of `ids`, exactly: an n-gram is the pair of the longest power-of-two grams at its start
    and at its end, and those are numbered by doubling, as in the construction of suffix arrays.
    """
    size, length = len(ids), 1
    grams = ids.astype(np.int64)
    while 2 * length <= n:
        grams = np.unique(grams[:-length] * size + grams[length:], return_inverse=True)[1]
        length *= 2
    last = n - length
    return len(np.unique(grams[: len(grams) - last] * size + grams[last:]))


def _invalid_characters(text: str) -> int:
    return sum(
        count
        for character, count in Counter(text).items()
        if character == REPLACEMENT
        or (unicodedata.category(character) in INVALID_CATEGORIES and character not in WHITE_SPACE)
    )
