"""
FR-Spec (arXiv 2502.14856): a draft head that scores only the tokens that text consists of mostly.

A draft's head reads one row of weights for each token it can propose, at every step. Few tokens make up nearly all of
a text, so the head keeps the rows of the most frequent ones (MiniCPM4's drafts: 32,768 of 73,448). The target still
scores its whole vocabulary, so what comes out does not change; a token that is not in the list costs a rejected
draft, no more.

Here the list is made, measured and stored. Which text it is counted on matters: see `FrequencyVocabulary.coverage`.
Shape letters: V the target's vocabulary, F tokens in the list.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from transformers.utils import logging

from .chat import as_ids


@dataclass(frozen=True)
class Coverage:
    """How much of a text can be drafted: `covered` of its `tokens`; `share` is 1 at best."""

    tokens: int
    covered: int

    @property
    def share(self) -> float:
        return self.covered / self.tokens


@dataclass(frozen=True)
class FrequencyVocabulary:
    """
    The token ids that a draft head keeps.

    Args:
        ids: F token ids of the target, the most frequent first, the lower id first of two that are as frequent.
        vocab_size: V, of the target's head (`config.vocab_size`, which may exceed the tokenizer's length).
        counts: occurrences of each id in the corpus; `None` for a file of another program, which has none.
        facts: what is known of the corpus and the tokenizer, in JSON's types.

    Raises:
        ValueError: no ids, an id twice or outside the vocabulary, or another number of counts than of ids.
    """

    ids: tuple[int, ...]
    vocab_size: int
    counts: tuple[int, ...] | None = None
    facts: dict = field(default_factory=dict)

    def __post_init__(self):
        if not self.ids:
            raise ValueError("a frequency vocabulary needs at least one token id, got none.")
        if self.counts is not None and len(self.counts) != len(self.ids):
            raise ValueError(f"{len(self.counts)} counts for {len(self.ids)} token ids: one count an id.")
        outside = next((token for token in self.ids if not 0 <= token < self.vocab_size), None)
        if outside is not None:
            raise ValueError(
                f"token id {outside} is outside the target's vocabulary of {self.vocab_size:,} (0 to "
                f"{self.vocab_size - 1}); take a list that was counted with the target's own tokenizer."
            )
        if len(set(self.ids)) < len(self.ids):
            seen: set[int] = set()
            twice = next(token for token in self.ids if token in seen or seen.add(token))
            raise ValueError(f"token id {twice} stands in the list twice; a draft head keeps each row once.")

    @classmethod
    def from_counts(
        cls, counts: torch.Tensor, size: int, keep: Iterable[int] = (), facts: dict | None = None
    ) -> FrequencyVocabulary:
        """
        The `size` most frequent tokens, with all of `keep` among them.

        One rule ranks every id of the vocabulary: more occurrences first, then the lower id. The list is `keep` and
        the best-ranked others. So where the corpus has fewer different tokens than `size`, the list is filled with the
        lowest ids that did not occur: BPE and SentencePiece number their tokens roughly in the order in which they
        were merged, and a low id is a token that was frequent where the tokenizer was trained.

        Args:
            counts: `[V]` int64, occurrences of each token id.
            size: F.
            keep: ids that must be in the list however rare they are.

        Raises:
            ValueError: no counts at all, `size` above V or below the number of `keep`, or an id of `keep` outside V.
        """
        keep, total = sorted(set(keep)), int(counts.sum())
        if not total:
            raise ValueError("the corpus holds no token: there is nothing to rank; give text that is not empty.")
        _check_size(size, keep, len(counts))
        # A stable sort of the whole vocabulary: of equal counts the lower id comes first.
        ranked = torch.argsort(counts, descending=True, stable=True).tolist()
        kept = set(keep)
        chosen = kept | set(islice((token for token in ranked if token not in kept), size - len(keep)))
        ids = tuple(token for token in ranked if token in chosen)
        own = tuple(int(count) for count in counts[list(ids)])
        found = {
            "tokens": total,
            "different_tokens": int((counts > 0).sum()),
            "covered": sum(own),
            "filled": sum(not count for token, count in zip(ids, own) if token not in kept),
            "least_count": min(own),
            "kept": keep,
        }
        return cls(ids, len(counts), own, {**found, **(facts or {})})

    def __len__(self) -> int:
        return len(self.ids)

    def to_tensor(self, device: torch.device | str | None = None) -> torch.Tensor:
        """`[F]` int64: the target's ids by the draft head's row."""
        return torch.tensor(self.ids, dtype=torch.int64, device=device)

    def coverage_of(self, counts: torch.Tensor) -> Coverage:
        """Of text whose tokens were counted: `counts` is `[V]` int64."""
        return Coverage(int(counts.sum()), int(counts[list(self.ids)].sum()))

    def coverage(
        self, sources: Mapping[str, Iterable], tokenizer, *, column: str = "text", batch_size: int = 256
    ) -> dict[str, Coverage]:
        """
        The share of each source's tokens that a draft with this list can propose.

        Give text that the list was not counted on, and name the domains apart, or their average hides the worst: a
        list that covers 0.94 of other articles was seen to cover 0.59 of manuals in the same language.

        Args:
            sources: name to texts, in any form that `count_tokens` takes.

        Raises:
            ValueError: another tokenizer than the list was counted with, a source without a token, or as for
                `count_tokens`.
        """
        known = self.facts.get("tokenizer")
        if known is not None and known != tokenizer_fingerprint(tokenizer):
            raise ValueError(
                "these token ids were counted with another tokenizer, where they stand for other text; give the "
                "tokenizer of the list, or build a list for this one."
            )
        found = {}
        for name, texts in sources.items():
            counts = count_tokens(texts, tokenizer, self.vocab_size, column=column, batch_size=batch_size, name=name)
            if not counts.any():
                raise ValueError(
                    f"the source {name!r} holds no token: it has no coverage; give text, or leave it out."
                )
            found[name] = self.coverage_of(counts)
        return found

    def save(self, path: str | os.PathLike, coverage: Mapping[str, Coverage] | None = None) -> Path:
        """
        Write `freq_{F}.pt`, the plain list of ids that CPM.cu reads, and a JSON file of the facts beside it.

        Args:
            path: a file that ends in `.pt`, or a folder, which gets the file of the usual name.
            coverage: of other text, for the record.

        Returns:
            The `.pt` file. Both files are there whole or not at all; a pair of which only one was replaced does not
            load.
        """
        file = Path(path)
        file = file if file.suffix == ".pt" else file / f"freq_{len(self)}.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "format": "fr_spec",
            "size": len(self),
            "vocab_size": self.vocab_size,
            **self.facts,
            "coverage": {
                name: {"tokens": found.tokens, "covered": found.covered, "share": found.share}
                for name, found in (coverage or {}).items()
            }
            or self.facts.get("coverage", {}),
            "ids_sha256": _digest(self.ids),
            "counts": None if self.counts is None else list(self.counts),
        }
        lines = ",\n".join(
            f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()
        )
        temporary = [
            target.with_name(f".{target.name}.{os.getpid()}.tmp") for target in (file.with_suffix(".json"), file)
        ]
        try:
            temporary[0].write_text("{\n" + lines + "\n}\n", encoding="utf-8")
            torch.save(list(self.ids), temporary[1])
            os.replace(temporary[0], file.with_suffix(".json"))
            os.replace(temporary[1], file)
        finally:
            for leftover in temporary:
                leftover.unlink(missing_ok=True)
        return file

    @classmethod
    def load(
        cls, path: str | os.PathLike, vocab_size: int | None = None, eos_token_id: int | Sequence[int] | None = None
    ) -> FrequencyVocabulary:
        """
        Read a file of `save`, or of CPM.cu: a list or a one-dimensional tensor of ids, and nothing beside it.

        Args:
            path: the `.pt` file, or a folder with one `freq_*.pt`.
            vocab_size: V of the target; needed where no JSON file stands beside, else checked against it.
            eos_token_id: as in `generation_config`: ids that must be in the list.

        Raises:
            FileNotFoundError: no such file, or no `freq_*.pt` in the folder.
            ValueError: anything but a list of ids, ids outside the vocabulary, an id twice, no end of text, facts of
                other ids, or several files in the folder.
        """
        file = _find(Path(path))
        try:
            ids = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for a file that is not its own
            raise ValueError(
                f"{file} cannot be read as a list of token ids ({' '.join(str(error).split())[:200]}); give a file of "
                "`save` or of CPM.cu."
            ) from error
        if isinstance(ids, torch.Tensor) and ids.dim() == 1 and not (ids.is_floating_point() or ids.is_complex()):
            ids = ids.tolist()
        if not isinstance(ids, (list, tuple)) or not all(type(token) is int for token in ids):
            raise ValueError(
                f"{file} holds a {type(ids).__name__} that is no list of token ids; a list of ints or a "
                "one-dimensional integer tensor is needed."
            )
        facts = _read_facts(file, ids)
        known = facts.pop("vocab_size", None)
        if vocab_size is None and known is None:
            raise ValueError(
                f"{file} says nothing of the vocabulary it belongs to; give vocab_size=model.config.vocab_size."
            )
        if vocab_size is not None and known not in (None, vocab_size):
            raise ValueError(
                f"{file} was made for a vocabulary of {known:,} tokens and the target has {vocab_size:,}; build a "
                "list for this target."
            )
        counts = facts.pop("counts", None)
        try:
            found = cls(tuple(ids), known or vocab_size, None if counts is None else tuple(counts), facts)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        missing = sorted(set(as_ids(eos_token_id)) - set(ids))
        if missing:
            raise ValueError(
                f"{file} lacks the end-of-text id {missing[0]}: a draft with it could never propose to stop; build a "
                "list with this id."
            )
        return found


def build_frequency_vocabulary(
    texts: Iterable,
    tokenizer,
    size: int,
    *,
    vocab_size: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    keep: Iterable[int] = (),
    corpus: str | None = None,
    column: str = "text",
    batch_size: int = 256,
) -> FrequencyVocabulary:
    """
    Count the tokens of `texts` and keep the `size` most frequent (`FrequencyVocabulary.from_counts` has the rule).

    Always kept: the tokenizer's special and added tokens, `eos_token_id` and `keep`.

    Args:
        texts: as for `count_tokens`.
        size: F.
        vocab_size: V, the target's `config.vocab_size`; the tokenizer's length if it is left out.
        eos_token_id: the target's `generation_config.eos_token_id`, an id or a list.
        corpus: what to call the text in the facts.

    Raises:
        ValueError: a `size` that cannot be, an empty corpus, or as for `count_tokens`.
    """
    vocab_size = len(tokenizer) if vocab_size is None else vocab_size
    keep = {*kept_ids(tokenizer, vocab_size, eos_token_id), *keep}
    _check_size(size, sorted(keep), vocab_size)  # before the corpus is read
    counts = count_tokens(texts, tokenizer, vocab_size, column=column, batch_size=batch_size)
    facts = {"corpus": corpus, "tokenizer": tokenizer_fingerprint(tokenizer)}
    return FrequencyVocabulary.from_counts(counts, size, keep, facts)


def count_tokens(
    texts: Iterable,
    tokenizer,
    vocab_size: int,
    *,
    column: str = "text",
    batch_size: int = 256,
    name: str = "counting tokens",
) -> torch.Tensor:
    """
    Occurrences of each token id, `[V]` int64, without tokens that the tokenizer would add to a text.

    Args:
        texts: strings, or rows with a string in `column`, such as a `datasets.Dataset` or a streamed one. Only
            `batch_size` of them are held at once.
        name: of the progress bar, which shows in a terminal only.

    Raises:
        TypeError: a single string, or an item without text.
        ValueError: a token id that is not below `vocab_size`.
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError("one string is given where several texts are needed; give a list: [text].")
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    total = len(texts) if hasattr(texts, "__len__") else None
    rows = iter(texts.select_columns([column]) if getattr(texts, "column_names", None) else texts)
    with logging.tqdm(total=total, desc=name, unit=" texts", disable=None) as bar:
        done = 0
        while batch := [_text(row, number, column) for number, row in enumerate(islice(rows, batch_size), done + 1)]:
            encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
            ids = torch.tensor([token for text in encoded["input_ids"] for token in text], dtype=torch.int64)
            if ids.numel() and int(ids.max()) >= vocab_size:
                raise ValueError(
                    f"the tokenizer produced the id {int(ids.max())} and the vocabulary has {vocab_size:,} tokens; "
                    "give the tokenizer of the target, and the target's vocab_size."
                )
            counts += torch.bincount(ids, minlength=vocab_size)
            done += len(batch)
            bar.update(len(batch))
    return counts


