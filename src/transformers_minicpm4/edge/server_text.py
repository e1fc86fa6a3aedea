"""
Between OpenAI's messages and token ids: a request becomes a prompt, and an answer's tokens become deltas.
"""

from __future__ import annotations

import contextlib
import json
import re
from itertools import pairwise

from ..generation.chat import encode_rendered
from ..generation.responses import THOUGHTS, ContentDelta, ResponseError, ResponseStream, ThinkingDelta
from ..generation.text_stream import TextStream
from ..generation.tool_calls import CALL_END, CALL_START, ToolCall, render_tool_calls
from .engine import EdgeEngine
from .server_schema import ApiError, ChatRequest


TURN_START, TURN_END = "<|im_start|>assistant\n", "<|im_end|>"
# What assistants write themselves, in earlier messages too.
ANSWER_TAGS = (*THOUGHTS, *THOUGHTS.values(), CALL_START, CALL_END)
TAGS = (*ANSWER_TAGS, TURN_END)
# Stands in a rendered prompt where a client's text must not become a control token: no text holds half a pair.
MARK = "\ud800"


# ------------------------------------------------------------------------------------------------------------ prompts


class PromptMaker:
    """
    Messages and tools to token ids, by the tokenizer's chat template.

    Control tokens come from the template and from us alone: the name of one in a client's text (contents, tools,
    arguments) is tokenized as text. Assistants' messages may hold thoughts and calls as the model writes them.
    Texts without such names are tokenized whole, as the engine does.
    """

    def __init__(self, engine: EdgeEngine):
        if engine.tokenizer is None or engine.tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template, which messages need; store one, e.g. "
                "transformers_minicpm4.generation.chat_template('minicpm4')."
            )
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.tokenizer("x")  # settles truncation and padding: from now on threads only read from it
        self.names = control_names(self.tokenizer)
        self.lead, self.lead_ids = _lead(self.tokenizer, self.names)
        self.names_but_tags = [name for name in self.names if name not in ANSWER_TAGS]
        # Every token stands for its own text, in byte-level vocabularies and in those with byte fallback.
        longest = max(len(name.encode()) for name in self.tokenizer.get_vocab())
        self.most_bytes = longest * (engine.context - 1)
        self.template_has_tools = self._template_has_tools()

    def _template_has_tools(self) -> bool:
        name = "tool_that_only_the_template_can_show"
        tool = {"name": name, "description": "", "parameters": {"type": "object", "properties": {}}}
        with contextlib.suppress(Exception):  # a template may refuse this in any way
            return name in self._apply([{"role": "user", "content": ""}], [{"type": "function", "function": tool}])
        return False

    def _apply(self, messages: list[dict], tools: list[dict], **options) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=True, **options
        )

    def text(self, request: ChatRequest) -> str:
        """
        The rendered prompt, with a `MARK` in each name of a control token that is the client's.

        Raises:
            ApiError: what the template refuses, or half a surrogate pair.
        """
        if len(request.messages) >= self.engine.context:
            raise self._too_long(f"{len(request.messages):,} messages")
        # Constrained text begins at once, without a thought.
        thinking = False if request.schema is not None else request.thinking
        options = {} if thinking is None else {"enable_thinking": thinking}
        try:
            tools = _marked(request.tools, self.names)
            messages = [self._message(message) for message in request.messages]
            if tools and not self.template_has_tools:
                messages, tools = _with_tools(messages, tools), []
            return self._apply(messages, tools, **options)
        except ApiError:
            raise
        except UnicodeEncodeError as error:
            raise ApiError("the messages or tools hold half a surrogate pair, no character.", "messages") from error
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ApiError(f"the model's chat template cannot render these messages: {reason}", "messages") from error

    def _message(self, message: dict) -> dict:
        """Marked; without template logic for calls, an earlier call is as the model wrote it."""
        names = {"content": self.names_but_tags} if message["role"] == "assistant" else {}
        marked = {name: _marked(value, names.get(name, self.names)) for name, value in message.items()}
        if "tool_calls" not in message or self.template_has_tools:
            return marked
        try:
            calls = render_tool_calls(message["tool_calls"])
        except ValueError as error:
            raise ApiError(f"an earlier tool call cannot be written: {error}.", "messages") from error
        calls = CALL_START + _marked(calls.removeprefix(CALL_START).removesuffix(CALL_END), self.names) + CALL_END
        content = marked["content"]
        return {"role": message["role"], "content": f"{calls}\n{content}" if content else calls}

    def ids(self, text: str) -> list[int]:
        """
        Args:
            text: as `PromptMaker.text` gives it.

        Raises:
            ApiError: no room for an answer.
        """
        first, *others = text.split(MARK)
        size = len(first.encode()) + sum(len(part.encode()) for part in others)
        if size > self.most_bytes or len(others) >= self.engine.context:
            raise self._too_long(f"{size:,} bytes, more tokens than fit,")
        ids = encode_rendered(self.tokenizer, first)["input_ids"]
        if others:
            parts = [self.lead + part for part in others]
            for part in self.tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]:
                ids += part[self.lead_ids :]
        ids = self.engine.encode(ids)
        if len(ids) >= self.engine.context:
            raise self._too_long(f"{len(ids):,} tokens")
        return ids

    def _too_long(self, size: str) -> ApiError:
        return ApiError(
            f"the prompt has {size} and this server's context is {self.engine.context:,} tokens, of which the answer "
            "needs some too; shorten the messages.",
            "messages",
            code="context_length_exceeded",
        )


