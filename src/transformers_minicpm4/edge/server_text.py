"""
Between OpenAI's messages and token ids: a request becomes a prompt, and an answer's tokens become deltas.
"""

from __future__ import annotations

import contextlib
import json
import re

from ..generation.chat import encode_rendered
from ..generation.responses import THOUGHTS, ContentDelta, ResponseError, ResponseStream, ThinkingDelta
from ..generation.text_stream import TextStream
from ..generation.tool_calls import CALL_END, CALL_START, ToolCall, render_tool_calls
from .engine import EdgeEngine
from .server_schema import ApiError, ChatRequest


TURN_START, TURN_END = "<|im_start|>assistant\n", "<|im_end|>"
TAGS = (*THOUGHTS, *THOUGHTS.values(), CALL_START, CALL_END, TURN_END)


# ------------------------------------------------------------------------------------------------------------ prompts


class PromptMaker:
    """Messages and tools to token ids, by the tokenizer's chat template."""

    def __init__(self, engine: EdgeEngine):
        if engine.tokenizer is None or engine.tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template, which messages need; store one, e.g. "
                "transformers_minicpm4.generation.chat_template('minicpm4')."
            )
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.tokenizer("x")  # settles truncation and padding: from now on threads only read from it
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
        Raises:
            ApiError: what the template refuses.
        """
        messages, tools = request.messages, request.tools
        if not self.template_has_tools:
            messages, tools = [_call_as_text(message) for message in messages], []
            if request.tools:
                messages = _with_tools(messages, request.tools)
        # Constrained text begins at once, without a thought.
        thinking = False if request.schema is not None else request.thinking
        options = {} if thinking is None else {"enable_thinking": thinking}
        try:
            return self._apply(messages, tools, **options)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ApiError(f"the model's chat template cannot render these messages: {reason}", "messages") from error

    def ids(self, text: str) -> list[int]:
        """
        Raises:
            ApiError: no valid Unicode, or no room for an answer.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ApiError("the messages or tools hold half a surrogate pair, no character.", "messages") from error
        ids = self.engine.encode(encode_rendered(self.tokenizer, text)["input_ids"])
        if len(ids) >= self.engine.context:
            raise ApiError(
                f"the prompt has {len(ids):,} tokens and this server's context is {self.engine.context:,}, of which "
                "the answer needs some too; shorten the messages.",
                "messages",
                code="context_length_exceeded",
            )
        return ids


def _call_as_text(message: dict) -> dict:
    """An earlier call as the model wrote it: our templates have no logic for calls."""
    if "tool_calls" not in message:
        return message
    try:
        calls = render_tool_calls(message["tool_calls"])
    except ValueError as error:
        raise ApiError(f"an earlier tool call cannot be written: {error}.", "messages") from error
    content = message["content"]
    return {"role": message["role"], "content": f"{calls}\n{content}" if content else calls}


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
            unread = event.source and event.source not in THOUGHTS.values()
            return self._content(event.source, block=True) if unread else None
        if not self.request.tools:
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
