"""What schemas and grammars are refused, and that those that are taken mean to the engine what they say."""

import functools
import json
import math
import random
import re
import subprocess
import sys
from decimal import Decimal

import jsonschema
import llguidance
import pytest

from transformers_minicpm4.generation.grammar import Grammar


class Bytes:
    """A vocabulary of all bytes, as `llguidance.TokenizerWrapper` takes it."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]

    def __call__(self, data):
        return list(data)


VOCABULARY = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))


@functools.lru_cache(maxsize=8)
def begun(text):
    return llguidance.LLMatcher(VOCABULARY, text, log_level=0)


def holds(grammar, text):
    """Whether the text is a whole one of all of a grammar's parts."""
    ids = list(text.encode())
    for part in grammar.texts:
        matcher = begun(part).deep_copy()
        assert not matcher.is_error(), matcher.get_error()
        if matcher.validate_tokens(ids) < len(ids) or not matcher.consume_tokens(ids) or not matcher.is_accepting():
            return False
    return True


def is_valid(schema, text):
    """By the `jsonschema` package; a name twice in an object is refused by it nowhere, so here."""
    kind = jsonschema.Draft202012Validator
    return kind(schema, format_checker=kind.FORMAT_CHECKER).is_valid(json.loads(text))


# --- Names of properties ---------------------------------------------------------------------------------------------

INTEGER = {"type": "integer"}
NAMES = [
    {"properties": {"a": INTEGER}},
    {"properties": {"a": INTEGER}, "additionalProperties": True},
    {"patternProperties": {"^a": INTEGER}},
    {"patternProperties": {"^a": INTEGER}, "properties": {"a": {"minimum": 1}}, "additionalProperties": False},
    {"properties": {"a/b": INTEGER, "é": INTEGER, "😀": INTEGER, '"': INTEGER, "": INTEGER}},
    {"properties": {"a\n": INTEGER, "\x1f": INTEGER}, "additionalProperties": False},
    {"patternProperties": {"^[a\n]+$": INTEGER, "^\x1f$": {"type": "boolean"}}},
    {"allOf": [{"required": ["a"]}, {"properties": {"a": INTEGER}}]},
    {"properties": {"b": {"properties": {"a": INTEGER}}}},
    {"additionalProperties": {"type": "string"}, "properties": {"a": INTEGER}},
]


def spellings(draw, text):
    """JSON's ways to write a string."""
    written = ""
    for letter in text:
        units = letter.encode("utf-16-be").hex()
        escaped = "".join(f"\\u{units[n : n + 4]}" for n in range(0, len(units), 4))
        ways = [json.dumps(letter)[1:-1], json.dumps(letter, ensure_ascii=False)[1:-1], escaped]
        written += draw.choice([*ways, escaped.upper().replace("U", "u"), "\\/" if letter == "/" else ways[0]])
    return f'"{written}"'


def test_a_name_is_the_same_however_it_is_spelled():
    draw = random.Random(0)
    taken = 0
    for schema in NAMES:
        schema = {"type": "object", **schema}
        grammar = Grammar.json_schema(schema, whitespace="")
        for name in ("a", "ab", "a\n", "a/b", "é", "😀", "\x1f", '"', "b", "zz"):
            for value in ("1", '"x"', '{"a":"x"}', '{"\\u0061":"x"}'):
                for _ in range(6):
                    text = f"{{{spellings(draw, name)}:{value}}}"
                    if holds(grammar, text):
                        taken += 1
                        assert is_valid(schema, text), (schema, text)
                # Written as json.dumps writes it, what is valid is taken.
                text = f"{{{json.dumps(name, ensure_ascii=False)}:{value}}}"
                assert holds(grammar, text) == (is_valid(schema, text) and "\\u0061" not in text), (schema, text)
    assert taken > 100


@pytest.mark.parametrize("name", ["a\n", "\x00", "\x1f", "b\x7f"])
def test_names_with_control_characters_are_refused_beside_free_ones(name):
    for schema in (
        {"properties": {name: INTEGER}}, {"required": [name]},
        {"properties": {name: INTEGER}, "patternProperties": {"^b": {}}, "additionalProperties": False},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="as a name beside free ones at #/items .no control characters"):
            Grammar.json_schema({"items": schema})
    schema = {"type": "object", "properties": {name: INTEGER}, "additionalProperties": False}
    assert holds(Grammar.json_schema(schema), json.dumps({name: 1}, ensure_ascii=False))


