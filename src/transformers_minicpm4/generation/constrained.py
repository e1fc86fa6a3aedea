"""
Text that cannot but follow a JSON schema, a regular expression or a grammar: tokens that would leave it get the score
minus infinity. The grammar engine is llguidance (MIT), which masks a whole vocabulary at a step.

    processor = ConstrainedLogitsProcessor(Grammar.json_schema(schema), tokenizer)
    model.generate(**inputs, logits_processor=[processor], max_new_tokens=200)

The state is derived from the ids of each call: rows may be reordered (beam search), and a text may be taken back and
go on differently (speculative decoding). Shape letters: B rows, S tokens of prompt and text, V scores a row.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .chat import as_ids
from .grammar import Grammar, _matcher


class ConstrainedLogitsProcessor(LogitsProcessor):
    """
    Keeps generated text inside a grammar. Where the text may end, the ids that end it are allowed as well; where it
    must end, they alone are.

    Works with sampling, greedy and beam search, batches, and `custom_generate=speculative_decode`. One processor
    serves one prompt (or one batch), however often; it is not for several threads at once.

    Args:
        grammar: what the text has to follow.
        tokenizer: of the model. What llguidance makes of it (a second for 50,000 tokens) is kept with it.
        prompt_length: tokens a row before the constrained text, padding included; `None` takes the length of the
            first call.
        eos_token_id: all ids that end a text, `model.generation_config.eos_token_id`; `None` takes the tokenizer's.
            A text token among them can only end the text here.

    Raises:
        ImportError: llguidance is not installed.
        ValueError: a grammar that this vocabulary cannot begin, no id that ends the text, or a tokenizer whose tokens
            are no bytes. In a call: see `__call__`.
    """

    def __init__(
        self,
        grammar: Grammar,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ):
        if prompt_length is not None and prompt_length < 0:
            raise ValueError(f"prompt_length is 0 or more tokens, got {prompt_length}.")
        eos = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
        self.eos_token_ids = sorted(set(as_ids(eos)))
        if not self.eos_token_ids or self.eos_token_ids[0] < 0:
            raise ValueError(
                f"constrained text needs token ids that end it, got {eos!r}; pass eos_token_id="
                "model.generation_config.eos_token_id."
            )
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self._vocabulary = llguidance_tokenizer(tokenizer, self.eos_token_ids[0])
        # llguidance lets a special token stand for its own name in a string, and decoded without special tokens it
        # would be missing there. A Lark grammar can ask for one on purpose (`<name>`).
        added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
        self._special = [] if grammar.names_tokens else sorted(added | set(tokenizer.all_special_ids))
        self._start = [_matcher()(self._vocabulary, text, log_level=0) for text in grammar.texts]
        self._rows: list[_Row] = []
        self._prompts: torch.Tensor | None = None
        self._begun = False
        self._allowed(_Row.begin(self._start), len(tokenizer))  # a dead end at the first token is told now

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input_ids: prompt and text so far, `[B, S]`.
            scores: logits or log-probabilities of the next token, `[B, V]`. V may differ from the vocabulary's size.

        Returns:
            `torch.Tensor`: the scores, `[B, V]`, minus infinity at what the grammar forbids. A row that has ended, or
            that another processor or a beam without any probability led out of the grammar, may only end.

        Raises:
            ValueError: another prompt than before, a first text outside the grammar, a state from which no token goes
                on, or only tokens that other processors forbid.
        """
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        length = self.prompt_length
        prompt = input_ids[:, :length]
        if self._prompts is None and input_ids.shape[1] >= length:
            self._prompts = prompt.unique(dim=0) if length else prompt[:1]
        # Beams multiply and reorder rows, so every row may be any of them.
        if input_ids.shape[1] < length or not bool((prompt[:, None] == self._prompts).all(-1).any(-1).all()):
            raise ValueError(
                f"this ConstrainedLogitsProcessor began with a prompt of {length} tokens, and the first {length} "
                f"of these {input_ids.shape[1]} tokens are another one; make a new processor for another prompt."
            )
        texts = [self._until_eos(text) for text in input_ids[:, length:].tolist()]
        places = self._follow([body for body, _ in texts])
        allowed = np.zeros((len(texts), scores.shape[1]), dtype=bool)
        inside = []
        for number, ((body, ended), row) in enumerate(zip(texts, places)):
            if ended or len(row.ids) < len(body):
                allowed[number, [token for token in self.eos_token_ids if token < scores.shape[1]]] = True
                if not self._begun and not ended:
                    raise ValueError(
                        f"the text after the first {length} tokens, {self.tokenizer.decode(body)[:80]!r}, does not "
                        "begin as the grammar says; prompt_length is the number of tokens of the whole prompt."
                    )
            else:
                allowed[number] = self._allowed(row, scores.shape[1])
                inside.append(number)
        self._begun = True
        masked = scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), float("-inf"))
        if inside and bool((masked[inside] == float("-inf")).all(-1).any()):
            raise ValueError(
                "no token is left: those that the grammar allows here are forbidden by another processor "
                "(min_new_tokens, suppress_tokens, bad_words_ids, ...); leave that one out."
            )
        return masked

    def is_complete(self, ids: torch.Tensor | Sequence[int]) -> bool | list[bool]:
        """
        Whether the text is a whole one of the grammar, and not one that `max_new_tokens` cut.

        Args:
            ids: what `generate` returned, prompt included: `[S]` or `[B, S]`, padded after an end or not.

        Returns:
            `bool` of one sequence, `list` of `bool` of several.
        """
        if isinstance(ids, torch.Tensor):
            ids = ids.tolist()
        if ids and isinstance(ids[0], Sequence):
            return [self.is_complete(row) for row in ids]
        if self.prompt_length is None:
            raise ValueError("no call of generate has shown how long the prompt is; pass prompt_length.")
        body, _ = self._until_eos(list(ids[self.prompt_length :]))
        row = _Row.begin(self._start)
        return self._move(row, body) == len(body) and row.is_accepting()

    def _until_eos(self, text: list[int]) -> tuple[list[int], bool]:
        for place, token in enumerate(text):
            if token in self.eos_token_ids:
                return text[:place], True
        return text, False

    def _follow(self, bodies: list[list[int]]) -> list[_Row]:
        """A row for each text, moved to it. Each takes the kept row that shares most with it."""
        left, found = self._rows, []
        for body in bodies:
            # Most often rows keep their order and grow by one token: then the first that is left fits.
            row = next((row for row in left if row.ids == body[: len(row.ids)] and len(body) - len(row.ids) < 2), None)
            if row is None and left:
                row = max(left, key=lambda row: _common(row.ids, body))
            if row is None:
                row = _Row.begin(self._start)
            else:
                left = [other for other in left if other is not row]
            self._move(row, body)
            found.append(row)
        self._rows = found
        return found

    def _move(self, row: _Row, body: list[int]) -> int:
        """Bring a row to `body` as far as the grammar goes; returns how many tokens that are."""
        common = _common(row.ids, body)
        if common < len(row.ids):
            for matcher in row.matchers:
                matcher.rollback(len(row.ids) - common)
        rest = body[common:]
        # An id that the vocabulary does not have would leave llguidance in an error for good.
        known = next((place for place, token in enumerate(rest) if token >= self._vocabulary.vocab_size), len(rest))
        if known:
            known = min(matcher.validate_tokens(rest[:known]) for matcher in row.matchers)
            for matcher in row.matchers:
                matcher.consume_tokens(rest[:known])
        row.ids[common:] = rest[:known]
        self._check(row)
        return len(row.ids)

    def _allowed(self, row: _Row, width: int) -> np.ndarray:
        """`[V]`, whether each token may come next."""
        masks = [np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8) for matcher in row.matchers]
        bits = np.unpackbits(np.bitwise_and.reduce(masks), bitorder="little")
        self._check(row)
        allowed = np.zeros(max(width, len(bits)), dtype=bool)
        allowed[: self._vocabulary.vocab_size] = bits[: self._vocabulary.vocab_size]
        allowed[self._vocabulary.eos_tokens] = False
        allowed[[token for token in self._special if token < len(allowed)]] = False
        allowed = allowed[:width]
        allowed[[token for token in self.eos_token_ids if token < width]] = row.is_accepting()
        if not allowed.any():
            raise ValueError(
                f"the grammar has a dead end: after {self.tokenizer.decode(row.ids)[-80:]!r} none of the model's "
                f"{width} tokens goes on and the text is not complete. Make the grammar possible: it may ask for a "
                "character that the vocabulary lacks, or for text that is the name of a special token."
            )
        return allowed

    def _check(self, row: _Row) -> None:
        error = next((matcher.get_error() for matcher in row.matchers if matcher.is_error()), None)
        if error:
            self._rows = []
            raise ValueError(
                f"llguidance gave up after {self.tokenizer.decode(row.ids)[-80:]!r}: "
                f"{error.strip().splitlines()[0][:300]}. A grammar without an end (a required part "
                "that contains itself) or a too large one does this; simplify it."
            )


