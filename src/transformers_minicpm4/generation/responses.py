"""
An answer of MiniCPM4 taken apart while it is written: thought, content, tool calls, and what could not be read.

MiniCPM4.1 thinks between `<think>` and `</think>`, MiniCPM4-MCP between `<|thought_start|>` and `<|thought_end|>`.
Calls stand between `<|tool_call_start|>` and `<|tool_call_end|>` (generation/tool_calls.py). Decode with
`skip_special_tokens=False`, or the tags are gone.

Source: MiniCPM4, arXiv 2506.07900; the formats: tokenizer_config.json of openbmb/MiniCPM4.1-8B and demo/minicpm4/MCP
of github.com/OpenBMB/MiniCPM.
"""

import json
import re
from dataclasses import dataclass

from .tool_calls import CALL_END, CALL_START, ResponseError, ToolCall, parse_tool_calls, render_tool_calls
from .tool_schemas import tool_schemas


THOUGHTS = {"<think>": "</think>", "<|thought_start|>": "<|thought_end|>"}
_TURN_START = "<|im_start|>assistant\n"
_TURN_END = "<|im_end|>"
_EOS = "</s>"
_LONGEST = max(map(len, (*THOUGHTS, *THOUGHTS.values(), CALL_START, CALL_END, _TURN_END)))


_TAGS = (*THOUGHTS, *THOUGHTS.values(), CALL_START, _TURN_END, _EOS)


def _any_of(*tags: str, more: str = "") -> re.Pattern:
    return re.compile("|".join(map(re.escape, tags)) + more, re.DOTALL)


_IN_CONTENT = _any_of(*THOUGHTS, *THOUGHTS.values(), CALL_START, _TURN_END)
_IN_THOUGHT = {opening: _any_of(closing, _TURN_END) for opening, closing in THOUGHTS.items()}
# What can change, inside a block, whether a tag is text of an argument: by what is open, "" for nothing.
_IN_BLOCK = {
    "": _any_of(CALL_END, _TURN_END, more=r"|\\.|'''|\"\"\"|'|\"|#"),
    "#": _any_of(CALL_END, _TURN_END, more=r"|\n"),
    **{quote: _any_of(CALL_END, _TURN_END, quote, more=r"|\\.|\n") for quote in ("'", '"')},
    **{quote: _any_of(CALL_END, _TURN_END, quote, more=r"|\\.") for quote in ("'''", '"""')},
}


@dataclass(frozen=True)
class ThinkingDelta:
    """The next piece of the thought."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True)
class ParsedResponse:
    """
    Args:
        thinking: the thought without its tags, "" without one. Several thoughts are joined by an empty line.
        content: the text outside thoughts and calls, without spaces at its ends.
        tool_calls: the calls that could be read, in order.
        errors: the rest of the calls, each with a sentence and its text, and what is wrong with the tags.
    """

    thinking: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    errors: tuple[ResponseError, ...] = ()

    def to_message(self) -> dict:
        """
        The assistant's message for `apply_chat_template`, in the form of Transformers' own `parse_response`:
        `reasoning_content` and `tool_calls` only where there are any, arguments as a dict. `content` is always there.
        """
        message = {"role": "assistant"}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        message["content"] = self.content
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message

    def to_openai(self) -> dict:
        """The message of OpenAI's chat completions: calls have ids, arguments are JSON text, no content is null."""
        message = self.to_message()
        message["content"] = self.content or None
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
                }
                for call in self.tool_calls
            ]
        return message


class _Text:
    """A text that grows by pieces; spaces, and `</s>`, at its end are kept back until more follows."""

    def __init__(self):
        self.pieces, self.kept, self.glue, self.empty = [], "", "", True

    def begin_part(self):
        """What comes next stands behind an empty line."""
        self.kept, self.glue, self.empty = "", "\n\n" if self.pieces else "", True

    def add(self, piece: str) -> str:
        piece = self.kept + piece
        if self.empty:
            piece = piece.lstrip()
        body = piece.rstrip()
        if body.endswith(_EOS):
            body = body.removesuffix(_EOS).rstrip()
        self.kept = piece[len(body) :]
        if not body:
            return ""
        delta = self.glue + body if self.empty else body
        self.pieces.append(delta)
        self.empty = False
        return delta


