"""Tool calls against their schemas: hand-written cases of each kind of fault, and agreement with plain JSON Schema."""

import copy
import json
import random
import time

import jsonschema
import pytest
from datasets import Dataset, load_dataset

from transformers_minicpm4.data.ultrachat.reasons import reason_counts
from transformers_minicpm4.data.ultrachat.tool_calls import ToolCallFilter, check_tool_calls, has_thought


def tool(name, properties, required=(), **more):
    parameters = {"type": "object", "properties": properties, "required": list(required), **more}
    return {"type": "function", "function": {"name": name, "description": "...", "parameters": parameters}}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = tool(
    "get_weather",
    {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "place": {
            "type": "object",
            "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}},
            "required": ["lat", "lon"],
        },
        "alerts": {"type": "array", "items": {"type": "object", "properties": {"kind": {"type": "string"}}}},
        "note": {"type": ["string", "null"]},
    },
    required=["city"],
)

CASES = [
    ({"city": "Oslo"}, "ok"),
    ({"city": "Oslo", "unit": "celsius", "days": 3, "place": {"lat": 1, "lon": 2.5}, "alerts": [{"kind": "x"}]}, "ok"),
    ({}, "missing_argument: call 1 get_weather, 'city'"),
    ({"city": "Oslo", "town": "Oslo"}, "extra_argument: call 1 get_weather, 'town'"),
    ({"City": "Oslo"}, "missing_argument: call 1 get_weather, 'city'; extra_argument: call 1 get_weather, 'City'"),
    ({"city": 3}, "wrong_type: call 1 get_weather, city: 3 is not of type 'string'"),
    ({"city": "Oslo", "days": "3"}, "wrong_type: call 1 get_weather, days: '3' is not of type 'integer'"),
    ({"city": "Oslo", "days": True}, "wrong_type: call 1 get_weather, days: True is not of type 'integer'"),
    ({"city": "Oslo", "days": 1.5}, "wrong_type: call 1 get_weather, days: 1.5 is not of type 'integer'"),
    ({"city": "Oslo", "days": 99}, "schema_mismatch: call 1 get_weather, days: 99 is greater than the maximum of 14"),
    (
        {"city": "Oslo", "unit": "K"},
        "wrong_value: call 1 get_weather, unit: 'K' is not one of ['celsius', 'fahrenheit']",
    ),
    ({"city": "Oslo", "place": {"lat": 1}}, "missing_argument: call 1 get_weather, 'lon' in place"),
    ({"city": "Oslo", "place": {"lat": 1, "lon": 2, "alt": 3}}, "extra_argument: call 1 get_weather, 'alt' in place"),
    (
        {"city": "Oslo", "alerts": {"kind": "x"}},
        "wrong_type: call 1 get_weather, alerts: {'kind': 'x'} is not of type 'array'",
    ),
    (
        {"city": "Oslo", "alerts": [{"kind": 1}]},
        "wrong_type: call 1 get_weather, alerts[0].kind: 1 is not of type 'string'",
    ),
    ({"city": "Oslo", "alerts": [{"sort": "x"}]}, "extra_argument: call 1 get_weather, 'sort' in alerts[0]"),
]


@pytest.mark.parametrize("arguments, reason", CASES)
def test_each_fault_has_its_name(arguments, reason):
    """The same for arguments as text and as object, tools as list and as text, wrapped and bare."""
    bare = {"name": "get_weather", "arguments": arguments}
    for calls in ([call("get_weather", json.dumps(arguments))], [call("get_weather", arguments)], [bare], bare):
        for tools in ([WEATHER], json.dumps([WEATHER]), [WEATHER["function"]]):
            assert check_tool_calls(calls, tools) == reason
            assert check_tool_calls(json.dumps(calls), tools) == reason


