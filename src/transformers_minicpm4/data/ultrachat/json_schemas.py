"""JSON and JSON Schema, strictly read: no NaN, no repeated keys, no schema fetched from elsewhere."""

import json
from collections import Counter
from functools import lru_cache

from .reasons import shorten


# Levels of objects and lists in a schema or in what it checks. jsonschema calls itself several times a level, and
# Python's stack holds some hundred levels; a limit of our own gives the same verdict wherever a row is read.
MAX_DEPTH = 32


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


@lru_cache(maxsize=4096)
def compile_schema(schema: str):
    """
    The jsonschema validator (draft 2020-12 unless `$schema` says otherwise) of a schema given as JSON text.

    Raises:
        ValueError: the text is not JSON, no valid schema, or refers to a schema outside itself (nothing is fetched).
    """
    jsonschema = import_jsonschema()
    from referencing import Registry

    parsed = parse_json(schema)
    if not isinstance(parsed, dict | bool):
        raise ValueError(f"a schema is an object, not {shorten(schema)}")
    if too_deep(parsed):
        raise ValueError(f"a schema has at most {MAX_DEPTH} levels; put deeper parts under $defs")
    if not isinstance(parsed, bool) and not isinstance(parsed.get("$schema", ""), str):
        raise ValueError(f"$schema is a text, not {shorten(parsed['$schema'])}; leave it out for draft 2020-12")
    if target := _foreign_reference(parsed):
        raise ValueError(f"$ref {target!r} leaves the schema; put the definition under $defs")
    try:
        chosen = jsonschema.validators.validator_for(parsed, default=jsonschema.Draft202012Validator)
        chosen.check_schema(parsed)
    except jsonschema.SchemaError as error:
        raise ValueError(f"no valid schema: {shorten(error.message, 100)}") from error
    except Exception as error:  # whatever jsonschema stumbles over in a schema of a model's making
        raise ValueError(f"no valid schema: {type(error).__name__}, {shorten(error, 100)}") from error
    return chosen(parsed, registry=Registry())


def schema_errors(schema: str, value) -> list[tuple[str, str, object]]:
    """
    What is wrong with `value`: (keyword of the schema, path like `a.b[0]`, jsonschema's error), by place.

    A `$ref` that leads nowhere, or round in a circle, comes back as one error of keyword `$ref`; a check that cannot
    be computed (numbers beyond a float, an `$id` that is no address) as one of keyword `error`.
    """
    from referencing.exceptions import Unresolvable

    validator = compile_schema(schema)
    if too_deep(value):
        return [("error", "", ValueError(f"nested deeper than {MAX_DEPTH} levels"))]
    try:
        errors = sorted(validator.iter_errors(value), key=lambda error: (error.json_path, error.message))
    except (Unresolvable, RecursionError) as error:
        return [("$ref", "", error)]
    except Exception as error:  # whatever jsonschema stumbles over in a model's schema and arguments
        return [("error", "", f"cannot be checked, {type(error).__name__}: {error}")]
    return [(error.validator, error.json_path.removeprefix("$").removeprefix("."), error) for error in errors]
