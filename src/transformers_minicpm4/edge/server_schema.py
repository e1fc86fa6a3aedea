"""
A body of `POST /v1/chat/completions`, checked: what OpenAI's API means by it, or one sentence that says why not.

Fields that would change the answer and are not known here are refused; those that would not (`user`, `metadata`,
`store`, ...) are passed over. Nothing here needs a model.
"""

from __future__ import annotations

import gc
import json
import threading
from dataclasses import dataclass, field

from ..generation.tool_schemas import tool_schemas


ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 4, 1000
# Below it every other token's probability rounds to zero.
GREEDY_TEMPERATURE = 1e-4
# Each with the values that ask for nothing.
REFUSED = {
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "functions": (None, []),
    "function_call": (None, "none"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "web_search_options": (None,),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "echo": (None, False),
    "top_k": (None, -1, 0),
    "min_p": (None, 0),
    "repetition_penalty": (None, 1),
    "ignore_eos": (None, False),
}
# Of these, what such a value switches off may be on in the checkpoint's generation_config.
SWITCHED_OFF = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
# Held by whoever has switched the collection of garbage off.
_READING = threading.Lock()


class ApiError(Exception):
    """An error for the client, in OpenAI's form."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass
class ChatRequest:
    """
    Attributes:
        model: the name that was asked for.
        messages: for a chat template; every `content` is a string.
        tools: functions that the model is told of; empty with `tool_choice="none"`.
        schema: JSON schema that the answer has to follow, or `None`.
        sampling: `temperature`, `top_p` and what of `SWITCHED_OFF` was given; a temperature of 0 is greedy.
        max_tokens: of the answer; `None` for what the context has room for.
        thinking: what the chat template's `enable_thinking` is set to; `None` leaves it to the template.
    """

    model: str
    messages: list[dict]
    tools: list[dict] = field(default_factory=list)
    parallel_tool_calls: bool = True
    schema: dict | bool | None = None
    sampling: dict[str, float] = field(default_factory=dict)
    max_tokens: int | None = None
    stop: list[str] = field(default_factory=list)
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    thinking: bool | None = None


def read_json(content: bytes | bytearray):
    """
    Raises:
        ApiError: no JSON, or nested too deeply to be read.
    """
    with _READING:
        # A body of lists would have all of the model's objects looked through for cycles, for seconds.
        collects = gc.isenabled()
        gc.disable()
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ApiError(f"the body is no JSON: {str(error)[:200]}.") from error
        finally:
            if collects:
                gc.enable()


def read_request(body) -> ChatRequest:
    """
    Args:
        body: what the JSON held, of any type.

    Raises:
        ApiError: with the name of the field at fault.
    """
    if not isinstance(body, dict):
        raise ApiError(f"the body must be a JSON object, got {_shown(body)}.")
    for name, neutral in REFUSED.items():
        if name in body and not any(_same(body[name], value) for value in neutral):
            hint = "; give tools and tool_choice" if name.startswith("function") else ""
            raise ApiError(f"{name} is not supported by this server, so leave it out{hint}.", name, code="unsupported")
    model = _typed(body, "model", str)
    if model is None:
        raise ApiError("model is missing; GET /v1/models names the one that is served.", "model")
    if _number(body, "n", 1, 128, whole=True) not in (None, 1):
        raise ApiError("n must be 1: one answer a request; ask several times for several.", "n", code="unsupported")
    stream, include_usage = _read_stream(body)
    tools, parallel = _read_tools(body)
    schema = _read_format(body)
    if tools and schema is not None:
        raise ApiError("tools and a JSON response_format exclude each other; give one of them.", "response_format")
    return ChatRequest(
        model=model,
        messages=_read_messages(body),
        tools=tools,
        parallel_tool_calls=parallel,
        schema=schema,
        sampling=_read_sampling(body),
        max_tokens=_read_max_tokens(body),
        stop=_read_stop(body),
        seed=_number(body, "seed", -(2**63), 2**63 - 1, whole=True),
        stream=stream,
        include_usage=include_usage,
        thinking=_read_thinking(body),
    )


# ---------------------------------------------------------------------------------------------------------- messages


def _read_messages(body: dict) -> list[dict]:
    messages = _typed(body, "messages", list)
    if not messages:
        raise ApiError("messages must be a list of at least one message.", "messages")
    return [_read_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _read_message(message, place: str) -> dict:
    if not isinstance(message, dict):
        raise ApiError(f"{place} must be an object with role and content, got {_shown(message)}.", place)
    role = message.get("role")
    if role not in ROLES:
        raise ApiError(f"{place}.role must be one of {', '.join(ROLES)}, got {_shown(role)}.", f"{place}.role")
    read = {"role": "system" if role == "developer" else role}
    calls = message.get("tool_calls") if role == "assistant" else None
    if calls:
        read["tool_calls"] = _read_calls(calls, f"{place}.tool_calls")
    content = message.get("content")
    if content is None and role == "assistant" and (calls or "content" in message):
        content = ""
    read["content"] = _read_content(content, f"{place}.content")
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            read[name] = _typed(message, name, str, f"{place}.{name}")
    return read


def _read_content(content, place: str) -> str:
    """A string, or text parts put together."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(f"{place} must be a string or a list of text parts, got {_shown(content)}.", place)
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = _shown(part.get("type") if isinstance(part, dict) else part)
            raise ApiError(
                f"{place}[{number}] must be {{'type': 'text', 'text': ...}}, got {kind}: this model reads text alone.",
                place,
            )
    return "".join(part["text"] for part in content)


def _read_calls(calls, place: str) -> list[dict]:
    """Earlier calls; arguments as a dict, as chat templates take them."""
    if not isinstance(calls, list):
        raise ApiError(f"{place} must be a list, got {_shown(calls)}.", place)
    read = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (0, 0)
        if not isinstance(name, str) or not isinstance(arguments, str):
            raise ApiError(
                f"{place}[{number}] must have function.name and function.arguments, both strings; got {_shown(call)}.",
                place,
            )
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ApiError(f"{place}[{number}].function.arguments must be the text of a JSON object.", place)
        # The id is for the client; templates that show it find it.
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        read.append({**identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return read


# ------------------------------------------------------------------------------------------------------------ fields


def _read_tools(body: dict) -> tuple[list[dict], bool]:
    tools = _typed(body, "tools", list) or []
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise ApiError(
                f"tools[{place}] must be {{'type': 'function', 'function': {{...}}}}, got {_shown(tool)}.", "tools"
            )
    try:
        tool_schemas(tools)
    except ValueError as error:
        raise ApiError(f"tools: {error}.", "tools") from error
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise ApiError(
            f"tool_choice must be 'auto' or 'none', got {_shown(choice)}: no call can be forced here.",
            "tool_choice",
            code="unsupported",
        )
    parallel = _typed(body, "parallel_tool_calls", bool)
    return ([] if choice == "none" else tools), parallel is not False


def _read_format(body: dict) -> dict | bool | None:
    wanted = _typed(body, "response_format", dict)
    kind = None if wanted is None else wanted.get("type")
    if wanted is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise ApiError(
            f"response_format.type must be text, json_object or json_schema, got {_shown(kind)}.",
            "response_format",
        )
    outer = wanted.get("json_schema")
    schema = outer.get("schema") if isinstance(outer, dict) else None
    if not isinstance(schema, (dict, bool)):
        raise ApiError(
            "response_format.json_schema must be {'name': ..., 'schema': a JSON schema}, and its schema is "
            f"{_shown(schema)}.",
            "response_format",
        )
    return schema


def _read_sampling(body: dict) -> dict[str, float]:
    config = _chat_window(body)
    temperature, top_p = _number(body, "temperature", 0, 2), _number(body, "top_p", 0, 1)
    if temperature is None and config.get("do_sample") is not None:
        temperature = _number(config, "temperature", 0, 2) if config["do_sample"] is True else 0
        temperature = 1 if temperature is None else temperature
    top_p = _number(config, "top_p", 0, 1) if top_p is None else top_p
    if top_p == 0:
        temperature, top_p = 0, None  # the likeliest token alone
    given = {"temperature": temperature, "top_p": top_p}
    given = {name: float(value) for name, value in given.items() if value is not None}
    if given.get("temperature", 1) < GREEDY_TEMPERATURE:
        given = {"temperature": 0.0}
    return given | {name: neutral for name, neutral in SWITCHED_OFF.items() if body.get(name) is not None}


def _read_max_tokens(body: dict) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        if (most := _number(body, name, 1, 2**63 - 1, whole=True)) is not None:
            return most
    return _number(_chat_window(body), "max_new_tokens", 1, 2**63 - 1, whole=True)


def _chat_window(body: dict) -> dict:
    """What `transformers chat` sends beside OpenAI's fields: a `GenerationConfig` as JSON text."""
    text = body.get("generation_config")
    if not isinstance(text, str):
        return {}
    config = read_json(text.encode("utf-8", "replace"))
    return config if isinstance(config, dict) else {}


def _read_stop(body: dict) -> list[str]:
    stop = body.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(string, str) and string for string in stop):
        raise ApiError(f"stop must be a string or a list of strings, none of them empty; got {_shown(stop)}.", "stop")
    if len(stop) > MAX_STOP_STRINGS or any(len(string) > MAX_STOP_CHARACTERS for string in stop):
        raise ApiError(
            f"stop has at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_CHARACTERS} characters; got "
            f"{len(stop)}, the longest of {max(map(len, stop))}.",
            "stop",
        )
    return stop


def _read_stream(body: dict) -> tuple[bool, bool]:
    stream = _typed(body, "stream", bool) or False
    options = _typed(body, "stream_options", dict)
    if options is not None and not stream:
        raise ApiError("stream_options belong to stream=true; leave them out, or stream.", "stream_options")
    usage = None if options is None else _typed(options, "include_usage", bool, "stream_options.include_usage")
    return stream, usage or False


def _read_thinking(body: dict) -> bool | None:
    options = _typed(body, "chat_template_kwargs", dict) or {}
    if options.keys() - {"enable_thinking"}:
        raise ApiError(
            f"chat_template_kwargs may have enable_thinking alone, got {_shown(sorted(options))}.",
            "chat_template_kwargs",
        )
    thinking = _typed(options, "enable_thinking", bool, "chat_template_kwargs.enable_thinking")
    effort = _typed(body, "reasoning_effort", str)
    return False if thinking is None and effort == "none" else thinking


# ------------------------------------------------------------------------------------------------------------- types


_NAMES = {str: "a string", bool: "true or false", list: "a list", dict: "an object"}


def _typed(fields: dict, name: str, kind: type, place: str | None = None):
    """A field of this type, or `None` where it is absent or null."""
    value = fields.get(name)
    if value is not None and not isinstance(value, kind):
        raise ApiError(f"{place or name} must be {_NAMES[kind]}, got {_shown(value)}.", place or name)
    return value


def _number(fields: dict, name: str, low, high, whole: bool = False):
    value = fields.get(name)
    if value is None:
        return None
    if whole and isinstance(value, float) and value.is_integer():
        value = int(value)
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not low <= value <= high:  # a NaN is in no range
        kind = "whole number" if whole else "number"
        bounds = f"of {low} or more" if high >= 2**62 and low >= 0 else f"between {low} and {high}"
        raise ApiError(f"{name} must be a {kind} {bounds}, got {_shown(value)}.", name)
    return value


def _same(value, neutral) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _shown(value) -> str:
    """A value in an error message: as JSON, and never long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
