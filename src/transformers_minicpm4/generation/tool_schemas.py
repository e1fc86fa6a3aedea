"""
The tools that a model may call, as JSON schemas, and what is wrong with a call by them.

The data room checks calls of training rows by the whole of JSON Schema (data/ultrachat/tool_calls.py); here a model is
told, between two turns, what to repair.
"""

from difflib import get_close_matches


MAX_DEPTH = 128  # subschemas in each other
MAX_STEPS = 10_000  # subschemas looked at for one call: references can go in circles, and double at every level
_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}


def shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def properties_of(schema: dict) -> dict:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def tool_schemas(tools) -> dict[str, dict]:
    """
    `{name: JSON schema of the arguments}` of tools as `apply_chat_template` takes them.

    Args:
        tools: list of `{"type": "function", "function": {"name", "parameters"}}`, of the inner objects, or of
            documented Python functions; `None` is no tools.
    Raises:
        ValueError: a tool has no name, or two have the same.
    """
    found = {}
    for place, tool in enumerate(tools or [], start=1):
        if callable(tool):
            from transformers.utils import get_json_schema

            tool = get_json_schema(tool)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"tool {place} is {str(tool)[:80]!r}; give {{'type': 'function', 'function': {{'name': ..., "
                "'parameters': ...}}}} or a Python function with type hints and a docstring"
            )
        if function["name"] in found:
            raise ValueError(f"two tools are called {function['name']!r}; rename one, or put its server in front")
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"parameters of {function['name']!r} are {str(parameters)[:80]!r}; give a JSON schema")
        found[function["name"]] = parameters
    return found


class _Checker:
    """The part of JSON Schema that says what an argument is; tools come from servers that nobody vouches for."""

    def __init__(self, root: dict):
        self.root, self.steps = root, 0

    def problems(self, schema, value, where: str, depth: int = 0) -> list[str]:
        self.steps += 1
        if not isinstance(schema, dict) or self.steps > MAX_STEPS or depth > MAX_DEPTH:
            return []
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/"):
            found = self.root
            for part in reference[2:].split("/"):
                found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
            return self.problems(found, value, where, depth + 1)
        for branches in (schema.get("anyOf"), schema.get("oneOf")):
            if isinstance(branches, list) and branches:
                each = [self.problems(branch, value, where, depth + 1) for branch in branches]
                if all(each):
                    return [", or ".join(shorten(problems[0], 150) for problems in each[:4])]
        types = schema.get("type")
        types = [name for name in (types if isinstance(types, list) else [types]) if name in list(_TYPES)]
        if types and not any(_is_type(value, name) for name in types):
            return [f"{where} must be {' or '.join(types)}, not {shorten(repr(value))}"]
        options = schema.get("enum")
        if isinstance(options, list) and value not in options:
            shown = shorten(", ".join(map(repr, options)), 200)
            return [f"{where} must be one of {shown}, not {shorten(repr(value))}"]
        if isinstance(value, dict):
            return self.object_problems(schema, value, where, depth)
        if isinstance(value, list):
            places = [(f"{where}[{place}]", item) for place, item in enumerate(value)]
            return [x for place, item in places for x in self.problems(schema.get("items"), item, place, depth + 1)]
        return []

    def object_problems(self, schema: dict, value: dict, where: str, depth: int) -> list[str]:
        properties, required = properties_of(schema), schema.get("required")
        required = required if isinstance(required, list) else []
        problems = [f"{where} lacks the required {name!r}" for name in required if name not in list(value)]
        closed = not schema.get("additionalProperties", not properties) and "patternProperties" not in schema
        for name, item in value.items():
            if name in properties:
                problems += self.problems(properties[name], item, f"{where}.{name}", depth + 1)
            elif closed:
                problems.append(f"{where} has no parameter {name!r}; {_nearest(name, properties)}")
        return problems


def _is_type(value, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()  # 3.0 is an integer of JSON Schema
    return isinstance(value, _TYPES[name])


def _nearest(name: str, known) -> str:
    near = get_close_matches(name[:100], known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are: {shorten(', '.join(known), 200) or 'none'}"


def check_arguments(calls, tools) -> list[str]:
    """
    What is wrong with calls, by the tools' JSON schemas: sentences for the model to act on; `[]` where nothing is.

    Checked are unknown tools, missing and unknown parameters (these too where a schema with `properties` leaves
    `additionalProperties` out), `type` and `enum`, inside `properties`, `items`, `anyOf`, `oneOf` and references
    within the schema. Other keywords are left to the tool.

    Args:
        calls: `ToolCall`s.
        tools: as for `tool_schemas`.
    """
    schemas, found = tool_schemas(tools), []
    for call in calls:
        if call.name in schemas:
            schema = schemas[call.name]
            found += _Checker(schema).problems({"type": "object"} | schema, call.arguments, call.name)
        else:
            found.append(f"there is no tool {call.name!r}; {_nearest(call.name, schemas)}")
    return found
