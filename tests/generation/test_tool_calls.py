"""Calls are read exactly or refused with a reason, for every cutting of the text, and survive rendering."""

import ast
import json
import random

import pytest
from transformers.utils.chat_parsing import parse_response as transformers_parse_response
from transformers.utils.chat_template_utils import render_jinja_template

from transformers_minicpm4.generation import responses
from transformers_minicpm4.generation.chat import chat_template
from transformers_minicpm4.generation.responses import (
    ContentDelta,
    ParsedResponse,
    ResponseStream,
    ThinkingDelta,
    parse_response,
    render_response,
)
from transformers_minicpm4.generation.tool_calls import (
    CALL_END,
    CALL_START,
    ResponseError,
    ToolCall,
    parse_tool_calls,
    render_tool_calls,
)
from transformers_minicpm4.generation.tool_schemas import check_arguments, tool_schemas


def fenced(code):
    return f"{CALL_START}\n```python\n{code}\n```\n{CALL_END}"


def read(code, tools=None):
    calls, errors = parse_tool_calls(code, tools)
    return [(call.name, call.arguments) for call in calls], [(error.message, error.source) for error in errors]


VALUES = {  # what is written: what is meant
    "'text'": "text",
    '"it\'s"': "it's",
    r"'it\'s'": "it's",
    r"'a\tb\\n\n\x41\101\u4e2d\U0001F600\N{BULLET}\'\"\a\0'": "a\tb\\n\nA\x41中😀•'\"\a\0",
    r"'\d+ \/ \('": r"\d+ \/ \(",
    r"'\777'": "\u01ff",
    r'"\ud83d\ude00"': "😀",
    r"r'C:\new\t'": r"C:\new\t",
    "u'x'": "x",
    "'''two\n'lines' '''": "two\n'lines' ",
    '"""a "" b"""': 'a "" b',
    "'a' \"b\"\n 'c'": "abc",
    "'a\\\nb'": "ab",
    "''": "",
    "'# no comment'": "# no comment",
    "'f(x=1), [g{'": "f(x=1), [g{",
    "'杭州 🎬'": "杭州 🎬",
    "0": 0,
    "-7": -7,
    "+7": 7,
    "- 7": -7,
    "1_000": 1000,
    "0x1F": 31,
    "0b101": 5,
    "0o17": 15,
    "3.5": 3.5,
    ".5": 0.5,
    "5.": 5.0,
    "-1.5e-3": -0.0015,
    "1E6": 1e6,
    "123456789012345678901234567890": 123456789012345678901234567890,
    "True": True,
    "False": False,
    "None": None,
    "true": True,
    "false": False,
    "null": None,
    "[]": [],
    "{}": {},
    "()": [],
    "(1)": 1,
    "(1,)": [1],
    "(1, 'a', (2,))": [1, "a", [2]],
    "[1, -2, [None, {'a': []}],]": [1, -2, [None, {"a": []}]],
    "{'a': {'b': [1, {'c': True}]}, \"d-e\": null,}": {"a": {"b": [1, {"c": True}]}, "d-e": None},
    "[1, # a comment, with 'quotes\n 2]": [1, 2],
}


@pytest.mark.parametrize("written, meant", VALUES.items(), ids=map(repr, VALUES))
def test_values(written, meant):
    calls, errors = read(f"f(x={written}, y=0)")
    assert (calls, errors) == ([("f", {"x": meant, "y": 0})], [])
    assert json.loads(json.dumps(meant)) == calls[0][1]["x"]
    assert type(calls[0][1]["x"]) is type(meant)


