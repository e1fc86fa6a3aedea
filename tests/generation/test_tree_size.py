"""Replaying is running: passes counted for a size are those of a run with it; the choice is that of brute force."""

import copy
import math
import random
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from transformers_minicpm4 import MiniCPM4ForCausalLM
from transformers_minicpm4.generation import tree_size
from transformers_minicpm4.generation.draft_tree import MAX_NODES, ROOT, DraftTree, grow_tree
from transformers_minicpm4.generation.drafts import Draft, ModelDraft, PromptLookupDraft
from transformers_minicpm4.generation.speculative import speculative_decode
from transformers_minicpm4.generation.tree_size import (
    acceptance_by_size,
    choose_tree_size,
    draft_cost,
    replay,
    verify_costs,
    verify_pass,
)


VOCABULARY = 128
PROMPTS = [torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(length)) for length in (5, 40)]
SIZES = [0, 1, 3, 12, 30]


@pytest.fixture(params=["llama", "sparse"])
def target(request, tiny_config, sparse_config):
    torch.manual_seed(0)
    if request.param == "sparse":
        config = tiny_config(sparse_config=sparse_config.to_dict())
        return MiniCPM4ForCausalLM._from_config(config, attn_implementation="infllm_v2").double().eval()
    return llama().double()


def llama(**changes):
    fields = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": 127,
        "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()


class Seeded(Draft):
    """Trees that depend on the text's length alone: noise with duplicates, and the known answer at random worths."""

    def __init__(self, answer, size=MAX_NODES, vocabulary=VOCABULARY):
        self.answer, self.size, self.vocabulary = answer, size, vocabulary

    def propose(self, token_ids, limit):
        draw = random.Random(len(token_ids))
        tokens, parents, worths, depths = [], [], [], []
        true = ROOT
        for node in range(draw.randrange(MAX_NODES + 1)):
            parent = draw.randrange(-1, node)
            depth = 1 if parent == ROOT else depths[parent] + 1
            if draw.random() < 0.3 or depth > limit:
                depth = 1 if true == ROOT else depths[true] + 1
                parent, known = true, self.answer[len(token_ids) + depth - 1 : len(token_ids) + depth]
                if not known or depth > limit:
                    break
                token, true = known[0], node
            else:
                token = draw.randrange(self.vocabulary)
            tokens.append(token)
            parents.append(parent)
            depths.append(depth)
            # Coarse steps make ties; a step of 0 makes a child as likely as its parent.
            worths.append((0 if parent == ROOT else worths[parent]) - draw.randrange(4))
        return DraftTree(tuple(tokens), tuple(parents), tuple(worths)).likeliest(self.size)


def run(model, prompt, draft, new=30, **options):
    options = {"do_sample": False, **options}
    return model.generate(prompt, custom_generate=speculative_decode, draft=draft, max_new_tokens=new, **options)


def similar(model):
    """The model with noise in its weights: right often, not always."""
    noisy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in noisy.parameters():
            weight += 0.04 * weight.std() * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return noisy


# --- Tokens a pass ---------------------------------------------------------------------------------------------------


def test_replay_is_the_run_with_a_model_as_draft():
    """Greedy, float64: the very passes that `ModelDraft(size=s)` takes."""
    torch.manual_seed(0)
    model = llama().double()
    small = similar(model)
    got = acceptance_by_size(model, ModelDraft(small, depth=4, topk=3, size=30), PROMPTS, 30, SIZES)
    passes, tokens = dict.fromkeys(SIZES, 0), 0
    for size in SIZES[1:]:
        tokens = 0
        for prompt in PROMPTS:
            draft = ModelDraft(small, depth=4, topk=3, size=size)
            new = run(model, prompt, draft, 30).shape[1] - prompt.shape[1]
            assert draft.passes + draft.accepted == new
            passes[size] += draft.passes
            tokens += new
    passes[0] = tokens
    assert (got.tokens, got.passes) == (tokens, passes)
    assert got.tokens_per_pass[30] > got.tokens_per_pass[1] > 1.2  # otherwise this test saw nothing


