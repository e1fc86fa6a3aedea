"""Prompts hold what they are given, and the loop asks until the checks pass, records all and gives up by name."""

import json
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

from transformers_minicpm4.data.ultrachat.constraints import check_constraints
from transformers_minicpm4.data.ultrachat.generation import (
    PROMPTS,
    ChatGenerator,
    PipelineGenerator,
    TrackGenerator,
    check_answer,
    generate_until,
    render_prompt,
    sample_and_keep,
)


TOOLS = [
    {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
]
ROWS = {name: {field: f"<{field}>" for fields in PROMPTS[name] for field in fields} for name in PROMPTS}
ROWS["instruction"]["constraints"] = [{"type": "words", "at_least": 50}, {"type": "title"}]
ROWS["tools"]["tools"] = TOOLS
ROWS["math"]["solutions"] = 3
ROWS["code"]["tests"] = 7


@pytest.mark.parametrize("prompt", PROMPTS)
def test_each_prompt_holds_its_fields(prompt):
    text = render_prompt(prompt, ROWS[prompt])[0]["content"]
    for name, value in ROWS[prompt].items():
        if name == "constraints":
            assert "1. Write at least 50 words." in text
            assert "2. Open with a title" in text
        elif name == "tools":
            assert json.dumps(TOOLS) in text
        else:
            assert str(value) in text, name
    assert "\n\n\n" not in text
    # Needed fields alone are enough, each of them is needed, and other columns do not matter.
    needed, _ = PROMPTS[prompt]
    least = {name: ROWS[prompt][name] for name in needed}
    assert render_prompt(prompt, {**least, "other": 1})[0]["role"] == "user"
    assert "None" not in render_prompt(prompt, least)[0]["content"]
    for name in needed:
        with pytest.raises(ValueError, match=f"missing or blank: {name}"):
            render_prompt(prompt, {**least, name: None})


def test_text_of_users_is_never_a_template():
    text = "{{ 7 * 7 }} {% for x in y %} {{ cycler.__init__ }}"
    assert text in render_prompt("reverse_instruction", {"text": text})[0]["content"]
    with pytest.raises(ValueError, match="prompts are knowledge"):
        render_prompt("../secret", {})


GOOD_CODE = """## Task
Double it.
## Solution
```python
def f(x):
    return 2 * x
```
## Tests
```python
assert f(2) == 4
```"""
ANSWERS = [
    ("knowledge", "## Question\nWhy?\n\n## Answer\nBecause.", "ok"),
    ("knowledge", "## Question\nWhy?", "sections: no section 'Answer' in its place"),
    ("math", "## Problem\nx\n## Solution 1\na\n## Solution 2\nb\n## Solution 3\nc", "ok"),
    ("math", "## Problem\nx\n## Solution 1\na\n## Solution 2\nb", "sections: no section 'Solution 3' in its place"),
    ("code", GOOD_CODE, "ok"),
    ("code", GOOD_CODE.replace("2 * x", "int(input())"), "user_interaction: line 2, input"),
    ("code", GOOD_CODE.replace("assert", "import pytest\nassert"), "external_import: line 3, pytest"),
    ("code", GOOD_CODE[:-4], "code_block: 1, asked exactly 2"),
    ("long_context", "## Question\nWho?\n## Answer\nHe.", "ok"),
    ("tools", '<think>One.</think>\n[{"name": "add", "arguments": {"a": 1}}]', "ok"),
    ("tools", '<think>One.</think>\n[{"name": "add", "arguments": {}}]', "missing_argument: call 1 add, 'a'"),
    ("tools", '<think> </think>\n[{"name": "add", "arguments": {"a": 1}}]', "no_thought: before the call"),
    (
        "tools",
        '[{"name": "add", "arguments": {"a": 1}}]',
        "format: asked <think>thoughts</think> and then a JSON list of calls",
    ),
    ("instruction", "Short.", "words: 1, asked at least 50; title: no heading of level 1 opens the text"),
    ("evolve_question", "Why so?", "ok"),
    ("reverse_instruction", " ", "empty: no text"),
]


@pytest.mark.parametrize("prompt, answer, reason", ANSWERS)
def test_answers_are_checked_by_their_track(prompt, answer, reason):
    row = {**ROWS[prompt], **({"language": "Python"} if prompt == "code" else {})}
    assert check_answer(prompt, answer, row) == reason


@dataclass(frozen=True)
class Writer:
    """Writes a random number of words; which, depends on the messages and on how often it was asked for them."""

    asked: dict
    most: int = 30

    def __call__(self, messages):
        text = messages[-1]["content"]
        self.asked[text] = self.asked.get(text, 0) + 1
        return " ".join(["word"] * random.Random(f"{text} {self.asked[text]}").randint(1, self.most))


def make_rows():
    return [
        {"task": f"Task {n}", "constraints": [{"type": "words", "at_least": 15, "at_most": 24}]} for n in range(40)
    ]


def test_the_loop_asks_until_the_constraints_pass():
    dataset = Dataset.from_list([*make_rows(), {"task": " ", "constraints": None}])
    result = dataset.map(TrackGenerator("instruction", Writer({}), max_attempts=3), new_fingerprint="one")
    assert result["task"][:] == dataset["task"][:]
    for row in result:
        # Every attempt is there with its true reason; only the last may pass, and nothing was asked after it.
        if row["generation_reason"].startswith("bad_row"):
            assert row["attempts"] == [""]
            continue
        truth = [check_constraints(output, row["constraints"]) for output in row["attempts"]]
        assert row["attempt_reasons"] == truth
        assert "ok" not in truth[:-1]
        assert row["generation_passed"] == (truth[-1] == "ok")
        assert row["response"] == (row["attempts"][-1] if truth[-1] == "ok" else "")
        assert row["generation_passed"] or len(truth) == 3
        assert row["task"] in row["prompt"]
    codes = [reason.split(":")[0] for reason in result["generation_reason"]]
    assert codes.count("bad_row") == 1
    assert 5 < codes.count("gave_up") < 25
    stream = list(dataset.to_iterable_dataset().map(TrackGenerator("instruction", Writer({}), max_attempts=3)))
    assert stream == result.to_list()
    two = dataset.map(TrackGenerator("instruction", Writer({}), max_attempts=3), num_proc=2, new_fingerprint="two")
    assert two.to_list() == result.to_list()


def test_samples_are_all_recorded():
    row = make_rows()[0]
    found = sample_and_keep(Writer({}), render_prompt("instruction", row), row["constraints"], samples=12)
    assert len(found) == 12
    assert [each["reason"] for each in found] == [
        check_constraints(each["output"], row["constraints"]) for each in found
    ]
    assert 0 < sum(each["passed"] for each in found) < 12


def test_own_check_and_wrong_settings():
    generator = TrackGenerator("evolve_question", Writer({}), check=lambda answer, row: f"too_long: {row['question']}")
    reason = generator({"question": "Why?"})["generation_reason"]
    assert reason == "gave_up: after 10 attempts, last too_long: Why?"
    with pytest.raises(ValueError, match="prompts are"):
        TrackGenerator("poetry", Writer({}))
    with pytest.raises(ValueError, match="1 or more"):
        generate_until(Writer({}), [], len, max_attempts=0)
    with pytest.raises(TypeError, match="must give a string, not list"):
        generate_until(lambda messages: [], [], len)
    with pytest.raises(ValueError, match="unknown type"):
        sample_and_keep(Writer({}), [], [{"type": "wrods"}])


@pytest.fixture(scope="module")
def tiny_pipeline():
    """A random Llama over single bytes, with a chat template, in the real text-generation pipeline."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: n for n, letter in enumerate(["</s>", *alphabet])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        initializer_range=1.0,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    return pipeline("text-generation", model=LlamaForCausalLM(config).eval(), tokenizer=tokenizer, device="cpu")


def test_a_real_pipeline_drives_the_loop(tiny_pipeline):
    """A random model writes noise: sampled until none of six characters is in it."""
    generate = PipelineGenerator(tiny_pipeline, {"max_new_tokens": 12, "do_sample": True})
    row = {"task": "Write.", "constraints": [{"type": "forbidden", "keywords": ["!", "a", "e", "0", "5", "z"]}]}
    found = TrackGenerator("instruction", generate, max_attempts=10)(row)
    assert all(isinstance(output, str) for output in found["attempts"])
    assert len(set(found["attempts"])) == len(found["attempts"])
    assert found["prompt"] not in found["attempts"][0]
    assert found["attempt_reasons"] == [check_constraints(output, row["constraints"]) for output in found["attempts"]]
    # The same text as the model gives without us.
    greedy = PipelineGenerator(tiny_pipeline, {"max_new_tokens": 12, "do_sample": False})
    messages = render_prompt("instruction", row)
    tokenizer = tiny_pipeline.tokenizer
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = tiny_pipeline.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert greedy(messages) == expected != ""


def test_a_chat_client_is_asked_as_its_protocol_says():
    """The client's protocol alone, since no server is here: names of the arguments, and the place of the text."""

    def create(*, model, messages, temperature):
        text = f"{model} {temperature} {messages[0]['content']}"
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=text))])

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    generate = ChatGenerator(client, "small", {"temperature": 0.5})
    assert generate([{"role": "user", "content": "Hi"}]) == "small 0.5 Hi"
