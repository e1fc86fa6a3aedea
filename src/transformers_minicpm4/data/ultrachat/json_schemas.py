"""JSON and JSON Schema, strictly read: no NaN, no repeated keys, no schema fetched from elsewhere."""

import json
import re
import time
from collections import Counter
from contextvars import ContextVar
from functools import lru_cache, wraps

import regex

from .reasons import shorten


# Levels of objects and lists in a schema or in what it checks. jsonschema calls itself several times a level, and
# Python's stack holds some hundred levels; a limit of our own gives the same verdict wherever a row is read.
MAX_DEPTH = 32
MAX_STEPS = 100_000  # keywords and subschemas looked at in one check: references can double them at every level
PATTERN_SECONDS = 1.0  # for all `pattern`s of one check; an honest one takes microseconds
MAX_NAME = 256  # characters of an argument's name where names are matched against patterns
# jsonschema matches names by `re`, which nothing can stop: only patterns that cannot take long.
_REPEATED_GROUP = re.compile(r"\)\??[*+{]|\(\?(?![:=!])")  # or a flag or comment that could hide one
_OFTEN = ((re.compile(r"[*+]|\{\d*,|\d{3,}\}"), 2), (re.compile(r"\("), 3), (re.compile(r"\?"), 6))
_WORK: ContextVar = ContextVar("work of the check that runs now", default=None)


class _TooMuchWork(Exception):
    """A schema whose check would take too long."""


class _Work:
    def __init__(self):
        self.steps, self.seconds = MAX_STEPS, PATTERN_SECONDS

    def step(self):
        self.steps -= 1
        if self.steps < 0:
            raise _TooMuchWork(f"more than {MAX_STEPS:,} steps: its references multiply")

    def search(self, pattern: str, text: str) -> bool:
        re.compile(pattern)  # what is no pattern to jsonschema is none here
        start = time.process_time()
        try:
            found = bool(regex.search(pattern, text, timeout=max(self.seconds, 0.001)))
        except regex.error:
            raise _TooMuchWork(f"the pattern {shorten(repr(pattern))} cannot be stopped in time") from None
        except TimeoutError as error:
            if "regex timed out" not in str(error):  # a caller's own, from its signal handler
                raise
            raise _TooMuchWork(f"the pattern {shorten(repr(pattern))} takes too long") from None
        self.seconds -= time.process_time() - start
        return found


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _no_repeats(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {next(key for key in counts if counts[key] > 1)!r} stands twice in one object")
    return found


def parse_json(text: str):
    """`json.loads` without NaN, Infinity and repeated keys. Raises ValueError, also for what is nested too deep."""
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def too_deep(value) -> bool:
    """Do objects and lists stand more than `MAX_DEPTH` levels deep in each other?"""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [item for each in level if isinstance(each, dict | list | tuple) for item in _items(each)]
        if not level:
            return False
    return any(isinstance(each, dict | list | tuple) for each in level)


def _items(value):
    return value.values() if isinstance(value, dict) else value


def drop_nulls(value):
    """
    `value` without the keys that hold null, at every depth.

    Arrow gives all objects of a column the union of their keys and fills with null; in such a column a null means
    "not there".
    """
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [drop_nulls(item) for item in value]
    return value


def import_jsonschema():
    try:
        import jsonschema
    except ImportError as error:
        raise ImportError(
            "JSON schemas are checked by the package jsonschema: pip install transformers_minicpm4[data]"
        ) from error
    return jsonschema


def _foreign_reference(schema) -> str | None:
    if isinstance(schema, dict):
        target = schema.get("$ref")
        if isinstance(target, str) and not target.startswith("#"):
            return target
        schema = list(schema.values())
    if isinstance(schema, list):
        return next((found for item in schema if (found := _foreign_reference(item))), None)
    return None


def _slow_name_pattern(schema) -> str | None:
    """A key of `patternProperties` whose search may take long: more choices than a name of `MAX_NAME` allows."""
    if isinstance(schema, dict):
        named = schema.get("patternProperties")
        for pattern in named if isinstance(named, dict) else ():
            plain = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)  # an escaped sign repeats nothing
            if _REPEATED_GROUP.search(plain) or any(len(sign.findall(plain)) > most for sign, most in _OFTEN):
                return pattern
        schema = list(schema.values())
    if isinstance(schema, list):
        return next((found for item in schema if (found := _slow_name_pattern(item)) is not None), None)
    return None


