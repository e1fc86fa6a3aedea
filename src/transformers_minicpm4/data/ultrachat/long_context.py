"""
Long-context packing: a document among distractors retrieved for it (MiniCPM4, arXiv 2506.07900, UltraChat v2: k
distractors, the document at a random place m from 1 to k + 1, a length drawn evenly from 8K to 64K tokens).
"""

import hashlib
import json
import random
from bisect import bisect_right
from dataclasses import dataclass, field

from .reasons import OK, column_of
from .retrieval import BM25Index, containment, word_runs


@dataclass(frozen=True)
class LongContextPacker:
    """
    For `map`, row by row: pack the row's document with distractors from `index` until a drawn length is reached.

    The target T is drawn evenly from min_tokens to max_tokens. Distractors are taken in the order of their BM25 score
    for the document, without the document itself and its near-duplicates, until T is full; the last is cut at the end
    so that the whole has at most T tokens. Then the place m is drawn evenly from 1 to k + 1. All draws come from
    `seed` and the row's id alone: workers, batches and order of rows change nothing.

    Adds, one row each: `packed_text` (str), `packed_tokens` (int, of the whole text, without special tokens),
    `target_tokens` (int, T), `document_tokens` (int), `document_position` (int, m; 0 where nothing was packed),
    `document_start` (int, its first character in packed_text), `distractor_count` (int, k), `distractor_ids` (JSON
    list), `packed_passed` (bool) and `packed_reason`: `ok`; `no_text`, `too_long` (the document alone has more than T
    tokens), both with an empty packed_text; `corpus_too_small` (all distractors are used up below T).

    Args:
        index: the corpus; built once, and the packer is to be built once too: it counts the corpus's tokens.
        tokenizer: a Hugging Face tokenizer, or a function text -> number of tokens.
        min_tokens, max_tokens: range of T, in tokens, both included.
        seed: changes all draws.
        text_column, id_column: the document and its id (the same ids as the index's, so that it can leave itself out).
        separator: text between two documents.
        near_duplicate: distractors that share this part of their 5-word runs with the document or more (containment,
            see `containment`) are left out.
        query_terms: how many of the document's words, the rarest first, are the query.
        max_slack: how many tokens below T still count as full. Cutting text can only come near T, since tokens may
            join across a cut.
    Raises:
        ValueError: a range that is empty or below 1.
        KeyError: a column is missing.
        TypeError: a document that is neither a string nor None.
    """

    index: BM25Index
    tokenizer: object
    min_tokens: int = 8192
    max_tokens: int = 65536
    seed: int = 0
    text_column: str = "text"
    id_column: str = "id"
    separator: str = "\n\n"
    near_duplicate: float = 0.8
    query_terms: int = 64
    max_slack: int = 8
    _sizes: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self):
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"tokens from {self.min_tokens} to {self.max_tokens}; give 1 <= min_tokens <= max_tokens")
        object.__setattr__(self, "_sizes", tuple(map(self.count, self.index.texts)))

    def count(self, text: str) -> int:
        """Tokens of a text, without special tokens."""
        if hasattr(self.tokenizer, "encode"):
            return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else 0
        return self.tokenizer(text)

    def __call__(self, row: dict) -> dict:
        text = column_of(row, self.text_column, "LongContextPacker")
        row_id = column_of(row, self.id_column, "LongContextPacker")
        if text is not None and not isinstance(text, str):
            raise TypeError(f"a document is a string or None, not {type(text).__name__}; name the column of the text")
        digest = hashlib.sha256(f"{self.seed}\0{row_id}".encode("utf-8", "surrogatepass")).digest()
        draw = random.Random(int.from_bytes(digest, "big"))
        target = draw.randint(self.min_tokens, self.max_tokens)
        size = self.count(text) if text and text.strip() else 0
        if not text or not text.strip():
            return self._row("", 0, target, 0, 0, 0, [], "no_text: the document is empty")
        if size > target:
            return self._row("", 0, target, size, 0, 0, [], f"too_long: {size} tokens, {target} drawn")
        places = self._choose(row_id, text, target, size)
        distractors, total = self._fit([self.index.texts[place] for place in places], text, 1, target)
        position = draw.randint(1, len(distractors) + 1)
        # Tokens may join otherwise at the new seams, so the length is fitted again where the document now stands.
        distractors, total = self._fit(distractors, text, position, target)
        position = min(position, len(distractors) + 1)
        packed = self._join(distractors, text, position)
        start = len(packed) - len(self._join(distractors[position - 1 :], text, 1))
        short = total < target - self.max_slack
        reason = f"corpus_too_small: {total} of {target} tokens" if short else OK
        ids = [self.index.ids[place] for place in places[: len(distractors)]]
        return self._row(packed, total, target, size, position, start, ids, reason)

    def _choose(self, row_id, text: str, target: int, size: int) -> list[int]:
        """Places of the distractors that fill `target` tokens; the last may go over it."""
        between = self.count(self.separator)
        own_runs = word_runs(text)
        chosen: list[int] = []
        for place in self.index.rank(text, self.query_terms):
            if size >= target - between:
                break
            if self.index.ids[place] == row_id or not self._sizes[place]:
                continue
            if containment(own_runs, word_runs(self.index.texts[place])) >= self.near_duplicate:
                continue
            chosen.append(place)
            size += between + self._sizes[place]
        return chosen

    def _join(self, distractors: list[str], text: str, position: int) -> str:
        return self.separator.join([*distractors[: position - 1], text, *distractors[position - 1 :]])

    def _fit(self, distractors: list[str], text: str, position: int, target: int) -> tuple[list[str], int]:
        """Shorten the last distractor until the whole has at most `target` tokens; (distractors, tokens)."""
        distractors = list(distractors)
        total = self.count(self._join(distractors, text, position))
        while total > target and distractors:
            last = distractors.pop()
            budget = self.count(last) - (total - target)
            # The longest beginning within the budget; counts of beginnings hardly ever fall as they grow.
            end = (
                bisect_right(range(len(last) + 1), budget, key=lambda n: self.count(last[:n])) - 1 if budget > 0 else 0
            )
            if last[:end].strip():
                distractors.append(last[:end])
            total = self.count(self._join(distractors, text, position))
        return distractors, total

    def _row(self, text, total, target, size, position, start, ids, reason) -> dict:
        return {
            "packed_text": text,
            "packed_tokens": total,
            "target_tokens": target,
            "document_tokens": size,
            "document_position": position,
            "document_start": start,
            "distractor_count": len(ids),
            "distractor_ids": json.dumps(ids),
            "packed_passed": reason == OK,
            "packed_reason": reason,
        }
