"""Whatever the model's scores, a text that ended fulfils its grammar, by judges that know nothing of the engine."""

import copy
import json
import random
import re
from typing import Literal

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transformers_minicpm4.generation.constrained import ConstrainedLogitsProcessor, llguidance_tokenizer
from transformers_minicpm4.generation.draft_tree import DraftTree
from transformers_minicpm4.generation.drafts import Draft
from transformers_minicpm4.generation.grammar import Grammar
from transformers_minicpm4.generation.json_schema import ANNOTATIONS, ENFORCED
from transformers_minicpm4.generation.speculative import speculative_decode


PROMPT = torch.tensor([[5, 600, 7]])
# SmolLM2's <|im_end|> and <|endoftext|>.
EOS = [2, 0]


@pytest.fixture(scope="module")
def tokenizer():
    """SmolLM2's own byte-level BPE."""
    from transformers_minicpm4.cli.assets import smollm2_path

    try:
        return AutoTokenizer.from_pretrained(smollm2_path())
    except FileNotFoundError as error:
        pytest.skip(f"no converted SmolLM2 weights: {error}")


def random_model(vocabulary=49152, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5, eos_token_id=EOS, pad_token_id=2, bos_token_id=1,
    )).eval()  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return random_model()


def generate(model, processor, rows=1, prompt=PROMPT, **options):
    options = {"max_new_tokens": 120, "do_sample": False, **options}
    if options["do_sample"]:
        options = {"top_k": 0, **options}
    ids = prompt.expand(rows, -1)
    return model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[processor], **options)


def texts(tokenizer, processor, output):
    """Of each row: whether it ended, and what it says."""
    rows = output[:, processor.prompt_length :]
    return list(zip(processor.is_complete(output), tokenizer.batch_decode(rows, skip_special_tokens=True)))


def judge(schema):
    kind = jsonschema.Draft202012Validator
    return kind(schema, format_checker=kind.FORMAT_CHECKER)


# --- JSON ------------------------------------------------------------------------------------------------------------


def random_schema(draw, depth=2, names=("leaf",), kind=None):
    """A schema of one of the kinds that occur, of few and bounded parts so that most texts come to an end."""
    inner = ["object", "object", "map", "array", "tuple", "anyOf", "ref"] if depth else ["ref"]
    kind = kind or draw.choice(["string", "pattern", "format", "integer", "number", "enum", "const", "types", *inner])
    low = draw.randint(-300, 300)
    if kind == "string":
        return {"type": "string", "minLength": draw.randint(0, 3), "maxLength": draw.randint(3, 8)}
    if kind == "pattern":
        return {"type": "string", "pattern": draw.choice(["^[a-c]{2,4}$", r"^\d+-\d$", '^(é|\\n|"|你)+$', "^x?$"])}
    if kind == "format":
        return {"type": "string", "format": draw.choice(["date", "uuid", "ipv4"])}
    if kind == "integer":
        bounds = draw.choice([
            {}, {"minimum": low, "maximum": low + 40}, {"exclusiveMinimum": low, "multipleOf": draw.randint(2, 9)},
            {"allOf": [{"minimum": low}, {"maximum": low + 2}]},
        ])  # fmt: skip
        return {"type": "integer", **bounds}
    if kind == "number":
        return {"type": "number", "minimum": low / 8, "exclusiveMaximum": low / 8 + draw.choice([1, 3, 1000])}
    if kind == "enum":
        return {"enum": draw.sample([1, "a", 'a"\\\n\u2028é😀', None, [1, {"b": 2}], True, 2.5, ""], 3)}
    if kind == "const":
        return {"const": draw.choice(["\t/</script>", 0, {"k": ["v"]}, "大"])}
    if kind == "types":
        return {"type": draw.choice([["boolean", "null"], ["integer", "null"], "boolean"])}
    if kind == "array":
        low = draw.randint(0, 2)
        items = random_schema(draw, depth - 1, names)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + draw.randint(0, 2)}
    if kind == "tuple":
        parts = [random_schema(draw, depth - 1, names) for _ in range(2)]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": draw.randint(0, 2)}
    if kind == "anyOf":
        if draw.random() < 0.5:
            return {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "integer"}, {"type": "null"}]}
        return {"anyOf": [random_schema(draw, depth - 1, names) for _ in range(2)], "title": "either"}
    if kind == "ref":
        return {"$ref": f"#/$defs/{draw.choice(names)}"}
    if kind == "map":
        counts = {"minProperties": draw.randint(0, 2), "maxProperties": draw.randint(2, 3)}
        one = random_schema(draw, 0, names)
        free = draw.choice([
            {"additionalProperties": one}, {"patternProperties": {"^[a-d]{1,2}$": one}, "additionalProperties": False},
        ])  # fmt: skip
        return {"type": "object", **free, **counts}
    keys = draw.sample(["a", "b", 'q"uote', "名", "sp ace", "$ref", "not"], 3)
    properties = {key: random_schema(draw, depth - 1, names) for key in keys}
    more = draw.choice([False, False, {"type": "boolean"}, {"type": "boolean"}, {"enum": ["x", 1]}])
    schema = {"type": "object", "properties": properties, "additionalProperties": more}
    if draw.random() < 0.3:  # the names that begin with "a" or "b" are joined with "properties"
        schema["patternProperties"] = draw.choice([{"^[ab]": {}}, {"^x-": {"type": "null"}, "^[ab]$": True}])
    # The engine counts properties only where all the named ones are required.
    required = draw.choice([keys, draw.sample(keys, draw.randint(0, 3))])
    if len(required) == 3:
        schema |= draw.choice([{}, {"maxProperties": 4}, {"minProperties": draw.randint(3, 5)}])
    return schema | {"required": required}