def test_free_names_may_repeat_so_they_are_not_counted():
    free = {"type": "object", "additionalProperties": INTEGER}
    for schema in (
        {**free, "minProperties": 2},
        {"type": "object", "patternProperties": {"^a": INTEGER}, "additionalProperties": False, "minProperties": 2},
        {**free, "properties": {"a": INTEGER}, "required": ["a"], "minProperties": 3},
        {"$ref": "#/$defs/x", "$defs": {"x": {**free, "allOf": [{"minProperties": 2}]}}},
    ):
        with pytest.raises(ValueError, match=r"'minProperties': . at #.*free keys may repeat"):
            Grammar.json_schema(schema)
    schema = {**free, "properties": {"a": INTEGER}, "required": ["a"], "minProperties": 2}
    grammar = Grammar.json_schema(schema, whitespace="")
    for text in ('{"a":1}', '{"a":1,"b":2}', '{"a":1,"a":2}', '{"a":1,"\\u0061":2}', '{"b":1,"b":2}'):
        names = dict(json.loads(text, object_pairs_hook=lambda pairs: pairs))
        assert holds(grammar, text) == (names.keys() == {"a", "b"}), text


# --- References ------------------------------------------------------------------------------------------------------

STRANGE = [
    "a/b",
    "a~b",
    "a b",
    "é",
    "%",
    '"q',
    "",
    "a%20b",
    "#x",
    "?",
    "名",
    "a~1b",
    "\\",
    "^|{}`<>",
    "\n",
    "[x]",
    "0",
]


def pointers(name):
    from urllib.parse import quote

    step = name.replace("~", "~0").replace("/", "~1")
    return {
        f"#/$defs/{quote(step, safe='')}",
        f"#/$defs/{quote(step, safe='~/!$')}",
        f"http://h/x#/$defs/{quote(step)}",
    }


def test_references_reach_what_they_point_to():
    definitions = {name: {"const": number} for number, name in enumerate(STRANGE)}
    for number, name in enumerate(STRANGE):
        for pointer in pointers(name):
            grammar = Grammar.json_schema({"$id": "http://h/x", "$ref": pointer, "$defs": definitions})
            assert [holds(grammar, str(one)) for one in range(len(STRANGE))] == [
                one == number for one in range(len(STRANGE))
            ], (name, pointer)
    for schema in (
        {"prefixItems": [{"type": "integer"}, {"$ref": "#/prefixItems/0"}], "items": False, "type": "array"},
        {"type": "array", "items": {"$ref": "#x"}, "$defs": {"y": {"anyOf": [{}, {"$anchor": "x", **INTEGER}]}}},
        {"$id": "http://h/x#", "type": "array", "items": {"$ref": "http://h/x#x"},
         "$defs": {"y": {"$anchor": "x", **INTEGER}}},
    ):  # fmt: skip
        grammar = Grammar.json_schema(schema, whitespace="")
        assert holds(grammar, "[1,2]")
        assert not holds(grammar, '[1,"a"]')


@pytest.mark.parametrize("pointer", [
    "#/$defs/gone", "http://a.b/c", "other.json#/$defs/x", "#y", "#/prefixItems/00", "#/prefixItems/-", "#/$defs",
    "#/default", "#/examples/0", "#/enum/0", "#/properties/a/const", "#/$defs/%FF", "$defs/x", "#/prefixItems/9",
])  # fmt: skip
def test_references_to_no_schema_are_refused(pointer):
    date = {"type": "string", "format": "date"}
    schema = {
        "properties": {"a": {"const": date}}, "default": date, "examples": [date], "enum": [date],
        "prefixItems": [date], "$defs": {"x": date}, "items": {"$ref": pointer},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"'\$ref': '.*' at #/items \(no schema of this document\)"):
        Grammar.json_schema(schema)


