"""Speculation changes nothing but the number of passes: greedy token for token, sampling in distribution."""

import math
from collections import Counter

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from transformers_minicpm4 import MiniCPM4ForCausalLM
from transformers_minicpm4.generation.draft_tree import MAX_NODES, ROOT, DraftTree, grow_tree
from transformers_minicpm4.generation.drafts import Draft, ModelDraft, PromptLookupDraft
from transformers_minicpm4.generation.speculative import speculative_decode


VOCABULARY = 128
PROMPTS = [
    torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(length)) for length in (2, 9, 40, 75)
]


class RandomTrees(Draft):
    """Nonsense of any shape, with duplicates among the children."""

    def __init__(self, seed=0, nodes=14, vocabulary=VOCABULARY):
        self.random = torch.Generator().manual_seed(seed)
        self.nodes, self.vocabulary = nodes, vocabulary

    def draw(self, high):
        return int(torch.randint(high, (1,), generator=self.random))

    def propose(self, token_ids, limit):
        tokens, parents, depths = [], [], []
        for node in range(self.draw(self.nodes + 1)):
            parent = self.draw(node + 1) - 1
            depth = 1 if parent == ROOT else depths[parent] + 1
            if depth <= limit:
                tokens.append(self.draw(self.vocabulary))
                parents.append(parent if depth > 1 else ROOT)
                depths.append(depth)
            else:
                tokens.append(0)
                parents.append(ROOT)
                depths.append(1)
        return DraftTree(tuple(tokens), tuple(parents))


class Knowing(Draft):
    """Drafts the known answer among wrong siblings, or with a mistake at a chosen depth."""

    def __init__(self, answer, wrong_at=None):
        self.answer, self.wrong_at = answer, wrong_at

    def propose(self, token_ids, limit):
        good = self.answer[len(token_ids) : len(token_ids) + min(5, limit)]
        bad = [[*good[:place], (token + 1) % VOCABULARY, 7][: min(5, limit)] for place, token in enumerate(good)]
        if self.wrong_at is not None:
            good = good[: self.wrong_at] + [(token + 1) % VOCABULARY for token in good[self.wrong_at :]]
        return DraftTree.from_chains([*bad[:2], good, *bad[2:]], 30)


def build(kind, make_config, sparse_config):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, eos_token_id=127, pad_token_id=0,
        )).eval()  # fmt: skip
    if kind == "eager":
        return MiniCPM4ForCausalLM._from_config(make_config(), attn_implementation="eager").eval()
    changes = {"sparse": {}, "nope": {"use_nope": True}, "switch": {"dense_len": 50}}.get(kind)
    if changes is None:
        return MiniCPM4ForCausalLM._from_config(make_config(), attn_implementation="sdpa").eval()
    config = make_config(sparse_config={**sparse_config.to_dict(), **changes})
    return MiniCPM4ForCausalLM._from_config(config, attn_implementation="infllm_v2").eval()


KINDS = ["llama", "dense", "eager", "sparse", "nope", "switch"]


