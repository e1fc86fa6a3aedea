"""
Calibration rows: text or tokens of many kinds, as batches of `input_ids` and `attention_mask`.

Shape letters: `B` sequences, `S` positions.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from typing import Any

import torch


class CalibrationError(ValueError):
    """The calibration data cannot be used; says what was given and what is needed."""


def calibration_rows(
    dataset: Any,
    tokenizer: Any = None,
    *,
    num_samples: int = 128,
    max_length: int = 2048,
    seed: int = 0,
    text_column: str = "text",
    prefix_ids: list[int] | None = None,
) -> list[torch.Tensor]:
    """
    `num_samples` rows of `max_length` tokens, drawn from joined texts at random places; rows already tokenized are
    taken as they are.

    Args:
        dataset: texts (an iterable of `str`), a `datasets.Dataset` or stream with `text_column`, the name of a Hub
            dataset with a `train` split, or tokenized rows (lists, tensors `[S]` or `[1, S]`, or mappings with
            `input_ids` and perhaps `attention_mask`, whose padding is cut off).
        tokenizer: needed for texts.
        prefix_ids: tokens that every row begins with, within `max_length`; by default the ones with which the
            tokenizer begins a text itself (most often `<s>` or none).

    Returns:
        int64 tensors `[S]`, all of `max_length` for texts.

    Raises:
        CalibrationError: no rows, too little text, texts without tokenizer, rows that are neither.
    """
    if num_samples < 1 or max_length < 2:
        raise CalibrationError(
            f"num_samples={num_samples} and max_length={max_length} were given; needed are at least 1 row of 2 tokens"
        )
    if isinstance(dataset, str):
        from datasets import load_dataset

        dataset = load_dataset(dataset, split="train", streaming=True)
    if dataset is None or not isinstance(dataset, Iterable) or isinstance(dataset, Mapping):
        raise CalibrationError(
            f"calibration data of type {type(dataset).__name__} was given; give texts, tokenized rows, a "
            "datasets.Dataset or the name of a Hub dataset"
        )
    rows = iter(dataset)
    first = next(rows, None)
    if first is None:
        raise CalibrationError("the calibration data is empty; give texts or tokenized rows")
    if _text_of(first, text_column) is None:
        return _tokenized(first, rows, num_samples, max_length, text_column)
    if tokenizer is None:
        raise CalibrationError("texts were given for calibration without a tokenizer; pass tokenizer=")
    prefix = _own_prefix(tokenizer) if prefix_ids is None else list(prefix_ids)
    length = max_length - len(prefix)
    if length < 1:
        raise CalibrationError(f"max_length={max_length} leaves no room after {len(prefix)} prefix tokens")
    # Twice what is drawn: rows from random places of a longer text overlap little.
    tokens = _joined(first, rows, text_column, tokenizer, enough=2 * num_samples * length)
    if len(tokens) < length:
        raise CalibrationError(
            f"the calibration text has {len(tokens)} tokens and one row needs {length}; give more text or a smaller "
            "max_length"
        )
    starts = list(range(0, len(tokens) - length + 1, length))
    generator = random.Random(seed)
    generator.shuffle(starts)
    if len(starts) < num_samples:
        raise CalibrationError(
            f"the calibration text has {len(tokens)} tokens, which make {len(starts)} rows of {length}, and "
            f"num_samples={num_samples} were asked for; give more text, fewer rows or a smaller max_length"
        )
    return [torch.tensor(prefix + tokens[start : start + length]) for start in starts[:num_samples]]


def batches(rows: list[torch.Tensor], batch_size: int, pad_id: int = 0) -> list[dict[str, torch.Tensor]]:
    """
    Rows of like length together, `{"input_ids": [B, S], "attention_mask": [B, S]}`, both int64; shorter rows are
    padded on the right.
    """
    if batch_size < 1:
        raise CalibrationError(f"batch_size={batch_size} was given; it is at least 1")
    rows = sorted(rows, key=len, reverse=True)  # stable: equal rows stay in their order
    made = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        ids = torch.full((len(part), len(part[0])), pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(part):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def digest(rows: list[torch.Tensor]) -> str:
    """Names the rows: a resumed run must see the same ones."""
    found = hashlib.sha256()
    for row in rows:
        found.update(row.numpy().tobytes())
        found.update(b";")
    return found.hexdigest()[:16]


def _text_of(row: Any, column: str) -> str | None:
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping) and isinstance(row.get(column), str):
        return row[column]
    return None


def _own_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    return whole[:at]


def _joined(first: Any, rows: Iterable, column: str, tokenizer: Any, enough: int) -> list[int]:
    tokens: list[int] = []
    row = first
    number = 0
    while row is not None and len(tokens) < enough:
        text = _text_of(row, column)
        if text is None:
            raise CalibrationError(f"calibration row {number} is {_short(row)}; the rows before it were texts")
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        row, number = next(rows, None), number + 1
    return tokens


def _tokenized(first: Any, rest: Iterable, num_samples: int, max_length: int, column: str) -> list[torch.Tensor]:
    taken: list[torch.Tensor] = []
    row = first
    while row is not None and len(taken) < num_samples:
        ids, mask = (row.get("input_ids"), row.get("attention_mask")) if isinstance(row, Mapping) else (row, None)
        try:
            ids = torch.as_tensor(ids) if ids is not None else None
        except (TypeError, ValueError, RuntimeError):
            ids = None
        if ids is not None and ids.ndim > 1 and ids.shape[:-1].numel() > 1:
            raise CalibrationError(
                f"calibration row {len(taken)} is a batch of shape {list(ids.shape)}; give its rows one by one"
            )
        ids = ids if ids is None else ids.reshape(-1)
        if ids is None or ids.dtype.is_floating_point or ids.dtype == torch.bool:
            raise CalibrationError(
                f"calibration row {len(taken)} is {_short(row)}; rows are texts, have a text in column {column!r}, "
                "or are tokens (a list or tensor of one row of token ids, or a mapping with input_ids)"
            )
        if mask is not None:
            mask = torch.as_tensor(mask).reshape(-1)
            if len(mask) != len(ids):
                raise CalibrationError(
                    f"calibration row {len(taken)} has {len(ids)} input_ids and an attention_mask of {len(mask)}"
                )
            ids = ids[mask != 0]
        ids = ids[:max_length].to(torch.int64).cpu()
        if len(ids) < 2:
            raise CalibrationError(f"calibration row {len(taken)} has {len(ids)} tokens; a row needs at least 2")
        taken.append(ids)
        row = next(rest, None)
    return taken


def _short(row: Any) -> str:
    return f"{type(row).__name__} {str(row)[:60]!r}"