def respelled(draw, value):
    """JSON of a value, some of its names in other spellings, some twice."""
    if isinstance(value, list):
        return f"[{','.join(respelled(draw, one) for one in value)}]"
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    items = [(name, one, 0.05) for name, one in value.items()]  # and how likely the name is spelled otherwise
    if len(items) > 1 and draw.random() < 0.3:
        items[-1] = (items[-2][0], *items[-1][1:])
    if draw.random() < 0.5:
        more = draw.choice([*value, "a", "x-"]), draw.choice([True, True, "x", 1, *value.values()]), 0.7
        items.insert(draw.choice([len(items), draw.randint(0, len(items))]), more)
    written = []
    for name, one, likely in items:
        spelled = json.dumps(name, ensure_ascii=False)
        if draw.random() < likely:
            spelled = '"' + "".join(f"\\u{ord(letter):04x}" for letter in name) + '"'
        written.append(f"{spelled}:{respelled(draw, one)}")
    return f"{{{','.join(written)}}}"


def readings(text):
    """What JSON says where a name comes twice: the last, or the first."""
    return [json.loads(text), json.loads(text, object_pairs_hook=lambda pairs: dict(reversed(pairs)))]


def check_random_schemas(tokenizer, model, first, number, rows=3):
    """
    Ended and all texts; every ended one was parsed and judged. And how many texts that are much like them, but for
    their names, were taken by the grammar: these were judged as well.
    """
    ended = total = alike = 0
    refused = []
    for seed in range(first, first + number):
        draw = random.Random(seed)
        leaf = random_schema(draw, 0, ["end"])
        tree = {"type": "object", "properties": {"v": {"$ref": "#/$defs/leaf"}, "sub": {"$ref": "#/$defs/tree"}},
                "required": ["v"], "additionalProperties": False}  # fmt: skip
        schema = random_schema(draw, draw.choice([1, 2]), ["leaf", "tree"], draw.choice([None, None, "object", "map"]))
        schema = {**schema, "$defs": {"leaf": leaf, "tree": tree, "end": {"const": "end"}}}
        try:
            grammar = Grammar.json_schema(schema, **draw.choice([{"whitespace": ""}, {"whitespace": " ?"}, {}]))
        except ValueError as error:
            refused.append((seed, str(error)))
            continue
        processor = ConstrainedLogitsProcessor(grammar, tokenizer, eos_token_id=EOS)
        torch.manual_seed(seed)
        output = generate(model, processor, rows, do_sample=True, temperature=draw.choice([0.7, 1.0, 3.0]))
        for complete, text in texts(tokenizer, processor, output):
            total += 1
            if not complete:
                continue
            ended += 1
            others = [respelled(draw, json.loads(text)) for _ in range(30)]
            ids = [PROMPT[0].tolist() + tokenizer.encode(other, add_special_tokens=False) for other in others]
            taken = [other for other, good in zip(others, processor.is_complete(ids)) if good]
            alike += len(taken)
            for judged in (text, *taken):
                for value in readings(judged):
                    errors = list(judge(schema).iter_errors(value))
                    assert not errors, (seed, schema, judged, errors)
    known = "free keys may repeat|less than 1 away|Unsatisfiable schema"
    assert not [one for one in refused if not re.search(known, one[1])], refused
    assert len(refused) < number / 2
    return ended, total, alike


