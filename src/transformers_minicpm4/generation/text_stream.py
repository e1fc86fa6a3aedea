"""
Token ids in, text out, while a sequence is being generated.

A piece of text is returned once nothing that may follow can change it: not the rest of a character whose bytes are
spread over tokens, and not the rest of a stop string. Only a window of the last tokens is decoded, so that a token
costs the same at any length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Of a character's at most four bytes up to three can be there without it being complete.
_MAX_BROKEN = 3
# Pieces that stand for one byte, in vocabularies with byte fallback (SentencePiece, Kudo and Richardson 2018).
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# The window is shortened to _KEPT tokens when it has more than _WINDOW.
_WINDOW, _KEPT = 16, 5


class TextStream:
    """
    Text of one sequence, piece by piece.

    All pieces together are `tokenizer.decode(all_ids, skip_special_tokens=..., clean_up_tokenization_spaces=False)`,
    cut before the first stop string, however the ids were chunked. The stop string that begins earliest in the text is
    the first; of several that begin at one place it is the shortest.

    A run of byte pieces (`<0xE4>`) is held back until another token follows: one wrong byte makes `decode` replace
    every byte of the run, also those of characters that looked complete.

    Args:
        tokenizer: a tokenizer of Transformers, fast or slow.
        stop: strings that end the text. They are not returned.
        skip_special_tokens: as in `tokenizer.decode`.

    Attributes:
        stopped: the stop string that was found, or `None`.

    Raises:
        ValueError: a stop string that is empty, not a `str`, or has lone surrogates, which no text contains.

    Example:
    ```python
    >>> stream = TextStream(tokenizer, stop=["\\n\\n"])
    >>> for token in tokens:
    ...     print(stream.put([token]), end="")
    ...     if stream.stopped:
    ...         break
    >>> print(stream.end())
    ```
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._stop = _StopStrings(stop)
        self._special = set(tokenizer.all_special_ids)
        self._special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._kinds: dict[int, str] = {}
        self._window: list[int] = []
        self._run = 0  # byte pieces at the end of the window
        self._decoded = 0  # tokens of the window that were there at the last look
        self._shown = 0  # characters of the window's text that went on
        self._pieces: list[str] = []
        self._ended = False

    @property
    def stopped(self) -> str | None:
        return self._stop.found

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._pieces)

    def put(self, token_ids: Sequence[int]) -> str:
        """
        The next tokens arrived.

        Args:
            token_ids: any number of ids, in order.

        Returns:
            `str`: new text that is certain, often empty. Always empty after a stop string.

        Raises:
            ValueError: a negative id, or the text has been ended.
        """
        if self._ended:
            raise ValueError("this TextStream has been ended; make a new one for a new text.")
        ids = [int(token) for token in token_ids]
        if ids and min(ids) < 0:
            raise ValueError(f"token ids are 0 or more, got {min(ids)}; remove padding and label masks first.")
        if self.stopped is not None:
            return ""
        for token in ids:
            kind = self._kind(token)
            if kind != "nothing":
                self._window.append(token)
                self._run = self._run + 1 if kind == "byte" else 0
        end = len(self._window) - self._run
        if end <= self._decoded:
            return ""
        text = self._decode(self._window[:end])
        certain = max(self._shown, len(text) - _broken(text))
        new = text[self._shown : certain]
        self._shown, self._decoded = certain, end
        if end > _WINDOW:
            self._shorten(text, end)
        return self._emit(self._stop.put(new))

    def end(self) -> str:
        """No more tokens follow: what was held back, an incomplete character as U+FFFD, as `decode` does."""
        if self._ended or self.stopped is not None:
            self._ended = True
            return ""
        self._ended = True
        return self._emit(self._stop.put(self._decode(self._window)[self._shown :]) + self._stop.end())

    def _emit(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)

    def _kind(self, token: int) -> str:
        """`"nothing"` of a token that `decode` passes over, `"byte"` of a byte piece, else `"text"`."""
        kind = self._kinds.get(token)
        if kind is None:
            name = self._tokenizer.convert_ids_to_tokens(token)
            kind = "text"
            # Ids above the vocabulary, which a model with padded logits may draw, have no name.
            if (name is None or (self._skip and token in self._special)) and not self._decode([token]):
                kind = "nothing"
            elif name is not None and _BYTE_PIECE.fullmatch(name):
                kind = "byte"
            self._kinds[token] = kind
        return kind

    def _shorten(self, text: str, end: int) -> None:
        """
        Keep the last tokens only, if at least one certain character stays with them.

        What stays may begin inside a character and then decode to another beginning; its end is the same, and text is
        counted from there. A certain character in front of the uncertain ones means that all bytes of these are in the
        window, and that the space that some decoders take from the front of a text has been taken from this one.
        """
        rest = self._decode(self._window[end - _KEPT : end])
        certain = len(rest) - (len(text) - self._shown)
        if certain > 0:
            del self._window[: end - _KEPT]
            self._shown, self._decoded = certain, _KEPT


def _broken(text: str) -> int:
    """How many characters at the end may belong to an incomplete one."""
    return min(len(text) - len(text.rstrip(REPLACEMENT)), _MAX_BROKEN)


class _StopStrings:
    """Passes text on until the first of some strings, holding back what may become one."""

    def __init__(self, strings: Sequence[str]):
        if isinstance(strings, str):
            raise ValueError(f"stop is a list of strings, got the string {strings!r}; write [{strings!r}].")
        for string in strings:
            if not isinstance(string, str):
                raise ValueError(f"stop strings are of type str, got {string!r} of type {type(string).__name__}.")
            if not string:
                raise ValueError("a stop string is empty, which would stop before the first character; leave it out.")
            if any("\ud800" <= character <= "\udfff" for character in string):
                raise ValueError(
                    f"the stop string {string!r} has a lone surrogate, which no text contains; write the character "
                    "itself, e.g. '\\U0001f600' and not '\\ud83d\\ude00'."
                )
        self._strings = sorted(set(strings), key=len)
        self._held = ""
        self.found: str | None = None

    def put(self, text: str) -> str:
        if not self._strings:
            return text
        text = self._held + text
        place, string = self._first(text)
        begun = min((self._begun(text, string) for string in self._strings), default=len(text))
        # A string that is complete must wait while a longer one that began before it may still win.
        if string is not None and begun >= place:
            self.found, self._held = string, ""
            return text[:place]
        self._held = text[begun:]
        return text[:begun]

    def end(self) -> str:
        if self.found is not None:
            return ""
        place, self.found = self._first(self._held)
        return self._held[:place]

    def _first(self, text: str) -> tuple[int, str | None]:
        """Where the first string is, and which; the text's end and `None` if there is none."""
        best = len(text), None
        for string in self._strings:  # the shortest first
            place = text.find(string, 0, best[0] + len(string) - 1)
            if place >= 0:
                best = place, string
        return best

    @staticmethod
    def _begun(text: str, string: str) -> int:
        """The first place from which the rest of the text is an incomplete `string`; the text's end if none."""
        for place in range(max(0, len(text) - len(string) + 1), len(text)):
            if string.startswith(text[place:]):
                return place
        return len(text)
