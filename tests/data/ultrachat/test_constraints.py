"""Constraints mean what they say: counts against independent readers, files and workers change nothing."""

import json
import random
import time
from collections import Counter

import pytest
from datasets import Dataset, load_dataset

from transformers_minicpm4.data.ultrachat.constraints import (
    FIELDS,
    ConstraintChecker,
    KeepPassing,
    OutputsChecker,
    check_constraints,
    describe_constraint,
    dump_constraints,
    load_constraints,
    validate_constraint,
)
from transformers_minicpm4.data.ultrachat.reasons import reason_counts
from transformers_minicpm4.data.ultrachat.text_counts import (
    count_capital_words,
    count_characters,
    count_keyword,
    count_lines,
    count_paragraphs,
    count_sentences,
    count_words,
    find_words,
    read_markdown,
    script_share,
)


REPORT = """# Report

Intro with a [link](x).

## Results

- one
- two
* three

1. first
2. second

| a | b |
|---|:-:|
| 1 | 2 |
| 3 | 4 |

```python
# no heading
- no bullet
```

## Empty

### Last
text
"""

# (text, constraint, does it pass); both sides of each border.
CASES = [
    ("one two three", {"type": "words", "exactly": 3}, True),
    ("one two three", {"type": "words", "at_least": 4}, False),
    ("one two three", {"type": "words", "at_least": 3, "at_most": 3}, True),
    ("one two three", {"type": "words", "at_most": 2}, False),
    ("我爱北京天安门", {"type": "words", "exactly": 7}, True),
    ("我用 Python 3", {"type": "words", "exactly": 4}, True),
    ("  ab c\n", {"type": "characters", "exactly": 4}, True),
    ("e\u0301", {"type": "characters", "exactly": 1}, True),
    ("A. B? C!", {"type": "sentences", "exactly": 3}, True),
    ("你好。“再见！”他说。", {"type": "sentences", "exactly": 3}, True),
    ("a\n\nb\nc\n \n\nd", {"type": "paragraphs", "exactly": 3}, True),
    ("a\n\nb\nc", {"type": "lines", "exactly": 3}, True),
    ("NASA and I met THE USA", {"type": "capital_words", "exactly": 3}, True),
    ("The cat saw a Cat.", {"type": "keywords", "keywords": ["cat"], "exactly": 2}, True),
    ("The cat saw a Cat.", {"type": "keywords", "keywords": ["cat"], "exactly": 1, "ignore_case": False}, True),
    ("concatenate", {"type": "keywords", "keywords": ["cat"]}, False),
    ("cat dog", {"type": "keywords", "keywords": ["cat", "bird"]}, False),
    ("北京的北京", {"type": "keywords", "keywords": ["北京"], "at_least": 2}, True),
    ("a, b", {"type": "forbidden", "keywords": [","]}, False),
    ("scatter", {"type": "forbidden", "keywords": ["cat"]}, True),
    ("Dear Anna, hello", {"type": "starts_with", "phrase": "Dear Anna"}, True),
    ("dear Anna, hello", {"type": "starts_with", "phrase": "Dear Anna"}, False),
    ("dear Anna, hello", {"type": "starts_with", "phrase": "Dear Anna", "ignore_case": True}, True),
    ("bye.\nThe end ", {"type": "ends_with", "phrase": "The end"}, True),
    ("The end.", {"type": "ends_with", "phrase": "The end"}, False),
    ('{"a": 1}', {"type": "json"}, True),
    ('```json\n{"a": 1}\n```', {"type": "json"}, True),
    ('```json\n{"a": 1}\n```', {"type": "json", "fenced": False}, False),
    ("Here: {}", {"type": "json"}, False),
    ('{"a": NaN}', {"type": "json"}, False),
    ('{"a": 1, "a": 2}', {"type": "json"}, False),
    ("[" * 100_000, {"type": "json"}, False),
    ("9" * 5000, {"type": "json"}, False),  # more digits than Python turns into a number
    ('{"a": 1}', {"type": "json", "schema": {"type": "object", "required": ["a"]}}, True),
    ('{"b": 1}', {"type": "json", "schema": '{"type": "object", "required": ["a"]}'}, False),
    (REPORT, {"type": "headings", "exactly": 4}, True),
    (REPORT, {"type": "headings", "exactly": 2, "level": 2}, True),
    (REPORT, {"type": "bullets", "exactly": 3}, True),
    (REPORT, {"type": "numbered", "exactly": 2}, True),
    (REPORT, {"type": "code_block", "exactly": 1, "language": "Python"}, True),
    (REPORT, {"type": "code_block", "language": "rust"}, False),
    ("```\nnever closed", {"type": "code_block"}, False),
    (REPORT, {"type": "table", "exactly": 1, "columns": 2}, True),
    (REPORT, {"type": "table", "columns": 3}, False),
    (REPORT, {"type": "sections", "titles": ["results", "Last"]}, True),
    (REPORT, {"type": "sections", "titles": ["Last", "Results"]}, False),
    (REPORT, {"type": "sections", "titles": ["Empty"]}, False),
    (REPORT, {"type": "title"}, True),
    ("text\n# Late", {"type": "title"}, False),
    ("## Two", {"type": "title"}, False),
    ("你好 ok", {"type": "script", "script": "Han", "at_least": 0.5}, True),
    ("你好 okay", {"type": "script", "script": "Han", "at_least": 0.5}, False),
    ("123", {"type": "script", "script": "Han", "at_least": 0.5}, False),
    ("no CAPITALS", {"type": "case", "case": "lower"}, False),
    ("no capitals, 3", {"type": "case", "case": "lower"}, True),
    ("123", {"type": "case", "case": "upper"}, False),
    ("ÄÖ 1", {"type": "case", "case": "upper"}, True),
]


