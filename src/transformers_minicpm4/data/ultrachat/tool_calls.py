"""
Tool calls against the tools that were offered: unknown tool, missing or extra argument, wrong type (MiniCPM4,
arXiv 2506.07900, UltraChat v2: drop what calls a tool not offered or contradicts its schema; think before the call).
"""

import json
from dataclasses import dataclass
from functools import lru_cache

from .json_schemas import MAX_DEPTH, compile_schema, drop_nulls, parse_json, schema_errors, too_deep
from .reasons import OK, column_of, join_reasons, shorten


# Words that public sets of tools use for types of JSON Schema.
_TYPE_ALIASES = {
    "dict": "object",
    "list": "array",
    "tuple": "array",
    "float": "number",
    "double": "number",
    "int": "integer",
    "long": "integer",
    "bool": "boolean",
    "str": "string",
}
# Where one of these stands, an object may be described in several places: closing one of them would be wrong.
_SHARED = ("allOf", "not", "if", "dependentSchemas", "unevaluatedProperties")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_VALUES = ("enum", "const", "default", "examples")


def _rename_types(schema):
    if isinstance(schema, list):
        return [_rename_types(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    renamed = {}
    for key, value in schema.items():
        if key in _VALUES:
            renamed[key] = value
        elif key in _NAMED and isinstance(value, dict):
            renamed[key] = {name: _rename_types(item) for name, item in value.items()}
        elif key == "type" and isinstance(value, str | list):
            types = [value] if isinstance(value, str) else value
            if "any" in types:
                continue
            types = [_TYPE_ALIASES.get(each, each) if isinstance(each, str) else each for each in types]
            distinct = [each for place, each in enumerate(types) if each not in types[:place]]  # "int" and "integer"
            renamed[key] = distinct[0] if isinstance(value, str) else distinct
        elif key == "required" and isinstance(value, bool):
            continue  # "required": true on an argument is no JSON Schema; the list on the object counts
        else:
            renamed[key] = _rename_types(value)
    return renamed


def _uses(schema, keywords) -> bool:
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key in keywords:
                return True
            named = key in _NAMED and isinstance(value, dict)  # the keys below are names, not keywords
            if key not in _VALUES and _uses(list(value.values()) if named else value, keywords):
                return True
        return False
    return isinstance(schema, list) and any(_uses(item, keywords) for item in schema)


def _close(schema):
    """Refuse properties that are not named, at every depth, where a schema does not say otherwise."""
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for key in _NAMED:
        if isinstance(schema.get(key), dict):
            closed[key] = {name: _close(item) for name, item in schema[key].items()}
    for key in ("items", "additionalProperties", "contains"):
        closed.update({key: _close(schema[key])} if key in schema else {})
    branches = [key for key in ("anyOf", "oneOf") if key in schema]
    for key in ("prefixItems", *(branches if "properties" not in schema else ())):
        if isinstance(schema.get(key), list):
            closed[key] = [_close(item) for item in schema[key]]
    open_by_word = ("additionalProperties", "patternProperties", "$ref", *branches)
    if "properties" in schema and not any(key in schema for key in open_by_word):
        closed["additionalProperties"] = False
    return closed


@lru_cache(maxsize=4096)
def _parameters_schema(parameters: str) -> str:
    """A tool's `parameters`, as JSON text, made the schema that its arguments are checked by. Raises ValueError."""
    parsed = parse_json(parameters)
    if not isinstance(parsed, dict):
        raise ValueError(f"parameters are a JSON schema of an object, not {shorten(parameters)}")
    if too_deep(parsed):
        raise ValueError(f"parameters have at most {MAX_DEPTH} levels; put deeper parts under $defs")
    schema = _rename_types(parsed)
    types = schema.setdefault("type", "object")
    if types != "object" and not (isinstance(types, list) and "object" in types):
        raise ValueError(f"parameters have type {shorten(repr(types))}; a tool's arguments are an object")
    if not any(key in schema for key in ("$ref", "anyOf", "oneOf", "allOf")):
        schema.setdefault("properties", {})
    if not _uses(schema, _SHARED):
        schema = _close(schema)
    text = json.dumps(schema)
    compile_schema(text)
    return text


def _as_list(value, what: str) -> list:
    if value is None:
        return []
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = parse_json(value)
        except ValueError as error:
            raise ValueError(f"{what} are no JSON, {shorten(error)}") from error
    else:
        try:
            value = drop_nulls(value)
        except RecursionError as error:
            raise ValueError(f"{what} are nested too deep") from error
    if value is None:
        return []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{what} are a list, not {type(value).__name__}")
    return value


def _function_of(entry, what: str) -> dict:
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise ValueError(f"{what} has no name: {shorten(entry)}")
    return function


def _read_tools(tools) -> dict[str, str]:
    """{name: schema of the arguments, as JSON text}. Raises ValueError."""
    found = {}
    for place, entry in enumerate(_as_list(tools, "the tools"), start=1):
        function = _function_of(entry, f"tool {place}")
        name, parameters = function["name"], function.get("parameters")
        if name in found:
            raise ValueError(f"{shorten(repr(name))} is offered twice")
        try:
            text = parameters if isinstance(parameters, str) else json.dumps(parameters or {}, default=str)
            found[name] = _parameters_schema(text)
        except (ValueError, TypeError, RecursionError) as error:  # json.dumps: keys that are no text, endless depth
            raise ValueError(f"{shorten(repr(name))}: {error}") from error
    return found


def _show(value) -> str:
    try:
        return shorten(json.dumps(value, default=str))
    except (ValueError, TypeError, RecursionError):
        return shorten(value)


def _argument_problems(where: str, schema: str, arguments) -> list[str]:
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError as error:
            return [f"malformed_arguments: {where}, {shorten(error, 80)}"]
    if not isinstance(arguments, dict):
        return [f"malformed_arguments: {where}, arguments are an object, not {_show(arguments)}"]
    if too_deep(arguments):
        return [f"malformed_arguments: {where}, nested deeper than {MAX_DEPTH} levels"]
    problems = []
    for keyword, path, error in schema_errors(schema, arguments):
        path = shorten(path)
        inside = f" in {path}" if path else ""
        if keyword == "required" and isinstance(error.validator_value, list):
            missing = [name for name in error.validator_value if name not in error.instance]
            name = next(name for name in missing if repr(name) in error.message)
            problems.append(f"missing_argument: {where}, {shorten(repr(name))}{inside}")
        elif keyword in ("additionalProperties", "unevaluatedProperties") and error.validator_value is False:
            known = error.schema.get("properties", {})
            extra = [name for name in error.instance if name not in known]
            problems.append(f"extra_argument: {where}, {shorten(', '.join(map(repr, extra)))}{inside}")
        elif keyword == "type":
            problems.append(f"wrong_type: {where}, {path or 'the arguments'}: {shorten(error.message, 80)}")
        elif keyword in ("enum", "const"):
            problems.append(f"wrong_value: {where}, {path}: {shorten(error.message, 80)}")
        elif keyword == "$ref":
            problems.append(f"bad_tool: {where}, a reference of its schema leads nowhere")
        else:
            message = shorten(getattr(error, "message", error), 80)
            problems.append(f"schema_mismatch: {where}, {path or 'the arguments'}: {message}")
    return problems


def check_tool_calls(calls, tools) -> str:
    """
    `"ok"`, or what is wrong with tool calls, each problem as `"code: detail"`, joined by `"; "`.

    Codes: bad_tool, no_tools_offered, malformed_call, unknown_tool, malformed_arguments, missing_argument,
    extra_argument, wrong_type, wrong_value (enum, const), schema_mismatch (any other keyword of the schema). An
    argument that the schema does not name is an extra one, nested too, unless the schema allows it by a word of its
    own (`additionalProperties`, `patternProperties`) or shares its objects between places (`allOf`, `if` ...).

    Args:
        calls: list, or JSON text of it, of `{"function": {"name": ..., "arguments": ...}}` or of the inner object;
            arguments are JSON text or an object. In objects that are no JSON text a null means "not there".
        tools: the tools offered, OpenAI's `{"type": "function", "function": {"name", "parameters"}}` or the inner
            object, as list or JSON text. Types may also be called dict, float, int, str, bool, list, tuple or any.
    """
    try:
        calls = _as_list(calls, "the calls")
    except ValueError as error:
        return f"malformed_call: {error}"
    try:
        offered = _read_tools(tools)
    except ValueError as error:
        return f"bad_tool: {shorten(error, 150)}"
    if calls and not offered:
        return f"no_tools_offered: {len(calls)} called"
    problems = []
    for place, call in enumerate(calls, start=1):
        try:
            function = _function_of(call, f"call {place}")
        except ValueError as error:
            problems.append(f"malformed_call: {error}")
            continue
        name = function["name"]
        where = f"call {place} {shorten(name)}"
        if name not in offered:
            problems.append(f"unknown_tool: {where}, offered {shorten(', '.join(offered))}")
        else:
            problems += _argument_problems(where, offered[name], function.get("arguments", {}))
    return join_reasons(problems)


def has_thought(message: dict) -> bool:
    """
    Does an assistant's message think before it calls? Yes with text in `reasoning_content`, `reasoning` or `thinking`,
    in `<think> </think>`, or, where the content has no such tag, with any content.
    """
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(name), str) and message[name].strip():
            return True
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = " ".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str):
        return False
    if "<think>" in content or "</think>" in content:
        closed = content.split("</think>")[:-1]
        return any(part.partition("<think>")[2].strip() for part in closed)
    return bool(content.strip())