def test_bounds_that_the_engine_gets_wrong_are_refused_wherever_they_meet():
    low, high = {"type": "number", "exclusiveMinimum": 1}, {"maximum": 1.5}
    for schema in (
        {"allOf": [{"$ref": "#x"}, high], "$defs": {"q": {"$anchor": "x", **low}}},
        {"allOf": [{"$ref": "#/$defs/a~1b"}, high], "$defs": {"a/b": low}},
        {"allOf": [{"$ref": "#/$defs/a%20b"}, high], "$defs": {"a b": low}},
        {"allOf": [{"$ref": "#/prefixItems/0"}, high], "prefixItems": [low]},
        {"$ref": "#/$defs/a", **high, "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": low}},
        {"allOf": [{"properties": {"a": low}}, {"properties": {"a": high}}]},
        {"properties": {"a": low}, "patternProperties": {"^a": high}},
        {"properties": {"a": low}, "allOf": [{"additionalProperties": high}]},
        {"$ref": "#/$defs/a", "items": high, "$defs": {"a": {"items": low}}},
        {"$ref": "#/$defs/a", "items": high, "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"items": low}}},
        {"type": "integer", "allOf": [low], "$defs": {"a": {"allOf": [{"$ref": "#/allOf/0"}, high]}}},
    ):
        with pytest.raises(ValueError, match="'exclusiveMinimum': 1 with 'maximum': 1.5, less than 1 away, at #"):
            Grammar.json_schema(schema)
    # Apart from each other, and of whole numbers, they are fine.
    for schema, text in (
        ({"type": "object", "properties": {"a": low, "b": high}}, '{"a":1.25,"b":1}'),
        ({"type": "integer", "allOf": [{"exclusiveMinimum": 1}, {"maximum": 2}]}, "2"),
        ({"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": low, "b": high}}, "1.25"),
    ):
        assert holds(Grammar.json_schema(schema), text)


def test_numbers_that_float64_does_not_know():
    for schema, place in (
        ({"const": 2**53 + 1}, "#"), ({"items": {"enum": [1, {"a": [10**17 + 1]}]}}, "#/items"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"in '(const|enum)' at {place} \(the engine rounds"):
            Grammar.json_schema(schema)
    draw, refused = random.Random(2), []
    for _ in range(300):
        size = draw.choice([50, 52, 53, 54, 60, 62])
        bound = draw.choice([-1, 1]) * draw.randint(2**size - 3, 2**size + 3)
        schema = {
            "type": "integer",
            draw.choice(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]): bound,
        }
        try:
            grammar = Grammar.json_schema(schema)
        except ValueError as error:  # one-sided from 10**18 away from 0 on
            refused.append(str(error))
            continue
        for value in (bound - 1, bound, bound + 1, bound - 5, bound + 5):
            assert not holds(grammar, str(value)) or is_valid(schema, str(value)), (schema, value)
        inside = [bound - 4096, bound + 4096]
        assert [holds(grammar, str(value)) for value in inside] == [is_valid(schema, str(value)) for value in inside]
    assert all("Failed to generate regex for integer range" in message for message in refused), refused
    assert len(refused) < 150
    for bound in (2**63 - 1, 1 - 2**63):
        grammar = Grammar.json_schema({"type": "integer", "minimum" if bound < 0 else "maximum": bound})
        assert holds(grammar, str(bound // 2))
        assert not holds(grammar, str(bound * 2))
    rounded = []
    for _ in range(600):
        value = draw.choice([draw.uniform(-9, 9), math.ldexp(draw.random(), draw.randint(-40, 40)), draw.random()])
        value = round(value, draw.randint(0, 18))
        try:
            grammar = Grammar.json_schema({"const": value})
        except ValueError as error:
            rounded.append((str(error), len(repr(value).strip("-0."))))
            continue
        digits = f"{Decimal(repr(value)):f}"
        assert holds(grammar, digits.removesuffix(".0")), value
        for other in (math.nextafter(value, 99), math.nextafter(value, -99)):
            assert not holds(grammar, f"{Decimal(repr(other)):f}")
    assert all("the engine rounds it" in message and digits > 15 for message, digits in rounded), rounded
    assert 10 < len(rounded) < 300


def test_bounds_beyond_the_engines_numbers_move_inward():
    for schema, inside, outside in (
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}, [-(2**62), 0, 2**62], [2**64, -(2**64)]),
        ({"type": "integer", "minimum": 0, "maximum": 1.7e308}, [0, 2**62], [-1]),
        ({"type": "number", "exclusiveMaximum": 1e16}, [9.5, 10**15], [10**16, 10**16 + 2]),
        ({"type": "integer", "exclusiveMinimum": 2**53, "minimum": 2**54}, [2**54, 2**55], [2**53, 2**53 + 2]),
    ):
        grammar = Grammar.json_schema(schema)
        assert [value for value in inside + outside if holds(grammar, str(value))] == inside, schema
    with pytest.raises(ValueError, match="'minimum': .* at # .it is a number below"):
        Grammar.json_schema({"minimum": 2**63})