@pytest.mark.parametrize("text, constraint, passes", CASES)
def test_both_sides_of_each_border(text, constraint, passes):
    reason = check_constraints(text, [constraint])
    assert (reason == "ok") is passes, reason
    assert passes or reason.startswith(constraint["type"] + ":")
    assert describe_constraint(constraint)


def test_every_type_is_tested():
    assert FIELDS.keys() == {constraint["type"] for _, constraint, _ in CASES} | {"language"}


def test_language_by_model():
    text = "这是一个关于语言识别的测试，我们需要足够长的中文文本。"
    assert check_constraints(text, [{"type": "language", "language": "ZH"}]) == "ok"
    assert check_constraints(text, [{"type": "language", "language": "en"}]) == "language: looks like zh, asked en"


def test_all_failures_are_named_and_blank_text_fails():
    reason = check_constraints(
        "one", [{"type": "words", "at_least": 2}, {"type": "title"}, {"type": "lines", "exactly": 1}]
    )
    assert reason == "words: 1, asked at least 2; title: no heading of level 1 opens the text"
    assert check_constraints(" \n", []) == check_constraints(None, []) == "empty: no text"
    assert check_constraints("x", None) == "ok"


@pytest.mark.parametrize(
    "constraint, message",
    [
        ("words", "it is an object"),
        ({"type": "wrods"}, "unknown type 'wrods'; types are words, characters"),
        ({"type": ["words"]}, "unknown type"),
        ({"type": "words"}, "needs a limit"),
        ({"type": "words", "min": 3}, "unknown field 'min'; words takes at_least, at_most, exactly"),
        ({"type": "words", "at_least": "3"}, "whole number"),
        ({"type": "words", "at_least": True}, "whole number"),
        ({"type": "words", "at_least": -1}, "whole number"),
        ({"type": "words", "at_least": 3, "at_most": 2}, "no text can pass"),
        ({"type": "words", "exactly": 3, "at_most": 4}, "exactly stands alone"),
        ({"type": "keywords"}, "needs the field 'keywords'"),
        ({"type": "keywords", "keywords": "cat"}, "list of at least one text"),
        ({"type": "keywords", "keywords": [" "]}, "not blank"),
        ({"type": "starts_with", "phrase": ""}, "not blank"),
        ({"type": "json", "schema": {"type": "objct"}}, "no valid schema"),
        ({"type": "json", "schema": {"$ref": "https://example.org/x.json"}}, "leaves the schema"),
        ({"type": "json", "schema": {"type": "object", "const": None}}, "ambiguous"),
        ({"type": "script", "script": "Klingon"}, "no Unicode script"),
        ({"type": "script", "script": "Han}|.{"}, "no Unicode script"),
        ({"type": "script", "script": "Han", "at_least": 90}, "share"),
        ({"type": "headings", "level": 7}, "1 to 6"),
        ({"type": "case", "case": "title"}, "lower or upper"),
    ],
)
def test_construction_refuses_by_name(constraint, message):
    with pytest.raises(ValueError, match=message):
        validate_constraint(constraint)
    with pytest.raises(ValueError, match=message):
        ConstraintChecker(constraints=[constraint])