def test_replay_is_the_run_with_trees_of_any_form(target):
    """Duplicates among children, ties, limits near the end, and an end of text inside an accepted path."""
    for prompt in PROMPTS:
        answer = target.generate(prompt, max_new_tokens=30, do_sample=False)[0].tolist()
        for end in (None, answer[prompt.shape[1] + 17]):
            options = {"eos_token_id": end}
            got = acceptance_by_size(target, Seeded(answer), [prompt], 30, [*SIZES, MAX_NODES], **options)
            for size, passes in got.passes.items():
                draft = Seeded(answer, size)
                new = run(target, prompt, draft, **options).shape[1] - prompt.shape[1]
                assert (got.tokens, passes) == (new, draft.passes), (size, end)
                assert passes + draft.accepted == new
            assert got.passes[MAX_NODES] < 0.8 * got.passes[0]


def test_replay_is_the_run_with_a_draft_that_copies():
    """Of chains the first nodes are the likeliest."""
    torch.manual_seed(0)
    model = llama().double()
    prompt = PROMPTS[0].repeat(1, 4)
    got = acceptance_by_size(model, PromptLookupDraft(length=8), [prompt], 60, [1, 3, 8])
    for size, passes in got.passes.items():
        draft = PromptLookupDraft(length=size)
        run(model, prompt, draft, 60)
        assert draft.passes == passes
    assert got.passes[8] < got.passes[1]


@pytest.mark.parametrize("new", [1, 2, 3])
def test_few_tokens(new):
    model = llama()
    got = acceptance_by_size(model, PromptLookupDraft(), PROMPTS, new, [0, 5])
    assert got.tokens == got.passes[0] == new * len(PROMPTS)


def test_replay_by_hand():
    trees = {
        2: DraftTree((7, 8, 9), (ROOT, 0, 1), (-1.0, -3.0, -4.0)),
        3: DraftTree((5, 8), (ROOT, ROOT), (-2.0, -3.0)),
    }
    text = [0, 0, 7, 8, 9, 1]
    # 7, 8, 9 and 1 at once; 7, 8 and 9, then 1; 7 and 8, then 9 without a tree, then 1.
    assert [replay(text, 2, trees, size) for size in (3, 2, 1, 0)] == [1, 2, 3, 4]
    # With one node fewer at place 2 the pass after it begins at place 3: 8 is there only as the second likeliest.
    trees[2] = DraftTree((6,), (ROOT,), (-1.0,))
    assert [replay(text, 2, trees, size) for size in (2, 1)] == [3, 4]