CALLS = {
    "f()": [("f", {})],
    "f( )": [("f", {})],
    "f(x=1,)": [("f", {"x": 1})],
    "f( x = 1 , y\n=\n2 )": [("f", {"x": 1, "y": 2})],
    "f (x=1)": [("f", {"x": 1})],
    "f(x=1)\n\n  g(y=2)": [("f", {"x": 1}), ("g", {"y": 2})],
    "f(x=1); g(y=2)": [("f", {"x": 1}), ("g", {"y": 2})],
    "f(x=1), g(y=2)": [("f", {"x": 1}), ("g", {"y": 2})],
    "f(x=1)\nf(x=1)": [("f", {"x": 1}), ("f", {"x": 1})],
    "f(x=1)  # first\n# then\ng()": [("f", {"x": 1}), ("g", {})],
    "f(\n  x=[1,\n     2],\n)\r\ng()": [("f", {"x": [1, 2]}), ("g", {})],
    # Names stand as they are written; strings with the same letters stay untouched.
    "get-weather(city='a-b')": [("get-weather", {"city": "a-b"})],
    "get_a-b(x-y_z='x_y-z')": [("get_a-b", {"x-y_z": "x_y-z"})],
    "server.tool(a.b=1)": [("server.tool", {"a.b": 1})],
    "server/tool()": [("server/tool", {})],
    "f(from='x', class='y', import=1)": [("f", {"from": "x", "class": "y", "import": 1})],
    "f(from_='x', q=' from=1,class=2')": [("f", {"from_": "x", "q": " from=1,class=2"})],
    "import(lambda=None)": [("import", {"lambda": None})],
    "None(True=1)": [("None", {"True": 1})],
    "f($filter=1, @type=2, 3d=4)": [("f", {"$filter": 1, "@type": 2, "3d": 4})],
    "天气(城市='杭州')": [("天气", {"城市": "杭州"})],
    "f(ﬁ=1)": [("f", {"ﬁ": 1})],  # the ligature: Python itself would rename it
    "f(**{'two words': 1}, x=2)": [("f", {"two words": 1, "x": 2})],
    "f(x='print(open(\"/etc/passwd\"))')": [("f", {"x": 'print(open("/etc/passwd"))'})],
    # Fences.
    "```python\nf()\n```": [("f", {})],
    "\n```\nf()\n```\n": [("f", {})],
    "```py\nf()\n```": [("f", {})],
    "```tool_code\nf()\n```": [("f", {})],
    "```python f()```": [("f", {})],
    "```python\nf()": [("f", {})],
    "```python\nf()\n```\n```python\ng()\n```": [("f", {}), ("g", {})],
    "f(x='```')": [("f", {"x": "```"})],
    "": [],
    " \n# nothing\n": [],
    "```python\n```": [],
}


@pytest.mark.parametrize("code, expected", CALLS.items(), ids=map(repr, CALLS))
def test_calls(code, expected):
    assert read(code) == (expected, [])


REFUSED = {  # code: part of the reason
    "f(1)": "argument 1 has no name; write f(parameter=value)",
    "f(x=1, 2)": "behind named ones",
    "f(x=1, x=2)": "'x' is given twice",
    "f(**{'x': 1}, x=2)": "'x' is given twice",
    "f(x={'a': 1, 'a': 2})": "'a' stands twice",
    "f(x={1: 2})": "keys must be strings",
    "f(x={[]: 2})": "keys must be strings",
    "f(x={'a'})": "expected ':'",
    "f(x={**y})": "expected a value",
    "f(*y)": "expected a value",
    "f(**y)": "only a dict written out",
    "f(x=f'{1}')": "an f-string",
    "f(x=rF'{1}')": "an f-string",
    "f(x='a' f'{1}')": "an f-string",
    "f(x=b'a')": "bytes",
    "f(x=q'a')": "prefixed by q",
    "f(x=celsius)": "celsius is no value; put text in quotes",
    "f(x=Unit.enum_0)": "Unit.enum_0 is no value",
    "f(x=g(y=1))": "a call inside an argument",
    "f(x=__import__('os').system('true'))": "a call inside an argument",
    "f(x=1 + 1)": "expected ',' or ')'",
    "f(x=2**99999999)": "expected ',' or ')'",
    "f(x='a' * 99999999)": "expected ',' or ')'",
    "f(x=[i for i in y])": "i is no value",
    "f(x=lambda: 1)": "lambda is no value",
    "f(x=not True)": "not is no value",
    "f(x=-True)": "expected a number",
    "f(x=...)": "expected a value",
    "f(x=1j)": "no finite number",
    "f(x=1e999)": "no finite number",
    "f(x=NaN)": "NaN is no value",
    "f(x=007)": "no finite number",
    "f(x=1if)": "no finite number",
    "f(x=0x)": "no finite number",
    "f(x==1)": "x is no value",
    "f(x=)": "expected a value",
    "f(=1)": "expected a value",
    "f(,)": "expected a value",
    "f(x=1,,y=2)": "expected a value",
    "f(x=1 y=2)": "expected ',' or ')'",
    r"f(x='\x4')": "a string cannot be read",
    r"f(x='\N{NO SUCH SIGN}')": "a string cannot be read",
    r"f(x='\ud83d')": "no valid Unicode",
    "f(x='\0')": "a string cannot be read",
    "f(x='open": "is not closed",
    "f(x='''open')": "is not closed",
    "f(x=[1, 2": "complete it",
    "f(x=": "complete it",
    "f(": "complete it",
    "f": "has no '('",
    "x = f(y=1)": "has no '('",
    "I call f(x=1)": "has no '('",
    "f(x=1).g()": "more text follows",
    "f(x=1) g(x=1)": "more text follows",
    "[f(x=1)]": "not a call",
    '{"name": "f", "arguments": {}}': "not a call",
    "(f)(x=1)": "not a call",
    "'f'": "not a call",
    "\ud800(x=1)": "not a call",
}