@pytest.mark.parametrize(
    "calls, tools, reason",
    [
        ([call("send", {})], [WEATHER], "unknown_tool: call 1 send, offered get_weather"),
        ([call("send", {})], [], "no_tools_offered: 1 called"),
        ([call("send", {})], None, "no_tools_offered: 1 called"),
        ([call("Get_weather", {"city": "x"})], [WEATHER], "unknown_tool: call 1 Get_weather, offered get_weather"),
        ([], [], "ok"),
        (None, None, "ok"),
        ("", "", "ok"),
        ("null", "null", "ok"),
        ([call("get_weather", '{"city": "Os')], [WEATHER], "malformed_arguments: call 1 get_weather, Unterminated"),
        ([call("get_weather", "")], [WEATHER], "malformed_arguments"),
        (
            [call("get_weather", '["Oslo"]')],
            [WEATHER],
            "malformed_arguments: call 1 get_weather, arguments are an object",
        ),
        ([call("get_weather", '{"city": "a", "city": "b"}')], [WEATHER], "malformed_arguments"),
        ([call("get_weather", '{"city": "a", "days": NaN}')], [WEATHER], "malformed_arguments"),
        ([call("get_weather", "[" * 100_000)], [WEATHER], "malformed_arguments"),
        ([{"arguments": {}}], [WEATHER], "malformed_call: call 1 has no name"),
        ([call("", {})], [WEATHER], "malformed_call"),
        (["get_weather"], [WEATHER], "malformed_call"),
        ("get_weather()", [WEATHER], "malformed_call: the calls are no JSON"),
        ([], [WEATHER, WEATHER], "bad_tool: 'get_weather' is offered twice"),
        ([], [tool("f", {"a": {"type": "strung"}})], "bad_tool: 'f': no valid schema"),
        ([], [{"name": "f", "parameters": {"type": "array"}}], "bad_tool: 'f': parameters have type 'array'"),
        ([], [tool("f", {"a": {"$ref": "http://x.org/a.json"}})], "bad_tool: 'f': $ref"),
        ([], "[{", "bad_tool: the tools are no JSON"),
        ([call("f", {"a": 1})], [tool("f", {"a": {"$ref": "#/$defs/b"}})], "bad_tool: call 1 f"),
        ([call("f", {"a": 1})], [{"name": "f"}], "extra_argument: call 1 f, 'a'"),
        ([call("f", {})], [{"name": "f"}], "ok"),
        ([{"name": "f"}], [{"name": "f"}], "ok"),
        ([call("f", {"a": 1})], [tool("f", {}, additionalProperties=True)], "ok"),
        ([call("f", {"a": "x"})], [tool("f", {}, additionalProperties={"type": "integer"})], "wrong_type"),
        ([call("f", '{"not": null}')], [tool("f", {"not": {"type": "null"}})], "ok"),
        ([call("f", {"not": 1, "b": 2})], [tool("f", {"not": {"type": "integer"}})], "extra_argument: call 1 f, 'b'"),
    ],
)
def test_faults_around_the_arguments(calls, tools, reason):
    assert check_tool_calls(calls, tools).startswith(reason)


def test_words_of_public_tool_sets_for_types():
    """dict, float, tuple, any: the same verdicts as the words of JSON Schema."""
    loose = {"name": "f", "parameters": {"type": "dict", "required": ["a"], "properties": {}}}
    loose["parameters"]["properties"] = {
        "a": {"type": "float"},
        "b": {"type": "tuple", "items": {"type": "int"}},
        "c": {"type": "any"},
        "type": {"type": "str", "enum": ["dict", "int"]},
    }
    assert check_tool_calls([call("f", {"a": 1, "b": [1], "c": {"x": [None]}, "type": "dict"})], [loose]) == "ok"
    assert check_tool_calls([call("f", {"a": "1"})], [loose]).startswith("wrong_type")
    assert check_tool_calls([call("f", {"a": 1, "type": "object"})], [loose]).startswith("wrong_value")


def test_references_and_unions_of_generated_schemas():
    """The shape that pydantic writes: $defs, and anyOf with null. Nested extras are seen through both."""
    node = {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/N"}},
        "required": ["v"],
    }
    properties = {"head": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}}
    chain = tool("f", properties, required=["head"], **{"$defs": {"N": node}})
    assert check_tool_calls([call("f", '{"head": null}')], [chain]) == "ok"
    assert check_tool_calls([call("f", {"head": {"v": 1, "next": {"v": 2}}})], [chain]) == "ok"
    assert check_tool_calls([call("f", {"head": {"v": 1, "w": 2}})], [chain]).startswith("schema_mismatch")
    both = tool("f", {"a": {"allOf": [{"properties": {"x": {}}}, {"properties": {"y": {}}}]}})
    assert check_tool_calls([call("f", {"a": {"x": 1, "y": 2}})], [both]) == "ok"
    assert check_tool_calls([call("f", {"a": {}})], [tool("f", {"a": {"$ref": "#/properties/a"}})]).startswith(
        "bad_tool"
    )


