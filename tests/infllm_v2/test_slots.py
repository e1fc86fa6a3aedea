"""Steps over a cache of fixed size say what the model says without a cache: float64, every form of attention."""

import pytest
import torch

from transformers_minicpm4 import MiniCPM4ForCausalLM
from transformers_minicpm4.edge.runner import SlotRunner
from transformers_minicpm4.generation.draft_tree import ROOT, DraftTree
from transformers_minicpm4.infllm_v2 import slots


KINDS = {"dense": None, "sparse": {}, "nope": {"use_nope": True}, "switch": {"dense_len": 70}}
TREE = DraftTree((5, 6, 7, 8, 9, 10, 11), (ROOT, ROOT, 0, 0, 1, 3, 5))
LENGTHS = (130, 47, 90)


def make(kind, make_config, sparse_config):
    changes = KINDS[kind]
    if changes is None:
        return MiniCPM4ForCausalLM._from_config(make_config(), attn_implementation="sdpa").eval().double()
    config = make_config(sparse_config={**sparse_config.to_dict(), **changes})
    return MiniCPM4ForCausalLM._from_config(config, attn_implementation="infllm_v2").eval().double()


def texts(lengths, more=60):
    return [torch.randint(3, 120, (n + more,), generator=torch.Generator().manual_seed(n)) for n in lengths]


@pytest.fixture(params=["gathered", "masked"])
def form(request, monkeypatch):
    """Makes the asked form of sparse attention the one that pays."""
    monkeypatch.setattr(slots, "GATHER_GAIN", 0 if request.param == "gathered" else 1000)
    return request.param


def forms_of(runner):
    """Records the form of attention of each step."""
    seen, choose = [], runner._form

    def recording(*arguments):
        seen.append(choose(*arguments))
        return seen[-1]

    runner._form = recording
    return seen


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_model_without_a_cache(kind, rows, form, tiny_config, sparse_config):
    """Rows of different length side by side; with `switch`, one of them crosses `dense_len` on the way."""
    model = make(kind, tiny_config, sparse_config)
    runner = SlotRunner(model, 256, batch=rows)
    seen = forms_of(runner)
    rows = texts(LENGTHS[:rows])
    with torch.no_grad():
        want = [model(text[None]).logits[0] for text in rows]
    for row, (text, length) in enumerate(zip(rows, LENGTHS, strict=False)):
        runner.prefill(text[:length].tolist(), 23, row=row)
    for step in range(40):
        got = runner.decode(torch.stack([text[n + step] for text, n in zip(rows, LENGTHS, strict=False)]))
        for row, logits in enumerate(want):
            assert torch.allclose(got[row], logits[LENGTHS[row] + step], atol=1e-12, rtol=0)
    if kind == "dense":
        assert set(seen) == {"dense"}
    elif kind == "switch" and len(rows) > 1:
        assert set(seen) == {"masked", form}
    else:
        assert set(seen) == {form}


@pytest.mark.parametrize("kind", KINDS)
def test_trees_are_verified_and_their_paths_kept(kind, form, tiny_config, sparse_config):
    """Every node against its own path, from lengths that end windows and blocks at every place of the tree."""
    model = make(kind, tiny_config, sparse_config)
    runner = SlotRunner(model, 256, tree=len(TREE))
    text = texts((110,), 0)[0]
    runner.prefill(text.tolist(), 40)
    for root in range(20, 29):
        logits = runner.verify(root, TREE)
        text = torch.cat([text, torch.tensor([root])])
        for node in range(ROOT, len(TREE)):
            path = torch.tensor([TREE.tokens[row - 1] for row in TREE.path(node)[1:]], dtype=torch.long)
            with torch.no_grad():
                alone = model(torch.cat([text, path])[None]).logits[0, -1]
            assert torch.allclose(logits[node + 1], alone, atol=1e-12, rtol=0)
        rows = TREE.path((5, 4, 1, 6)[root % 4])
        runner.keep(rows)
        text = torch.cat([text, torch.tensor([TREE.tokens[row - 1] for row in rows[1:]])])
    assert runner.lengths == [len(text)]