@pytest.mark.parametrize("code, reason", REFUSED.items(), ids=map(ascii, REFUSED))
def test_refused_with_the_text_and_a_reason(code, reason):
    calls, [(message, source)] = read(code)
    assert calls == []
    assert reason in message
    assert source == code


def test_a_broken_call_leaves_its_neighbours():
    calls, errors = read("f(x=1)\ng(y=oops)\nh(z='it')\nprose, it's this\ni()")
    assert calls == [("f", {"x": 1}), ("h", {"z": "it"}), ("i", {})]
    assert [source for _, source in errors] == ["g(y=oops)", "prose, it's this"]
    # Which call the rest belongs to would be a guess.
    calls, errors = read("f(x=1)\ng(y=[1)\nh(z=2)\n")
    assert calls == [("f", {"x": 1})]
    assert [source for _, source in errors] == ["g(y=[1)\nh(z=2)"]
    assert read("f(x=1))\ng()") == (
        [],
        [("more text follows the call on its line; write one call a line and nothing else", "f(x=1))\ng()")],
    )
    # Where they fit, a call of several lines is one error.
    calls, errors = read("f(x=[1,\n!,\n'\\'];'])\ng(y=1)")
    assert calls == [("g", {"y": 1})]
    assert [source for _, source in errors] == ["f(x=[1,\n!,\n'\\'];'])"]


def test_nothing_is_evaluated(tmp_path):
    trap = tmp_path / "trap"
    for code in (f"open({str(trap)!r}, 'w')", f"f(x=open({str(trap)!r}, 'w'))", f"f(x=f'{{open({str(trap)!r})}}')"):
        calls, errors = read(code)
        assert not calls
        assert len(errors) == 1
    assert not trap.exists()


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"enum": ["C", "F"]},
                "at": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/Place"}]},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["city"],
            "$defs": {"Place": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]}},
        },
    },
}


def forecast(city: str, days: int = 1):
    """
    Tell the weather.

    Args:
        city: Where.
        days: For how long.
    """


def test_arguments_without_names_take_the_schema_s():
    for tools in ([WEATHER], [WEATHER["function"]]):
        assert read("weather('Bern', 3, unit='C')", tools)[0] == [
            ("weather", {"city": "Bern", "days": 3, "unit": "C"})
        ]
    assert read("forecast('Bern')", [forecast])[0] == [("forecast", {"city": "Bern"})]
    assert "given twice" in read("weather('Bern', city='Basel')", [WEATHER])[1][0][0]
    assert "its parameters are: city, days" in read("weather(1, 2, 3, 4, 5, 6)", [WEATHER])[1][0][0]
    assert "has no name" in read("other(1)", [WEATHER])[1][0][0]