def test_json_that_ended_is_valid_under_random_schemas(tokenizer, model):
    # Of these, 23 fails where two free names are counted though they are the same, and 38 where a name may be escaped.
    ended, total, alike = check_random_schemas(tokenizer, model, 20, 24)
    assert ended > 0.6 * total
    assert alike > ended


@pytest.mark.slow
def test_json_that_ended_is_valid_under_many_random_schemas(tokenizer, model):
    ended, total, alike = check_random_schemas(tokenizer, model, 1000, 500)
    assert ended > 0.6 * total
    assert alike > ended


def holds(tokenizer, grammar, text):
    """Whether the text is a whole one of the grammar, token by token as the tokenizer writes it."""
    processor = ConstrainedLogitsProcessor(grammar, tokenizer, prompt_length=0)
    return processor.is_complete(tokenizer.encode(text, add_special_tokens=False))


# Each enforced keyword with documents on both sides of it; the validator confirms the sides.
KEYWORDS = [
    ("type", {"type": ["integer", "null"]}, [1, None], ["a", 1.5]),
    ("enum", {"enum": [1, "a", {"b": [2]}]}, [1, "a", {"b": [2]}], [2, "b", {}]),
    ("const", {"const": {"a": 'x"'}}, [{"a": 'x"'}], [{}, 'x"']),
    ("anyOf", {"anyOf": [{"type": "string"}, {"minimum": 3, "type": "integer"}]}, ["a", 3], [2, None]),
    ("oneOf", {"oneOf": [{"type": "string"}, {"type": "integer"}]}, ["a", 3], [None, []]),
    ("allOf", {"type": "integer", "allOf": [{"minimum": 3}, {"maximum": 9}]}, [3, 9], [2, 10]),
    ("$ref", {"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer"}}, "minimum": 5}, [5], [4, "a"]),
    ("definitions", {"$ref": "#/definitions/x", "definitions": {"x": {"type": "null"}}}, [None], [4, "a"]),
    ("$anchor", {"$ref": "#x", "$defs": {"y": {"$anchor": "x", "type": "null"}}}, [None], [4, "a"]),
    ("$id", {"$id": "http://a.b/c", "$ref": "#/$defs/x", "$defs": {"x": {"type": "null"}}}, [None], [4]),
    ("properties", {"properties": {"a": {"type": "null"}}, "type": "object"}, [{}, {"a": None}], [{"a": 1}, 1]),
    ("required", {"type": "object", "required": ["a"]}, [{"a": 1}], [{}, {"b": 1}]),
    ("additionalProperties", {"type": "object", "additionalProperties": {"type": "null"}}, [{"a": None}], [{"a": 1}]),
    ("patternProperties", {"type": "object", "patternProperties": {"^a": {"type": "null"}}}, [{"ab": None, "b": 1}],
     [{"ab": 1}]),
    ("minProperties", {"type": "object", "minProperties": 1}, [{"a": 1}, {"a": 1, "b": 2}], [{}]),
    ("maxProperties", {"type": "object", "maxProperties": 1}, [{"a": 1}, {}], [{"a": 1, "b": 2}]),
    ("items", {"type": "array", "items": {"type": "null"}}, [[], [None, None]], [[None, 1]]),
    ("prefixItems", {"type": "array", "prefixItems": [{"type": "null"}], "items": {"const": 1}}, [[None, 1]],
     [[1], [None, None]]),
    ("minItems", {"type": "array", "minItems": 2}, [[1, 2]], [[], [1]]),
    ("maxItems", {"type": "array", "maxItems": 1}, [[], [1]], [[1, 2]]),
    ("minLength", {"type": "string", "minLength": 2}, ["😀é", '""'], ["", "😀"]),
    ("maxLength", {"type": "string", "maxLength": 2}, ["😀é", '""', "\n"], ["abc", "😀😀😀"]),
    ("pattern", {"type": "string", "pattern": "b+"}, ["abc", "b"], ["ac", ""]),
    ("format", {"type": "string", "format": "date"}, ["2024-02-29", "2000-02-29", "1999-12-31"],
     ["2024-13-01", "today", "2023-02-29", "1900-02-29", "2024-04-31", "0000-01-01"]),
    ("minimum", {"type": "number", "minimum": -1.5}, [-1.5, 0, 7.25], [-1.6, -2]),
    ("maximum", {"type": "integer", "maximum": 12}, [12, -40], [13, 120]),
    ("exclusiveMinimum", {"type": "integer", "exclusiveMinimum": 12}, [13, 120], [12, 2]),
    ("exclusiveMaximum", {"type": "number", "exclusiveMaximum": 0.5}, [0.49, -1], [0.5, 1]),
    ("multipleOf", {"type": "integer", "multipleOf": 7}, [0, 7, -14, 700], [1, 8, 71]),
]  # fmt: skip


