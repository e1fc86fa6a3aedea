"""
What constrained text has to follow: a JSON schema, a regular expression, a Lark grammar, a choice of strings.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from .json_schema import alone, enforceable, is_text


# At most a line break and an indentation between JSON's parts: with unbounded white space a model may never come on.
WHITESPACE = r"\n? {0,24}"

# JSON in which nothing is escaped but what has to be. The engine writes all strings so, except free names of
# properties beside named ones.
_ONE_SPELLING = r'([^"]|"([^"\\]|\\(["\\bfnrt]|u00([01][0-9a-fA-F]|7[fF])))*")*'

# The engine compiles rules inside rules by recursion, with up to 5.4 kB of stack for each (measured 2026-11-28).
MAX_RULES = 800


@dataclass(frozen=True)
class Grammar:
    """
    What text has to follow; make one by `json_schema`, `regex`, `lark` or `choice`.

    All of them raise `ImportError` where llguidance is not installed.
    """

    # In llguidance's form; generated text has to follow all of them.
    texts: tuple[str, ...] = field(repr=False)
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
            ValueError: no schema, a malformed or too deep one, one that nothing fulfils, or keywords, formats or
                patterns that are not enforced: each is named with its place.
        """
        _check_text(whitespace, "whitespace pattern")
        _valid(_matcher().grammar_from_regex(whitespace), "whitespace pattern")
        closed = isinstance(schema, type) and hasattr(schema, "model_json_schema")
        if closed:
            # Pydantic drops unknown fields where it does not say additionalProperties: a model need not write them.
            try:
                schema = schema.model_json_schema()
            except RuntimeError as error:  # a field of a type that JSON does not know
                raise ValueError(f"the JSON schema of {schema.__name__} cannot be made: {error}") from error
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"the schema is a string that is no JSON, or too deep: {error}.") from error
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise ValueError(
                f"a JSON schema is a dict (or its JSON, or a Pydantic model class), got {reprlib.repr(schema)}."
            )
        schema, by_spelling = enforceable(schema, closed)
        options = {"lenient": False, "coerce_one_of": False}
        options |= {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}

        def compiled(schema: dict, kind: str) -> str:
            return _valid(_matcher().grammar_from_json_schema(json.dumps(schema), overrides=options), kind)

        try:
            text = compiled(schema, "JSON schema")
        except ValueError:
            for place, one in alone(schema):
                compiled(one, f"JSON schema at {place}")
            raise
        more = [_matcher().grammar_from_regex(_ONE_SPELLING)] if by_spelling else []
        return cls((text, *more))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        r"""
        Text that the whole of a regular expression matches, as by `re.fullmatch`.

        The dialect is that of Rust's `regex`: Python's without look-around, back references and `\b`.

        Raises:
            ValueError: no string, or a pattern outside that dialect.
        """
        _check_text(pattern, "regular expression")
        return cls((_valid(_matcher().grammar_from_regex(pattern), "regular expression"),))

    @classmethod
    def lark(cls, grammar: str) -> Grammar:
        """
        A context-free grammar in llguidance's variant of Lark; the text is a `start`.

        Raises:
            ValueError: no string, one that does not parse, or more than 800 rules.
        """
        _check_text(grammar, "Lark grammar")
        # A rule begins a line, or a nested grammar. A JSON schema inside counts by its parts.
        rules = len(re.findall(r"^\s*[?!\w][^\n]*:|^\s*:|%lark", grammar, flags=re.MULTILINE))
        rules += grammar.count("{") if "%json" in grammar else 0
        if rules > MAX_RULES:
            raise ValueError(
                f"the Lark grammar has {rules} rules, parts of JSON schemas in it included, and {MAX_RULES} are what "
                "the engine takes safely; write it with fewer."
            )
        text = _valid(_matcher().grammar_from_lark(grammar), "Lark grammar", warnings=True)
        return cls((text,), names_tokens=True)

    @classmethod
    def choice(cls, strings: Sequence[str]) -> Grammar:
        """
        One of some strings.

        Raises:
            ValueError: no string, an empty one, or one with lone surrogates.
        """
        if not isinstance(strings, Sequence) or isinstance(strings, str) or not strings:
            raise ValueError(f"Grammar.choice takes a list of strings, got {reprlib.repr(strings)}.")
        if not all(isinstance(string, str) for string in strings):
            raise ValueError(f"Grammar.choice takes a list of strings, got {reprlib.repr(strings)}.")
        for string in strings:
            if not string or not is_text(string):
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


def _check_text(text, kind: str) -> None:
    if not isinstance(text, str) or not is_text(text):
        raise ValueError(f"a {kind} is a string without lone surrogates, got {reprlib.repr(text)}.")


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