class _Row(NamedTuple):
    matchers: list  # one for each part of the grammar
    ids: list[int]  # consumed by each of them

    @classmethod
    def begin(cls, start: list) -> _Row:
        return cls([matcher.deep_copy() for matcher in start], [])

    def is_accepting(self) -> bool:
        return all(matcher.is_accepting() for matcher in self.matchers)


def _common(one: list[int], other: list[int]) -> int:
    if one == other[: len(one)]:
        return len(one)
    return next(place for place, token in enumerate(one) if place == len(other) or token != other[place])


# --- Vocabulary ------------------------------------------------------------------------------------------------------


_VOCABULARIES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_PROBE = 'a "b": [1, 2]'


def llguidance_tokenizer(tokenizer: PreTrainedTokenizerBase, eos_token_id: int):
    """
    The vocabulary as llguidance's `LLTokenizer`, made once for each tokenizer (and again when it has grown).

    Raises:
        ImportError: llguidance is not installed.
        ValueError: the bytes that a token stands for could not be found.
    """
    try:
        import llguidance
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise ImportError(
            "constrained decoding needs llguidance: pip install 'transformers_minicpm4[edge]' (or llguidance)."
        ) from error
    known = _VOCABULARIES.get(tokenizer)
    if known is not None and known[0] == len(tokenizer):
        return known[1]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    probe = [token for token in tokenizer.encode(_PROBE, add_special_tokens=False) if token not in special]
    expected = tokenizer.decode(probe, clean_up_tokenization_spaces=False).strip()
    makers = [lambda: llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Pieces(tokenizer, special, eos_token_id)))]
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        makers.insert(0, lambda: from_tokenizer(tokenizer, eos_token=eos_token_id))
    for make in makers:
        try:
            made = make()
        except ValueError:  # a form of tokenizer.json that llguidance does not know
            continue
        # It also takes some that it misreads (a Metaspace decoder): there spaces would not be spaces.
        if made.decode_bytes(probe).decode(errors="replace").strip() == expected:
            _VOCABULARIES[tokenizer] = (len(tokenizer), made)
            return made
    raise ValueError(
        f"the tokens of this {type(tokenizer).__name__} could not be read as bytes; byte-level BPE and SentencePiece "
        "vocabularies (spaces written as 'Ġ' or '▁') can be used for constrained decoding."
    )


