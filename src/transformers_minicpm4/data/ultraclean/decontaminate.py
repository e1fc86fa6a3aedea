"""Documents that contain passages of evaluation sets, found by shared n-grams.

The common rule of 13 words in a row: Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .deduplicate import check_batch, check_texts, tokenize


logger = logging.getLogger(__name__)


def _ngrams(text, n):
    """n-grams of tokens in order, each as its tokens joined by a space."""
    tokens = tokenize(text)
    if len(tokens) < n:
        return
    # Slices of one joined string: much cheaper than joining n tokens at each place.
    joined, starts, at = " ".join(tokens), [], 0
    for token in tokens:
        starts.append(at)
        at += len(token) + 1
    starts.append(at)
    for i in range(len(tokens) - n + 1):
        yield joined[starts[i] : starts[i + n] - 1]


@dataclass(frozen=True)
class NgramDecontaminator:
    """Batched callable for `Dataset.map`: marks texts that share an n-gram with an evaluation set.

    Made by [`NgramDecontaminator.from_texts`]. Tokens are words and single characters of Chinese and Japanese, without
    case and punctuation. Adds three columns:

    - `contaminated` (bool);
    - `contaminated_ngram` (str): the first shared n-gram of the text, tokens joined by spaces; `""` where clean;
    - `contaminated_by` (str): evaluation sets that hold this n-gram, joined by `", "`; `""` where clean. (Not
      null: `datasets` cannot type a column whose first thousand rows are all null.)

    Attributes:
        ngrams (`dict[str, str]`): n-gram -> evaluation sets.
        n (`int`): tokens per n-gram.
        too_short (`dict[str, int]`): evaluation set -> texts of fewer than `n` tokens, which cannot be found.
        text_column (`str`): column to read.
    """

    ngrams: dict[str, str]
    n: int
    too_short: dict[str, int]
    text_column: str = "text"

    @classmethod
    def from_texts(
        cls, evaluation_sets: Mapping[str, Iterable[str]], n: int = 13, *, text_column: str = "text"
    ) -> "NgramDecontaminator":
        """Index of all n-grams of evaluation sets.

        Args:
            evaluation_sets (`dict[str, iterable of str]`): name -> texts (questions, with their answers if wanted).
            n (`int`, *optional*, defaults to 13): tokens (words, or characters of Chinese) per n-gram.
            text_column (`str`, *optional*, defaults to `"text"`): column of the documents to read.

        Raises:
            TypeError: a set is one string, or a text is not a string.
            ValueError: n < 1, a name with ", ", or no text has n tokens.
        """
        if n < 1:
            raise ValueError(f"n={n}: an n-gram has at least one token")
        ngrams, too_short = {}, {}
        for name, texts in evaluation_sets.items():
            if isinstance(texts, str):
                raise TypeError(f"evaluation set {name!r} is one string: a list of texts is needed")
            if ", " in name:
                raise ValueError(f"evaluation set {name!r}: a name without ', ' is needed, which separates names")
            too_short[name] = 0
            for text in texts:
                if not isinstance(text, str):
                    raise TypeError(f"evaluation set {name!r} holds {type(text).__name__}: strings are needed")
                found = False
                for ngram in _ngrams(text, n):
                    found = True
                    sets = ngrams.setdefault(ngram, name)
                    if sets != name and name not in sets.split(", "):
                        ngrams[ngram] = f"{sets}, {name}"
                too_short[name] += not found
            if too_short[name]:
                logger.warning(
                    "%d texts of evaluation set %r have fewer than %d tokens and cannot be found; lower n",
                    too_short[name],
                    name,
                    n,
                )
        if not ngrams:
            raise ValueError(f"no evaluation text has {n} tokens: pass texts, or a smaller n")
        return cls(ngrams, n, too_short, text_column)

    @property
    def added_columns(self) -> dict[str, Any]:
        """Names and Arrow types of the added columns."""
        import pyarrow as pa

        return {"contaminated": pa.bool_(), "contaminated_ngram": pa.string(), "contaminated_by": pa.string()}

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """`batch[text_column]`: list of n strings or None -> the three columns, n values each."""
        texts, known = check_texts(batch, self.text_column), self.ngrams
        hits = [next((ngram for ngram in _ngrams(text, self.n) if ngram in known), "") for text in texts]
        return {
            "contaminated": [bool(hit) for hit in hits],
            "contaminated_ngram": hits,
            "contaminated_by": [known[hit] if hit else "" for hit in hits],
        }


@dataclass(frozen=True)
class ContaminationFilter:
    """Batched callable for `Dataset.filter`: keeps the rows that are not `contaminated`.

    `reasons(batch)` gives, for each row, None or `"contaminated by <evaluation sets>"`.
    """

    def __call__(self, batch: dict[str, list]) -> list[bool]:
        """n rows -> n booleans, True for the rows to keep."""
        return [reason is None for reason in self.reasons(batch)]

    def reasons(self, batch: dict[str, list]) -> list[str | None]:
        """n rows -> for each None (kept) or the reason."""
        if "contaminated" not in batch:
            raise KeyError("no column 'contaminated': map an NgramDecontaminator first")
        check_batch(batch, "contaminated")
        return [
            f"contaminated by {sets}" if flag else None
            for flag, sets in zip(batch["contaminated"], batch["contaminated_by"])
        ]