def test_agrees_with_json_schema_where_everything_is_closed():
    """On random schemas that close their objects themselves, "ok" is what jsonschema says is valid."""
    draw = random.Random(3)

    def schema(depth):
        kind = draw.choice(["string", "integer", "number", "boolean", *(["array", "object"] if depth else [])])
        if kind == "array":
            return {"type": "array", "items": schema(depth - 1), "maxItems": 2}
        if kind == "object":
            names = draw.sample("abc", 2)
            inside = {name: schema(depth - 1) for name in names}
            return {"type": kind, "properties": inside, "required": names[:1], "additionalProperties": False}
        return {"type": kind, "enum": [1, "x"]} if draw.random() < 0.2 else {"type": kind}

    def value(depth):
        kinds = [1, 2.0, 2.5, "x", True, None]
        if depth and draw.random() < 0.7:
            size = draw.randint(0, 3)
            if draw.random() < 0.5:
                return [value(depth - 1) for _ in range(size)]
            return {name: value(depth - 1) for name in draw.sample("abcd", size)}
        return draw.choice(kinds)

    def fitting(spec):
        if "enum" in spec:
            return draw.choice(spec["enum"])
        if spec["type"] == "array":
            return [fitting(spec["items"])]
        if spec["type"] == "object":
            return {name: fitting(inside) for name, inside in spec["properties"].items() if draw.random() < 0.8}
        return {"string": "x", "integer": 1, "number": 2.5, "boolean": True}[spec["type"]]

    verdicts = []
    for _ in range(600):
        parameters = {"type": "object", "properties": {"a": schema(2), "b": schema(1)}, "additionalProperties": False}
        arguments = {"a": fitting(parameters["properties"]["a"])} if draw.random() < 0.6 else {"b": value(2)}
        valid = jsonschema.Draft202012Validator(parameters).is_valid(arguments)
        reason = check_tool_calls([call("f", json.dumps(arguments))], [{"name": "f", "parameters": parameters}])
        assert (reason == "ok") == valid, (parameters, arguments, reason)
        # The same schema left open is closed by us.
        opened = json.loads(json.dumps(parameters).replace(', "additionalProperties": false', ""))
        again = check_tool_calls([call("f", json.dumps(arguments))], [{"name": "f", "parameters": opened}])
        assert (again == "ok") == valid
        verdicts.append(valid)
    assert 150 < sum(verdicts) < 450


@pytest.mark.parametrize(
    "message, thinks",
    [
        ({"content": "<think>I need the weather.</think>"}, True),
        ({"content": "<think> \n</think>"}, False),
        ({"content": "<think></think> Calling now."}, False),
        ({"content": "</think> Calling now."}, False),
        ({"content": "I will look it up."}, True),
        ({"content": " "}, False),
        ({"content": None}, False),
        ({}, False),
        ({"content": None, "reasoning_content": "Need it."}, True),
        ({"content": [{"type": "text", "text": "Because"}]}, True),
    ],
)
def test_thought_before_the_call(message, thinks):
    assert has_thought(message) is thinks
    turn = {"role": "assistant", "tool_calls": [call("get_weather", {"city": "x"})], **message}
    row = {"tools": [WEATHER], "messages": [{"role": "user", "content": "?"}, turn]}
    assert ToolCallFilter()(row)["tool_calls_passed"]
    judged = ToolCallFilter(require_thought=True)(row)
    assert judged["tool_calls_passed"] is thinks
    assert thinks or judged["tool_calls_reason"].startswith("no_thought")


@pytest.fixture
def rows():
    rows = []
    for number in range(90):
        arguments, _ = CASES[number % len(CASES)]
        calls = [call("get_weather", json.dumps(arguments))] * (number % 3)
        turn = {"role": "assistant", "content": "<think>hm</think>", "tool_calls": calls}
        messages = [{"role": "user", "content": "?"}, turn, {"role": "tool", "content": "{}"}, turn]
        rows.append({"id": number, "tools": [WEATHER] if number % 7 else [], "messages": messages})
    return rows