@dataclass(frozen=True)
class ToolCallFilter:
    """
    For `map`, row by row: are all calls of a conversation calls of offered tools, with arguments that their schemas
    allow? Adds `tool_calls_count` (int), `tool_calls_passed` (bool) and `tool_calls_reason` (`"ok"` or the problems of
    `check_tool_calls`, and `no_thought`). A conversation without calls passes. Nothing is called.

    Args:
        tools_column: column of the tools offered.
        messages_column: column of the conversation, a list of messages or its JSON text; the calls are the
            `tool_calls` of its assistant's messages.
        calls_column: a column that holds the calls themselves; with it `messages_column` is not read.
        require_thought: each message that calls must think first (`has_thought`).
    Raises:
        KeyError: a column is missing.
        ValueError: `require_thought` without messages.
    """

    tools_column: str = "tools"
    messages_column: str = "messages"
    calls_column: str | None = None
    require_thought: bool = False

    def __post_init__(self):
        if self.require_thought and self.calls_column is not None:
            raise ValueError("require_thought reads messages; leave calls_column out and give messages_column")

    def __call__(self, row: dict) -> dict:
        tools = column_of(row, self.tools_column, "ToolCallFilter")
        problems, count = [], 0
        if self.calls_column is not None:
            turns = [{"tool_calls": column_of(row, self.calls_column, "ToolCallFilter")}]
        else:
            try:
                messages = _as_list(column_of(row, self.messages_column, "ToolCallFilter"), "the messages")
                turns = [turn for turn in messages if turn.get("role") == "assistant" and turn.get("tool_calls")]
            except (ValueError, AttributeError) as error:
                turns, problems = [], [f"malformed_messages: {shorten(error, 100)}"]
        for place, turn in enumerate(turns, start=1):
            reason = check_tool_calls(turn["tool_calls"], tools)
            problems += [reason] if reason != OK else []
            if self.require_thought and not has_thought(turn):
                problems.append(f"no_thought: before the call of turn {place}")
            count += self._count(turn["tool_calls"])
        reason = join_reasons(problems)
        return {"tool_calls_count": count, "tool_calls_passed": reason == OK, "tool_calls_reason": reason}

    @staticmethod
    def _count(calls) -> int:
        try:
            return len(_as_list(calls, "the calls"))
        except ValueError:
            return 0
