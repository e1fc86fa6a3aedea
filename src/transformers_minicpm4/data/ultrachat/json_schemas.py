"""JSON and JSON Schema, strictly read: no NaN, no repeated keys, no schema fetched from elsewhere."""

import json
from functools import lru_cache

from .reasons import shorten


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _no_repeats(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


def parse_json(text: str):
    """`json.loads` without NaN, Infinity and repeated keys. Raises ValueError, also for what is nested too deep."""
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


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
    if target := _foreign_reference(parsed):
        raise ValueError(f"$ref {target!r} leaves the schema; put the definition under $defs")
    chosen = jsonschema.validators.validator_for(parsed, default=jsonschema.Draft202012Validator)
    try:
        chosen.check_schema(parsed)
    except jsonschema.SchemaError as error:
        raise ValueError(f"no valid schema: {shorten(error.message, 100)}") from error
    return chosen(parsed, registry=Registry())


def schema_errors(schema: str, value) -> list[tuple[str, str, object]]:
    """
    What is wrong with `value`: (keyword of the schema, path like `a.b[0]`, jsonschema's error), by place.

    A `$ref` that leads nowhere, or round in a circle, comes back as one error of keyword `$ref`.
    """
    from referencing.exceptions import Unresolvable

    try:
        errors = sorted(compile_schema(schema).iter_errors(value), key=lambda error: (error.json_path, error.message))
    except (Unresolvable, RecursionError) as error:
        return [("$ref", "", error)]
    return [(error.validator, error.json_path.removeprefix("$").removeprefix("."), error) for error in errors]