def run(model, prompt, draft, **options):
    return model.generate(prompt, custom_generate=speculative_decode, draft=draft, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_is_plain_greedy_output(kind, tiny_config, sparse_config):
    """Any draft, dense and sparse attention; where two tokens are as good as equal it would be listed."""
    model = build(kind, tiny_config, sparse_config)
    small = build("llama", tiny_config, sparse_config)
    ties = []
    for prompt in PROMPTS[::3] if kind in ("nope", "switch") else PROMPTS[1:]:
        options = {"max_new_tokens": 25, "do_sample": False}
        plain = model.generate(prompt, **options)
        answer = plain[0].tolist()
        drafts = {
            "random": RandomTrees(),
            "perfect": Knowing(answer),
            "perfect, then wrong": Knowing(answer, wrong_at=2),
            "lookup": PromptLookupDraft(branches=3),
            "model chain": ModelDraft(small),
            "model tree": ModelDraft(small, depth=4, topk=3, size=20),
            "nothing": Nothing(),
        }
        for name, draft in drafts.items():
            got = run(model, prompt, draft, **options)[0].tolist()
            if got != answer:
                ties.append((name, first_gap(model, answer, got)))
            assert draft.passes + draft.accepted == len(got) - prompt.shape[1]
        if len(answer) == prompt.shape[1] + 25:
            assert drafts["perfect"].passes <= 25 / 5 + 1
    assert all(gap < 1e-4 for _, gap in ties), ties
    assert len(ties) <= 1, ties


class Nothing(Draft):
    def propose(self, token_ids, limit):
        return DraftTree((), ())


def first_gap(model, one, other):
    """Difference of the two best logits where the answers part."""
    place = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    with torch.no_grad():
        best = model(torch.tensor([one[:place]])).logits[0, -1].topk(2).values
    return (best[0] - best[1]).item()


@pytest.mark.parametrize("kind", ["dense", "sparse", "nope"])
def test_the_pass_over_a_tree_is_a_pass_over_each_path(kind, tiny_config, sparse_config):
    """Logits of every node, and the cache after keeping a path, in float64."""
    from transformers_minicpm4.generation.speculative import _Target

    model = build(kind, tiny_config, sparse_config).double()
    prompt = PROMPTS[3]
    tree = DraftTree((5, 6, 7, 8, 9, 10, 11), (ROOT, ROOT, 0, 0, 1, 3, 5))
    cache = DynamicCache(config=model.config)
    target = _Target(model, cache, ())
    target.prefill(prompt[0].tolist(), None, Nothing())
    with torch.no_grad():
        logits = target.verify(int(prompt[0, -1]), tree)
        for node in range(len(tree)):
            path = [tree.tokens[row - 1] for row in tree.path(node)[1:]]
            alone = model(torch.cat([prompt, torch.tensor([path])], 1)).logits[0, -1]
            assert torch.allclose(logits[node + 1], alone, atol=1e-12, rtol=0)
        target.keep(tree.path(5))
        text = torch.cat([prompt, torch.tensor([[5, 8, 10]])], 1)
        assert cache.get_seq_length() == text.shape[1]
        more = torch.tensor([[20, 21]])
        after = model(more, past_key_values=cache, use_cache=True).logits
        alone = model(torch.cat([text, more], 1)).logits[:, -2:]
        assert torch.allclose(after, alone, atol=1e-12, rtol=0)


# --- Sampling --------------------------------------------------------------------------------------------------------


class Fixed(Draft):
    """Always the same tree over a vocabulary of five."""

    def propose(self, token_ids, limit):
        return DraftTree.from_chains([[0, 1, 2], [0, 2], [3, 0], [1, 1, 1]])


def small_vocabulary():
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=1.0, eos_token_id=None, pad_token_id=None, bos_token_id=None,
    )).eval()  # fmt: skip


def exact(model, prompt, temperature):
    """Probability of each next three tokens."""
    texts = torch.cartesian_prod(*[torch.arange(5)] * 3)
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(125, -1), texts], 1)).logits[:, prompt.shape[1] - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1).gather(-1, texts[..., None])[..., 0].sum(1)
    return {tuple(text): math.exp(value) for text, value in zip(texts.tolist(), logprobs.tolist(), strict=True)}


def chi_square(model, decode, draws, temperature):
    prompt = torch.tensor([[2, 4, 1]])
    torch.manual_seed(5)
    counts = Counter()
    for _ in range(draws):
        output = model.generate(
            prompt, custom_generate=decode, draft=Fixed(), max_new_tokens=4, do_sample=True, temperature=temperature,
            top_k=0,
        )  # fmt: skip
        counts[tuple(output[0, 3:6].tolist())] += 1
    expected = {text: probability * draws for text, probability in exact(model, prompt, temperature).items()}
    rare = [text for text, number in expected.items() if number < 5]
    value = sum((counts[text] - number) ** 2 / number for text, number in expected.items() if number >= 5)
    rest = sum(expected[text] for text in rare)
    if rest:
        value += (sum(counts[text] for text in rare) - rest) ** 2 / rest
    degrees = len(expected) - len(rare) + bool(rare) - 1
    # Upper 1e-4 quantile, by Wilson and Hilferty (1931).
    limit = degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3
    return value, limit


def test_sampled_tokens_follow_the_target():
    value, limit = chi_square(small_vocabulary(), speculative_decode, 1500, 0.9)
    assert value < limit


def test_a_biased_acceptance_rule_is_noticed(monkeypatch):
    """Planted: the likeliest token is taken whenever it has more than 0.6 of the probability."""
    from transformers_minicpm4.generation import speculative

    honest = torch.multinomial

    def biased(probabilities, number, generator=None):
        token = honest(probabilities, number, generator=generator)
        return probabilities.argmax(-1, keepdim=True) if probabilities.max() > 0.6 else token

    monkeypatch.setattr(speculative.torch, "multinomial", biased)
    value, limit = chi_square(small_vocabulary(), speculative_decode, 1500, 0.9)
    assert value > limit


# --- What generate promises ------------------------------------------------------------------------------------------