class ResponseStream:
    """
    Reads an answer piece by piece. The events, put together, are what `parse_response` gives for the whole text,
    however the text is cut. Text is held back only while it may still become a tag, or is space at an end.

    Args:
        prefix: the rendered prompt, as Transformers' `ResponseParser` takes it. What it has after its last
            `<|im_start|>assistant` line opens the answer and belongs to it: templates may write `<think>` there.
            Without that line all of it is taken for the answer's beginning.
        tools: tools by which arguments without names are named; see `tool_schemas`.

    Example:
    ```python
    >>> stream = ResponseStream()
    >>> stream.feed("<think>\\nSum.</th") + stream.feed("ink>\\n4") + stream.finish()
    [ThinkingDelta(text='Sum.'), ContentDelta(text='4')]
    ```
    """

    def __init__(self, *, prefix: str = "", tools=None):
        self._tools = list(tools or [])
        tool_schemas(self._tools)  # refuses what is no tool
        self._buffer, self._start = "", 0  # what is read of the buffer ends at `_start`
        self._ended = self._finished = False
        self._read = self._read_content
        self._thinking, self._content, self._calls, self._errors = _Text(), _Text(), [], []
        self._thought = None  # the tag that opened the last thought
        self._events = []
        self.initial_events = self.feed(prefix.rpartition(_TURN_START)[2])

    def feed(self, text: str) -> list:
        """
        Take the next piece of text and return what it completes, in order: `ThinkingDelta`, `ContentDelta`, `ToolCall`
        and `ResponseError`. Calls come when their block is closed.
        """
        if self._finished:
            raise RuntimeError("this answer is finished; make a new ResponseStream for the next one")
        return self._advance(text, final=False)

    def finish(self) -> list:
        """The events that only the end of the text decides. Nothing can be fed afterwards."""
        events = self._advance("", final=True)
        self._finished = True
        return events

    @property
    def response(self) -> ParsedResponse:
        """All that was read so far; complete after `finish`."""
        return ParsedResponse(
            "".join(self._thinking.pieces), "".join(self._content.pieces), tuple(self._calls), tuple(self._errors)
        )

    def _advance(self, text: str, final: bool) -> list:
        self._events = []
        if not self._ended:
            self._buffer, self._start = self._buffer[self._start :] + text, 0
            while self._read(final):
                pass
        return self._events

    def _say(self, field: _Text, end: int, behind: int):
        """Hand on the text up to `end`, and go on reading at `behind`."""
        delta = field.add(self._buffer[self._start : end])
        self._start = behind
        if delta:
            self._events.append(ThinkingDelta(delta) if field is self._thinking else ContentDelta(delta))

    def _say_all_but_a_beginning_tag(self, field: _Text, final: bool):
        """Hand on the text, without its last characters where they begin a tag."""
        end = len(self._buffer)
        tail = end if final else self._buffer.find("<", max(self._start, end - _LONGEST + 1))
        while 0 <= tail < end:
            if any(tag.startswith(self._buffer[tail:]) for tag in _TAGS):
                end = tail
            else:
                tail = self._buffer.find("<", tail + 1)
        self._say(field, end, end)

    def _error(self, message: str, source: str = "", repeats: bool = False):
        self._errors.append(ResponseError(message, source, repeats))
        self._events.append(self._errors[-1])

    def _end(self) -> bool:
        self._buffer, self._start, self._ended = "", 0, True
        return False

    # Each of the three takes one step, and says whether another can follow before more text comes.

    def _read_content(self, final: bool) -> bool:
        content = self._content
        for tag in _IN_CONTENT.finditer(self._buffer, self._start):
            if tag[0] == _TURN_END:
                self._say(content, tag.start(), tag.end())
                return self._end()
            if tag[0] == CALL_START:
                self._say(content, tag.start(), tag.end())
                self._at, self._quote, self._tag_in_string = 0, "", None
                self._read = self._read_block
                return True
            # In the midst of an answer the other tags are text: it may be about them.
            opens_answer = content.empty and not (content.kept + self._buffer[self._start : tag.start()]).strip()
            if tag[0] in THOUGHTS and opens_answer:
                self._start, self._thought = tag.end(), tag[0]
                self._thinking.begin_part()
                self._read = self._read_thought
                return True
            if tag[0] in THOUGHTS.values() and self._thought is None:
                self._say(content, tag.end(), tag.end())
                self._thought = tag[0]  # so that it is said once
                self._error(f"{tag[0]} closes a thought that nothing opened; give the prompt as prefix", tag[0])
                return True
        self._say_all_but_a_beginning_tag(content, final)
        return False

    def _read_thought(self, final: bool) -> bool:
        tag = _IN_THOUGHT[self._thought].search(self._buffer, self._start)
        if tag is not None and tag[0] != _TURN_END:
            self._say(self._thinking, tag.start(), tag.end())
            self._read = self._read_content
            return True
        if tag is not None:
            self._say(self._thinking, tag.start(), tag.end())
            self._end()
        else:
            self._say_all_but_a_beginning_tag(self._thinking, final)
        if tag is not None or final:
            called = CALL_START in "".join(self._thinking.pieces)
            self._error(
                f"the text ends inside the thought, before {THOUGHTS[self._thought]}"
                + ("; calls inside a thought are not read" if called else "")
            )
        return False

    def _read_block(self, final: bool) -> bool:
        """The block ends at a tag outside strings, or inside one that its line, or the text, does not close."""
        buffer, start = self._buffer, self._start
        while (found := _IN_BLOCK[self._quote].search(buffer, start + self._at)) is not None:
            token, place = found[0], (found[0], found.start() - start)
            if token in (CALL_END, _TURN_END):
                if self._quote in ("", "#"):
                    return self._close_block(*place)
                self._tag_in_string = self._tag_in_string or place
            elif token == "\n" and self._tag_in_string:
                return self._close_block(*self._tag_in_string)
            elif self._quote and token[0] != "\\":  # the line's end, or the quote again
                self._quote, self._tag_in_string = "", None
            elif token[0] in "#'\"":
                if token != "#" and not final and len(buffer) - found.start() < 3:
                    self._at = found.start() - start  # one quote, or the first of three
                    return False
                self._quote = token
            self._at = found.end() - start
        if final:
            return self._close_block(*(self._tag_in_string or ("", len(buffer) - start)))
        self._at = max(self._at, len(buffer) - start - _LONGEST + 1)
        return False

    def _close_block(self, tag: str, length: int) -> bool:
        block = self._buffer[self._start : self._start + length]
        self._start += length + len(tag)
        calls, errors = parse_tool_calls(block, self._tools)
        self._calls += calls
        self._events += calls
        for error in errors:
            self._error(error.message, error.source)
        self._read = self._read_content
        if tag == CALL_END:
            return True
        self._error(f"the text ends before {CALL_END}; the calls that were complete are read", block, repeats=True)
        return self._end()


