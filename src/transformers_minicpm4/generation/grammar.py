"""
What constrained text has to follow: a JSON schema, a regular expression, a Lark grammar, a choice of strings.

Nothing of a schema is ignored: a keyword that is not enforced is named in the error. The lists below were found by
asking the engine (llguidance 1.9.1) about accepted and refused documents of each keyword, against an independent
validator; `docs/constrained.md` shows them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


# fmt: off
ENFORCED = frozenset([
    "type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions", "$id", "$anchor",
    "properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties",
    "items", "prefixItems", "minItems", "maxItems",
    "minLength", "maxLength", "pattern", "format",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
])
ANNOTATIONS = frozenset([
    "title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly", "$schema",
    "discriminator",
])
# fmt: on
FORMATS = frozenset(["date", "date-time", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"])
# Drafts in which the keywords above mean the same; "items" as a list is refused apart.
_DRAFTS = ("2020-12/schema", "2019-09/schema", "draft-07/schema", "draft-06/schema")

# The engine's dates have a 29 February in every year, and a year 0, which calendars have not.
_LEAP = "[0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00"
_REAL_DATE = f"^([0-9]{{4}}-(0[13-9]|1[0-2]|02-([01]|2[0-8]))|({_LEAP})-02-29)"

# At most a line break and an indentation between JSON's parts: with unbounded white space a model may never come on.
WHITESPACE = r"\n? {0,24}"


@dataclass(frozen=True)
class Grammar:
    """
    A grammar in llguidance's form; make one by `json_schema`, `regex`, `lark` or `choice`.

    All of them raise `ImportError` where llguidance is not installed.
    """

    text: str = field(repr=False)
    # Whether it may ask for special tokens by name.
    names_tokens: bool = False

    @classmethod
    def json_schema(cls, schema: dict | bool | str | type, whitespace: str = WHITESPACE) -> Grammar:
        """
        JSON that is valid under a schema. Properties come in the schema's order.

        Args:
            schema: a JSON schema (draft 2020-12), the same as a JSON string, or a Pydantic model class, which gets no
                other fields than its own unless it says `extra="allow"`. In a schema say
                `"additionalProperties": False`, or the model may add properties without end.
            whitespace: regular expression of what may stand between JSON's parts; `""` for none.

        Raises:
            ValueError: no schema, one that nothing fulfils, or keywords, formats or patterns that are not enforced:
                each is named with its place.
        """
        if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
            # Pydantic drops unknown fields where it does not say additionalProperties: a model need not write them.
            for one, _ in list(_schemas(schema, "#")):
                if "properties" in one:
                    one.setdefault("additionalProperties", False)
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise ValueError(f"the schema is a string that is no JSON: {error}.") from error
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise ValueError(f"a JSON schema is a dict (or its JSON, or a Pydantic model class), got {schema!r}.")
        try:
            schema = json.loads(json.dumps(schema))  # a copy, which is written in below
        except (TypeError, ValueError) as error:
            raise ValueError(f"the schema has a value that JSON does not know: {error}.") from error
        problems = [problem for one, place in _schemas(schema, "#") for problem in _problems(one, place)]
        problems += [problem for one, place in _schemas(schema, "#") for problem in _narrow(one, schema, place)]
        if problems:
            raise ValueError(
                f"the JSON schema asks for what constrained decoding cannot enforce: {'; '.join(problems)}. Take that "
                "out of the schema and check it after decoding, or say it otherwise."
            )
        for one, _ in list(_schemas(schema, "#")):
            if one.get("format") in ("date", "date-time"):
                one["allOf"] = [*one.get("allOf", []), {"pattern": _REAL_DATE}, {"pattern": "^0{0,3}[1-9]"}]
        options = {"lenient": False, "coerce_one_of": False}
        options |= {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
        text = _matcher().grammar_from_json_schema(json.dumps(schema), overrides=options)
        return cls(_valid(text, "JSON schema"))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        r"""
        Text that the whole of a regular expression matches, as by `re.fullmatch`.

        The dialect is that of Rust's `regex`: Python's without look-around, back references and `\b`.

        Raises:
            ValueError: a pattern outside that dialect.
        """
        return cls(_valid(_matcher().grammar_from_regex(pattern), "regular expression"))

    @classmethod
    def lark(cls, grammar: str) -> Grammar:
        """
        A context-free grammar in llguidance's variant of Lark; the text is a `start`.

        Raises:
            ValueError: a grammar that does not parse.
        """
        return cls(_valid(_matcher().grammar_from_lark(grammar), "Lark grammar", warnings=True), names_tokens=True)

    @classmethod
    def choice(cls, strings: Sequence[str]) -> Grammar:
        """
        One of some strings.

        Raises:
            ValueError: no string, an empty one, or one with lone surrogates.
        """
        if isinstance(strings, str) or not strings or not all(isinstance(string, str) for string in strings):
            raise ValueError(f"Grammar.choice takes a list of strings, got {strings!r}.")
        for string in strings:
            if not string or any("\ud800" <= letter <= "\udfff" for letter in string):
                raise ValueError(f"Grammar.choice: {string!r} is empty or has lone surrogates; leave it out.")
        return cls.regex("|".join("".join(f"\\x{{{ord(letter):x}}}" for letter in string) for string in strings))


def _matcher():
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise ImportError(
            "constrained decoding needs llguidance: pip install 'transformers_minicpm4[edge]' (or llguidance)."
        ) from error
    return LLMatcher


def _valid(text: str, kind: str, warnings: bool = False) -> str:
    """
    The grammar, if llguidance takes it.

    Args:
        warnings: whether those are let pass (a special token is not known before the tokenizer is).
    """
    failed, messages = _matcher().validate_grammar_with_warnings(text)
    if failed or (messages and not warnings):
        raise ValueError(f"the {kind} cannot be used: {' '.join(' '.join(messages).split())}.")
    return text


def _schemas(schema, place: str) -> Iterator[tuple[dict, str]]:
    """A schema and all those inside it, each with its place."""
    if not isinstance(schema, dict):
        return
    yield schema, place
    for keyword in ("items", "additionalProperties"):
        yield from _schemas(schema.get(keyword), f"{place}/{keyword}")
    for keyword in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(schema.get(keyword), list):
            for number, one in enumerate(schema[keyword]):
                yield from _schemas(one, f"{place}/{keyword}/{number}")
    for keyword in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(schema.get(keyword), dict):
            for name, one in schema[keyword].items():
                yield from _schemas(one, f"{place}/{keyword}/{name}")


def _problems(schema: dict, place: str) -> Iterator[str]:
    """What a schema itself asks for that is not enforced."""
    for keyword, value in schema.items():
        if keyword not in ENFORCED and keyword not in ANNOTATIONS:
            yield f"{keyword!r} at {place}"
        elif keyword == "items" and isinstance(value, list):
            yield f"'items' as a list at {place} (write 'prefixItems')"
        elif keyword in ("exclusiveMinimum", "exclusiveMaximum") and isinstance(value, bool):
            yield f"{keyword!r} as true or false at {place} (write the bound itself)"
        elif keyword == "format" and value not in FORMATS:
            yield f"'format': {value!r} at {place} (known: {', '.join(sorted(FORMATS))})"
        elif keyword == "$schema" and not str(value).rstrip("#").endswith(_DRAFTS):
            yield f"'$schema': {value!r} at {place} (drafts 06, 07, 2019-09 and 2020-12 are known)"


def _narrow(schema: dict, document: dict, place: str) -> Iterator[str]:
    """A whole number that is excluded next to another bound less than 1 away: the engine lets it pass."""
    if schema.get("type") == "integer":
        return
    bounds = list(_bounds(schema, document, set()))
    for keyword, bound in bounds:
        if keyword.startswith("exclusive") and bound == int(bound):
            for other, value in bounds:
                if other[-7:] != keyword[-7:] and abs(value - bound) < 1:
                    yield f"{keyword!r}: {bound} with {other!r}: {value}, less than 1 away, at {place}"


def _bounds(schema, document: dict, seen: set[str]) -> Iterator[tuple[str, float]]:
    """Bounds of a number, those of parts that the engine joins with the schema among them."""
    if not isinstance(schema, dict):
        return
    for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        value = schema.get(keyword)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield keyword, value
    for keyword in ("allOf", "anyOf", "oneOf"):
        for one in schema.get(keyword) if isinstance(schema.get(keyword), list) else []:
            yield from _bounds(one, document, seen)
    pointer = schema.get("$ref")
    if isinstance(pointer, str) and pointer not in seen:
        seen.add(pointer)
        target = document
        for name in pointer.removeprefix("#").split("/")[1:]:
            target = target.get(name) if isinstance(target, dict) else None
        yield from _bounds(target, document, seen)
