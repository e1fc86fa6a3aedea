"""Prompts: near-duplicates are marked, the too easy are dropped, and what is never solved stays."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transformers_minicpm4.data.ultrachat.reasons import reason_counts
from transformers_minicpm4.rl.curation import (
    DifficultyScorer,
    DuplicateFilter,
    ModelSampler,
    mark_duplicate_prompts,
    pass_at_k,
    prompt_text,
)


def chat(text):
    return [
        {
            "role": "system",
            "content": "Think step by step, put the final answer into a box, and say nothing else at all.",
        },
        {"role": "user", "content": text},
    ]


TRAINS = "A train leaves the station at noon and travels at sixty miles an hour for three hours; how far does it go?"
APPLES = "Mary has seven apples and gives three of them to her brother John; how many apples does she have left?"


@pytest.mark.parametrize("form", [str, chat])
def test_near_duplicate_prompts_are_marked_and_dropped_in_a_step_of_their_own(form):
    texts = [
        TRAINS,
        APPLES,
        TRAINS.upper().replace(";", " --"),
        "Now then. " + TRAINS,
        "What is 2 + 2?",
        "What is 2 + 3?",
    ]
    dataset = Dataset.from_dict({"prompt": [form(text) for text in texts], "solution": list("abcdef")})
    marked = mark_duplicate_prompts(dataset)
    assert marked["duplicate_of"][:] == [None, None, 0, 0, None, None]
    assert marked["similarity"][2] == 1.0
    assert 0.8 <= marked["similarity"][3] < 1.0
    assert set(marked.column_names) == {"prompt", "solution", "duplicate_of", "similarity"}
    assert marked["prompt"][:] == dataset["prompt"][:]
    kept = marked.filter(DuplicateFilter(), batched=True)
    assert kept["solution"][:] == ["a", "b", "e", "f"]


def test_the_text_of_a_prompt_is_what_the_user_wrote():
    assert prompt_text(chat("a")) == prompt_text("a") == "a"
    assert prompt_text([*chat("a"), {"role": "assistant", "content": "x"}, {"role": "user", "content": "b"}]) == "a\nb"
    assert prompt_text([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]) == "a\n"
    assert prompt_text(None) == ""
    with pytest.raises(TypeError, match="a prompt is '3'; give a string, or a list of messages"):
        prompt_text(3)
    with pytest.raises(ValueError, match="no column 'question'; .* set prompt_column"):
        mark_duplicate_prompts(Dataset.from_dict({"prompt": ["a"]}), prompt_column="question")


class Tries:
    """Answers the n-th sample of a problem rightly if n is below the number that its prompt says."""

    def __call__(self, prompts):
        seen = {}
        answers = []
        for prompt in prompts:
            seen[prompt] = seen.get(prompt, -1) + 1
            answers.append("right" if seen[prompt] < int(prompt.split()[-1]) else "wrong")
        return answers


def graded(completions, prompts, solution, **columns):
    assert len(completions) == len(prompts) == len(solution)
    return [None if gold is None else float(text == gold) for text, gold in zip(completions, solution)]


def test_solved_k_of_k_is_dropped_and_solved_never_is_kept():
    solutions = ["right"] * 5 + [None]
    dataset = Dataset.from_dict(
        {"prompt": [f"problem {n}" for n in (0, 1, 2, 3, 4)] + ["other 4"], "solution": solutions}
    )
    scored = dataset.map(DifficultyScorer(Tries(), graded, answers_column="answers"), batched=True, batch_size=4)
    assert len(scored) == 6
    assert scored["solved"][:] == [0, 1, 2, 3, 4, 0]
    assert scored["results"][1] == [1.0, 0.0, 0.0, 0.0]
    assert scored["answers"][1] == ["right", "wrong", "wrong", "wrong"]
    assert scored["pass_at_k"][:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert reason_counts(scored["difficulty_reason"]) == {"ok": 4, "all_right": 1, "bad_result": 1}
    kept = scored.filter(lambda row: row["difficulty_passed"])
    assert kept["prompt"][:] == ["problem 0", "problem 1", "problem 2", "problem 3"]
    two = dataset.map(DifficultyScorer(Tries(), graded, samples=2, k=2), batched=True)
    assert two["solved"][:] == [0, 1, 2, 2, 2, 0]
    assert two["pass_at_k"][:5] == [pass_at_k(2, right, 2) for right in (0, 1, 2, 2, 2)]


def test_a_share_of_the_tests_is_not_solved():
    dataset = Dataset.from_dict({"prompt": ["a", "b"]})
    scorer = DifficultyScorer(
        lambda prompts: prompts, lambda completions, **_: [0.75 + 0.25 * (c == "b") for c in completions]
    )
    scored = dataset.map(scorer, batched=True)
    assert scored["solved"][:] == [0, 4]
    assert scored["difficulty_passed"][:] == [True, False]


def make_model():
    letters = Tokenizer(models.WordLevel({c: i for i, c in enumerate("_.0123456789")}, unk_token="_"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="_", eos_token=".")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), tokenizer


def test_a_model_answers_the_problems():
    """A real generate: the share of right answers is what the odds of the model say."""
    model, tokenizer = make_model()
    sampler = ModelSampler(model, tokenizer, max_new_tokens=1, batch_size=64, seed=3)
    with torch.no_grad():
        odds = model(**tokenizer(["12"], return_tensors="pt")).logits[0, -1].double().softmax(-1)
    best = int(odds[2:].argmax()) + 2
    dataset = Dataset.from_dict({"prompt": ["12", "345"], "solution": [tokenizer.decode([best])] * 2})
    scorer = DifficultyScorer(
        sampler, lambda completions, solution, **_: [float(a == b) for a, b in zip(completions, solution)], 800
    )
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    scored = scorer(dataset[:])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert scored == scorer(dataset[:])  # seeded
    deviation = (odds[best] * (1 - odds[best]) / 800) ** 0.5
    assert abs(scored["solved"][0] / 800 - odds[best]) < 4 * deviation
    assert ModelSampler(model, tokenizer, 1, 64, seed=4)(["12"] * 50) != sampler(["12"] * 50)


def test_conversations_come_back_as_messages_and_padding_changes_nothing():
    model, tokenizer = make_model()
    greedy = {"do_sample": False, "temperature": None, "top_k": None}
    sampler = ModelSampler(model, tokenizer, max_new_tokens=5, batch_size=3, **greedy)
    prompts = ["1", "23456", "78"]
    alone = [sampler([prompt])[0] for prompt in prompts]
    assert sampler(prompts) == alone
    chats = sampler([[{"role": "user", "content": prompt}] for prompt in prompts])
    assert chats == [[{"role": "assistant", "content": answer}] for answer in alone]


def test_wrong_arguments_are_named():
    scorer = DifficultyScorer(lambda prompts: prompts[1:], graded)
    with pytest.raises(KeyError, match="no column 'prompt'; the columns are"):
        scorer({"question": ["a"]})
    with pytest.raises(TypeError, match="pass batched=True"):
        scorer({"prompt": "a", "solution": "b"})
    with pytest.raises(AssertionError):
        scorer({"prompt": ["a"], "solution": ["b"]})
    with pytest.raises(ValueError, match="generate gave 3 values for 4 samples"):
        DifficultyScorer(lambda prompts: prompts[1:], lambda completions, **_: [0.0] * 4)({"prompt": ["a"]})
    with pytest.raises(ValueError, match="reward gave 1 values for 4 samples"):
        DifficultyScorer(lambda prompts: prompts, lambda completions, **_: [0.0])({"prompt": ["a"]})
    with pytest.raises(TypeError, match="reward is str; give a function"):
        DifficultyScorer(print, "math_reward")
    with pytest.raises(ValueError, match="k = 5 of 4 samples"):
        DifficultyScorer(print, print, k=5)
    model, tokenizer = make_model()
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        ModelSampler(model, tokenizer, 0)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no pad_token"):
        ModelSampler(model, tokenizer)
