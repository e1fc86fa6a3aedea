"""The trainer teaches, on text it has not seen, and its passes over the head's own states are what drafting does."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from transformers_minicpm4 import llama_to_minicpm4
from transformers_minicpm4.generation import eagle_training
from transformers_minicpm4.generation.draft_tree import DraftTree
from transformers_minicpm4.generation.eagle import EagleDraft
from transformers_minicpm4.generation.eagle_training import eagle_loss, hidden_states, new_head, train_eagle
from transformers_minicpm4.generation.speculative import speculative_decode


@pytest.fixture(scope="module")
def target():
    """Peaked distributions that hang on the last tokens: something to learn in seconds."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, initializer_range=0.1, eos_token_id=None, pad_token_id=None, bos_token_id=None,
        tie_word_embeddings=False,
    )).eval()  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        model.lm_head.weight.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def texts(target):
    """Drawn from the target itself."""
    torch.manual_seed(1)
    return target.generate(torch.randint(96, (48, 1)), max_new_tokens=63, do_sample=True, top_k=0, temperature=0.7)


def held_out_loss(head, target, texts):
    score = eagle_training._output_head(target, None)
    with torch.no_grad():
        return [loss.item() for loss in eagle_loss(head, target, score, texts, hidden_states(target, texts), 2, 0.1)]


def accepted_per_pass(head, target, prompts):
    accepted = passes = 0
    for prompt in prompts:
        draft = EagleDraft(head, depth=3, topk=1)
        options = {"max_new_tokens": 30, "do_sample": False}
        output = target.generate(prompt[None], custom_generate=speculative_decode, draft=draft, **options)
        assert torch.equal(output, target.generate(prompt[None], **options))
        accepted, passes = accepted + draft.accepted, passes + draft.passes
    return accepted / passes


def test_training_lowers_the_loss_and_raises_acceptance_on_unseen_text(target, texts):
    train, held = texts[:40], texts[40:]
    head = new_head(target)
    before, random = held_out_loss(head, target, held), accepted_per_pass(head, target, held[:3, :16])
    trained = train_eagle(target, train, 80, length=64, learning_rate=1e-2, progress=False)
    after = held_out_loss(trained, target, held)
    assert all(new < 0.5 * old for old, new in zip(before, after, strict=True))
    accepted = accepted_per_pass(trained, target, held[:3, :16])
    assert accepted > random + 1
    assert not trained.training
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    assert all(parameter.grad is None for parameter in target.parameters())


@pytest.mark.parametrize("own_steps", [0, 3])
def test_the_passes_of_training_are_levels_of_a_draft(own_steps, tiny_model, monkeypatch):
    """Pass j's row p is what a chain drafted j deep says, from the text that ends j tokens before."""
    model = tiny_model()  # float64, all of MiniCPM4's constants
    torch.manual_seed(2)
    head = new_head(model, seed=5, initialise=False).double()
    ids = torch.randint(3, 60, (2, 12))
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        plain, seen = eagle_training._output_head(model, None), []

        def score(state):
            seen.append(plain(state))
            return seen[-1]

        eagle_loss(head, model, score, ids, hidden, own_steps, 0.1)
    draft = EagleDraft(head, window=None)
    for row in range(2):
        for end in (own_steps + 2, 9, 12):  # the pass's row is the pair of tokens end - 2 and end - 1
            text, drafted = ids[row, : end - own_steps].tolist(), ids[row, end - own_steps : end].tolist()
            found = []

            def chain(expand, first, depth, topk, size, drafted=drafted, found=found):
                found.append(first)
                for token in drafted:
                    found.append(expand([(0, token)])[0])
                return DraftTree(tuple(drafted), tuple(range(-1, len(drafted) - 1)))

            monkeypatch.setattr("transformers_minicpm4.generation.eagle.grow_tree", chain)
            draft.begin(model)
            draft.observe(text[:-1], [hidden[row, : len(text) - 1]])
            draft.propose(text, 9)
            for step, logprobs in enumerate(found):
                pair = len(text) - 2 + step
                got = seen[1 + step][row, pair - step].log_softmax(-1)
                assert torch.allclose(got, logprobs, atol=1e-12, rtol=0), (end, step)


def test_stopped_by_hand_it_returns_what_it_has(target, texts, monkeypatch):
    whole = train_eagle(target, texts, 6, length=64, warmup=1e-9, progress=False)
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return eagle_loss(*arguments)

    monkeypatch.setattr(eagle_training, "eagle_loss", interrupted)
    head = train_eagle(target, texts, 6, length=64, warmup=1e-9, progress=False)
    assert len(calls) == 4
    start = new_head(target)
    changed = [not torch.equal(a, b) for a, b in zip(head.parameters(), start.parameters(), strict=True)]
    assert all(changed)
    assert not all(torch.equal(a, b) for a, b in zip(head.parameters(), whole.parameters(), strict=True))
    prompt = texts[:1, :9]
    output = target.generate(
        prompt, custom_generate=speculative_decode, draft=EagleDraft(head), max_new_tokens=9, do_sample=False
    )
    assert torch.equal(output, target.generate(prompt, max_new_tokens=9, do_sample=False))
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_a_seed_is_a_result_and_the_global_one_is_left_alone(target, texts):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, again, other = (train_eagle(target, texts, 5, length=64, seed=s, progress=False) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_head_is_trained_further_and_few_ids_are_enough(target, texts):
    ids = torch.randperm(96)[:30]
    first = train_eagle(target, texts[:40], 25, length=64, vocabulary_ids=ids, progress=False)
    before = held_out_loss(first, target, texts[40:])
    second = train_eagle(target, texts[:40], 25, head=first, length=64, seed=1, progress=False)
    assert second is first
    assert held_out_loss(second, target, texts[40:])[0] < before[0]


def test_sparse_minicpm4_targets(texts, target, sparse_config):
    sparse = llama_to_minicpm4(target, sparse_config=sparse_config.to_dict())
    head = train_eagle(sparse, texts, 3, length=64, progress=False)
    assert head.residual_scale == pytest.approx((2 / 3) ** 0.5)
    prompt = texts[:1, :50]
    draft = EagleDraft(head, depth=3, topk=4)
    output = sparse.generate(
        prompt, custom_generate=speculative_decode, draft=draft, max_new_tokens=9, do_sample=False
    )
    assert torch.equal(output, sparse.generate(prompt, max_new_tokens=9, do_sample=False))


def test_refusals(target, texts):
    with pytest.raises(ValueError, match="have 64 tokens and one piece needs 128"):
        train_eagle(target, texts[:1], 2)
    with pytest.raises(ValueError, match="length at least own_steps"):
        train_eagle(target, texts, 2, length=3)
    with pytest.raises(ValueError, match="steps, batch_size and reuse are 1 or more"):
        train_eagle(target, texts, 0)