def test_words_are_each_character_once():
    """Words never overlap, hold no white space, and cover all letters and digits."""
    draw = random.Random(0)
    alphabet = "aZé9 _-'’.,!。我京カ가ก\n\t\u0301"
    for _ in range(2000):
        text = "".join(draw.choices(alphabet, k=draw.randint(0, 25)))
        words = find_words(text)
        kept = "".join(words)
        assert not any(character.isspace() for character in kept)
        assert Counter(filter(str.isalnum, kept)) == Counter(filter(str.isalnum, text))
        assert all(len(word) == 1 for word in words if set(word) & set("我京カ"))
        assert count_words(text) == len(words)
        # Every sentence and paragraph of words has at least one word, so their numbers are ordered.
        assert count_paragraphs(text) >= 0
        assert count_sentences(text) <= count_words(text)
        assert count_characters(text) <= len(text)


def test_exact_values_on_mixed_text():
    assert find_words("don't state-of-the-art 1,000.5 a_b x.y") == [
        "don't",
        "state-of-the-art",
        "1,000.5",
        "a_b",
        "x",
        "y",
    ]
    assert find_words("GPT4模型の重みは3.5GB") == ["GPT4", "模", "型", "の", "重", "み", "は", "3.5GB"]
    assert count_sentences("See e.g. this one. Pi is 3.14! “Why?” he asked... Dr. Who did") == 5
    assert count_sentences("all small. here too. i.e. two") == 3
    assert count_sentences("...\n!!!") == 0
    assert count_capital_words("I AM the USA's NATO-Chef A1") == 1
    assert count_keyword("aaaa", "aa") == 0
    assert count_keyword("好好好好", "好好") == 2
    assert count_keyword("C++ and c++", "C++") == 2
    assert script_share("abя", "Cyrillic") == pytest.approx(1 / 3)


def test_markdown_equals_a_commonmark_parser():
    """Headings, closed fences and their languages, and tables as markdown-it reads them, on generated documents."""
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable("table")
    draw = random.Random(1)
    pieces = ["# A", "## B ##", "####### no", "#no", "text", "```python\n# x\n- y\n```", "~~~\n|a|\n~~~", "---"]
    pieces += [
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "a | b\n- | -\n1 | 2",
        "- item",
        "1. item",
        "````md\n```\n````",
        "### ",
    ]
    seen = Counter()
    for _ in range(400):
        text = "\n\n".join(draw.choices(pieces, k=draw.randint(1, 8)))
        tokens = parser.parse(text)
        found = read_markdown(text)
        top = [token for token in tokens if token.level == 0]
        headings = [int(token.tag[1]) for token in top if token.type == "heading_open"]
        fences = [(token.info.split() or [""])[0] for token in top if token.type == "fence"]
        assert [level for level, _ in found.headings] == headings, text
        assert [language for language, _ in found.code_blocks] == fences, text
        assert len(found.tables) == sum(token.type == "table_open" for token in top), text
        items = Counter(token.markup for token in tokens if token.type == "list_item_open")
        assert found.bullets == items["-"], text
        assert found.numbered == items["."], text
        seen.update(token.type for token in tokens)
    assert min(seen[kind] for kind in ("heading_open", "fence", "table_open", "list_item_open")) > 50