def test_seconds_are_those_of_a_clock_and_names_have_an_end():
    for kind, good, bad in (
        ("time", ["12:00:59Z", "23:59:00.5+01:00"], ["12:00:60Z", "23:59:60Z"]),
        ("date-time", ["2024-02-29T12:00:59Z"], ["2024-01-01T12:00:60Z", "2023-02-29T12:00:00Z"]),
        ("hostname", ["a.example"], [".".join(["a" * 60] * 5)]),
        ("email", ["a@b.example"], ["a@" + ".".join(["b" * 60] * 5)]),
    ):
        grammar = Grammar.json_schema({"type": "string", "format": kind})
        assert [text for text in good + bad if holds(grammar, json.dumps(text))] == good


# --- Options that exclude each other ---------------------------------------------------------------------------------

TAGGED = {
    "type": "object",
    "properties": {"kind": {"const": "a"}, "x": {"type": "integer"}},
    "required": ["kind"],
    "additionalProperties": False,
}
OTHER = {**TAGGED, "properties": {"kind": {"enum": ["b", "c"]}, "y": {"type": "string"}}}
NUMBERED = [{**TAGGED, "properties": {"v": {"$ref": f"#/$defs/{name}"}}, "required": ["v"]} for name in ("one", "two")]
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {"oneOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#/$defs/add"}], "discriminator": {"propertyName": "t"}},
        "leaf": {**TAGGED, "properties": {"t": {"const": "leaf"}, "n": {"type": "integer"}}, "required": ["t", "n"]},
        "add": {
            **TAGGED,
            "properties": {"t": {"const": "add"}, "of": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["t", "of"],
        },
    },
}


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        (
            {"oneOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": {"type": "string"}}},
            ["null", '"b"', "1"],
        ),
        (
            {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {"a": TAGGED, "b": OTHER}},
            ['{"kind":"a","x":1}', '{"kind":"b","x":1}', '{"kind":"c","y":""}', '{"kind":"a","y":""}', "{}"],
        ),
        (
            {"oneOf": NUMBERED, "$defs": {"one": {"const": 1}, "two": {"const": 2}}},
            ['{"v":1}', '{"v":2}', '{"v":3}', "{}"],
        ),
        ({"oneOf": [{"const": 1}, {"const": True}, {"enum": ["a", None]}]}, ["1", "true", "null", '"a"', "2"]),
        ({"oneOf": [TAGGED, OTHER], "anyOf": [TAGGED, {"type": "null"}]}, ['{"kind":"a"}', '{"kind":"b"}', "null"]),
        (
            TREE,
            [
                '{"t":"add","of":[{"t":"leaf","n":1},{"t":"add","of":[]}]}',
                '{"t":"leaf","n":2}',
                '{"t":"leaf","of":[]}',
            ],
        ),
    ],
    ids=["null", "tags", "numbers", "values", "beside anyOf", "tree"],
)
def test_options_are_told_apart_behind_references_too(schema, texts):
    grammar = Grammar.json_schema(schema)
    got = [holds(grammar, text) for text in texts]
    assert got == [is_valid(schema, text) for text in texts]
    assert True in got
    assert False in got


