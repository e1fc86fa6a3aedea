"""Quantized targets and drafts: same tokens, and a tree whose size follows from what was measured."""

import copy

import pytest
import torch

from transformers_minicpm4 import BitCPM4Config, MiniCPM4ForCausalLM
from transformers_minicpm4.edge import tree_tuning
from transformers_minicpm4.edge.engine import EdgeEngine
from transformers_minicpm4.edge.tree_tuning import tune_tree
from transformers_minicpm4.generation.drafts import ModelDraft, PromptLookupDraft
from transformers_minicpm4.generation.eagle import EagleDraft
from transformers_minicpm4.generation.eagle_training import new_head
from transformers_minicpm4.quantization.bitcpm4.qat import prepare_qat
from transformers_minicpm4.quantization.bitcpm4.quantizer import freeze


PROMPTS = [torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (30, 75)]


def ternary(model):
    """The model with ternary linear layers, packed to 2 bits."""
    return freeze(prepare_qat(copy.deepcopy(model), BitCPM4Config(16)))


@pytest.fixture
def model(tiny_config):
    return MiniCPM4ForCausalLM._from_config(tiny_config(), attn_implementation="sdpa").eval()


@pytest.mark.parametrize("target", ["full", "ternary", "ternary, sparse"])
def test_quantized_drafts_and_targets_change_no_token(target, model, tiny_config, sparse_config):
    if target == "ternary, sparse":
        config = tiny_config(sparse_config=sparse_config.to_dict())
        model = MiniCPM4ForCausalLM._from_config(config, attn_implementation="infllm_v2").eval()
    dense = MiniCPM4ForCausalLM._from_config(tiny_config(), attn_implementation="sdpa").eval()
    dense.load_state_dict(model.state_dict())
    if target != "full":
        model = ternary(model)
    drafts = {
        "ternary model": ModelDraft(ternary(dense), depth=3, topk=2, size=6),
        "full model": ModelDraft(dense, depth=4),
        "head": EagleDraft(new_head(model, initialise=False), depth=2, topk=2, size=5),
    }
    plain = EdgeEngine(model, context=160, compile=False)
    accepted = {}
    for name, draft in drafts.items():
        engine = EdgeEngine(model, context=160, draft=draft, compile=False)
        for prompt in PROMPTS:
            options = {"max_new_tokens": 24}
            alone = model.generate(torch.tensor([prompt]), do_sample=False, **options)[0, len(prompt) :].tolist()
            assert plain.generate(prompt, **options).token_ids == alone
            assert engine.generate(prompt, **options).token_ids == alone
            accepted[name] = accepted.get(name, 0) + engine.last.accepted
    # The draft that is the target agrees with it wherever its tree reaches.
    assert accepted["ternary model" if target == "ternary" else "full model"] > 20 or "sparse" in target


def test_the_choice_follows_the_measured_cost(model, monkeypatch):
    """A draft that is the target: the deeper the tree the better, until a pass is made to cost by the node."""
    prompt = PROMPTS[1]
    engine = EdgeEngine(model, context=200, draft=ModelDraft(copy.deepcopy(model), depth=8), compile=False)
    costs = {"flat": lambda size: 1.0, "by the node": lambda size: 1.0 + 2.0 * size}
    monkeypatch.setattr(tree_tuning, "draft_cost", lambda *arguments: 0.0)
    chosen = {}
    for name, cost in costs.items():
        monkeypatch.setattr(
            tree_tuning, "verify_costs", lambda passes, sizes, repeats, cost=cost: {size: cost(size) for size in sizes}
        )
        chosen[name] = tune_tree(engine, [prompt], sizes=(2, 4, 8), max_new_tokens=24)
    assert chosen["flat"].size == 8
    assert chosen["flat"].speed_up > 5
    assert chosen["by the node"].size == 0
    assert "no draft" in str(chosen["by the node"])


def test_the_passes_that_are_timed_are_the_engines(model):
    """Each size in turn, and the cache as long as before."""
    engine = EdgeEngine(model, context=200, draft=PromptLookupDraft(length=8), compile=False)
    verify = tree_tuning._passes(engine, [0, 3], 40)
    for size in (3, 0, 3):
        verify(size)
    choice = tune_tree(engine, PROMPTS, sizes=(2, 8), max_new_tokens=8, context=40, repeats=1)
    assert choice.size in (0, 2, 8)
    with pytest.raises(ValueError, match="engine without a draft"):
        tune_tree(EdgeEngine(model, context=64, compile=False), PROMPTS)
    with pytest.raises(ValueError, match="needs prompts"):
        tune_tree(engine, [])
