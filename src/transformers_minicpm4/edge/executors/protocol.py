"""
What a runtime offers, said beforehand: a fixed set of calls with one meaning, of which each executor declares its own.

Shape letters: `S` tokens of a text, `K` candidates, `T` nodes of a drafted tree, `V` vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...generation.draft_tree import DraftTree
from ..trace import Trace


CALLS = ("generate", "score", "prefill", "decode", "verify", "reset")


class CallNotOffered(NotImplementedError):
    """A call that the executor did not declare; names those it did."""


@dataclass(frozen=True)
class Scores:
    """
    Log-probabilities of a text, in nats. Row `s` is the distribution after tokens `0 .. s`.

    Attributes:
        logprobs: of the token that follows, float64 `[S - 1]`.
        top_ids: the likeliest tokens, the likeliest first, int64 `[S - 1, K]`.
        top_logprobs: theirs, float64 `[S - 1, K]`.
    """

    logprobs: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    @classmethod
    def of_logits(cls, logits: torch.Tensor, following: Sequence[int], top: int) -> Scores:
        """From logits `[S - 1, V]` and the `S - 1` tokens that follow."""
        logprobs = logits.double().log_softmax(-1).cpu()
        best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
        given = torch.tensor(following, dtype=torch.long)
        return cls(logprobs.gather(1, given[:, None])[:, 0], best.indices, best.values)

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Scores of consecutive pieces of one text."""
        names = ("logprobs", "top_ids", "top_logprobs")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


class Executor:
    """
    One model in one runtime. The public methods check what they are given, write into `trace`, and call the method of
    the same name with an underscore, which a subclass has for each call in `calls`.

    `prefill`, `decode`, `verify` and `keep` go on with one text, which `reset` begins anew; `score` and `generate` are
    about texts of their own, and `generate` leaves none behind that one could go on with.

    Attributes:
        name: shown in reports and errors.
        calls: what is offered, of `CALLS`.
        vocab_size: `V`, rows of the embedding.
        context: tokens that a text may have.
    """

    name: str
    calls: frozenset[str] = frozenset()
    vocab_size: int
    context: int
    trace: Trace | None = None
    # Rows of the last `verify` that `keep` may name, and whether the runtime's memory was given back.
    _drafted = 0
    _closed = False

    def generate(self, token_ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int] = ()) -> list[int]:
        """
        The greedy answer: at most `max_new_tokens` tokens, a token of `stop_ids` being the last.

        Raises:
            CallNotOffered: this executor has no such call.
            ValueError: no tokens, tokens outside the vocabulary, or more than fit into the context; a closed executor.
            TypeError: tokens that are no whole numbers.
        """
        with self._call("generate", tokens=len(token_ids), max_new_tokens=max_new_tokens):
            if max_new_tokens < 0:
                raise ValueError(f"max_new_tokens is 0 or more, got {max_new_tokens}.")
            return self._generate(self._check(token_ids, max_new_tokens), max_new_tokens, frozenset(stop_ids))

    def score(self, token_ids: Sequence[int], top: int = 16) -> Scores:
        """
        Log-probabilities of a text's tokens after the first, and of the `top` likeliest at each place.

        Raises: as `generate`; also a text of fewer than two tokens, `top` below 2.
        """
        with self._call("score", tokens=len(token_ids), top=top):
            token_ids = self._check(token_ids)
            if len(token_ids) < 2:
                raise ValueError("score needs two tokens or more: the first has nothing before it.")
            if top < 2:
                raise ValueError(f"top is 2 or more (a gap takes two), got {top}.")
            return self._score(token_ids, min(top, self.vocab_size))

    def prefill(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Put tokens behind the text. Returns the logits after the last, float `[V]`. Raises: as `generate`."""
        with self._call("prefill", tokens=len(token_ids)):
            return self._prefill(self._check(token_ids, self._held()))

    def decode(self, token: int) -> torch.Tensor:
        """Put one token behind the text. Returns the logits after it, float `[V]`. Raises: as `generate`."""
        with self._call("decode", position=self._held()):
            return self._decode(*self._check([token], self._held()))

    def verify(self, root: int, tree: DraftTree) -> torch.Tensor:
        """
        The logits after the token `root` and after each node of a tree drafted behind it, float `[T + 1, V]`. The text
        does not grow until `keep` says which of these were right.
        """
        with self._call("verify") as arguments:
            arguments["nodes"] = len(tree)
            self._check([root, *tree.tokens], self._held())
            logits = self._verify(root, tree)
            self._drafted = len(logits)
            return logits

    def keep(self, rows: Sequence[int]) -> None:
        """
        Put the root (row 0) and the accepted nodes (`n` is row `n + 1`) of the last `verify` behind the text.

        Raises:
            ValueError: rows that are not of a `verify` just before.
        """
        with self._call("verify", kept=len(rows)):
            strangers = [row for row in rows if not 0 <= row < self._drafted]
            if strangers:
                given = f"has rows 0 .. {self._drafted - 1}" if self._drafted else "was not called since the text grew"
                raise ValueError(f"row {strangers[0]} was given to keep, and verify {given}.")
            self._keep(list(rows))
            self._drafted = 0

    def reset(self) -> None:
        """Begin a new text."""
        with self._call("reset"):
            self._reset()

    def close(self) -> None:
        """Give the runtime's memory back; there are no calls afterwards."""
        self._closed = True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    @contextmanager
    def _call(self, name: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        if name not in self.calls:
            offered = ", ".join(call for call in CALLS if call in self.calls)
            raise CallNotOffered(f"{self.name} does not offer {name}; it offers {offered}.")
        if self._closed:
            raise ValueError(f"{self.name} was closed; open it again.")
        if name in ("generate", "prefill", "decode", "reset"):
            self._drafted = 0
        with self._span(name, **arguments) as shown:
            yield shown

    @contextmanager
    def _span(self, name: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Of the trace, where there is one."""
        if self.trace is None:
            yield arguments
            return
        with self.trace.span(name, lane=self.name, **arguments) as shown:
            yield shown

    def _check(self, token_ids: Sequence[int], more: int = 0) -> list[int]:
        token_ids = [operator.index(token) for token in token_ids]
        if not token_ids:
            raise ValueError("no tokens were given; give at least one (the tokenizer's <s> for an empty text).")
        outside = [token for token in token_ids if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(f"token {outside[0]} was given; {self.name} knows 0 .. {self.vocab_size - 1}.")
        if len(token_ids) + more > self.context:
            raise ValueError(
                f"{len(token_ids) + more} tokens do not fit into {self.name}'s context of {self.context}; "
                "open it with a larger context."
            )
        return token_ids

    def _held(self) -> int:
        """Tokens of the text so far."""
        return 0

    def _generate(self, token_ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        """Of the smaller calls, for executors that have them."""
        made: list[int] = []
        self.reset()
        logits = self.prefill(token_ids) if max_new_tokens > 0 else None
        while len(made) < max_new_tokens:
            made.append(int(logits.argmax()))
            if made[-1] in stop_ids or len(made) == max_new_tokens:
                break
            logits = self.decode(made[-1])
        self.reset()
        return made


__all__ = ["CALLS", "CallNotOffered", "Executor", "Scores"]