PROBLEMS = {
    "weather(city='Bern', days=3, at={'lat': 1}, tags=['a'])": [],
    "weather(city='Bern', days=3.0, at=None)": [],
    "weather()": ["weather lacks the required 'city'"],
    "weather(city='Bern', day=3)": ["weather has no parameter 'day'; did you mean 'days'?"],
    "weather(city='Bern', zzz=3)": ["weather has no parameter 'zzz'; known are: city, days, unit, at, tags"],
    "weather(city=3)": ["weather.city must be string, not 3"],
    "weather(city='Bern', days='3')": ["weather.days must be integer, not '3'"],
    "weather(city='Bern', days=True)": ["weather.days must be integer, not True"],
    "weather(city='Bern', days=2.5)": ["weather.days must be integer, not 2.5"],
    "weather(city='Bern', unit='K')": ["weather.unit must be one of 'C', 'F', not 'K'"],
    "weather(city='Bern', tags=['a', 1])": ["weather.tags[1] must be string, not 1"],
    "weather(city='Bern', at={'lat': 'x'})": [
        "weather.at must be null, not {'lat': 'x'}, or weather.at.lat must be number, not 'x'"
    ],
    "weathr(city='Bern')": ["there is no tool 'weathr'; did you mean 'weather'?"],
    "weather(days='3', x=1)": [
        "weather lacks the required 'city'",
        "weather.days must be integer, not '3'",
        "weather has no parameter 'x'; known are: city, days, unit, at, tags",
    ],
}


@pytest.mark.parametrize("code, problems", PROBLEMS.items(), ids=PROBLEMS)
def test_problems_by_schema(code, problems):
    calls, errors = parse_tool_calls(code)
    assert errors == []
    assert check_arguments(calls, [WEATHER]) == problems


def test_hostile_schemas_end():
    circles = [
        {"$ref": "#"},
        {"properties": {"x": {"$ref": "#/properties/x"}}},
        {"properties": {"x": {"anyOf": [{"$ref": "#/properties/x"}, {"$ref": "#/properties/x"}]}}},
        {"type": [5, {}], "required": 7, "properties": [], "enum": "x"},
        {"properties": {"x": {"type": {}, "anyOf": 3, "items": [1], "enum": None}}},
    ]
    call = ToolCall("f", {"x": 1})
    for schema in circles:
        assert check_arguments([call], [{"name": "f", "parameters": schema}]) == []


def test_tools_are_refused_at_the_door():
    for tools in ([{}], ["f"], [WEATHER, WEATHER], [{"name": "f", "parameters": "x"}]):
        with pytest.raises(ValueError, match=r"tool|parameters"):
            tool_schemas(tools)
        with pytest.raises(ValueError, match=r"tool|parameters"):
            ResponseStream(tools=tools)