def control_names(tokenizer) -> list[str]:
    """The tokens that text must not become: special ones, those that the chat template writes, and `TAGS`."""
    template = str(tokenizer.chat_template)
    added = tokenizer.added_tokens_decoder.values()
    # Words, and runs of spaces, are added tokens of some vocabularies and control nothing.
    written = {one.content for one in added if one.content[:1] in "<[" and one.content in template}
    special = {one.content for one in added if one.special or one.content in TAGS}
    return sorted(name for name in special | written if len(name) > 1)


def _lead(tokenizer, names: list[str]) -> tuple[str, int]:
    """
    What to put before the middle of a text, so that its tokens are those of the middle, and how many tokens it has
    itself: alone, a text begins with a space in some vocabularies, in others also behind a control token.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    for lead in (*names[:8], *(f"{name}\n" for name in names[:8])):
        own = ids(lead)
        got = [ids(lead + text) for text in ("|", "a")]
        if all(one[: len(own)] == own for one in got) and all(
            tokenizer.convert_ids_to_tokens(one[len(own)]) == text for one, text in zip(got, ("|", "a"))
        ):
            return lead, len(own)
    return names[0], 1


def _marked(value, names: list[str]):
    """
    A value of JSON, a mark behind the first character of each name in it, of those too that overlap.

    Raises:
        UnicodeEncodeError: half a surrogate pair, which could be taken for a mark.
    """
    if isinstance(value, str):
        value.encode("utf-8")
        cuts = {0, len(value)}
        for name in names:
            place = value.find(name)
            while place >= 0:
                cuts.add(place + 1)
                place = value.find(name, place + 1)
        return MARK.join(value[begin:end] for begin, end in pairwise(sorted(cuts)))
    if isinstance(value, list):
        return [_marked(item, names) for item in value]
    if isinstance(value, dict):
        return {_marked(name, names): _marked(item, names) for name, item in value.items()}
    return value


def _with_tools(messages: list[dict], tools: list[dict]) -> list[dict]:
    """The tools in the system message, and how MiniCPM4 calls them (demo/minicpm4/MCP of OpenBMB/MiniCPM)."""
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    told = (
        f"# Functions\nYou may call these functions, one JSON schema a line:\n{functions}\n\n"
        "# How to call\nTo call functions, write one call a line, with named arguments, like this:\n"
        f"{CALL_START}\n```python\nname(first=value, second=value)\n```\n{CALL_END}\n"
        "The results come as the next messages. If no function is needed, answer directly."
    )
    if messages[0]["role"] == "system":
        first = f"{messages[0]['content']}\n\n{told}" if messages[0]["content"] else told
        return [{**messages[0], "content": first}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def opening_of(prompt: str) -> str:
    """What a template has already written of the answer: `<think>`, or an empty thought."""
    opening = prompt.rpartition(TURN_START)[2] if TURN_START in prompt else ""
    bare = re.sub("|".join(map(re.escape, (*THOUGHTS, *THOUGHTS.values()))), "", opening)
    return "" if bare.strip() else opening


# ------------------------------------------------------------------------------------------------------------ answers


class AnswerReader:
    """Token ids to the deltas of OpenAI's messages: content, thoughts and calls."""

    def __init__(self, tokenizer, request: ChatRequest, prompt: str):
        self.request, self.calls, self.has_content = request, 0, False
        try:
            self.text = TextStream(tokenizer, request.stop, skip_special_tokens=False)
        except ValueError as error:
            raise ApiError(f"stop: {error}", "stop") from error
        # JSON may speak of the tags, so constrained text is not taken apart.
        constrained = request.schema is not None
        self.reader = None if constrained else ResponseStream(prefix=opening_of(prompt), tools=request.tools)
        added = tokenizer.added_tokens_decoder
        special = set(tokenizer.all_special_ids) | {token for token, one in added.items() if one.special}
        tags = () if constrained else TAGS
        self.hidden = {token for token in special if tokenizer.convert_ids_to_tokens(token) not in tags}
        self.tool_names = {tool["function"]["name"] for tool in request.tools}
        self.tokens = 0

    @property
    def stopped(self) -> bool:
        return self.text.stopped is not None

    def put(self, token_ids: list[int]) -> list[dict]:
        """The next tokens; those behind a stop string do not count."""
        deltas = []
        for token in token_ids:
            if self.stopped:
                break
            self.tokens += 1
            if token not in self.hidden:
                deltas += self._read(self.text.put([token]))
        return deltas

    def end(self) -> list[dict]:
        deltas = self._read(self.text.end())
        return deltas if self.reader is None else deltas + self._deltas(self.reader.finish())

    def _read(self, piece: str) -> list[dict]:
        if not piece:
            return []
        return [{"content": piece}] if self.reader is None else self._deltas(self.reader.feed(piece))

    def _deltas(self, events: list) -> list[dict]:
        return [delta for event in events if (delta := self._delta(event))]

    def _delta(self, event) -> dict | None:
        if isinstance(event, ThinkingDelta):
            return {"reasoning_content": event.text}
        if isinstance(event, ContentDelta):
            return self._content(event.text)
        if isinstance(event, ResponseError):
            # A call that cannot be read is shown; a stray tag is in the content already.
            shown = event.repeats or event.source in THOUGHTS.values()
            return self._content(event.source, block=True) if event.source and not shown else None
        if event.name not in self.tool_names:
            return self._content(f"{CALL_START}\n{event.source}\n{CALL_END}", block=True)
        return self._call(event)

    def _content(self, text: str, block: bool = False) -> dict:
        text = f"\n{text}" if block and self.has_content else text
        self.has_content = True
        return {"content": text}

    def _call(self, call: ToolCall) -> dict | None:
        if self.calls and not self.request.parallel_tool_calls:
            return None
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        self.calls += 1
        function = {"name": call.name, "arguments": arguments}
        return {"tool_calls": [{"index": self.calls - 1, "id": call.id, "type": "function", "function": function}]}


def whole_message(deltas: list[dict]) -> dict:
    """The message that deltas add up to."""
    content = "".join(delta.get("content", "") for delta in deltas)
    thinking = "".join(delta.get("reasoning_content", "") for delta in deltas)
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    message = {"role": "assistant", "content": content if content or not calls else None}
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
    return message