def test_each_enforced_keyword_is_enforced(tokenizer):
    for keyword, schema, good, bad in KEYWORDS:
        grammar = Grammar.json_schema(schema)
        for documents, expected in ((good, True), (bad, False)):
            for document in documents:
                assert judge(schema).is_valid(document) is expected, (keyword, document)
                for ascii_only in (False, True):
                    text = json.dumps(document, ensure_ascii=ascii_only)
                    if expected and ascii_only and not text.isascii():
                        continue
                    if expected and "\\u" in text:  # characters beyond the control ones are written as they are
                        continue
                    assert holds(tokenizer, grammar, text) is expected, (keyword, text)
    assert {keyword for keyword, *_ in KEYWORDS} | {"$defs"} == ENFORCED


def test_bounds_of_numbers(tokenizer):
    """Pairs of any distance but the refused ones, at the bounds and around them."""
    draw = random.Random(6)
    refused, taken = [], 0
    for _ in range(150):
        low = draw.randint(-300, 300) / draw.choice([1, 1, 4, 10])
        high = round(low + draw.choice([0.5, 0.25, 1, 1.5, 9, 0.1, 40.75]), 6)
        schema = {
            draw.choice(["minimum", "exclusiveMinimum"]): low,
            draw.choice(["maximum", "exclusiveMaximum"]): high,
        }
        schema["type"] = draw.choice(["number", "number", "integer"])
        try:
            grammar = Grammar.json_schema(schema)
        except ValueError as error:
            refused.append(str(error))
            continue
        taken += 1
        for value in {low, high, low - 0.01, high + 0.01, float(int(low)), float(int(high)), 0.0, low + 0.05}:
            for text in {repr(round(value, 6)), f"{value:.0f}"}:
                if holds(tokenizer, grammar, text):
                    assert judge(schema).is_valid(json.loads(text)), (schema, text)
    assert all("less than 1 away" in message or "Unsatisfiable" in message for message in refused), refused
    assert taken > 75


UNSUPPORTED = {
    "uniqueItems": True, "contains": {}, "minContains": 1, "maxContains": 1, "not": {"type": "null"}, "if": {},
    "then": {}, "else": {}, "propertyNames": {"maxLength": 2}, "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {}, "dependencies": {}, "unevaluatedProperties": False, "unevaluatedItems": False,
    "additionalItems": False, "$dynamicRef": "#a", "$recursiveRef": "#", "contentEncoding": "base64",
    "nullable": True, "minLenght": 3, "x-guidance": {"lenient": True}, "format": "zorb", "items": [{}],
    "exclusiveMinimum": True, "$schema": "http://json-schema.org/draft-04/schema#",
}  # fmt: skip


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_what_is_not_enforced_is_named_with_its_place(keyword):
    wrong = {keyword: UNSUPPORTED[keyword]}
    for schema, place in (
        (wrong, "#"),
        ({"type": "object", "properties": {"not": {"anyOf": [{}, wrong]}}}, "#/properties/not/anyOf/1"),
        ({"prefixItems": [wrong], "items": False}, "#/prefixItems/0"),
        ({"$defs": {"x": {"additionalProperties": {"items": wrong}}}}, "#/$defs/x/additionalProperties/items"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"'{keyword}'") + f".* at {re.escape(place)}( |;|\\.)"):
            Grammar.json_schema(schema)