F = ToolCall("f", {"x": 1})
OPENED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
RESPONSES = {  # (text, prefix): thinking, content, calls, number of errors
    ("Hello.", ""): ("", "Hello.", [], 0),
    ("", ""): ("", "", [], 0),
    ("<think>\nHm.\n</think>\n\nYes.\n", ""): ("Hm.", "Yes.", [], 0),
    ("<|thought_start|>\nHm.\n<|thought_end|>\nYes.", ""): ("Hm.", "Yes.", [], 0),
    ("<think>\n\n</think>\nYes.", ""): ("", "Yes.", [], 0),
    ("<think>Hm. <think> again</think>Yes.", ""): ("Hm. <think> again", "Yes.", [], 0),
    ("<think>a <|thought_end|> b</think>c", ""): ("a <|thought_end|> b", "c", [], 0),
    ("<think>a</think><think>b</think>c", ""): ("a\n\nb", "c", [], 0),
    # Cut inside the thought, or inside a tag.
    ("<think>\nHm, let", ""): ("Hm, let", "", [], 1),
    ("<think>\nHm.\n</thi", ""): ("Hm.\n</thi", "", [], 1),
    ("<thin", ""): ("", "<thin", [], 0),
    # The template opened, or closed, the thought.
    ("Hm.\n</think>\nYes.", OPENED): ("Hm.", "Yes.", [], 0),
    ("Hm.", OPENED): ("Hm.", "", [], 1),
    ("Yes.", OPENED + "\n</think>\n"): ("", "Yes.", [], 0),
    ("Hm.</think>Yes.", "<think>"): ("Hm.", "Yes.", [], 0),
    ("Hm.</think>Yes.", ""): ("", "Hm.</think>Yes.", [], 1),
    # Answers about the format.
    ("The tags are <think> and </think>.", ""): ("", "The tags are <think> and </think>.", [], 1),
    ("<think>a</think>Write <think>x</think>.", ""): ("a", "Write <think>x</think>.", [], 0),
    # Calls.
    (fenced("f(x=1)"), ""): ("", "", [F], 0),
    ("<think>\nHm.\n</think>\n" + fenced("f(x=1)\nf(x=1)") + "\nDone.", ""): ("Hm.", "Done.", [F, F], 0),
    (f"<|thought_start|>\nHm.\n<|thought_end|>\n{fenced('f(x=1)')}", ""): ("Hm.", "", [F], 0),
    (f"One.\n{fenced('f(x=1)')}\nTwo.\n{fenced('f(x=1)')}", ""): ("", "One.\n\nTwo.", [F, F], 0),
    (f"<think>a</think>{fenced('f(x=1)')}<think>b</think>{fenced('f(x=1)')}", ""): ("a\n\nb", "", [F, F], 0),
    (f"{CALL_START}f(x=1){CALL_END}", ""): ("", "", [F], 0),
    (f"{CALL_START}{CALL_END}x", ""): ("", "x", [], 0),
    (f"<think>maybe {fenced('f(x=1)')}</think>No.", ""): (f"maybe {fenced('f(x=1)')}", "No.", [], 0),
    (f"<think>maybe {fenced('f(x=1)')}", ""): (f"maybe {fenced('f(x=1)')}", "", [], 1),
    # Tags inside strings are text, unless the string is not closed.
    (fenced(f"f(x='{CALL_END}')") + "a", ""): ("", "a", [ToolCall("f", {"x": CALL_END})], 0),
    (fenced(f"f(x='''\n{CALL_END}''')"), ""): ("", "", [ToolCall("f", {"x": "\n" + CALL_END})], 0),
    (fenced("f(x='<|im_end|>')"), ""): ("", "", [ToolCall("f", {"x": "<|im_end|>"})], 0),
    (f"{CALL_START}f(x='abc{CALL_END}\nIt's done.", ""): ("", "It's done.", [], 1),
    (f"{CALL_START}f(x=1)\nf(x='''abc{CALL_END}Done.", ""): ("", "Done.", [F], 1),
    (f"{CALL_START}# don't\nf(x=1)\n# can't {CALL_END}Done.", ""): ("", "Done.", [F], 0),
    # Cut inside the block: complete calls count, and it is said.
    (f"{CALL_START}\n```python\nf(x=1)\nf(x=", ""): ("", "", [F], 2),
    (f"{CALL_START}\n```python\nf(x=1)\n```\n", ""): ("", "", [F], 1),
    (f"{CALL_START}f(x=1)<|im_end|>more", ""): ("", "", [F], 1),
    (CALL_START, ""): ("", "", [], 1),
    # Ends of the turn.
    ("Yes.<|im_end|>\n<|im_start|>user\nNo", ""): ("", "Yes.", [], 0),
    ("Yes.</s>", ""): ("", "Yes.", [], 0),
    ("Yes. </s>\n", ""): ("", "Yes.", [], 0),
    ("<s>old</s> new", ""): ("", "<s>old</s> new", [], 0),
    ("<think>a<|im_end|>", ""): ("a", "", [], 1),
    ("a < b <|x|> c <", ""): ("", "a < b <|x|> c <", [], 0),
}


@pytest.mark.parametrize("case, expected", RESPONSES.items(), ids=map(repr, RESPONSES))
def test_responses(case, expected):
    text, prefix = case
    response = parse_response(text, prefix=prefix)
    thinking, content, calls, errors = expected
    assert (response.thinking, response.content, list(response.tool_calls)) == (thinking, content, calls)
    assert len(response.errors) == errors


def joined(events):
    calls = [event for event in events if isinstance(event, ToolCall)]
    errors = [event for event in events if isinstance(event, ResponseError)]
    thinking = "".join(event.text for event in events if isinstance(event, ThinkingDelta))
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    assert not any(isinstance(event, ThinkingDelta | ContentDelta) and not event.text for event in events)
    return ParsedResponse(thinking, content, tuple(calls), tuple(errors))


def stream(text, sizes, prefix=""):
    reader = ResponseStream(prefix=prefix)
    events, at = list(reader.initial_events), 0
    for size in sizes:
        events += reader.feed(text[at : at + size])
        at += size
    events += reader.feed(text[at:]) + reader.finish()
    assert joined(events) == reader.response
    return reader.response