@pytest.mark.parametrize(
    "options",
    [
        [{"type": "integer"}, {"type": "number"}],
        [{"const": 1}, {"const": 1.0}],
        [TAGGED, {**OTHER, "properties": {"kind": {"enum": ["b", "a"]}}}],
        [{**TAGGED, "required": []}, {**OTHER, "required": []}],
        [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
    ],
    ids=["integer", "equal", "shared tag", "without tag", "references"],
)
def test_options_that_may_hold_at_once_are_refused(options):
    definitions = {"a": {"type": "string"}, "b": {"maxLength": 3}}
    with pytest.raises(ValueError, match="oneOf"):
        Grammar.json_schema({"oneOf": options, "$defs": definitions})


# --- Form ------------------------------------------------------------------------------------------------------------

MALFORMED = [
    ("type", ["strin", 5, None, [], ["null", "null"], ["null", 5], {}]),
    ("format", [["date"], 5, {}]), ("pattern", [5, None, ["a"]]), ("$ref", [5, None, {}]), ("$anchor", [5]),
    ("$schema", [5, []]), ("enum", [[], {}, "ab", 5]), ("required", ["a", [5], ["a", "a"], {}]),
    ("allOf", [5, {}, [], [5], {"type": "null"}]), ("anyOf", [{"type": "string"}, []]), ("oneOf", ["a", [None]]),
    ("prefixItems", [5, {}, [5]]), ("items", ["a", 5]), ("additionalProperties", ["no", 5, []]),
    ("properties", [["a"], 5, {"a": 5}]), ("patternProperties", [[], {"a": "b"}]), ("$defs", [[{}], {"a": []}]),
    ("definitions", [5]), ("minLength", ["3", -1, 1.5, True, 10**40]), ("maxItems", [None, -1, {}]),
    ("minProperties", [[], "1"]), ("multipleOf", [0, -1, "a", True]), ("minimum", ["1", None, True, 10**40]),
    ("exclusiveMinimum", ["1", [], 10**300]), ("exclusiveMaximum", [{}]),
]  # fmt: skip


def test_what_asks_for_nothing_is_no_hindrance():
    schema = {
        "type": "object",
        "additionalProperties": {"type": "array", "items": {"type": "null"}, "uniqueItems": False, "maxItems": 2.0},
        "propertyNames": {"type": "string"},
        "x-order": 3,
        "example": {},
    }
    grammar = Grammar.json_schema(schema)
    assert holds(grammar, '{"a":[null,null]}')
    assert not holds(grammar, '{"a":[null,null,null]}')
    for asking in ({"propertyNames": {"maxLength": 3}}, {"uniqueItems": True}, {"x-guidance": {"lenient": True}}):
        with pytest.raises(ValueError, match="cannot enforce: '.*' at #"):
            Grammar.json_schema({**schema, **asking})


def test_what_would_take_the_engine_or_the_memory_is_refused():
    long = {"properties": {"a" * 100_000: {"properties": {str(number): {} for number in range(1000)}}}}
    with pytest.raises(ValueError, match="too large: the places of its values"):
        Grammar.json_schema(long)
    wide = {"type": "object", "properties": {f"p{number}": INTEGER for number in range(460)}}
    with pytest.raises(ValueError, match="460 properties that may be left out at # "):
        Grammar.json_schema(wide)
    Grammar.json_schema({**wide, "required": [f"p{number}" for number in range(20)]})


@pytest.mark.parametrize(("keyword", "values"), MALFORMED)
def test_a_malformed_keyword_is_named_with_its_place(keyword, values):
    for value in values:
        wrong = {"format": "date", keyword: value} if keyword == "allOf" else {keyword: value}
        for schema, place in ((wrong, "#"), ({"properties": {"a/b": {"items": wrong}}}, "#/properties/a~1b/items")):
            for given in (schema, json.dumps(schema)):
                with pytest.raises(ValueError, match=f"{re.escape(repr(keyword))}.* at {place}[ ;.]"):
                    Grammar.json_schema(given)


def test_what_the_engine_refuses_is_named_with_its_place():
    for wrong, message in (
        ({"pattern": "(("}, "unclosed group"), ({"pattern": "(?=a)b"}, "look-around"),
        ({"patternProperties": {"[": INTEGER}}, "unclosed character class"),
        ({"minItems": 3, "maxItems": 2}, "minItems"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"), ({"minLength": 3, "maxLength": 1}, "minLength"),
        ({"type": "object", "maxProperties": 0, "minProperties": 1}, "Properties"),
    ):  # fmt: skip
        wrong = {"type": "array" if "minItems" in wrong else "string", **wrong}
        if "patternProperties" in wrong:
            wrong["type"] = "object"
        schema = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/a~1b"}, "$defs": {"a/b": wrong}}
        with pytest.raises(ValueError, match=rf"the JSON schema at #/\$defs/a~1b cannot be used: .*{message}"):
            Grammar.json_schema(schema)


def test_values_that_are_no_json_are_named_with_their_place():
    for value in (
        math.inf,
        -math.inf,
        math.nan,
        10**400,
        10**5000,
        "\ud800",
        {5: 1},
        {"\ud800": 1},
        b"a",
        {1, 2},
        object(),
    ):
        for keyword in ("exclusiveMinimum", "const", "default", "pattern"):
            for schema, place in (({keyword: value}, "#/"), ({"items": {keyword: [value]}}, "#/items/")):
                with pytest.raises(ValueError, match=f"the JSON schema has a .* at {place}{keyword}"):
                    Grammar.json_schema(schema)
    for text in ('{"minimum": NaN}', '{"minimum": 1e999}', '{"minimum": -Infinity}', '{"const": "\\ud800"}'):
        with pytest.raises(ValueError, match="at #/"):
            Grammar.json_schema(text)
    for schema in (None, 5, [], b"{}", "5", "[]", "", "{", int, "[" * 100_000, '{"minimum": ' + "9" * 5000 + "}"):
        with pytest.raises(ValueError, match="schema"):
            Grammar.json_schema(schema)
    for whitespace in (None, 5, "(", "\ud800"):
        with pytest.raises(ValueError, match="whitespace pattern"):
            Grammar.json_schema({}, whitespace=whitespace)


def test_random_damage_is_a_value_error_or_nothing():
    """Any part of a schema replaced by anything."""
    draw = random.Random(5)
    anything = [None, True, False, 0, -1, 1.5, 10**30, math.nan, "", "a", "#", "date", "\ud800", [], [1], {}, {"a": 1},
                [{}], {"type": "x"}, {"$ref": "#"}, {"items": []}, b"x", 2**63, -(2**63), "(", ["null"]]  # fmt: skip
    refused = []
    for _ in range(1500):
        schema = {
            "type": "object", "required": ["a"], "minProperties": 1, "$defs": {"x": {"$anchor": "x", "maximum": 3}},
            "properties": {"a": {"anyOf": [{"type": "string", "format": "date"}, {"$ref": "#x"}]},
                           "b": {"type": "array", "items": {"$ref": "#/$defs/x"}, "minItems": 1}},
            "patternProperties": {"^c": {"enum": [1, "a"]}}, "allOf": [{"additionalProperties": {"type": "null"}}],
        }  # fmt: skip
        for _ in range(draw.randint(1, 2)):
            part = schema
            while True:
                keys = list(part) if isinstance(part, dict) else range(len(part))
                key = draw.choice(keys)
                if isinstance(part[key], dict | list) and part[key] and draw.random() < 0.7:
                    part = part[key]
                    continue
                part[key] = draw.choice(anything)
                break
        try:
            Grammar.json_schema(schema)
        except ValueError as error:
            refused.append(str(error))
    assert all(message.startswith("the JSON schema ") and len(message) > 40 for message in refused), refused
    assert 500 < len(refused) < 1500


# --- Depth -----------------------------------------------------------------------------------------------------------

# Each makes a grammar of a size; a crash would take pytest with it, so they run in a process of their own.
DEEP = """
import sys
from transformers_minicpm4.generation.grammar import Grammar

def chain(size, link, last={"type": "integer"}):
    parts = {f"d{n}": link({"$ref": f"#/$defs/d{n + 1}"}) for n in range(size)}
    return Grammar.json_schema({"$ref": "#/$defs/d0", "$defs": {**parts, f"d{size}": last}})

def nested(size, start, end, middle="{}"):
    return Grammar.json_schema(start * size + middle + end * size)

def spelled(size):  # one definition, by many spellings of its name
    names = ["".join(f"%{ord(c):X}" if n >> b & 1 else c for b, c in enumerate("abcdefghijkl")) for n in range(size)]
    options = [{"type": "array", "items": {"$ref": f"#/$defs/{name}"}} for name in names]
    return Grammar.json_schema({"$ref": "#/$defs/abcdefghijkl", "$defs": {"abcdefghijkl": {"anyOf": options}}})

def inside_itself():
    schema = {"type": "array"}
    schema["items"] = schema
    return Grammar.json_schema(schema)

def ring(size):
    parts = {f"d{n}": {"items": {"$ref": f"#/$defs/d{(n + 1) % size}"}} for n in range(size)}
    return Grammar.json_schema({"$ref": "#/$defs/d0", "$defs": parts})

def rules(size, name="r"):
    lines = [f'{name}{n}: "a" {name}{n + 1}' for n in range(size)]
    return Grammar.lark("\\n".join([f"start: {name}0", *lines, f'{name}{size}: "b"']))

def inline(size):
    parts = ",".join(f'"d{n}":{{"items":{{"$ref":"#/$defs/d{n + 1}"}}}}' for n in range(size))
    return Grammar.lark(f'start: %json {{"$ref":"#/$defs/d0","$defs":{{{parts},"d{size}":{{}}}}}}')

cases = {
    "array": lambda n: chain(n, lambda to: {"type": "array", "items": to}),
    "alone": lambda n: chain(n, lambda to: to),
    "allOf": lambda n: chain(n, lambda to: {"allOf": [to], "minimum": 1}),
    "tuple": lambda n: chain(n, lambda to: {"prefixItems": [to]}),
    "object": lambda n: chain(n, lambda to: {"type": "object", "properties": {"a": {"anyOf": [to, {}]}}}),
    "spelled": spelled, "ring": ring, "inside itself": lambda n: inside_itself(),
    "items": lambda n: nested(n, '{"items":', "}"),
    "anyOf": lambda n: nested(n, '{"anyOf":[', "]}"),
    "const": lambda n: Grammar.json_schema('{"const":' + "[" * n + "]" * n + "}"),
    "rules": rules, "terminals": lambda n: rules(n, "R"), "inline": inline,
    "brackets": lambda n: Grammar.regex("(" * n + "a" + ")" * n),
    "lark brackets": lambda n: Grammar.lark("start: " + "(" * n + '"a"' + ")" * n),
    "pattern": lambda n: Grammar.json_schema({"pattern": "(a|" * n + "b" + ")" * n}),
    "repeats": lambda n: Grammar.regex("(a{1000}){1000}" * n),
}
for size in map(int, sys.argv[1:]):
    for name, make in cases.items():
        print(size, name, end=": ", flush=True)
        try:
            make(size)
            print("taken")
        except ValueError as error:
            print(str(error)[:60].replace("\\n", " "))
"""


def test_nothing_is_too_deep_for_the_process():
    command = [sys.executable, "-c", DEEP, "30", "150", "3000"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, (result.returncode, result.stdout[-300:], result.stderr[-2000:])
    told = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert len(told) == 3 * 18
    taken = {name for name, what in told.items() if what == "taken"}
    chains = {"array", "alone", "allOf", "tuple", "ring"}
    for name in chains:
        assert "more than 400 schemas inside each other" in told[f"3000 {name}"], told
    for size, least in ((30, {*chains, "object", "items", "rules", "inline"}), (150, {*chains, "rules", "terminals"})):
        assert {f"{size} {name}" for name in least} <= taken
    assert {name for name in taken if "000 " in name} <= {"3000 repeats"}, told


def test_what_is_no_text_is_refused():
    for make in (Grammar.regex, Grammar.lark):
        for given in (None, 5, b"a", ["a"], "\ud800"):
            with pytest.raises(ValueError, match="is a string"):
                make(given)
    with pytest.raises(ValueError, match="Grammar.choice takes a list of strings"):
        Grammar.choice(None)
    with pytest.raises(ValueError, match="Grammar.choice takes a list of strings"):
        Grammar.choice(5)