@pytest.mark.parametrize("kind", ["sparse", "nope"])
def test_compressed_keys_are_a_function_of_the_keys(kind, tiny_config, sparse_config):
    """Prefill in chunks, steps and kept paths leave what one prefill leaves."""
    model = make(kind, tiny_config, sparse_config)
    mixed, whole = (SlotRunner(model, 192, tree=len(TREE)) for _ in range(2))
    text = texts((70,), 30)[0].tolist()
    mixed.prefill(text[:70], 9)
    for token in text[70:]:
        mixed.decode(torch.tensor([token]))
    for root in (3, 4, 5):
        mixed.verify(root, TREE)
        mixed.keep(TREE.path(5))
        text += [root, 5, 8, 10]
    whole.prefill(text, 1000)
    for one, other in zip(mixed.cache.layers, whole.cache.layers, strict=True):
        length = len(text)
        for name in ("keys", "values", "selection_keys"):
            if getattr(one, name) is not None:
                got, want = (getattr(layer, name)[:, :, :length] for layer in (one, other))
                assert torch.allclose(got, want, atol=1e-12, rtol=0)
        for name, coarse in (("fine", False), ("coarse", True)):
            size, stride = sparse_config.windows(coarse)
            count = (length - size) // stride + 1
            got, want = (getattr(layer, name)[:, :, :count] for layer in (one, other))
            assert count > 3
            assert torch.allclose(got, want, atol=1e-12, rtol=0)


def test_compiled_steps_are_the_same_and_no_length_is_frozen_in(tiny_config, sparse_config):
    """600 tokens, one program a form: token for token what eager steps give. Dense to sparse on the way."""
    changes = {"dense_len": 200, "topk": 4}
    config = tiny_config(sparse_config={**sparse_config.to_dict(), **changes}, max_position_embeddings=1024)
    model = MiniCPM4ForCausalLM._from_config(config, attn_implementation="infllm_v2").eval()
    answers, programs = {}, []
    for compile in (False, True):
        runner = SlotRunner(model, 704, compile=compile)
        seen = forms_of(runner)
        runner.prefill(texts((60,), 0)[0].tolist(), 64)
        token, answer = torch.tensor([7]), []
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for _ in range(600):
            token = runner.decode(token).argmax(-1)
            answer.append(int(token))
        programs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        answers[compile] = answer
        assert {"dense", "gathered"} <= set(seen)
        assert runner.compile == compile
    assert answers[True] == answers[False]
    assert len(set(answers[True])) > 20
    assert 0 < programs[1] <= 2 * len(set(seen)), programs


def test_compiled_programs_belong_to_their_model(tiny_config):
    """Dynamo would give the second model the first one's: other weights, and a constant that is in the program."""
    for seed, scale in ((0, 1.4), (1, 1.4), (1, 2.5)):
        torch.manual_seed(seed)
        model = MiniCPM4ForCausalLM(tiny_config(scale_depth=scale, num_hidden_layers=1)).eval()
        logits = []
        for compile in (True, False):
            runner = SlotRunner(model, 64, compile=compile)
            runner.prefill(list(range(3, 20)), 64)
            logits.append(runner.decode(torch.tensor([7])))
            assert runner.compile == compile
        assert torch.allclose(*logits, atol=1e-4, rtol=0)


def test_refusals(tiny_config, sparse_config):
    model = make("dense", tiny_config, sparse_config)
    runner = SlotRunner(model, 64)
    runner.prefill(list(range(3, 67)), 64)
    with pytest.raises(ValueError, match="65 slots are needed for 1 more tokens, and there are 64"):
        runner.decode(torch.tensor([3]))
    config = tiny_config(sparse_config={**sparse_config.to_dict(), "dense_switch": "call"})
    other = MiniCPM4ForCausalLM._from_config(config, attn_implementation="infllm_v2")
    with pytest.raises(ValueError, match="dense_switch='call'"):
        SlotRunner(other, 64)
    model.set_attn_implementation("slots")
    with pytest.raises(ValueError, match="does not hand keyword arguments"):
        model(torch.tensor([[1, 2]]))