TAGS = [*responses.THOUGHTS, *responses.THOUGHTS.values(), CALL_START, CALL_END, "<|im_end|>", "</s>"]
PIECES = [
    *TAGS, "```python\n", "```", "f(x=1)", "g-h(from='a", "')", '"', "'", "'''", '"""', "\\", "#", "\n", " ", "text",
    "(", ")", "[", "<", "<|", "|>",
]  # fmt: skip


def test_any_cutting_gives_the_same():
    chance = random.Random(0)
    texts = [(text, prefix) for text, prefix in RESPONSES]
    for _ in range(600):
        text = "".join(chance.choices(PIECES, k=chance.randint(2, 14)))
        texts.append((text, chance.choice(["", "", OPENED, "<think"])))
    for text, prefix in texts:
        whole = parse_response(text, prefix=prefix)
        for sizes in ([1] * len(text), [2] * len(text), *([chance.randint(0, 9) for _ in text] for _ in range(4))):
            assert stream(text, sizes, prefix) == whole, (text, sizes)
        # What the prompt has of the answer counts as if the model had written it.
        cut = chance.randint(0, len(text))
        assert parse_response(text[cut:], prefix=OPENED.removesuffix("<think>\n") + text[:cut]) == parse_response(text)


# The part of the format that Transformers' templates can say.
TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "content": {"close": "<|im_end|>", "content": "text"},
    },
}


def test_transformers_agrees_on_thoughts():
    chance = random.Random(4)
    words = ["a", " b ", "\n", "it's", "<", "<|", "|>", "/think>", "中", "``` ", "</"]
    for _ in range(300):
        thought, content = ("".join(chance.choices(words, k=chance.randint(1, 6))) for _ in range(2))
        text = chance.choice([f"<think>{thought}</think>{content}", f"<think>{thought}", content])
        prefix = "<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n"
        if text.startswith("<think>") and chance.random() < 0.5:
            prefix, text = prefix + "<think>", text.removeprefix("<think>")
        theirs = transformers_parse_response(text + chance.choice(["", "<|im_end|>"]), TEMPLATE, prefix=prefix)
        if "<think>" in prefix.rpartition("\n")[2] + text and "</think>" not in text:
            theirs["reasoning_content"] = theirs.get("reasoning_content", "").removesuffix("<|im_end|>").rstrip()
        ours = parse_response(text, prefix=prefix).to_message()
        assert {key: value for key, value in ours.items() if value} == {k: v for k, v in theirs.items() if v}, text


def test_text_comes_as_soon_as_it_can():
    reader = ResponseStream()
    assert reader.feed("<think>\nAn app") == [ThinkingDelta("An app")]
    assert reader.feed("le. <") == [ThinkingDelta("le.")]
    assert reader.feed("/thin") == []
    assert reader.feed("k>Yes") == [ContentDelta("Yes")]
    assert reader.feed(f", a<b. {CALL_START}f(x=1)\ng(") == [ContentDelta(", a<b.")]
    assert reader.feed(f"){CALL_END}") == [F, ToolCall("g", {})]
    assert reader.finish() == []
    with pytest.raises(RuntimeError, match="finished"):
        reader.feed("x")


