"""
Labelled documents for the quality classifier: words, label, source; which are held out, and which train in what order.

Order and choice come from hashes of seed, source and text, never from row numbers or a random generator: the same
documents in another order, or read by another process, give the same training file.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from .fasttext_model import LABEL_PREFIX as LABEL_PREFIX  # also for those who import it from here
from .fasttext_model import words_read
from .normalize import to_words_batch


LABELS = ("pos", "neg")


@dataclass(frozen=True)
class Documents:
    """
    Labelled lines, ready for fastText, without those that cannot be used.

    `words` is a `datasets.Dataset` column read by index, so texts stay on disk where `datasets` keeps them. All arrays
    have one entry a usable document, `row` being its index in `words`.
    """

    words: object
    row: np.ndarray
    positive: np.ndarray
    source: np.ndarray
    group: np.ndarray
    key: np.ndarray
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.row)

    def take(self, chosen: np.ndarray) -> Documents:
        """The chosen documents (mask or indices); `dropped` stays what it was for the whole."""
        arrays = (self.row, self.positive, self.source, self.group, self.key)
        return Documents(self.words, *(array[chosen] for array in arrays), self.dropped)

    def lines(self, order: np.ndarray | None = None):
        """The words of each document, as strings, a thousand rows in memory at a time."""
        rows = self.row if order is None else self.row[order]
        for start in range(0, len(rows), 1000):
            yield from self.words[rows[start : start + 1000]]["words"]


def keyed(*parts: str) -> str:
    """32 hex digits that depend on the parts alone: an order and an identity that no process or row order changes."""
    return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).hexdigest()


def _prepare_rows(columns: Mapping, *, tokenizer, text, label, source, pool, group, names) -> dict[str, list]:
    """A batch of rows to words with label, source, group, identity, and the reason where there are no words."""
    texts = columns[text]
    words, reasons = [None] * len(texts), [None] * len(texts)
    for index, value in enumerate(texts):
        if value is None:
            reasons[index] = "text missing"
        elif not isinstance(value, str):
            reasons[index] = f"text is {type(value).__name__}, not a string"
        elif not value.strip():
            reasons[index] = "text blank"
    usable = [index for index, reason in enumerate(reasons) if reason is None]
    for index, line in zip(usable, to_words_batch([texts[index] for index in usable], tokenizer)):
        line = words_read(line)
        if line.strip():
            words[index] = line
        else:
            reasons[index] = "no words after preprocessing"
    labels = [_label(value, names) for value in columns[label]] if label else [None] * len(texts)
    sources = [_source(value) for value in columns[source]] if source else [pool] * len(texts)
    keys = [None if line is None else keyed(line) for line in words]
    groups = [key or "" for key in keys]
    if group:
        groups = [key if value is None else str(value) for key, value in zip(groups, columns[group])]
    return {"words": words, "label": labels, "source": sources, "group": groups, "key": keys, "reason": reasons}


def _label(value, names) -> bool:
    """True for a positive document."""
    if names is not None and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        value = names[value]
    if isinstance(value, bool):
        return value
    if value not in LABELS:
        raise ValueError(
            f"Label {value!r} is not one of 'pos', 'neg', True, False. Map your labels to those, and leave out the "
            "rows that have none."
        )
    return value == "pos"


def _source(value) -> str:
    return "(no source)" if value is None else str(value)


def prepare(
    dataset,
    *,
    text_column: str = "text",
    label_column: str | None = "label",
    source_column: str | None = "source",
    group_column: str | None = None,
    tokenizer=None,
    num_proc: int | None = None,
) -> Documents:
    """
    Normalise documents to fastText lines, and drop with a reason what has no words.

    Args:
        dataset (`datasets.Dataset` or mapping of pool name to `datasets.Dataset`): of a mapping, the name is the
            source and `source_column` is not read.
        label_column: `None` for documents without labels.

    Raises:
        TypeError: not a `Dataset` (a streaming one must be gathered first).
        ValueError: a column is missing, there are no rows, or a label is none of "pos", "neg", True, False.
    """
    from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets

    pools = dataset if isinstance(dataset, Mapping) else {None: dataset}
    if not pools:
        raise ValueError("There are no pools: give at least one pool of each label.")
    parts = []
    for name, pool in pools.items():
        where = "The dataset" if name is None else f"Pool {name!r}"
        if not isinstance(pool, Dataset):
            raise TypeError(f"{where} is a {type(pool).__name__}; a datasets.Dataset is needed.")
        source = source_column if name is None else None
        for column in (text_column, label_column, source, group_column):
            if column is not None and column not in pool.column_names:
                raise ValueError(
                    f"{where} has no column {column!r}, only {', '.join(pool.column_names)}: name the right one in "
                    "text_column, label_column, source_column or group_column."
                )
        if len(pool) == 0:
            raise ValueError(f"{where} is empty: leave it out, or give it documents.")
        feature = pool.features[label_column] if label_column else None
        rows = partial(
            _prepare_rows,
            tokenizer=tokenizer,
            text=text_column,
            label=label_column,
            source=source,
            pool=_source(name),
            group=group_column,
            names=tuple(feature.names) if isinstance(feature, ClassLabel) else None,
        )
        strings = dict.fromkeys(("words", "source", "group", "key", "reason"), Value("string"))
        part = pool.with_format(None).map(
            rows,
            batched=True,
            remove_columns=pool.column_names,
            features=Features({**strings, "label": Value("bool")}),
            num_proc=num_proc,
            desc="words" if name is None else f"words of {name}",
        )
        parts.append(part)
    whole = concatenate_datasets(parts)
    arrays = {name: np.array(whole[name][:], dtype=object) for name in ("label", "source", "group", "key", "reason")}
    usable = np.array([reason is None for reason in arrays["reason"]])
    dropped = Counter(arrays["reason"][~usable])
    if label_column is not None:
        positive = arrays["label"].astype(bool)
        # The same line as "pos" and as "neg" teaches nothing, and would be an error whichever side it is tested on.
        both = set(arrays["key"][usable & positive]) & set(arrays["key"][usable & ~positive])
        conflict = usable & np.array([key in both for key in arrays["key"]])
        if conflict.any():
            dropped["same text under both labels"] = int(conflict.sum())
            usable &= ~conflict
    else:
        positive = np.zeros(len(whole), dtype=bool)
    rows = np.flatnonzero(usable)
    chosen = (arrays[name][rows] for name in ("source", "group", "key"))
    return Documents(whole.select_columns("words"), rows, positive[rows], *chosen, dict(dropped))


def joined(first: Documents, second: Documents) -> Documents:
    """Both sets in one; what the first dropped."""
    from datasets import concatenate_datasets

    names = ("positive", "source", "group", "key")
    arrays = (np.concatenate([getattr(first, name), getattr(second, name)]) for name in names)
    row = np.concatenate([first.row, second.row + len(first.words)])
    return Documents(concatenate_datasets([first.words, second.words]), row, *arrays, first.dropped)


# ---- which documents train, and which are held out ------------------------------------------------------------------


def split(documents: Documents, fraction: float, seed: int) -> np.ndarray:
    """
    Mask of held-out documents: of each source and label at least `fraction`, by whole groups, chosen by a hash of
    seed and group, so that neither the order nor the number of other rows changes who is held out first. A source that
    is one single group is held out whole.
    """
    held_out = np.zeros(len(documents), dtype=bool)
    for rows in cells(documents).values():
        members: dict[str, list[int]] = {}
        for row in rows:
            members.setdefault(documents.group[row], []).append(row)
        source = documents.source[rows[0]]
        left = fraction * len(rows)
        for group in sorted(members, key=lambda name: keyed(str(seed), source, name)):
            if left <= 0:
                break
            held_out[members[group]] = True
            left -= len(members[group])
    return held_out


def cells(documents: Documents) -> dict[tuple[bool, str], np.ndarray]:
    """Indices of the documents of each (label, source), positives first, sources by name."""
    found: dict[tuple[bool, str], list[int]] = {}
    for index, cell in enumerate(zip(documents.positive.tolist(), documents.source)):
        found.setdefault(cell, []).append(index)
    return {cell: np.array(found[cell]) for cell in sorted(found, key=lambda cell: (not cell[0], cell[1]))}


def quotas(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """
    Divide `total` over pools as evenly as their sizes allow: small pools give all they have, the rest share alike.

    The sum is `min(total, sum(sizes))`; no quota exceeds its size, and of two quotas that are not a whole pool none
    is more than 1 above the other.
    """
    left, given = min(total, sum(sizes.values())), {}
    order = sorted(sizes, key=lambda name: (sizes[name], name))
    for position, name in enumerate(order):
        given[name] = min(sizes[name], left // (len(order) - position))
        left -= given[name]
    return given


def sample(documents: Documents, *, balance: str | None, ratio: float, seed: int) -> np.ndarray:
    """
    Indices of the training sample, in training order.

    Args:
        balance: "oversample" uses every document and repeats those of the class that is short of `ratio` negatives a
            positive, all of them equally often (give or take one); "undersample" repeats nothing and takes the largest
            sample of that ratio, spread evenly over the sources of each label; `None` takes everything once.
    """
    found = cells(documents)
    have = {side: int((documents.positive == side).sum()) for side in (True, False)}
    if balance == "undersample":
        positives = min(have[True], int(have[False] / ratio + 1e-9))
        wanted = {True: max(1, positives), False: min(have[False], max(1, round(positives * ratio)))}
    elif balance == "oversample":
        positives = max(have[True], round(have[False] / ratio))
        wanted = {True: positives, False: max(have[False], round(positives * ratio))}
    else:
        wanted = have
    chosen, turns = [], []
    for side in (True, False):
        rows = np.concatenate([rows for (label, _), rows in found.items() if label is side])
        if balance == "undersample":
            share = quotas({name: len(rows) for (label, name), rows in found.items() if label is side}, wanted[side])
            rows = np.concatenate([_shuffled(documents, found[side, name], seed)[:n] for name, n in share.items()])
        else:
            rows = _shuffled(documents, rows, seed)
        times = np.arange(wanted[side])
        chosen.append(rows[times % len(rows)])
        turns.append(times // len(rows))
    chosen, turns = np.concatenate(chosen), np.concatenate(turns)
    order = np.array([keyed(str(seed), str(turn), documents.key[row]) for row, turn in zip(chosen, turns)])
    return chosen[np.argsort(order, kind="stable")]


def _shuffled(documents: Documents, rows: np.ndarray, seed: int) -> np.ndarray:
    order = np.array([keyed(str(seed), documents.source[row], documents.key[row]) for row in rows])
    return rows[np.argsort(order, kind="stable")]