def parse_response(text: str, *, prefix: str = "", tools=None) -> ParsedResponse:
    """
    Take a whole answer apart. Nothing in it is evaluated; time grows linearly with its length.

    Args:
        text: what the model wrote, special tokens kept. It may be cut anywhere; what follows `<|im_end|>` is not read.
        prefix, tools: as for `ResponseStream`.

    Example:
    ```python
    >>> response = parse_response("<think>\\nHm.\\n</think>\\n<|tool_call_start|>look-up(from=1)<|tool_call_end|>")
    >>> response.thinking, response.tool_calls[0].name, response.tool_calls[0].arguments
    ('Hm.', 'look-up', {'from': 1})
    ```
    """
    stream = ResponseStream(prefix=prefix, tools=tools)
    stream.feed(text)
    stream.finish()
    return stream.response


def render_response(message: dict, *, thought: str = "<think>") -> str:
    """
    An assistant's message as the text that the model would have written: thought, calls, content, in this order. Put
    it into `content` for our chat templates, which know neither thoughts nor calls.

    Args:
        message: as `ParsedResponse.to_message` or `to_openai` gives it.
        thought: `"<think>"` (MiniCPM4.1) or `"<|thought_start|>"` (MiniCPM4-MCP).
    Raises:
        ValueError: `parse_response` would not read the text back as this message, because its parts hold tags.
    """
    if thought not in THOUGHTS:
        raise ValueError(f"thought is {thought!r}; give {' or '.join(map(repr, THOUGHTS))}")
    thinking, content = (message.get("reasoning_content") or "").strip(), (message.get("content") or "").strip()
    calls = message.get("tool_calls") or []
    parts = [f"{thought}\n{thinking}\n{THOUGHTS[thought]}"] if thinking else []
    parts += [render_tool_calls(calls)] if calls else []
    text = "\n".join([*parts, content] if content else parts)
    read = parse_response(text)
    if (read.thinking, read.content, len(read.tool_calls), read.errors) != (thinking, content, len(calls), ()):
        raise ValueError("the message's thought or content holds tags of the format; take them out or change them")
    return text