@pytest.fixture
def rows():
    texts = ["one two three", "", None, "# T\n\ntext", '{"a": 1}', "我爱北京"] * 20
    lists = [
        [{"type": "words", "at_least": 2}],
        [{"type": "keywords", "keywords": ["two", "x"], "at_most": 3}, {"type": "title"}],
        [{"type": "json", "schema": '{"type": "object", "properties": {"a": {"const": null}}}'}],
        [],
        [{"type": "script", "script": "Han", "at_least": 0.5}, {"type": "words", "exactly": 4}],
    ] * 24
    return {"id": list(range(120)), "response": texts, "constraints": lists}


def test_constraints_survive_parquet(rows, tmp_path):
    """As JSON text and as lists of objects, which Arrow fills with nulls, they give the same verdicts."""
    expected = [check_constraints(text, each) for text, each in zip(rows["response"], rows["constraints"])]
    texts = {**rows, "constraints": [dump_constraints(each) for each in rows["constraints"]]}
    for name, columns in (("objects", rows), ("text", texts)):
        path = str(tmp_path / f"{name}.parquet")
        Dataset.from_dict({**columns, "row": list(range(120))}).to_parquet(path)
        back = load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
        cells = back["constraints"]
        assert [load_constraints(cell) for cell in cells] == [load_constraints(each) for each in rows["constraints"]]
        assert back.map(ConstraintChecker())["constraints_reason"][:] == expected


def test_workers_streams_and_formats_change_nothing(rows):
    dataset = Dataset.from_dict(rows)
    checker = ConstraintChecker()
    one = dataset.map(checker, load_from_cache_file=False)
    two = dataset.map(checker, num_proc=2, load_from_cache_file=False)
    stream = list(dataset.to_iterable_dataset(num_shards=3).map(checker))
    assert one.to_dict() == two.to_dict()
    assert [row["constraints_reason"] for row in stream] == one["constraints_reason"][:]
    # No row is lost, and the counts of reasons add up to the rows.
    assert sum(reason_counts(one["constraints_reason"]).values()) == len(dataset)
    assert one["id"][:] == rows["id"]
    kept = one.filter(lambda row: row["constraints_passed"])
    assert len(kept) == reason_counts(one["constraints_reason"])["ok"]


def test_outputs_are_all_recorded_and_only_passing_ones_kept():
    outputs = [["short", "one two three", "a b c d"], [], ["x"], ["p q r"]]
    dataset = Dataset.from_dict({"id": [0, 1, 2, 3], "outputs": outputs})
    judged = dataset.map(OutputsChecker(constraints=[{"type": "words", "at_least": 3}]))
    assert judged["outputs_passed"][:] == [[False, True, True], [], [False], [True]]
    assert [len(reasons) for reasons in judged["outputs_reason"]] == [3, 0, 1, 1]
    assert judged["outputs_reason"][0][0] == "words: 1, asked at least 3"
    for size in (1, 2, 1000):
        kept = judged.map(KeepPassing(), batched=True, batch_size=size, remove_columns=judged.column_names)
        assert kept["response"][:] == ["one two three", "a b c d", "p q r"]
        assert kept["id"][:] == [0, 0, 3]
        assert kept["output_index"][:] == [1, 2, 0]
    assert len(kept) == sum(judged["passed_count"])


