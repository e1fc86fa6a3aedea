"""Quality scores as a new column, and the filter on them: callables for `datasets`, Spark, datatrove, plain dicts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple

from . import fasttext_model
from .deduplicate import check_batch, is_null
from .normalize import has_lone_surrogate, to_words_batch


class ColumnError(ValueError):
    """A batch without the column that is read, or with one that would be overwritten."""


def _columns(batch) -> list[str]:
    return list(batch.column_names if hasattr(batch, "column_names") else batch.keys())


def _values(batch, column: str) -> list:
    """One column of a dict, `datasets` batch, Arrow table or pandas frame as Python values, nulls as None."""
    names = _columns(batch)
    if column not in names:
        raise ColumnError(f"no column {column!r}; the columns are {', '.join(map(repr, names))}")
    check_batch(batch, column)
    # A batch of `Dataset.map` keeps its Arrow table: exact types and nulls, whatever the dataset's format.
    table = getattr(batch, "pa_table", batch)
    if hasattr(table, "to_pylist"):
        return table.column(column).to_pylist()
    values = table[column]
    return values.tolist() if hasattr(values, "tolist") else list(values)


@dataclass(frozen=True)
class QualityScorer:
    """
    Adds the classifier's P(positive) to every row; for `dataset.map(scorer, batched=True)`.

    Every row and column stays. A row without text to score gets a null score and label, and the reason: `"missing"`,
    `"empty"`, `"only whitespace"`, `"not a string"`, `"lone surrogate"`, or `"no words"` (nothing left after step 5).
    fastText itself answers an empty line with a confident label.

    Words `</s>` and `__label__...` are left out, as in training: at the first fastText stops reading, so that the rest
    of a text would not count, and over the second it passes. A text of nothing else has no words.

    Picklable, and the same under any `num_proc`, streaming or Spark: the model is loaded once in each process. The
    model file's content is part of the object, so `datasets` scores again when the file was replaced. A tokenizer
    given by name is known by that name only.

    Args:
        model (`str` or `os.PathLike`):
            A fastText file with labels `__label__pos` and `__label__neg`, or a Hub id such as
            `"openbmb/Ultra-FineWeb-classifier:en"`.
        tokenizer (`str` or tokenizer, *optional*):
            For step 4 of `to_words`; must be the one that the model was trained with. `DEFAULT_TOKENIZER` names that
            of the released classifiers. `None`: words end at white space.
        text_column (`str`, *optional*, defaults to `"text"`): The column to read; Ultra-FineWeb's is `"content"`.
        normalize (`bool`, *optional*, defaults to `True`):
            `False` scores the stripped text with spaces for newlines, for models trained on raw text.
        score_column, label_column, reason_column (`str`, *optional*):
            Names of the new columns: float64 in [0, 1]; `"pos"` or `"neg"`, the likelier label; a string, null where
            there is a score.

    Raises:
        `FileNotFoundError`, `ValueError`: from `fasttext_model.resolve`.
        `ModelFileError`: on first use, a file that is no such classifier, or that changed since.
        `ColumnError`: on use, no `text_column`, or a new column exists already.
        `TypeError`: on use, a single row: `batched=True` was left out.

    Source: UltraClean, arXiv 2505.05427, section 3.3; MiniCPM4, arXiv 2506.07900, section 3.1.
    """

    model: str
    tokenizer: Any = None
    text_column: str = "text"
    normalize: bool = True
    score_column: str = "quality_score"
    label_column: str = "quality_label"
    reason_column: str = "quality_reason"
    digest: str = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "model", str(self.model))
        added = [self.score_column, self.label_column, self.reason_column]
        if len({*added, self.text_column}) < 4:
            raise ValueError(f"the text column {self.text_column!r} and the new columns {added} need four names")
        if self.tokenizer is not None and not self.normalize:
            raise ValueError("a tokenizer is a step of the normalisation: leave it out, or leave normalize=True")
        object.__setattr__(self, "digest", fasttext_model.digest(fasttext_model.resolve(self.model)))

    def _types(self) -> dict[str, str]:
        return {self.score_column: "float64", self.label_column: "string", self.reason_column: "string"}

    @property
    def added_columns(self) -> dict:
        """New column -> `pyarrow.DataType`."""
        import pyarrow as pa

        return {name: pa.type_for_alias(kind) for name, kind in self._types().items()}

    def __call__(self, batch):
        """
        Args:
            batch (`dict[str, list]`, batch of `datasets`, `pyarrow.Table` or `pandas.DataFrame`): N rows.

        Returns:
            of a dict, the three new columns (`dict[str, list]` of N values); of a table or frame, and in
            `Dataset.map`, the batch with them.
        """
        texts = _values(batch, self.text_column)
        for column in self._types():
            if column in _columns(batch):
                raise ColumnError(
                    f"the column {column!r} exists already and would be overwritten; rename or remove it, or set "
                    "score_column, label_column and reason_column"
                )
        added = self.score(texts)
        # An Arrow table keeps the types of columns that are null throughout a batch, which lists cannot.
        table = getattr(batch, "pa_table", batch)
        if hasattr(table, "append_column"):
            import pyarrow as pa

            for column, kind in self.added_columns.items():
                table = table.append_column(column, pa.array(added[column], kind))
            return table
        if hasattr(batch, "assign"):
            import pandas as pd

            kinds = self.added_columns
            return batch.assign(**{name: pd.array(added[name], pd.ArrowDtype(kinds[name])) for name in added})
        return added

    def features(self, features):
        """
        The features of the result, for `map(..., features=scorer.features(dataset.features))`.

        Needed where lists go back to `datasets` (formats numpy, torch, jax): it takes types from the first values that
        it writes, and stops where those are all null and later ones are not.

        Args:
            features (`datasets.Features`): Those of the dataset to score.
        """
        from datasets import Features, Value

        return Features({**features, **{name: Value(kind) for name, kind in self._types().items()}})

    def score(self, texts: list) -> dict[str, list]:
        """The three new columns for N values of the text column."""
        reasons = [self._unusable(text) for text in texts]
        lines = self._lines([text for text, reason in zip(texts, reasons) if reason is None])
        lines = list(map(fasttext_model.words_read, lines))
        # Marks can be all of a text that is not blank, and fastText scores a line of blanks as if it were text.
        filled = [bool(line.strip(fasttext_model.SPACE)) for line in lines]
        values = iter(fasttext_model.predict_positive(self._loaded(), compress(lines, filled)))
        filled, scores = iter(filled), []
        for row, reason in enumerate(reasons):
            if reason is None and not next(filled):
                reasons[row] = reason = "no words"
            scores.append(None if reason else next(values))
        labels = [None if score is None else "pos" if score >= 0.5 else "neg" for score in scores]
        return {self.score_column: scores, self.label_column: labels, self.reason_column: reasons}

    @staticmethod
    def _unusable(text) -> str | None:
        if not isinstance(text, str):
            return "missing" if is_null(text) else "not a string"
        if not text:
            return "empty"
        if not text.replace("\0", " ").strip():
            return "only whitespace"
        return "lone surrogate" if has_lone_surrogate(text) else None

    def _lines(self, texts: list[str]) -> list[str]:
        if self.normalize:
            return to_words_batch(texts, self.tokenizer)
        return [text.strip().replace("\n", " ") for text in texts]

    def _loaded(self):
        path = fasttext_model.resolve(self.model)
        found = fasttext_model.digest(path)
        if found != self.digest:
            raise fasttext_model.ModelFileError(
                f"{path} is not the model this scorer was made with (SHA-256 {found[:12]}..., then "
                f"{self.digest[:12]}...); make a new QualityScorer"
            )
        return fasttext_model.load_model(path)


class Split(NamedTuple):
    """What `QualityFilter.split` returns: two datasets, and how many rows went where and why."""

    kept: Any
    diverted: Any
    counts: dict[str, int]


@dataclass(frozen=True)
class QualityFilter:
    """
    Keeps rows whose score is at least a threshold; for `dataset.filter(quality_filter, batched=True)`.

    Rows without a score are never kept.

    Args:
        threshold (`float`, *optional*, defaults to 0.5): In [0, 1]; 0.5 keeps what the released script keeps.
        score_column, reason_column (`str`, *optional*): As `QualityScorer` wrote them.

    Raises:
        `ValueError`: a threshold outside [0, 1].
        `ColumnError`: on use, no score column.
        `TypeError`: on use, a single row: `batched=True` was left out.
    """

    threshold: float = 0.5
    score_column: str = "quality_score"
    reason_column: str = "quality_reason"

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: scores are probabilities, give a value from 0 to 1")

    def __call__(self, batch) -> list[bool]:
        """N rows -> `list[bool]`: which to keep."""
        return [reason is None for reason in self.reasons(batch)]

    def reasons(self, batch) -> list[str | None]:
        """N rows -> for each None (kept), or why it goes: `"score below 0.5"`, or the reason for having no score."""
        scores = _values(batch, self.score_column)
        given = _values(batch, self.reason_column) if self.reason_column in _columns(batch) else [None] * len(scores)
        below = f"score below {self.threshold:g}"
        return [
            (None if is_null(reason) else str(reason)) or "no score"
            if is_null(score)
            else None
            if score >= self.threshold
            else below
            for score, reason in zip(scores, given)
        ]

    def split(self, dataset, batch_size: int = 1000) -> Split:
        """
        Divides a scored dataset; every row goes to exactly one side, in its old order.

        Args:
            dataset (`datasets.Dataset`): With the scorer's columns.
            batch_size (`int`, *optional*, defaults to 1000): Rows read at once.

        Returns:
            `Split`: `kept`, `diverted` and `counts` (`"kept"`, and the diverted rows by reason).

        Raises:
            `TypeError`: no `Dataset`. A stream is read once, so it can only be filtered; count with `count`.
        """
        from datasets import Dataset

        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"split takes a Dataset, got {type(dataset).__name__}; filter a stream with "
                "`.filter(quality_filter, batched=True)` and count its rows with `quality_filter.count(stream)`"
            )
        kept, diverted, counts = [], [], Counter(kept=0)
        for start, reasons in self._batches(dataset, batch_size):
            counts.update(reason or "kept" for reason in reasons)
            for row, reason in enumerate(reasons, start):
                (diverted if reason else kept).append(row)
        return Split(dataset.select(kept), dataset.select(diverted), dict(counts))

    def count(self, dataset, batch_size: int = 1000) -> dict[str, int]:
        """
        How many rows are kept, and how many are not, by reason; reads a `Dataset` or `IterableDataset` through once.

        The reason `"kept"` counts kept rows.
        """
        counts = Counter(kept=0)
        for _, reasons in self._batches(dataset, batch_size):
            counts.update(reason or "kept" for reason in reasons)
        return dict(counts)

    def _batches(self, dataset, batch_size: int):
        names = dataset.column_names
        if names is not None:
            if self.score_column not in names:
                raise ColumnError(
                    f"no column {self.score_column!r}; score with QualityScorer first; there are {names}"
                )
            dataset = dataset.select_columns([n for n in (self.score_column, self.reason_column) if n in names])
        start = 0
        for batch in dataset.with_format(None).iter(batch_size):
            reasons = self.reasons(batch)
            yield start, reasons
            start += len(reasons)