def test_annotations_change_nothing(tokenizer):
    schema = {"type": "string", "maxLength": 3, "$schema": "https://json-schema.org/draft/2020-12/schema"}
    noted = {**schema, **dict.fromkeys(ANNOTATIONS - {"$schema", "$comment"}, "x"), "$comment": "not for machines"}
    for text, expected in (('"abc"', True), ('"abcd"', False), ("1", False)):
        assert holds(tokenizer, Grammar.json_schema(noted), text) is expected
        assert holds(tokenizer, Grammar.json_schema(json.dumps(schema)), text) is expected


def test_pydantic_models(tokenizer, model):
    from pydantic import BaseModel, Field

    class Point(BaseModel):
        x: int = Field(ge=-99, le=99)
        label: Literal["a", "b"] | None = None

    class Path(BaseModel):
        points: list[Point] = Field(max_length=2)
        closed: bool

    processor = ConstrainedLogitsProcessor(Grammar.json_schema(Path, whitespace=""), tokenizer, eos_token_id=EOS)
    torch.manual_seed(3)
    output = generate(model, processor, 4, do_sample=True, temperature=3.0)
    ended = [text for complete, text in texts(tokenizer, processor, output) if complete]
    assert ended
    for text in ended:
        assert Path.model_validate_json(text).model_dump_json(exclude_unset=True) == text.replace("-0", "0")


# --- Regular expressions, choices, Lark ------------------------------------------------------------------------------

PATTERNS = [
    "[a-f]{3,9}",
    r"(\+|-)?\d{1,3}(\.\d{2})?",
    "(yes|no|maybe, but (not )?now)",
    "[^ -~]{2}",
    "(?i)ok{1,4}!?",
    "a?",
]


def test_regular_expressions(tokenizer, model):
    for pattern in PATTERNS:
        processor = ConstrainedLogitsProcessor(Grammar.regex(pattern), tokenizer, eos_token_id=EOS)
        torch.manual_seed(1)
        output = generate(model, processor, 8, do_sample=True, max_new_tokens=30)
        for complete, text in texts(tokenizer, processor, output):
            assert complete
            assert re.fullmatch(pattern, text), (pattern, text)


def test_a_choice_is_one_of_the_strings(tokenizer, model):
    strings = ['a"\\n', "ab", "a", "/.*[", "你好\n", "😀 "]
    grammar = Grammar.choice(strings)
    assert all(holds(tokenizer, grammar, string) for string in strings)
    assert not any(holds(tokenizer, grammar, string) for string in ("", 'a"', "abc", "你好", "/x", "😀"))
    processor = ConstrainedLogitsProcessor(grammar, tokenizer, eos_token_id=EOS)
    torch.manual_seed(2)
    output = generate(model, processor, 24, do_sample=True, temperature=8.0)
    drawn = {text for _, text in texts(tokenizer, processor, output)}
    assert drawn <= set(strings)
    assert len(drawn) > 3


def test_a_recursive_lark_grammar(tokenizer, model):
    grammar = Grammar.lark('start: pair\npair: "(" pair ")" | "x" /[0-9]/')
    processor = ConstrainedLogitsProcessor(grammar, tokenizer, eos_token_id=EOS)
    torch.manual_seed(2)
    output = generate(model, processor, 8, do_sample=True, max_new_tokens=25)
    for complete, text in texts(tokenizer, processor, output):
        inner = re.fullmatch(r"(\(*)(x\d)?(\)*)", text)
        assert inner
        assert complete == bool(inner[2] and len(inner[1]) == len(inner[3]))


# --- State -----------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "tags"],
    "properties": {"name": {"type": "string", "maxLength": 9}, "tags": {"type": "array", "maxItems": 3,
                   "items": {"enum": ["red", "reddish", "é\"", 12, 125]}}},
}  # fmt: skip


def allowed(processor, ids, width=49152):
    return processor(ids, torch.zeros(len(ids), width)) == 0


# A schema with free names, whose grammar has two parts.
OPEN = {**SCHEMA, "additionalProperties": {"type": "integer"}}