def test_sampling_in_distribution():
    """Passes of replay and of runs, a two-sample chi-square at 1e-4."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=1.0, eos_token_id=None, pad_token_id=None, bos_token_id=None,
    )).eval()  # fmt: skip

    class Fixed(Draft):
        def __init__(self, size):
            self.size = size

        def propose(self, token_ids, limit):
            return DraftTree.from_chains([[0, 1, 2], [3, 0], [1, 1]], self.size)

    prompt, size = torch.tensor([[2, 4, 1]]), 4
    options = {"do_sample": True, "temperature": 4.0, "top_k": 0}
    replayed, ran = Counter(), Counter()
    for seed in range(150):
        torch.manual_seed(seed)
        replayed[acceptance_by_size(model, Fixed(7), [prompt], 6, [size], **options).passes[size]] += 1
        draft = Fixed(size)
        torch.manual_seed(10_000 + seed)
        run(model, prompt, draft, 6, **options)
        ran[draft.passes] += 1
    kinds = [number for number in replayed | ran if replayed[number] + ran[number] >= 10]
    value = sum((replayed[number] - ran[number]) ** 2 / (replayed[number] + ran[number]) for number in kinds)
    degrees = len(kinds) - 1
    assert degrees >= 2
    # Upper 1e-4 quantile, by Wilson and Hilferty (1931).
    assert value < degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3


# --- The likeliest nodes ---------------------------------------------------------------------------------------------


def test_the_likeliest_nodes_are_the_smaller_tree():
    """`grow_tree` with fewer nodes, for every size; one draft has many ties."""
    for seed in range(4):
        logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
        logprobs = (logits if seed % 2 else logits.round()).log_softmax(-1)
        trees = [
            grow_tree(lambda nodes: logprobs[[token for _, token in nodes]], logprobs[0], depth=4, topk=4, size=size)  # noqa: B023
            for size in range(1, 41)
        ]
        for size, tree in enumerate(trees, 1):
            found = trees[-1].likeliest(size)
            assert (found, found.worths) == (tree, tree.worths)
            assert all(tree.worths[i] <= tree.worths[p] for i, p in enumerate(tree.parents) if p != ROOT)


def test_worths_that_are_none_are_refused():
    with pytest.raises(ValueError, match="one worth a token"):
        DraftTree((1, 2), (ROOT, 0), (-1.0,))
    with pytest.raises(ValueError, match="node 1 is worth -0.5 and its parent -1.0"):
        DraftTree((1, 2), (ROOT, 0), (-1.0, -0.5))
    unranked = DraftTree((1, 2), (ROOT, 0))
    assert unranked.likeliest(2) == unranked
    assert unranked.likeliest(0) == DraftTree((), ())
    with pytest.raises(ValueError, match="2 nodes without worths was given: which 1 are"):
        unranked.likeliest(1)


# --- Seconds ---------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when it is told to."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tree_size, "time", clock)
    return clock


def test_costs_are_medians_of_rounds_that_take_turns(clock):
    calls = []

    def verify(size):
        calls.append(size)
        # Call by call the machine slows down; one call in ten is far off.
        clock.now += (10 + size) * (1 + 0.001 * len(calls)) * (50 if len(calls) % 10 == 0 else 1)

    sizes, repeats = [0, 4, 9], 9
    got = verify_costs(verify, sizes, repeats)
    assert calls[:3] == sizes  # warm-up
    rounds = [calls[3 * n : 3 * n + 3] for n in range(1, repeats + 1)]
    assert all(sorted(one) == sizes for one in rounds)
    assert Counter(one[0] for one in rounds) == dict.fromkeys(sizes, repeats // 3)
    for size in sizes:
        assert abs(got[size] / (10 + size) - 1) < 0.03


def test_a_pass_has_all_rows_and_leaves_the_cache_as_it_was(target):
    seen = []
    hook = target.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (kwargs["input_ids"].shape[1], kwargs["past_key_values"].get_seq_length())
        ),
        with_kwargs=True,
    )
    verify = verify_pass(target, 50)
    assert seen == [(50, 0)]
    seen.clear()
    sizes = [0, 1, 5, 64, 2]
    for size in sizes:
        verify(size)
    hook.remove()
    assert seen == [(size + 1, 50) for size in sizes]
    small = verify_pass(target, 50, DraftTree((3, 4), (ROOT, 0)))
    with pytest.raises(ValueError, match="over 3 nodes was asked for and the tree has 2"):
        small(3)


def test_real_seconds_are_above_none():
    model = llama()
    assert min(verify_costs(verify_pass(model, 20), [0, 8], 3).values()) > 0
    assert draft_cost(model, PromptLookupDraft(), PROMPTS[0], 8) > 0


def test_the_draft_costs_its_tree_and_its_reading(clock):
    class Slow(Draft):
        """3 seconds a tree, 2 a token that is read; a prompt of 40 tokens must not be charged."""

        def propose(self, token_ids, limit):
            clock.now += 3
            return DraftTree((), ())

        def observe(self, token_ids, hidden_states):
            clock.now += 2 * len(token_ids)

    assert draft_cost(llama(), Slow(), PROMPTS[1], 8) == 5


# --- The choice ------------------------------------------------------------------------------------------------------


def test_the_choice_is_that_of_brute_force():
    """Costs that rise and fall as they like."""
    draw = random.Random(0)
    drafted = 0
    for _ in range(300):
        sizes = draw.sample(range(1, 65), 6)
        tokens = {size: 1 + draw.random() * min(size, 3) for size in sizes}
        seconds = {0: draw.uniform(0.2, 0.6), **{size: draw.uniform(0.5, 2) for size in sizes}}
        draft = draw.choice([0.0, 0.3, 1.0])
        best, rate = 0, 1 / seconds[0]
        for size in sorted(sizes):
            if tokens[size] / (seconds[size] + draft) > rate:
                best, rate = size, tokens[size] / (seconds[size] + draft)
        got = choose_tree_size(tokens, seconds, draft)
        assert got.size == best
        assert got.speed_up == pytest.approx(rate * seconds[0], abs=1e-12)
        drafted += best > 0
    assert 30 < drafted < 270


def test_ties_go_to_the_smaller_tree_and_no_gain_to_no_draft():
    assert choose_tree_size({8: 2.0, 4: 2.0}, {0: 1.0, 4: 1.0, 8: 1.0}, 0.5).size == 4
    same = choose_tree_size({4: 1.5}, {0: 1.0, 4: 1.0}, 0.5)
    assert (same.size, same.speed_up) == (0, 1.0)
    assert str(same).endswith("best: no draft; every tree that was weighed makes decoding slower, or no faster")


def test_the_table():
    got = str(choose_tree_size({0: 1.0, 4: 1.8, 12: 2.4}, {0: 0.010, 4: 0.011, 12: 0.020}, 0.001)).splitlines()
    assert [line.split() for line in got[1:4]] == [
        ["0", "1.00", "10.00", "0.00", "100.0", "1.00x"],
        ["4", "1.80", "11.00", "1.00", "150.0", "1.50x", "<-"],
        ["12", "2.40", "20.00", "1.00", "114.3", "1.14x"],
    ]
    assert got[4] == "best: 4 nodes, 1.50 times as fast as without a draft"


@pytest.mark.parametrize(
    "tokens, seconds, draft, words",
    [
        ({4: 2.0}, {4: 1.0}, 0.1, "lacks the sizes 0;"),
        ({4: 2.0, 8: 2.0}, {0: 1.0, 4: 1.0}, 0.1, "lacks the sizes 8;"),
        ({4: 5.5}, {0: 1.0, 4: 1.0}, 0.1, "5.5 tokens a pass with 4 nodes: a pass gives 1 to 5"),
        ({4: 0.5}, {0: 1.0, 4: 1.0}, 0.1, "0.5 tokens a pass"),
        ({4: 2.0}, {0: 1.0, 4: 0.0}, 0.1, "a pass over 4 nodes took 0.0 seconds"),
        ({4: 2.0}, {0: math.nan, 4: 1.0}, 0.1, "a pass over 0 nodes took nan seconds"),
        ({4: 2.0}, {0: 1.0, 4: 1.0}, -1, "draft_seconds=-1"),
    ],
)
def test_figures_that_cannot_be(tokens, seconds, draft, words):
    with pytest.raises(ValueError, match=words):
        choose_tree_size(tokens, seconds, draft)


def test_refusals():
    model = llama()
    with pytest.raises(ValueError, match="no token was decoded"):
        acceptance_by_size(model, PromptLookupDraft(), [], 4, [1])
    for sizes in ([], [-1], [65]):
        with pytest.raises(ValueError, match="from 0 to 64"):
            acceptance_by_size(model, PromptLookupDraft(), PROMPTS, 4, sizes)
        with pytest.raises(ValueError, match="from 0 to 64"):
            verify_costs(lambda size: None, sizes)
    with pytest.raises(ValueError, match="repeats=0"):
        verify_costs(lambda size: None, [1], 0)
    with pytest.raises(ValueError, match="context=0"):
        verify_pass(model, 0)
    with pytest.raises(ValueError, match="never asked within max_new_tokens=1"):
        draft_cost(model, PromptLookupDraft(), PROMPTS[0], 1)