@lru_cache(maxsize=16)
def _bounded(chosen):
    """A validator class of jsonschema that counts its steps and stops its patterns."""
    import attrs
    from jsonschema import ValidationError
    from jsonschema.validators import extend, validator_for

    def counted(function):
        @wraps(function)
        def count(validator, value, instance, schema):
            _WORK.get().step()
            return function(validator, value, instance, schema)

        return count

    def pattern(validator, pattern, instance, schema):
        if validator.is_type(instance, "string") and not _WORK.get().search(pattern, instance):
            yield ValidationError(f"{instance!r} does not match {pattern!r}")

    def of_names(function):
        def check(validator, value, instance, schema):
            longest = max(map(len, instance), default=0) if isinstance(instance, dict) else 0
            if "patternProperties" in schema and longest > MAX_NAME:
                raise _TooMuchWork(f"names of more than {MAX_NAME} characters are not matched against patterns")
            return function(validator, value, instance, schema)

        return check

    keywords = {**chosen.VALIDATORS, "pattern": pattern}
    for name in ("patternProperties", "additionalProperties"):
        keywords[name] = of_names(keywords[name])
    bounded = extend(chosen, {name: counted(function) for name, function in keywords.items()})

    def evolve(self, **changes):
        _WORK.get().step()
        # jsonschema's own would go back to a class without bounds where a subschema names its draft.
        other = validator_for(changes.get("schema", self.schema), default=bounded)
        kind = bounded if other in (bounded, chosen) else _bounded(other)
        same = {field.alias: getattr(self, field.name) for field in attrs.fields(type(self)) if field.init}
        return kind(**{**same, **changes})

    bounded.evolve = evolve
    return bounded


# What jsonschema stumbles over in a schema and arguments of a model's making. No more: a caller's own exception, from
# a signal handler that stops a slow row, has to get through.
_STUMBLES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, re.error)


@lru_cache(maxsize=4096)
def compile_schema(schema: str):
    """
    The jsonschema validator (draft 2020-12 unless `$schema` says otherwise) of a schema given as JSON text.

    Raises:
        ValueError: the text is not JSON, no valid schema, or refers to a schema outside itself (nothing is fetched).
    """
    jsonschema = import_jsonschema()
    from referencing import Registry
    from referencing.exceptions import CannotDetermineSpecification

    parsed = parse_json(schema)
    if not isinstance(parsed, dict | bool):
        raise ValueError(f"a schema is an object, not {shorten(schema)}")
    if too_deep(parsed):
        raise ValueError(f"a schema has at most {MAX_DEPTH} levels; put deeper parts under $defs")
    if not isinstance(parsed, bool) and not isinstance(parsed.get("$schema", ""), str):
        raise ValueError(f"$schema is a text, not {shorten(parsed['$schema'])}; leave it out for draft 2020-12")
    if target := _foreign_reference(parsed):
        raise ValueError(f"$ref {target!r} leaves the schema; put the definition under $defs")
    if (slow := _slow_name_pattern(parsed)) is not None:
        raise ValueError(
            f"the pattern of names {shorten(repr(slow))} may take too long; repeat no group, use at most two of "
            f"* + {{m,n}}, three groups and six ?"
        )
    try:
        chosen = jsonschema.validators.validator_for(parsed, default=jsonschema.Draft202012Validator)
        chosen.check_schema(parsed)
    except jsonschema.SchemaError as error:
        raise ValueError(f"no valid schema: {shorten(error.message, 100)}") from error
    except (*_STUMBLES, jsonschema.exceptions.UnknownType, CannotDetermineSpecification) as error:
        raise ValueError(f"no valid schema: {type(error).__name__}, {shorten(error, 100)}") from error
    return _bounded(chosen)(parsed, registry=Registry())


def schema_errors(schema: str, value) -> list[tuple[str, str, object]]:
    """
    What is wrong with `value`: (keyword of the schema, path like `a.b[0]`, jsonschema's error), by place.

    A `$ref` that leads nowhere, or round in a circle, comes back as one error of keyword `$ref`; a check that cannot
    be computed (numbers beyond a float, an `$id` that is no address) or would take too long (`MAX_STEPS`,
    `PATTERN_SECONDS`) as one of keyword `error`.
    """
    jsonschema = import_jsonschema()
    from referencing.exceptions import CannotDetermineSpecification, Unresolvable

    validator = compile_schema(schema)
    if too_deep(value):
        return [("error", "", ValueError(f"nested deeper than {MAX_DEPTH} levels"))]
    before = _WORK.set(_Work())
    try:
        errors = sorted(validator.iter_errors(value), key=lambda error: (error.json_path, error.message))
    except (Unresolvable, RecursionError) as error:
        return [("$ref", "", error)]
    except _TooMuchWork as error:
        return [("error", "", f"cannot be checked, {error}")]
    except (*_STUMBLES, jsonschema.exceptions.UnknownType, CannotDetermineSpecification) as error:
        return [("error", "", f"cannot be checked, {type(error).__name__}: {error}")]
    finally:
        _WORK.reset(before)
    return [(error.validator, error.json_path.removeprefix("$").removeprefix("."), error) for error in errors]