@pytest.mark.parametrize("schema", [SCHEMA, OPEN])
def test_what_is_allowed_depends_on_the_ids_alone(tokenizer, model, schema):
    """Rows in any order, of any text so far, taken back and resumed: as a new processor says of the row alone."""
    processor = ConstrainedLogitsProcessor(Grammar.json_schema(schema), tokenizer, eos_token_id=EOS)
    torch.manual_seed(4)
    output = generate(model, processor, 6, do_sample=True, max_new_tokens=60)
    draw = random.Random(4)
    known = {}
    for _ in range(60):
        length = draw.randint(3, output.shape[1])
        ids = output[[draw.randrange(6) for _ in range(draw.randint(1, 7))], :length].clone()
        if length > 6 and draw.random() < 0.5:
            ids[0, draw.randrange(3, length)] = draw.choice([3, 700, 45000])  # a draft that is rejected later
        together = allowed(processor, ids)
        for row, ours in zip(ids, together):
            key = tuple(row.tolist())
            if key not in known:
                fresh = ConstrainedLogitsProcessor(Grammar.json_schema(schema), tokenizer, 3, EOS)
                allowed(fresh, row[None, :3])
                known[key] = allowed(fresh, row[None])[0]
            assert torch.equal(ours, known[key])
    assert len(known) > 100


class Wobbly(Draft):
    """Drafts the known answer with a mistake at a random depth, among random siblings."""

    def __init__(self, answer):
        self.answer, self.random = answer, random.Random(0)

    def propose(self, token_ids, limit):
        good = self.answer[len(token_ids) : len(token_ids) + min(5, limit)]
        if self.random.random() < 0.7 and good:
            good[self.random.randrange(len(good))] = self.random.randrange(49152)
        return DraftTree.from_chains([[self.random.randrange(49152)], good, good[:1] + [7]], 20)


def test_speculation_changes_nothing(tokenizer):
    for seed in range(3):
        model = random_model(seed=seed)
        for schema in (SCHEMA, OPEN, random_schema(random.Random(seed), 2, ["x"]) | {"$defs": {"x": {"const": "x"}}}):
            grammar = Grammar.json_schema(schema, whitespace=" ?")
            processors = [ConstrainedLogitsProcessor(grammar, tokenizer, eos_token_id=EOS) for _ in range(2)]
            plain = generate(model, processors[0])
            draft = Wobbly(plain[0].tolist())
            output = generate(model, processors[1], custom_generate=speculative_decode, draft=draft)
            assert output.tolist() == plain.tolist()
            assert draft.accepted > 0 or plain.shape[1] < 6
            # Sampled, with drafts of another text, most of which are rejected.
            processor = ConstrainedLogitsProcessor(grammar, tokenizer, eos_token_id=EOS)
            output = generate(model, processor, custom_generate=speculative_decode, draft=draft, do_sample=True)
            ((complete, text),) = texts(tokenizer, processor, output)
            assert not complete or judge(schema).is_valid(json.loads(text))


def test_drafts_and_beams_of_transformers(tokenizer, model):
    grammar = Grammar.json_schema(SCHEMA, whitespace="")
    make = lambda: ConstrainedLogitsProcessor(grammar, tokenizer, eos_token_id=EOS)  # noqa: E731
    plain = generate(model, make())
    assert generate(model, make(), prompt_lookup_num_tokens=6).tolist() == plain.tolist()
    # Fewer tokens are allowed than there are beams: some beams leave the grammar without any probability.
    processor = make()
    output = generate(model, processor, 2, num_beams=5, num_return_sequences=2)
    for complete, text in texts(tokenizer, processor, output):
        assert complete
        assert judge(SCHEMA).is_valid(json.loads(text))


def test_padded_prompts_of_a_batch(tokenizer, model):
    prompt = torch.tensor([[2, 2, 5, 6], [8, 9, 10, 11]])
    processor = ConstrainedLogitsProcessor(Grammar.regex("[ab]{4}"), tokenizer, eos_token_id=EOS)
    output = model.generate(
        prompt, attention_mask=(prompt != 2).long(), logits_processor=[processor], max_new_tokens=9, do_sample=False
    )
    assert processor.is_complete(output) == [True, True]