def test_workers_streams_and_files_change_nothing(rows, tmp_path):
    expected = [ToolCallFilter()(row) for row in copy.deepcopy(rows)]
    text = [{**row, "tools": json.dumps(row["tools"]), "messages": json.dumps(row["messages"])} for row in rows]
    for name, each in (("objects", rows), ("text", text)):
        dataset = Dataset.from_list(each)
        path = str(tmp_path / f"{name}.parquet")
        dataset.to_parquet(path)
        back = load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
        results = [
            dataset.map(ToolCallFilter(), load_from_cache_file=False),
            dataset.map(ToolCallFilter(), num_proc=2, load_from_cache_file=False),
            dataset.to_iterable_dataset(num_shards=3).map(ToolCallFilter()),
            back.map(ToolCallFilter()),
        ]
        for result in results:
            assert [{key: row[key] for key in expected[0]} for row in result] == expected
    counts = reason_counts(row["tool_calls_reason"] for row in expected)
    assert sum(counts.values()) == len(rows)
    assert {"ok", "no_tools_offered", "missing_argument", "extra_argument", "wrong_type"} <= counts.keys()
    assert [row["tool_calls_count"] for row in expected] == [2 * (row["id"] % 3) for row in rows]


def test_calls_from_a_column_and_bad_messages():
    one = ToolCallFilter(calls_column="answers")(
        {"tools": json.dumps([WEATHER]), "answers": '[{"name": "get_weather"}]'}
    )
    assert one["tool_calls_reason"] == "missing_argument: call 1 get_weather, 'city'"
    bad = ToolCallFilter()({"tools": [], "messages": "hello"})
    assert not bad["tool_calls_passed"]
    assert bad["tool_calls_reason"].startswith("malformed_messages")
    with pytest.raises(KeyError, match="reads the column 'tools'"):
        ToolCallFilter()({"messages": []})
    with pytest.raises(ValueError, match="leave calls_column out"):
        ToolCallFilter(calls_column="answers", require_thought=True)


def test_without_jsonschema_the_error_names_the_extra(monkeypatch):
    from transformers_minicpm4.data.ultrachat import json_schemas, tool_calls

    monkeypatch.setitem(__import__("sys").modules, "jsonschema", None)
    for cache in (json_schemas.compile_schema, tool_calls._parameters_schema):
        cache.cache_clear()
    with pytest.raises(ImportError, match=r"pip install transformers_minicpm4\[data\]"):
        check_tool_calls([call("f", {})], [tool("f", {})])


def nested(levels, inner, wrap):
    for _ in range(levels):
        inner = wrap(inner)
    return inner


SURROGATE = json.loads(r'"\ud800"')  # what a model's JSON may hold and no file takes
DEEP = nested(3000, 1, lambda inner: {"a": inner})
DEEP_SCHEMA = nested(100, {"type": "string"}, lambda inner: {"type": "object", "properties": {"a": inner}})
HUGE = "9" * 400
TINY_STEPS = tool("f", {"a": {"type": "number", "multipleOf": 0.01}})