def test_stopping_processors_streaming_and_the_returned_cache(tiny_config, sparse_config):
    model = build("dense", tiny_config, sparse_config)
    prompt = PROMPTS[2]
    options = {"max_new_tokens": 40, "do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    plain = model.generate(prompt, **options)[0].tolist()
    draft = Knowing(plain)
    assert run(model, prompt, draft, **options)[0].tolist() == plain
    assert draft.accepted > 10

    # An end of text inside an accepted path: nothing after it.
    end = plain[prompt.shape[1] + 7]
    stopped = model.generate(prompt, **options, eos_token_id=end)[0].tolist()

    class Collect:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Collect()
    output = run(
        model,
        prompt,
        Knowing(plain),
        **options,
        eos_token_id=end,
        text_streamer=streamer,
        return_dict_in_generate=True,
    )
    assert output.sequences[0].tolist() == stopped
    assert streamer.seen == stopped, "the prompt comes first, as generate gives it"
    assert streamer.ended
    # The cache goes on where it stopped.
    cache = output.past_key_values
    assert cache.get_seq_length() == len(stopped) - 1
    longer = torch.cat([output.sequences, PROMPTS[1]], 1)
    assert (
        run(model, longer, PromptLookupDraft(), max_new_tokens=10, do_sample=False, past_key_values=cache).tolist()
        == model.generate(longer, max_new_tokens=10, do_sample=False).tolist()
    )


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_prefill_in_chunks(kind, tiny_config, sparse_config):
    model = build(kind, tiny_config, sparse_config)
    options = {"max_new_tokens": 12, "do_sample": False}
    whole = run(model, PROMPTS[3], PromptLookupDraft(), **options)
    assert torch.equal(run(model, PROMPTS[3], PromptLookupDraft(), **options, prefill_chunk_size=16), whole)


def test_length_limits_are_exact(tiny_config, sparse_config):
    model = build("llama", tiny_config, sparse_config)
    for new in (1, 2, 3, 7):
        assert run(model, PROMPTS[1], RandomTrees(), max_new_tokens=new, do_sample=False).shape[1] == 9 + new


def test_refusals(tiny_config, sparse_config):
    model = build("llama", tiny_config, sparse_config)
    with pytest.raises(ValueError, match="takes one sequence, got 2"):
        run(model, PROMPTS[1].expand(2, -1), RandomTrees(), max_new_tokens=3)
    with pytest.raises(ValueError, match="needs a draft"):
        model.generate(PROMPTS[1], custom_generate=speculative_decode, max_new_tokens=3)
    with pytest.raises(ValueError, match="attention_mask has zeros"):
        run(model, PROMPTS[1], RandomTrees(), attention_mask=torch.tensor([[0] + [1] * 8]), max_new_tokens=3)
    sliding = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=0, eos_token_id=None,
    ))  # fmt: skip
    with pytest.raises(ValueError, match="cannot; use a DynamicCache"):
        run(sliding, PROMPTS[1], RandomTrees(), max_new_tokens=3)
    other = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2))  # fmt: skip
    with pytest.raises(ValueError, match="vocabulary of 64 tokens and the target one of 128"):
        run(model, PROMPTS[1], ModelDraft(other), max_new_tokens=3)
    with pytest.raises(ValueError, match="needs a dense draft"):
        ModelDraft(build("sparse", tiny_config, sparse_config))
    with pytest.raises(ValueError, match="at most 64"):
        ModelDraft(other, depth=10, topk=10)
    with pytest.raises(ValueError, match="at most 64"):
        PromptLookupDraft(length=33, branches=2)


# --- Trees -----------------------------------------------------------------------------------------------------------


def test_trees_that_are_none_are_refused():
    with pytest.raises(ValueError, match="at most 64 are allowed"):
        DraftTree((1,) * 65, tuple(range(-1, 64)))
    with pytest.raises(ValueError, match="node 0 has parent 0"):
        DraftTree((1,), (0,))
    with pytest.raises(ValueError, match="one parent a token"):
        DraftTree((1,), ())


def test_chains_share_their_beginnings_and_stop_at_the_size():
    tree = DraftTree.from_chains([[1, 2, 3], [1, 2, 4], [5]])
    assert tree == DraftTree((1, 2, 3, 4, 5), (ROOT, 0, 1, 1, ROOT))
    assert tree.paths() == [[0, 1, 2, 3], [0, 1, 2, 4], [0, 5]]
    assert tree.depths() == [0, 1, 2, 3, 3, 1]
    assert len(DraftTree.from_chains([[n, n] for n in range(60)])) == MAX_NODES


def test_the_dynamic_tree_keeps_the_likeliest_nodes():
    """Against all paths of a context-free draft, by brute force."""
    logprobs = torch.randn(6, 6, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    first = torch.randn(6, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    tree = grow_tree(lambda nodes: logprobs[[token for _, token in nodes]], first, depth=3, topk=6, size=20)
    worths = {}
    for text in [t for n in (1, 2, 3) for t in torch.cartesian_prod(*[torch.arange(6)] * n).reshape(-1, n).tolist()]:
        worths[tuple(text)] = first[text[0]] + sum(logprobs[a, b] for a, b in zip(text, text[1:], strict=False))
    got = {tuple(tree.tokens[row - 1] for row in tree.path(node)[1:]) for node in range(len(tree))}
    # Each level expands its six likeliest nodes, which holds all of the twenty likeliest paths here.
    assert got == set(sorted(worths, key=lambda text: -worths[text])[:20])
