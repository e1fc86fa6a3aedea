"""
Tool calls as MiniCPM4 writes them: Python calls with named arguments, read exactly and never evaluated.

Between `<|tool_call_start|>` and `<|tool_call_end|>` stands a Python fence with one call a line. Names are read as
they stand, so `get-weather(from="Bern")` keeps its hyphen and its keyword; the released reader rewrites `-`, `_` and
keywords in the whole text, strings included, and answers `[]` to what it cannot read. Values are literals; `true`,
`false` and `null` count too, because the chat template released with tool calls writes earlier ones with `tojson`.

Source: MiniCPM4, arXiv 2506.07900 (MiniCPM4-MCP); its formats: demo/minicpm4/MCP of github.com/OpenBMB/MiniCPM.
"""

import ast
import contextlib
import json
import math
import re
import uuid
from dataclasses import dataclass, field

from .tool_schemas import properties_of, shorten, tool_schemas


CALL_START = "<|tool_call_start|>"
CALL_END = "<|tool_call_end|>"
MAX_DEPTH = 64  # lists and dicts in each other, in one argument
MAX_DIGITS = 1000  # of a number; Python itself refuses to print integers of more than 4300

_NAME = re.compile(r"[\w$@][\w$@.\-/]*")
_SPACE = re.compile(r"(?:[ \t\r\n\f]+|\\\r?\n|#[^\n]*)*+")
_NUMBER = re.compile(r"\.?\d(?:[eE][+-]|[\w.])*+", re.ASCII)
_NUMBER_FORM = re.compile(r"0[xX][\da-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|[\d_]*\.?[\d_]*(?:[eE][+-]?[\d_]+)?", re.ASCII)
_STRING_OPEN = re.compile(r"([A-Za-z]{0,2})('''|\"\"\"|'|\")")
_STRING_REST = {
    "'": re.compile(r"(?:[^\\'\n]|\\.)*+'", re.DOTALL),
    '"': re.compile(r'(?:[^\\"\n]|\\.)*+"', re.DOTALL),
    "'''": re.compile(r"(?:[^\\']|\\.|'(?!''))*+'''", re.DOTALL),
    '"""': re.compile(r'(?:[^\\"]|\\.|"(?!""))*+"""', re.DOTALL),
}
_ESCAPE = re.compile(r"\\([0-7]{1,3}|.)", re.DOTALL)
_FENCE = re.compile(r"```(?:python\b|py\b|[ \t]*[\w+-]*+[ \t]*+(?=[\r\n]))?")
_CALL_OPEN = re.compile(r"[ \t]*+\(")
_LINE_REST = re.compile(r"[ \t\r\f]*+(?:[\n;,#]|```|\Z)")
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_OCTAL_WARNED = frozenset(f"{code:o}" for code in range(0o400, 0o1000))


@dataclass(frozen=True)
class ToolCall:
    """
    One call of a tool.

    Args:
        name: the tool's name, as the model wrote it.
        arguments: name to value, in the order written; values are what JSON has (a tuple is read as a list).
        source: the call's text, verbatim.
        id: for `tool_call_id` of the answer; random, and of no weight when calls are compared.
    """

    name: str
    arguments: dict
    source: str = field(default="", compare=False)
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}", compare=False)


@dataclass(frozen=True)
class ResponseError:
    """
    What could not be read: `message` says why, for the model to act on; `source` is the text, verbatim. `repeats`: all
    of that text has come before, as calls and errors of its own.
    """

    message: str
    source: str = ""
    repeats: bool = False


class _Malformed(Exception):
    """A call that cannot be read."""