def random_value(chance, depth=0):
    kind = chance.randrange(5 if depth > 3 else 7)
    if kind == 0:
        return chance.choice([None, True, False, "", 0, -1, {}, []])
    if kind == 1:
        return chance.randint(-(10**20), 10**20)
    if kind == 2:
        return chance.choice([-1, 1]) * chance.random() * 10.0 ** chance.randint(-300, 300)
    if kind in (3, 4):
        return random_text(chance)
    if kind == 5:
        return [random_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {random_text(chance): random_value(chance, depth + 1) for _ in range(chance.randrange(4))}


def random_text(chance):
    ordinary = [chr(chance.randint(1, 0xD7FF)), chr(chance.randint(0xE000, 0x10FFFF)), "abc", "it's", 'say "x"', "\0"]
    return "".join(chance.choices(PIECES + ordinary * 4, k=chance.randrange(6)))


def random_name(chance):
    letters = "abcXYZ_09éß天$@" + "-./"
    name = chance.choice(letters[:-3]) + "".join(chance.choices(letters, k=chance.randrange(6)))
    return chance.choice([name, "class", "from", "get-weather", "import", "None", "and.or"])


def random_calls(chance):
    return [
        ToolCall(
            random_name(chance),
            {
                random_name(chance) if chance.random() < 0.9 else random_text(chance): random_value(chance)
                for _ in range(chance.randrange(5))
            },
        )
        for _ in range(chance.randint(1, 4))
    ]


def test_tags_inside_arguments_are_written_without_being_tags():
    """A tokenizer would make one token of them, and a template's reader the end of the turn."""
    rendered = render_tool_calls([ToolCall("f", {"x": "".join(TAGS), TAGS[4]: 1})])
    assert [tag for tag in TAGS if "<|" in tag and tag in rendered] == [CALL_START, CALL_END]
    assert parse_response(rendered).tool_calls == (ToolCall("f", {"x": "".join(TAGS), TAGS[4]: 1}),)


@pytest.mark.parametrize("name, thought", [("minicpm4", "<|thought_start|>"), ("minicpm4.1", "<think>")])
def test_a_rendered_message_is_read_back(name, thought):
    """Through our chat template, for random names and values, tags and all signs of Unicode in them."""
    chance = random.Random(1)
    for _ in range(300):
        calls = tuple(random_calls(chance))
        sent = ParsedResponse(chance.choice(["", "Hm, 'so'."]), chance.choice(["", "It's done.\n\n# ok"]), calls)
        for message in (sent.to_message(), sent.to_openai()):
            turn = {"role": "assistant", "content": render_response(message, thought=thought)}
            [prompt], _ = render_jinja_template(
                [[{"role": "user", "content": "Hi"}, turn]], chat_template=chat_template(name)
            )
            text = prompt.rpartition("<|im_start|>assistant\n")[2]
            assert parse_response(text) == sent
            # == takes 1, 1.0 and True for one value; their text tells them apart.
            assert [repr(call.arguments) for call in parse_response(text).tool_calls] == [
                repr(call.arguments) for call in calls
            ]
        assert [json.loads(call["function"]["arguments"]) for call in sent.to_openai()["tool_calls"]] == [
            call.arguments for call in calls
        ]


# How the released template writes earlier calls: names as they are, values by `tojson`, commas without a space.
RELEASED = """{%- for call in messages[0].tool_calls -%}
{{ call.function.name }}({% for key, value in call.function.arguments|items %}{{ key }}={{ value|tojson }}
{{- ',' if not loop.last }}{% endfor %})
{% endfor -%}"""


def test_values_written_as_json_are_read():
    chance = random.Random(2)
    for _ in range(300):
        calls = [
            ToolCall(random_name(chance), {random_name(chance): random_value(chance) for _ in range(3)})
            for _ in range(chance.randint(1, 3))
        ]
        [code], _ = render_jinja_template([[ParsedResponse(tool_calls=calls).to_message()]], chat_template=RELEASED)
        assert parse_tool_calls(code) == (calls, [])


def test_python_agrees():
    """Where Python's own parser takes the call, it reads the same names and values."""
    chance = random.Random(3)
    for _ in range(500):
        arguments = {f"a{place}": random_value(chance) for place in range(chance.randint(1, 4))}
        code = f"f({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        call = ast.parse(code.replace("\0", "\\0"), mode="eval").body
        expected = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        assert read(code) == ([("f", expected)], [])
        assert expected == arguments


@pytest.mark.parametrize(
    "calls, reason",
    [
        ([ToolCall("a b", {})], "cannot be called"),
        ([ToolCall("f", {"x": float("nan")})], "cannot be an argument"),
        ([ToolCall("f", {"x": {1: 2}})], "cannot be an argument"),
        ([ToolCall("f", {"x": {1, 2}})], "cannot be an argument"),
        ([ToolCall("f", {"x": "\ud800"})], "surrogates"),
        ([{"name": "f", "arguments": "[1]"}], "give a dict"),
    ],
)
def test_what_cannot_be_written_is_refused(calls, reason):
    with pytest.raises(ValueError, match=reason):
        render_tool_calls(calls)


def test_messages_that_would_be_read_differently_are_refused():
    for message in (
        {"content": f"see {CALL_START}"},
        {"content": "<think>x</think>y"},
        {"content": "a<|im_end|>b"},
        {"reasoning_content": "a</think>b", "content": ""},
    ):
        with pytest.raises(ValueError, match="holds tags"):
            render_response(message)
    with pytest.raises(ValueError, match="thought is"):
        render_response({"content": ""}, thought="<thinking>")


def test_messages():
    response = ParsedResponse("Hm.", "", (ToolCall("f", {"x": "é", "y": [True, None]}),))
    function = {"name": "f", "arguments": {"x": "é", "y": [True, None]}}
    assert response.to_message() == {
        "role": "assistant",
        "reasoning_content": "Hm.",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }
    openai = response.to_openai()
    assert openai["content"] is None
    assert openai["tool_calls"] == response.to_openai()["tool_calls"]  # the same ids
    assert openai["tool_calls"][0]["function"]["arguments"] == '{"x": "é", "y": [true, null]}'
    assert (
        openai["tool_calls"][0]["id"]
        != ParsedResponse(tool_calls=(ToolCall("f", {}),)).to_openai()["tool_calls"][0]["id"]
    )
    assert ParsedResponse(content="Yes.").to_message() == {"role": "assistant", "content": "Yes."}


N = 20_000
HOSTILE = {
    "nested lists": ("f(x=" + "[" * N + "]" * N + ")", 0),
    "nested dicts": ("f(x=" + "{'a':" * N + "1" + "}" * N + ")", 0),
    "nested brackets": ("f(x=" + "(" * N + "1" + ")" * N + ")", 0),
    "nested calls": ("f(x=" * N + ")" * N, 0),
    "open brackets": ("f(" + "[{(" * N, 0),
    "signs": ("f(x=" + "-" * N + "1)", 0),
    "sums": ("f(x=" + "1+" * N + "1)", 0),
    "digits": ("f(x=" + "9" * N + ")", 0),
    "hex digits": ("f(x=0x" + "f" * N + ")", 0),
    "exponents": ("f(x=" + "1e+" * N + ")", 0),
    "quotes": ("f(x=" + "'" * (2 * N + 1), 0),
    "escapes": ("f(x='" + "\\'" * N, 0),
    "open strings, line by line": ("'\\\n\"\\\n" * N, 0),
    "triple quotes": ("'''\"\"\"\\" * N, 0),
    "strings side by side": ("f(x=" + "'a'" * N + ")", 1),
    "long name": ("a.b-" * N + "(x=1)", 1),
    "long string": ("f(x='" + "a" * 20 * N + "')", 1),
    "many arguments": ("f(" + ",".join(f"a{place}=1" for place in range(N)) + ")", 1),
    "many calls": ("f(x=1)\n" * 5000, 5000),
    "many broken calls": ("f(!)\n" * 5000, 0),
    "spaces": ("f(" + " \n" * N + ")", 1),
    "comments": ("#" * N + "\n#\n" * N, 0),
    "line ends": ("\\\n" * N, 0),
    "fences": ("```" * N, 0),
}


@pytest.mark.parametrize("code, count", HOSTILE.values(), ids=HOSTILE)
def test_hostile_blocks_end(code, count):
    calls, errors = parse_tool_calls(code)
    assert len(calls) == count
    # Every sign of the text is in a call, in an error, or nothing but space, comment, fence and divider.
    calls_left, errors_left, at, between = list(calls), list(errors), 0, ""
    while calls_left or errors_left:
        places = [code.find(part[0].source, at) if part else len(code) for part in (calls_left, errors_left)]
        part = (errors_left if places[1] < places[0] else calls_left).pop(0)
        assert min(places) >= at
        between += code[at : min(places)]
        at = min(places) + len(part.source)
    between += code[at:]
    assert all(line.lstrip(" \\`;,").startswith("#") or not line.strip(" \\`;,") for line in between.split("\n"))
    assert parse_response(CALL_START + code + CALL_END).tool_calls == tuple(calls)


@pytest.mark.parametrize(
    "text",
    [
        tag * N
        for tag in (*responses.THOUGHTS, *responses.THOUGHTS.values(), CALL_START, CALL_END, "<", "<|", " ", "</s>")
    ]
    + [(f"{CALL_START}'''{CALL_END}" + f'{CALL_START}"""{CALL_END}') * 2000, fenced("f(x=1)") * 5000],
    ids=lambda text: repr(text[:30]),
)
def test_hostile_texts_end(text):
    response = parse_response(text)
    pieces = [text[at : at + 997] for at in range(0, len(text), 997)]
    assert stream(text, map(len, pieces)) == response
    assert len(response.thinking) + len(response.content) <= len(text)