def test_wrong_columns_and_texts_are_named():
    with pytest.raises(KeyError, match="reads the column 'response'"):
        ConstraintChecker(constraints=[])({"text": "x"})
    with pytest.raises(KeyError, match="reads the column 'constraints'"):
        ConstraintChecker()({"response": "x"})
    with pytest.raises(TypeError, match="not int"):
        ConstraintChecker(constraints=[])({"response": 3})
    with pytest.raises(ValueError, match="are no JSON"):
        load_constraints("[{")
    with pytest.raises(ValueError, match="list of objects"):
        load_constraints(json.dumps({"type": "title"}))


HOSTILE = [
    ".",
    "?",
    "a.",
    "。",
    "# ",
    " ",
    "`",
    "```\n",
    "~",
    "\n",
    "\r",
    "-",
    "- ",
    "-|",
    "| ",
    "\\|",
    '."',
    "\u0301\u0327",
]


@pytest.mark.parametrize("unit", HOSTILE, ids=repr)
def test_time_is_linear_in_hostile_text(unit):
    """Much of one thing, behind beginnings that start something and before ends that spoil it."""
    for beginning, end in (("", "x"), ("# a", "x"), ("```", "`"), ("a |\n-", "x"), ("A.", "]"), ("```json\n", "x")):
        text = beginning + unit * (10**5 // len(unit)) + end
        for count in (count_sentences, count_words, count_paragraphs, count_characters, read_markdown):
            start = time.process_time()
            count(text)
            assert time.process_time() - start < 0.5, count
    start = time.process_time()
    check_constraints(text, [{"type": "json"}, {"type": "keywords", "keywords": [unit.strip() or "a"]}])
    assert time.process_time() - start < 3


def test_lines_end_where_editors_end_them():
    for end in ("\n", "\r\n", "\r"):
        report = REPORT.replace("\n", end)
        assert read_markdown(report) == read_markdown(REPORT)
        assert (count_lines(report), count_paragraphs(report)) == (count_lines(REPORT), count_paragraphs(REPORT))
        fenced = '```JSON\n{"a": 1}\n```\n'.replace("\n", end)
        assert check_constraints(fenced, [{"type": "json"}, {"type": "code_block", "language": "json"}]) == "ok"
    for inside in "\x0b\x0c\x1c\x85\u2028\u2029":
        assert count_lines(f"a{inside}b\nc") == 2
        assert read_markdown(f"```\na{inside}b\n```").code_blocks == [("", f"a{inside}b")]


@pytest.mark.parametrize(
    "line, heading",
    [
        ("# a #", (1, "a")),
        ("## a#", (2, "a#")),
        ("### a # b ###  ", (3, "a # b")),
        ("#", (1, "")),
        ("# ##", (1, "")),
        ("#\ta", (1, "a")),
        ("   # a \\#", (1, "a \\#")),
    ],
)
def test_headings_end_before_their_closing_signs(line, heading):
    assert read_markdown(line).headings == [heading]


def test_marks_in_long_runs_count_as_in_short_ones():
    assert count_characters("e" + "\u0301" * 31) == 31
    assert count_characters("e" + "\u0301" * 100 + "e\u0301") == 101


def test_odd_values_of_a_json_get_a_reason():
    schema = {"type": "json", "schema": {"items": {"multipleOf": 0.01}}}
    for text in ("[" + "9" * 400 + "]", "[1e999]", "[" * 500 + "]" * 500):
        assert check_constraints(text, [schema]).startswith("json: ")
    keys = "".join(f'"{n}": 1,' for n in range(50_000))
    start = time.process_time()
    assert "'49999' stands twice" in check_constraints("{" + keys + '"49999": 1}', [{"type": "json"}])
    assert time.process_time() - start < 2


def test_outputs_are_a_list():
    for outputs in ("abc", b"abc", 3):
        with pytest.raises(TypeError, match="outputs are a list of texts or None"):
            OutputsChecker([{"type": "title"}])({"outputs": outputs})