class _Pieces:
    """Vocabulary in the form that `llguidance.TokenizerWrapper` takes, from the tokens' names."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: set[int], eos_token_id: int):
        self.eos_token_id, self.bos_token_id = eos_token_id, tokenizer.bos_token_id
        self.special_token_ids = sorted(special | {eos_token_id})
        names = [tokenizer.convert_ids_to_tokens(token) or "" for token in range(len(tokenizer))]
        byte_level = "Ġ" in names
        self.tokens = [
            name.encode() if token in special else (_from_byte_level if byte_level else _from_sentencepiece)(name)
            for token, name in enumerate(names)
        ]

        ids = {piece: token for token, piece in enumerate(self.tokens) if piece and token not in special}
        longest = max(map(len, ids))
        self._ids, self._sizes = ids, range(longest, 0, -1)

    def __call__(self, data: bytes) -> list[int]:
        """
        Tokens of text that the grammar forces, the longest first. `tokenizer.encode` would begin with a space.
        """
        tokens = []
        while data:
            piece = next((data[:size] for size in self._sizes if data[:size] in self._ids), None)
            if piece is None:
                break
            tokens.append(self._ids[piece])
            data = data[len(piece) :]
        return tokens


def _from_sentencepiece(name: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name):
        return bytes([int(name[3:5], 16)])
    return name.replace("▁", " ").encode()


# Byte-level BPE (Radford et al. 2019) writes printable bytes as they are, and the rest in order from U+0100.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_HIDDEN)}


def _from_byte_level(name: str) -> bytes:
    return bytes(_BYTES[letter] for letter in name) if all(letter in _BYTES for letter in name) else name.encode()