class _Reader:
    """Reads calls from `text`, left to right; every method starts at `at` and leaves it behind what it read."""

    def __init__(self, text: str, schemas: dict[str, dict]):
        self.text, self.schemas, self.at = text, schemas, 0

    def space(self):
        self.at = _SPACE.match(self.text, self.at).end()

    def next(self) -> str:
        """The character after spaces and comments; "" at the end."""
        self.space()
        return self.text[self.at : self.at + 1]

    def take(self, character: str) -> bool:
        found = self.next() == character
        self.at += found
        return found

    def call(self) -> ToolCall:
        start = self.at
        name = _NAME.match(self.text, self.at)
        if name is None:
            raise _Malformed("this is not a call; write tool_name(parameter=value), one call a line")
        self.at = name.end()
        opening = _CALL_OPEN.match(self.text, self.at)
        if opening is None:
            raise _Malformed(f"{shorten(name[0])!r} has no '(' behind it; write tool_name(parameter=value)")
        self.at = opening.end()
        tool, positional, named = name[0], [], {}
        while not self.take(")"):
            for key, value in self.argument(tool):
                if key is None and named:
                    raise _Malformed(f"{tool}: an argument without a name stands behind named ones; name it")
                if key is None:
                    positional.append(value)
                elif key in named:
                    raise _Malformed(f"{tool}: {key!r} is given twice; give it once")
                else:
                    named[key] = value
            if not self.take(",") and self.next() != ")":
                raise _Malformed(self.expected("',' or ')'"))
        arguments = self.name_positional(tool, positional)
        for key in named:
            if key in arguments:
                raise _Malformed(f"{tool}: {key!r} is given twice, once without its name; give it once")
        return ToolCall(tool, arguments | named, self.text[start : self.at])

    def name_positional(self, tool: str, values: list) -> dict:
        if values and tool not in self.schemas:
            raise _Malformed(f"{tool}: argument 1 has no name; write {tool}(parameter=value)")
        known = list(properties_of(self.schemas.get(tool, {})))
        if len(values) > len(known):
            names = ", ".join(known) or "none"
            raise _Malformed(f"{tool}: {len(values)} arguments without names; its parameters are: {names}")
        return dict(zip(known, values))

    def argument(self, tool: str) -> list[tuple]:
        """`[(name or None, value)]`; more than one pair, or none, for `**{...}`."""
        self.space()
        if self.text.startswith("**", self.at):
            self.at += 2
            if self.next() != "{":
                raise _Malformed(f"{tool}: behind ** only a dict written out can be read")
            return list(self.value(0).items())
        name = _NAME.match(self.text, self.at)
        if name is not None:
            start, self.at = self.at, name.end()
            if self.take("=") and self.text[self.at : self.at + 1] != "=":
                return [(name[0], self.value(0))]
            self.at = start
        return [(None, self.value(0))]

    def expected(self, what: str) -> str:
        rest = self.text[self.at : self.at + 20]
        return f"expected {what} before {rest!r}" if rest else f"the call ends where {what} should stand; complete it"

    def value(self, depth: int):
        if depth > MAX_DEPTH:
            raise _Malformed(f"nested deeper than {MAX_DEPTH} levels; give a flatter value")
        character = self.next()
        if character in _PAIRS:
            self.at += 1
            return self.mapping(depth) if character == "{" else self.sequence(depth, _PAIRS[character])
        if character in ("+", "-"):
            self.at += 1
            self.space()
            number = self.number()
            return -number if character == "-" else number
        string = _STRING_OPEN.match(self.text, self.at)
        if string is not None:
            return self.strings(string)
        if _NUMBER.match(self.text, self.at):
            return self.number()
        word = _NAME.match(self.text, self.at)
        if word is None:
            raise _Malformed(self.expected("a value"))
        if word[0] in _WORDS:
            self.at = word.end()
            return _WORDS[word[0]]
        name, self.at = shorten(word[0]), word.end()
        if self.next() == "(":
            raise _Malformed(f"{name}(...) is a call inside an argument; give its result as a plain value")
        raise _Malformed(f"{name} is no value; put text in quotes")

    def sequence(self, depth: int, closing: str) -> list:
        values, commas = [], 0
        while not self.take(closing):
            values.append(self.value(depth + 1))
            if self.take(","):
                commas += 1
            elif self.next() != closing:
                raise _Malformed(self.expected(f"',' or '{closing}'"))
        # (x) is x and (x,) a tuple of one, as in Python.
        return values[0] if closing == ")" and len(values) == 1 and not commas else values

    def mapping(self, depth: int) -> dict:
        values = {}
        while not self.take("}"):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise _Malformed(f"{shorten(repr(key))} is a key of a dict; keys must be strings, in quotes")
            if key in values:
                raise _Malformed(f"the key {shorten(key)!r} stands twice in one dict; give it once")
            if not self.take(":"):
                raise _Malformed(self.expected("':'"))
            values[key] = self.value(depth + 1)
            if not self.take(",") and self.next() != "}":
                raise _Malformed(self.expected("',' or '}'"))
        return values

    def number(self) -> int | float:
        found = _NUMBER.match(self.text, self.at)
        if found is None:
            raise _Malformed(self.expected("a number"))
        shown = shorten(found[0])
        if len(found[0]) > MAX_DIGITS:
            raise _Malformed(f"the number {shown} has more than {MAX_DIGITS} digits")
        number = None
        if _NUMBER_FORM.fullmatch(found[0]):
            with contextlib.suppress(ValueError, SyntaxError):
                number = ast.literal_eval(found[0])
        if type(number) not in (int, float) or not math.isfinite(number):
            raise _Malformed(f"{shown} is no finite number of JSON")
        self.at = found.end()
        return number

    def strings(self, opening: re.Match) -> str:
        """One string, or several side by side, which Python joins."""
        parts = []
        while opening is not None:
            prefix, quote = opening[1].lower(), opening[2]
            if prefix not in ("", "r", "u"):
                kind = "an f-string" if "f" in prefix else "bytes" if "b" in prefix else f"prefixed by {opening[1]}"
                raise _Malformed(f"a string is {kind}, which is not read; give plain text in quotes")
            rest = _STRING_REST[quote].match(self.text, opening.end())
            if rest is None:
                raise _Malformed(f"a string opened by {quote} is not closed; write line breaks in it as \\n")
            parts.append(_unescape(self.text[opening.start() : rest.end()], raw=prefix == "r"))
            self.at = rest.end()
            self.space()
            opening = _STRING_OPEN.match(self.text, self.at)
        return "".join(parts)

    def skip_statement(self):
        """To the line break or `;` that ends a broken statement; to the end where brackets do not fit."""
        closings = []
        while self.at < len(self.text):
            character = self.text[self.at]
            opening = _STRING_OPEN.match(self.text, self.at) if character in "'\"" else None
            if opening is not None:
                rest = _STRING_REST[opening[2]].match(self.text, opening.end())
                line_end = self.text.find("\n", opening.end())
                self.at = rest.end() if rest else line_end if line_end >= 0 else len(self.text)
            elif character == "#":
                line_end = self.text.find("\n", self.at)
                self.at = line_end if line_end >= 0 else len(self.text)
            elif character in "\n;" and not closings:
                return
            elif character in _PAIRS:
                closings.append(_PAIRS[character])
                self.at += 1
            elif character in ")]}":
                if not closings or closings.pop() != character:
                    self.at = len(self.text)  # which call the rest belongs to would be a guess
                self.at += 1
            else:
                self.at += 1
        self.at = len(self.text)