def test_without_a_prompt(tokenizer):
    processor = ConstrainedLogitsProcessor(Grammar.regex("a"), tokenizer, prompt_length=0, eos_token_id=EOS)
    a = tokenizer.convert_tokens_to_ids("a")
    assert allowed(processor, torch.zeros(1, 0, dtype=torch.long))[0].nonzero().tolist() == [[a]]
    assert allowed(processor, torch.tensor([[a]]))[0].nonzero().flatten().tolist() == [0, 2]


def test_the_end(tokenizer):
    """Ids that end the text are allowed where it is complete and nowhere else, and all of them."""
    processor = ConstrainedLogitsProcessor(Grammar.regex("ab?"), tokenizer, eos_token_id=[2, 0, 17])
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    for text, expected in (
        ([], {a, tokenizer.convert_tokens_to_ids("ab")}),
        ([a], {b, 2, 0, 17}),
        ([a, b], {2, 0, 17}),
    ):
        ids = torch.tensor([[5, 6, *text]])
        assert set(allowed(processor, ids)[0].nonzero().flatten().tolist()) == expected
        assert processor.is_complete(ids) == [bool(text)]
        # After the end whatever generate pads with is no matter.
        if text:
            ids = torch.tensor([[5, 6, *text, 17, 9, 9]])
            assert set(allowed(processor, ids)[0].nonzero().flatten().tolist()) == {2, 0, 17}
            assert processor.is_complete(ids[0]) is True
    assert processor.is_complete([5, 6, b]) is False
    assert processor.is_complete([5, 6, a, 49999]) is False


# --- Vocabularies ----------------------------------------------------------------------------------------------------


def test_logits_wider_and_narrower_than_the_vocabulary(tokenizer):
    grammar = Grammar.regex("[a-z ]{6,12}")
    for width in (50000, 49000, 30000):
        processor = ConstrainedLogitsProcessor(grammar, tokenizer, eos_token_id=EOS)
        output = generate(random_model(width), processor, do_sample=True, max_new_tokens=20)
        ((complete, text),) = texts(tokenizer, processor, output)
        assert complete
        assert re.fullmatch("[a-z ]{6,12}", text)
        assert not allowed(processor, PROMPT, 50000)[0, 49152:].any()