@pytest.mark.parametrize(
    "calls, tools, reason",
    [
        ([call(SURROGATE, {})], [WEATHER], r"unknown_tool: call 1 \ud800"),
        ([call("get_weather", {"city": "x", SURROGATE: 1})], [WEATHER], "extra_argument"),
        ([call("get_weather", {"city": "x", "unit": SURROGATE})], [WEATHER], "wrong_value"),
        ([{SURROGATE: 1}], [WEATHER], r"malformed_call: call 1 has no name: {'\ud800"),
        ([], [tool(SURROGATE, {"a": {"type": SURROGATE}})], r"bad_tool: '\ud800'"),
        ([], [tool("f", {}, **{"$schema": 7})], "bad_tool: 'f': $schema is a text"),
        ([], [tool("f", {}, **{"$schema": ["x"]})], "bad_tool: 'f': $schema is a text"),
        ([], [tool("f", {}, **{"$schema": "http://["})], "bad_tool: 'f': no valid schema"),
        ([call("f", {"a": 1})], [tool("f", {"a": {"$ref": "#/b"}}, **{"$id": "http://["})], "bad_tool: call 1 f"),
        ([], [{"name": "f", "parameters": DEEP_SCHEMA}], "bad_tool: 'f': parameters have at most 32 levels"),
        ([], [{"name": "f", "parameters": DEEP}], "bad_tool"),
        ([], [{"name": "f", "parameters": json.dumps(DEEP_SCHEMA)}], "bad_tool"),
        ([call("f", DEEP)], [tool("f", {}, additionalProperties=True)], "malformed_call: the calls are nested"),
        ([call("f", json.dumps({"a": DEEP_SCHEMA}))], [{"name": "f"}], "malformed_arguments: call 1 f, nested deeper"),
        ([call("f", f'{{"a": {HUGE}}}')], [TINY_STEPS], "schema_mismatch"),
        ([call("f", '{"a": 1e999}')], [TINY_STEPS], "schema_mismatch"),
        ([call("f", f'{{"a": {"9" * 5000}}}')], [TINY_STEPS], "malformed_arguments"),
        ([call("f", b"{}")], [{"name": "f"}], "malformed_arguments: call 1 f, arguments are an object"),
        ([call("f", {1, 2})], [{"name": "f"}], "malformed_arguments: call 1 f, arguments are an object"),
        ([call("f", 16**5000)], [{"name": "f"}], "malformed_arguments: call 1 f, arguments are an object"),
        ([call("f", {})], [tool("f", {}, default=object())], "ok"),
        ([], [{"name": "f", "parameters": {(1, 2): 3}}], "bad_tool: 'f': keys must be str"),
        (b"[]", [], "malformed_call: the calls are a list, not bytes"),
        ([], 3, "bad_tool: the tools are a list, not int"),
        ([call("f" * 10**6, {})], [WEATHER], "unknown_tool: call 1 ffff"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_whatever_models_write_gets_a_reason_that_files_take(calls, tools, reason):
    row = {"tools": tools, "calls": calls}
    found = ToolCallFilter(calls_column="calls")(row)["tool_calls_reason"]
    assert found.startswith(reason)
    assert len(found.encode("utf-8")) < 500


@pytest.mark.parametrize("content", [5, 2.5, True, b"<think>x</think>", {"text": "x"}, [{"text": 3}], [None, 4]])
def test_content_that_is_no_text_is_no_thought(content):
    turn = {"role": "assistant", "content": content, "tool_calls": [{"name": "f"}]}
    judged = ToolCallFilter(require_thought=True)({"tools": [{"name": "f"}], "messages": [turn]})
    assert judged["tool_calls_reason"] == "no_thought: before the call of turn 1"


def test_equal_turns_keep_their_numbers():
    turn = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    judged = ToolCallFilter(require_thought=True)({"tools": [{"name": "f"}], "messages": [turn, dict(turn)]})
    assert judged["tool_calls_reason"].endswith("no_thought: before the call of turn 2")


def test_nested_as_deep_as_allowed_is_read():
    """At the limit schema and arguments are still checked, through references and unions too."""
    inner = nested(14, {"type": "string"}, lambda inside: {"type": "object", "properties": {"a": inside}})
    deep = {"name": "f", "parameters": {"type": "object", "properties": {"a": inner}}}
    assert check_tool_calls([call("f", nested(15, "x", lambda inside: {"a": inside}))], [deep]) == "ok"
    assert check_tool_calls([call("f", nested(15, 1, lambda inside: {"a": inside}))], [deep]).startswith("wrong_type")
    node = {"anyOf": [{"type": "object", "properties": {"a": {"$ref": "#/$defs/N"}}}, {"type": "integer"}]}
    chain = tool("f", {"a": {"$ref": "#/$defs/N"}}, **{"$defs": {"N": node}})
    assert check_tool_calls([call("f", nested(32, 1, lambda inside: {"a": inside}))], [chain]) == "ok"


def test_lists_of_types_know_the_same_words():
    properties = {"a": {"type": ["str", "null"]}, "b": {"type": ["int", "integer"]}, "c": {"type": ["any", "str"]}}
    loose = {"name": "f", "parameters": {"type": ["dict", "null"], "properties": properties}}
    assert check_tool_calls([call("f", '{"a": null, "b": 1, "c": []}')], [loose]) == "ok"
    assert check_tool_calls([call("f", {"a": "x", "b": 2})], [loose]) == "ok"
    assert check_tool_calls([call("f", {"a": 1})], [loose]).startswith("wrong_type: call 1 f, a")
    assert check_tool_calls([], [{"name": "f", "parameters": {"type": ["array", "null"]}}]).startswith("bad_tool")


def doubling(levels, leaf, **more):
    """A flat schema whose references double at each level."""
    steps = {f"s{i}": {"allOf": [{"$ref": f"#/$defs/s{i + 1}"}] * 2, **more} for i in range(levels)}
    return {"$defs": {**steps, f"s{levels}": leaf}, "$ref": "#/$defs/s0", "type": "object"}


def named(pattern):
    return {"type": "object", "patternProperties": {pattern: {}}, "additionalProperties": False}


DRAFT = "https://json-schema.org/draft/2020-12/schema"
SLOW = [
    ({"properties": {"a": {"pattern": "^(a+)+$"}}}, {"a": "a" * 35 + "!"}),
    ({"properties": {"a": {"pattern": "(a|a)*b"}}}, {"a": "a" * 40}),
    ({"properties": {"a": {"pattern": "(.*)(.*)(.*)(.*)(.*)x"}}}, {"a": "a" * 5000}),
    ({"properties": {"a": {"items": {"pattern": "^(a|aa)+$"}}}}, {"a": ["a" * n + "!" for n in range(20, 60)]}),
    (named("^(a+)+$"), {"a" * 35 + "!": 1}),
    (named("^(a|a)*?$"), {"a" * 35 + "!": 1}),
    (named("^(?:a{1,9}){1,99}$"), {"a" * 35 + "!": 1}),
    (named(".*.*.*.*.*x"), {"a" * 2000: 1}),
    (named(".*.*x"), {"a" * 200_000: 1}),
    (named(r"^(a|a|\\)+$"), {"a" * 35 + "!": 1}),
    (named("(?x)^(a|a) +$"), {"a" * 35 + "!": 1}),
    (named("^" + "a?" * 35 + "a" * 35 + "$"), {"a" * 34: 1}),
    (named("^" + "(a|a)" * 35 + "$"), {"a" * 35 + "!": 1}),
    (named("^" + "a{0,99}" * 9 + "$"), {"a" * 99 + "!": 1}),
    (doubling(26, {"type": "object"}), {}),
    (doubling(26, {"type": "array"}), {}),
    (doubling(26, True), {}),
    (doubling(26, {"type": "object"}, **{"$schema": DRAFT}), {}),
    ({"unevaluatedProperties": False, **doubling(26, {"properties": {"a": {}}})}, {"a": 1}),
]


@pytest.mark.parametrize("schema, arguments", SLOW)
def test_a_schema_that_would_take_for_ever_refuses_in_bounded_time(schema, arguments):
    start = time.process_time()
    reason = check_tool_calls([call("f", arguments)], [{"name": "f", "parameters": {"type": "object", **schema}}])
    assert time.process_time() - start < 10
    # Where the answer is found in time after all, it is the right one.
    answers = ("the arguments: cannot be checked", "may take too long", "does not match '^(a+)+$'")
    assert any(answer in reason for answer in (*answers, "a: 'aaaaaaaa")), reason


@pytest.mark.parametrize(
    "pattern, good, bad",
    [
        ("^[a-z]+(-[a-z]+)*$", "one-two-three-four-" * 50 + "x", "one--two-three"),
        (r"^(\d{1,3}\.){3}\d{1,3}$", "192.168.100.200", "192.168.100.x00"),
        (r"^[\w.+-]+@(\w+\.)+\w+$", "someone@mail.example.org", "someone.mail.example.org"),
    ],
)
def test_honest_patterns_with_repeated_groups_are_checked(pattern, good, bad):
    offered = [tool("f", {"a": {"type": "string", "pattern": pattern}})]
    assert check_tool_calls([call("f", {"a": good})], offered) == "ok"
    assert "does not match" in check_tool_calls([call("f", {"a": bad})], offered)


def test_large_arguments_and_patterns_of_names_are_checked():
    parameters = {**named("^x-[a-z]+$"), "properties": {"rows": {"items": {"$ref": "#/$defs/row"}}}}
    parameters["$defs"] = {"row": {"type": "object", "properties": {k: {"type": "integer"} for k in "abcdef"}}}
    offered = [{"name": "f", "parameters": parameters}]
    rows = [dict.fromkeys("abcdef", 1)] * 2000
    assert check_tool_calls([call("f", {"rows": rows, "x-a": 1})], offered) == "ok"
    assert "extra_argument: call 1 f, 'y'" in check_tool_calls([call("f", {"rows": rows, "y": 1})], offered)
    nested = {"$defs": {"a": {"$schema": DRAFT, "type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/a"}}}
    assert check_tool_calls([call("f", {"a": "x"})], [{"name": "f", "parameters": nested}]).startswith("wrong_type")


def test_an_exception_of_the_caller_gets_through(monkeypatch):
    """A signal handler that stops a slow row raises inside the check."""
    from transformers_minicpm4.data.ultrachat import json_schemas

    def stop(*_):
        raise TimeoutError("the caller's")

    monkeypatch.setattr(json_schemas._Work, "step", stop)
    with pytest.raises(TimeoutError, match="the caller's"):
        check_tool_calls([call("get_weather", {"city": "Oslo"})], [WEATHER])