def _unescape(literal: str, raw: bool) -> str:
    def without_warning(escape):  # what Python accepts with a warning, said in full
        if escape[1] in _OCTAL_WARNED:
            return f"\\u{int(escape[1], 8):04x}"
        known = escape[1][0] in "\n\\'\"abfnrtvxuUN01234567"
        return escape[0] if known else "\\" + escape[0]

    try:
        text = ast.literal_eval(literal if raw else _ESCAPE.sub(without_warning, literal))
        # JSON writes characters beyond U+FFFF as two halves, which Python does not join.
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except (ValueError, SyntaxError, MemoryError) as error:
        reason = str(error).splitlines()[0] if not isinstance(error, UnicodeError) else "it is no valid Unicode"
        raise _Malformed(f"a string cannot be read: {shorten(reason, 100)}") from None


def parse_tool_calls(text: str, tools=None) -> tuple[list[ToolCall], list[ResponseError]]:
    """
    Read the calls between `<|tool_call_start|>` and `<|tool_call_end|>`; nothing is evaluated.

    A call that cannot be read becomes an error with its text, and the next one is read. Where brackets do not fit, the
    rest of the text is one error. Time grows linearly with the text.

    Args:
        text: the inside of a block: calls, with or without a Python fence around them, divided by line breaks, `;`
            or `,`.
        tools: as for `tool_schemas`; arguments without names are named in the order of the tool's `properties`, and
            refused without tools.
    Returns:
        calls and errors, each in the order written.
    """
    reader, calls, errors = _Reader(text, tool_schemas(tools)), [], []
    while character := reader.next():
        fence = _FENCE.match(text, reader.at)
        if fence is not None or character in ";,":
            reader.at = fence.end() if fence else reader.at + 1
            continue
        start = reader.at
        try:
            call = reader.call()
            if _LINE_REST.match(text, reader.at) is None:
                raise _Malformed("more text follows the call on its line; write one call a line and nothing else")
            calls.append(call)
        except _Malformed as problem:
            reader.at = start
            reader.skip_statement()
            errors.append(ResponseError(str(problem), text[start : reader.at].rstrip()))
    return calls, errors


def _write_value(value, depth: int = 0) -> str:
    if depth > MAX_DEPTH:
        raise ValueError(f"an argument is nested deeper than {MAX_DEPTH} levels; give a flatter one")
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, str):
        value.encode("utf-8")  # half a surrogate pair is no text: UnicodeEncodeError, a ValueError
        # A tag inside an argument must not end the block, nor become one token.
        return json.dumps(value, ensure_ascii=False).replace("<|", "\\u003c|")
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        text = repr(value)
        if len(text) <= MAX_DIGITS:
            return text
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_write_value(item, depth + 1) for item in value) + "]"
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        pairs = (f"{_write_value(key)}: {_write_value(item, depth + 1)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    raise ValueError(f"{shorten(repr(value))} cannot be an argument; give what JSON has, with strings as keys")


def render_tool_calls(tool_calls) -> str:
    """
    The block that calls these tools, tags and fence included: `parse_tool_calls` of its inside gives them back.

    Args:
        tool_calls: `ToolCall`s, or a message's `{"function": {"name", "arguments"}}` or inner objects; arguments are
            a dict or its JSON text.
    Raises:
        ValueError: a name cannot be written as a call, or an argument has no literal.
    """
    lines = []
    for call in tool_calls:
        if isinstance(call, ToolCall):
            name, arguments = call.name, call.arguments
        else:
            function = call.get("function", call)
            name, arguments = function["name"], function.get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be called: a tool's name has letters, digits and _ . - / $ @ alone")
        if not isinstance(arguments, dict):
            raise ValueError(f"{name}: arguments are {shorten(repr(arguments))}; give a dict or its JSON text")
        plain = {key: value for key, value in arguments.items() if isinstance(key, str) and _NAME.fullmatch(key)}
        written = [f"{key}={_write_value(value)}" for key, value in plain.items()]
        if len(plain) < len(arguments):  # Python's own way to give an argument any name
            written = ["**" + _write_value(arguments)] if arguments else []
        lines.append(f"{name}({', '.join(written)})\n")
    return f"{CALL_START}\n```python\n{''.join(lines)}```\n{CALL_END}"