def kept_ids(tokenizer, vocab_size: int, eos_token_id: int | Sequence[int] | None = None) -> set[int]:
    """
    Ids that every list has: the tokenizer's special and added tokens, its end of text, and `eos_token_id`. Added
    tokens beyond the target's head are left out: no target can say them.
    """
    own = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return {*(token for token in own if token < vocab_size), *as_ids(eos_token_id)}


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 of the tokenizer's vocabulary: which id stands for which token."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def _check_size(size: int, keep: list[int], vocab_size: int) -> None:
    outside = next((token for token in keep if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise ValueError(
            f"token id {outside} must be kept but is outside the target's vocabulary of {vocab_size:,}; check the "
            "end-of-text ids and the vocabulary's size."
        )
    if not max(len(keep), 1) <= size <= vocab_size:
        raise ValueError(
            f"a list of {size} tokens was asked for; it has at least {max(len(keep), 1)} (end-of-text, special and "
            f"added tokens are always kept) and at most the vocabulary's {vocab_size:,}."
        )


def _text(row, number: int, column: str) -> str:
    text = row
    if isinstance(row, Mapping):
        if column not in row:
            raise TypeError(f"text {number} has no column {column!r}; its columns are {', '.join(map(str, row))}.")
        text = row[column]
    if not isinstance(text, str):
        raise TypeError(
            f"text {number} is of type {type(text).__name__}; a string is needed, or a row with one in {column!r}."
        )
    return text


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()


def _find(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}; give a freq_*.pt file or a folder that holds one.")
        return path
    files = sorted(path.glob("freq_*.pt"))
    if not files:
        raise FileNotFoundError(f"{path} holds no freq_*.pt; give the file, or the folder that it was saved in.")
    if len(files) > 1:
        raise ValueError(f"{path} holds {', '.join(file.name for file in files)}; give the one that you want.")
    return files[0]


def _read_facts(file: Path, ids: Sequence[int]) -> dict:
    """What `save` noted beside the file, but for what the ids say themselves; nothing beside a file of CPM.cu."""
    beside = file.with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        facts = json.loads(beside.read_bytes())
    except ValueError as error:
        raise ValueError(f"{beside} is no JSON ({error}); save the list again, or move the file away.") from error
    if not isinstance(facts, dict) or facts.pop("format", None) != "fr_spec":
        raise ValueError(f"{beside} is not of this program; move it away, or save the list again.")
    if facts.pop("ids_sha256", None) != _digest(ids):
        raise ValueError(f"{beside} describes other ids than {file.name} holds; save the list again.")
    facts.pop("size", None)
    if not facts.get("coverage"):
        facts.pop("coverage", None)
    return facts