def metaspace():
    """A decoder that llguidance 1.9.1 misreads: to it the mark of a space is a letter."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "the", *"abcdefgh0123"]
    backend = Tokenizer(models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], 0, True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def test_vocabularies_with_marked_spaces(tmp_path):
    tokenizer = metaspace()
    model = random_model(len(tokenizer))
    for pattern in ("a( the)+ b", '"( |é|大){3,5}"'):
        processor = ConstrainedLogitsProcessor(Grammar.regex(pattern), tokenizer)
        prompt = torch.tensor([[5, 6]])
        output = generate(model, processor, 8, prompt, do_sample=True, max_new_tokens=40, pad_token_id=1)
        for complete, text in texts(tokenizer, processor, output):
            assert not complete or re.fullmatch(pattern, text), text
        assert any(processor.is_complete(output))


def test_a_vocabulary_is_read_once_and_again_when_it_has_grown():
    tokenizer = metaspace()
    once = llguidance_tokenizer(tokenizer, 1)
    assert llguidance_tokenizer(tokenizer, 1) is once
    tokenizer.add_tokens(["zzz"])
    grown = llguidance_tokenizer(tokenizer, 1)
    assert grown.vocab_size == once.vocab_size + 1
    assert grown.decode_bytes([len(tokenizer) - 1]) == b"zzz"


# --- Refusals --------------------------------------------------------------------------------------------------------


def test_refusals(tokenizer, model):
    for schema, message in (
        (False, "a JSON schema is a dict"), ("{", "a string that is no JSON"),
        ({"type": "strin"}, "'type': 'strin' at #"), ({"$ref": "http://a.b/c"}, "no schema of this document"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable schema"),
        ({"$ref": "#/$defs/gone"}, "gone' at # .no schema of this document"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf constraints are not supported"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"minimum": -27.5, "exclusiveMaximum": -27}, "'exclusiveMaximum': -27 with 'minimum': -27.5, less"),
        ({"allOf": [{"exclusiveMinimum": 0}, {"$ref": "#/$defs/x"}], "$defs": {"x": {"maximum": 0.5}}}, "less than 1"),
        ({"type": "object", "properties": {"a": {}}, "maxProperties": 1}, "only supported when all keys"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Grammar.json_schema(schema)
    with pytest.raises(ValueError, match="regular expression cannot be used.*backreferences"):
        Grammar.regex(r"(a)\1")
    with pytest.raises(ValueError, match="Lark grammar cannot be used.*unknown name"):
        Grammar.lark("start: b")
    for strings in ([], "ab", [1], ["a", ""], ["\ud83d"]):
        with pytest.raises(ValueError, match=r"Grammar\.choice"):
            Grammar.choice(strings)
    grammar = Grammar.regex("ab+c")
    with pytest.raises(ValueError, match="token ids that end it, got \\[\\]"):
        ConstrainedLogitsProcessor(grammar, tokenizer, eos_token_id=[])
    with pytest.raises(ValueError, match="prompt_length is 0 or more"):
        ConstrainedLogitsProcessor(grammar, tokenizer, prompt_length=-1)
    with pytest.raises(ValueError, match="pass prompt_length"):
        ConstrainedLogitsProcessor(grammar, tokenizer).is_complete([1, 2])


def test_a_prompt_that_is_not_the_beginning(tokenizer, model):
    processor = ConstrainedLogitsProcessor(Grammar.regex("ab+c"), tokenizer, eos_token_id=EOS)
    generate(model, processor, max_new_tokens=5)
    generate(model, processor, 2, max_new_tokens=5)  # the same prompt again
    with pytest.raises(ValueError, match="first 3 of these 3 tokens are another one"):
        generate(model, processor, prompt=PROMPT + 1)
    with pytest.raises(ValueError, match="began with a prompt of 3 tokens"):
        generate(model, processor, prompt=PROMPT[:, :2])
    processor = ConstrainedLogitsProcessor(Grammar.regex("ab+c"), tokenizer, prompt_length=1, eos_token_id=EOS)
    with pytest.raises(ValueError, match="the text after the first 1 tokens, .* does not begin as the grammar says"):
        generate(model, processor)


def test_a_special_token_does_not_stand_for_its_name(tokenizer):
    """
    Decoded without special tokens its name would be missing. Where a string may have other text the name is spelled;
    where the schema forces the name, llguidance offers the special token alone, and that is an error with a sentence.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    special = tokenizer.convert_tokens_to_ids("<think>")

    def write(schema):
        processor = ConstrainedLogitsProcessor(
            Grammar.json_schema(schema), tokenizer, prompt_length=0, eos_token_id=tokenizer.eos_token_id
        )
        ids = torch.empty(1, 0, dtype=torch.long)
        for step in range(40):
            logits = torch.randn(1, len(tokenizer), generator=torch.Generator().manual_seed(step))
            logits[0, special] = 100
            ids = torch.cat([ids, processor(ids, logits).argmax(-1, keepdim=True)], 1)
            if int(ids[0, -1]) == tokenizer.eos_token_id:
                break
        return ids[0]

    free = write({"type": "string", "maxLength": 12})
    assert special not in free.tolist()
    assert len(json.loads(tokenizer.decode(free, skip_special_tokens=True))) <= 12
    with pytest.raises(ValueError, match="the name of a special token"):
        write({"const": "a <think> b"})


def test_dead_ends(tokenizer, model):
    with pytest.raises(ValueError, match="gave up after ''"):
        ConstrainedLogitsProcessor(Grammar.lark("start: b\nb: b"), tokenizer)
    small = metaspace()
    small.add_special_tokens({"eos_token": "</s>"})
    # Within the first 200 ids there is no "a".
    processor = ConstrainedLogitsProcessor(Grammar.regex("\n{2}a"), small)
    ids = torch.tensor([[7, small.convert_tokens_to_ids("<0x0A>")]])
    allowed(processor, ids[:, :1], 20)
    with pytest.raises(ValueError, match="dead end: after '\\\\n\\\\n' none of the model's 20 tokens"):
        allowed(processor, torch.cat([ids, ids[:, 1:]], 1), 20)
    with pytest.raises(ValueError, match="forbidden by another processor"):
        generate(model, ConstrainedLogitsProcessor(Grammar.regex("a"), tokenizer, eos_token_id=EOS), min_new_tokens=5)
