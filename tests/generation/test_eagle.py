"""EAGLE heads against a second computation from the formulas, in float64, and in decoding."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from transformers_minicpm4 import MiniCPM4ForCausalLM
from transformers_minicpm4.generation import eagle
from transformers_minicpm4.generation.draft_tree import ROOT, DraftTree
from transformers_minicpm4.generation.eagle import Eagle3Draft, Eagle3Head, EagleConfig, EagleDraft, EagleHead
from transformers_minicpm4.generation.speculative import speculative_decode


VOCABULARY = 128
PROMPT = torch.randint(3, 60, (1, 21), generator=torch.Generator().manual_seed(1))
IDS = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(2))[:40]
KINDS = ["eagle", "bias", "ids", "eagle3"]
MODELS = ["llama", "dense", "sparse"]


def build(model, make_config, sparse_config, **changes):
    torch.manual_seed(0)
    if model == "llama":
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, eos_token_id=127, pad_token_id=0, **changes,
        )).eval()  # fmt: skip
    sparse = {"sparse_config": sparse_config.to_dict()} if model == "sparse" else {}
    config = make_config(num_hidden_layers=6, **sparse, **changes)
    implementation = "infllm_v2" if model == "sparse" else "sdpa"
    return MiniCPM4ForCausalLM._from_config(config, attn_implementation=implementation).eval()


def random_head(kind, target, seed=3):
    """Weights of a size that keeps every term in play, norms around one."""
    random = torch.Generator().manual_seed(seed)
    config = EagleConfig.for_target(target.config, fc_bias=kind == "bias")
    if kind == "eagle3":
        config = EagleConfig.for_target(target.config, draft_vocab_size=len(IDS))
    head = Eagle3Head(config) if kind == "eagle3" else EagleHead(config)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
        if kind == "eagle3":
            head.d2t.copy_(IDS - torch.arange(len(IDS)))
    return head.to(target.dtype)


def random_draft(kind, target, seed=3, **options):
    head = random_head(kind, target, seed)
    if kind == "eagle3":
        return Eagle3Draft(head, (2, 3, 3), **options)
    return EagleDraft(head, vocabulary_ids=IDS if kind == "ids" else None, **options)


def run(model, prompt, draft, **options):
    return model.generate(prompt, custom_generate=speculative_decode, draft=draft, **options)


# --- The formulas, a second time -------------------------------------------------------------------------------------


def norm(x, weight, eps):
    """In float32, as released."""
    single = x.float()
    return weight * (single * torch.rsqrt((single * single).mean() + eps)).double()


def rotate(vector, position, base):
    """One head's vector `[D]`, angles in float32 as released."""
    half = len(vector) // 2
    angles = position * (1.0 / base ** (torch.arange(0, 2 * half, 2).float() / (2 * half)))
    cos, sin = angles.cos().double(), angles.sin().double()
    one, two = vector[:half], vector[half:]
    return torch.cat([one * cos - two * sin, two * cos + one * sin])


class Formula:
    """Row by row, head by head: the text's pairs first, then a chain of drafted tokens."""

    def __init__(self, draft, target, kind, window):
        self.w = {name: tensor.double() for name, tensor in draft.head.state_dict().items()}
        self.target, self.third, self.window = target, kind == "eagle3", window
        config = self.config = target.config
        self.eps, self.base = config.rms_norm_eps, config.rope_parameters["rope_theta"]
        self.muP = target.config.model_type == "minicpm4"
        self.scale = config.scale_depth / (config.num_hidden_layers + 1) ** 0.5 if self.muP and not self.third else 1
        self.scaling = config.hidden_size / config.dim_model_base if self.muP else 1
        self.ids = IDS if kind in ("ids", "eagle3") else torch.arange(VOCABULARY)
        self.layer = "midlayer." if self.third else "layers.0."
        self.keys, self.values = [], []

    def row(self, hidden, token):
        """The next hidden state and the log-probabilities of the ids."""
        w, layer, position = self.w, self.layer, len(self.keys)
        e = self.target.model.embed_tokens.weight[token] * (self.config.scale_emb if self.muP else 1)
        if self.third:
            stream = w["fc.weight"] @ hidden if len(hidden) == 3 * len(e) else hidden
            read = torch.cat([norm(e, w[layer + "input_layernorm.weight"], self.eps),
                              norm(stream, w[layer + "hidden_norm.weight"], self.eps)])  # fmt: skip
        else:
            both = [norm(e, w["input_norm1.weight"], self.eps), norm(hidden, w["input_norm2.weight"], self.eps)]
            stream = w["fc.weight"] @ torch.cat(both) + w.get("fc.bias", 0)
            read = norm(stream, w[layer + "input_layernorm.weight"], self.eps)
        q, k, v = ((w[f"{layer}self_attn.{n}_proj.weight"] @ read).reshape(-1, 16) for n in "qkv")
        self.keys.append([rotate(head, position, self.base) for head in k])
        self.values.append(v)
        out = []
        for number, head in enumerate(q):
            head, group = rotate(head, position, self.base), number // 2
            seen = [j for j in range(position + 1) if self.window is None or j == 0 or position - j < self.window]
            weights = torch.stack([head @ self.keys[j][group] / 4 for j in seen]).softmax(0)
            out.append(sum(weight * self.values[j][group] for weight, j in zip(weights, seen, strict=True)))
        stream = stream + self.scale * (w[layer + "self_attn.o_proj.weight"] @ torch.cat(out))
        y = norm(stream, w[layer + "post_attention_layernorm.weight"], self.eps)
        gate, up = w[layer + "mlp.gate_proj.weight"] @ y, w[layer + "mlp.up_proj.weight"] @ y
        x = stream + self.scale * (w[layer + "mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up))
        if self.third:
            logits = w["lm_head.weight"] @ norm(x, w["norm.weight"], self.eps)
        else:
            logits = self.target.lm_head.weight.double()[self.ids] @ x / self.scaling
        return x, logits.log_softmax(-1)

    @torch.no_grad()
    def chain(self, text, hidden, drafted):
        """Log-probabilities after `text`, and after each of the `drafted` ids (numbers of the head)."""
        self.keys, self.values = [], []
        for place in range(len(text) - 1):
            x, logprobs = self.row(hidden[place], text[place + 1])
        found = [logprobs]
        for number in drafted:
            x, logprobs = self.row(x, int(self.ids[number]))
            found.append(logprobs)
        return found


def states(target, ids, layers):
    with torch.no_grad():
        output = target(ids, output_hidden_states=True)
    return [output.hidden_states[layer][0] for layer in layers]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["llama", "dense"])
def test_every_node_of_a_tree_has_the_log_probabilities_of_the_formula(
    model, kind, window, tiny_config, sparse_config, monkeypatch
):
    """The tree's rows share a cache; the formula computes each path alone, as a chain behind the text."""
    target = build(model, tiny_config, sparse_config, tie_word_embeddings=False).double()
    draft = random_draft(kind, target, window=window)
    levels = [[(0, 7), (0, 3), (0, 11)], [(2, 5), (0, 9), (2, 6)], [(1, 1), (0, 30)], [(1, 2)]]
    got = []

    def fixed(expand, first, depth, topk, size):
        got.append(first[None])
        got.extend(expand(level) for level in levels)
        return DraftTree((7, 3, 11), (ROOT,) * 3)

    monkeypatch.setattr(eagle, "grow_tree", fixed)
    ids = PROMPT[:, :13]
    hidden = states(target, ids, draft.hidden_layers)
    draft.begin(target)
    # In three pieces, the last with the token that every pass begins with.
    for start, end in ((0, 5), (5, 6), (6, 12)):
        draft.observe(ids[0, start:end].tolist(), [state[start:end] for state in hidden])
    text = ids[0].tolist()
    tree = draft.propose(text, 9)
    formula = Formula(draft, target, kind, window)
    assert tree.tokens == tuple(int(formula.ids[number]) for number in (7, 3, 11))
    hidden = torch.cat(hidden, dim=-1)
    paths = [[[]]]
    for level in levels:
        paths.append([[*paths[-1][parent], number] for parent, number in level])
    for found, expected in zip(got, paths, strict=True):
        for logprobs, path in zip(found, expected, strict=True):
            assert torch.allclose(logprobs, formula.chain(text, hidden, path)[-1], atol=1e-12, rtol=0), path
    # Sparse targets, other windows and later pieces change the log-probabilities: the test can fail.
    assert not torch.allclose(got[1][0], got[1][1], atol=1e-3)


@pytest.mark.parametrize("kind, window", [("bias", 8), ("ids", None), ("eagle3", 8), ("eagle3", None)])
@pytest.mark.parametrize("model", MODELS)
def test_greedy_output_is_plain_and_the_cache_that_of_the_final_text(model, kind, window, tiny_config, sparse_config):
    """Passes that accept nothing, some and all of what is drafted."""
    target = build(model, tiny_config, sparse_config).double()
    options = {"max_new_tokens": 16, "do_sample": False}
    plain = target.generate(PROMPT, **options)
    draft = random_draft(kind, target, depth=4, topk=5, size=20, window=window)
    own, lengths = draft.propose, iter([0, 2, 4, 0, 1, 3, 0, 0, 2, 0, 1] * 2)

    def with_the_answer(token_ids, limit):
        tree = own(token_ids, limit)
        chains = [[tree.tokens[row - 1] for row in path[1:]] for path in tree.paths()]
        known = plain[0, len(token_ids) :].tolist()[: min(next(lengths), limit)]
        return DraftTree.from_chains([*chains, known])

    draft.propose = with_the_answer
    assert torch.equal(run(target, PROMPT, draft, **options), plain)
    assert draft.proposed > draft.accepted >= 6
    draft.propose = own
    text = plain[0].tolist()
    fresh = random_draft(kind, target, depth=4, topk=5, size=20, window=window)
    fresh.begin(target)
    fresh.observe(text[:-1], [state[:-1] for state in states(target, plain, fresh.hidden_layers)])
    assert draft.propose(text, 4) == fresh.propose(text, 4)
    for got, want in zip(draft._rows.view(), fresh._rows.view(), strict=True):
        assert torch.allclose(got, want, atol=1e-12, rtol=0)
    rows = len(text) - 1 if window is None else window + 1
    assert draft._rows.view()[0].shape == (1, 2, rows, 16)


@pytest.mark.parametrize("model", MODELS)
def test_what_the_heads_observe(model, tiny_config, sparse_config):
    """EAGLE-3: what enters its layers; EAGLE-2: what leaves the final norm."""
    target = build(model, tiny_config, sparse_config)
    entered = {}

    def keep(name):
        def hook(module, inputs, *output):
            entered.setdefault(name, (output or inputs)[0])

        return hook

    for number in (2, 3):
        target.model.layers[number].register_forward_pre_hook(keep(number))
    target.model.norm.register_forward_hook(keep("norm"))
    for kind, expected in (("eagle3", (2, 3, 3)), ("eagle", ("norm",))):
        draft, seen = random_draft(kind, target), []
        draft.observe = lambda ids, hidden, seen=seen: seen.append((ids, hidden))
        draft.propose = lambda ids, limit: DraftTree((), ())
        entered.clear()
        run(target, PROMPT, draft, max_new_tokens=1, do_sample=False)
        assert seen[0][0] == PROMPT[0, :-1].tolist()
        assert all(torch.equal(got, entered[name][0]) for got, name in zip(seen[0][1], expected, strict=True))


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_prompts_of_one_token_in_chunks_and_again(kind, tiny_config, sparse_config):
    target = build("dense", tiny_config, sparse_config).double()
    draft = random_draft(kind, target, window=8)
    options = {"max_new_tokens": 9, "do_sample": False}
    long = torch.randint(3, 60, (1, 150), generator=torch.Generator().manual_seed(4))
    for prompt in (PROMPT[:, :1], PROMPT, long, PROMPT[:, :2]):
        plain = target.generate(prompt, **options)
        assert torch.equal(run(target, prompt, draft, **options), plain)
        passes = draft.passes
        assert torch.equal(run(target, prompt, draft, **options, prefill_chunk_size=7), plain)
        assert draft.passes == passes


def test_the_target_as_its_own_knowledge(tiny_config, sparse_config):
    """A head whose output is made to point at the next token is believed: all drafted levels are accepted."""
    target = build("llama", tiny_config, sparse_config, tie_word_embeddings=False).double()
    with torch.no_grad():
        # After token i the target says i + 1: the last state is the token's embedding, the rest adds nothing.
        for layer in target.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        vectors = torch.nn.functional.normalize(torch.randn(VOCABULARY, 64, dtype=torch.double), dim=-1)
        target.model.embed_tokens.weight.copy_(vectors)
        target.lm_head.weight.copy_(vectors.roll(1, 0))
        head = EagleHead(EagleConfig.for_target(target.config)).double()
        head.layer.self_attn.o_proj.weight.zero_()
        head.layer.mlp.down_proj.weight.zero_()
        head.fc.weight.copy_(torch.cat([torch.eye(64), torch.zeros(64, 64)], 1))  # the embedding's half comes first
    draft = EagleDraft(head, depth=4, topk=1)
    output = run(target, torch.tensor([[5, 6]]), draft, max_new_tokens=15, do_sample=False)
    assert output[0].tolist() == list(range(5, 22))
    assert draft.passes == 3
    assert draft.accepted == draft.proposed == 12


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_and_the_names_of_others(kind, tiny_config, sparse_config, tmp_path):
    target = build("dense", tiny_config, sparse_config)
    draft = random_draft(kind, target)
    cls = type(draft)
    draft.save_pretrained(tmp_path / "own")
    own = load_file(tmp_path / "own" / "model.safetensors")
    assert own.keys() == draft.head.state_dict().keys()
    layer = "midlayer." if kind == "eagle3" else "layers.0."
    assert layer + "self_attn.q_proj.weight" in own

    # vLLM's names in a .bin file, with the tensors that belong to the target.
    other = tmp_path / "other"
    other.mkdir()
    foreign = "model.layers.0." if kind == "eagle3" else "model.eagle_layers.0."
    renamed = {}
    for name, tensor in own.items():
        short = foreign + name.removeprefix(layer) if name.startswith(layer) else f"model.{name}"
        renamed["d2t" if name == "d2t" else short] = tensor
    renamed["model.embed_tokens.weight"] = target.model.embed_tokens.weight.detach().clone()
    if kind != "eagle3":
        renamed["lm_head.weight"] = target.lm_head.weight.detach().clone()
    torch.save(renamed, other / "pytorch_model.bin")
    (other / "config.json").write_text((tmp_path / "own" / "config.json").read_text())
    if kind == "ids":
        torch.save(IDS.tolist(), other / "freq_40.pt")

    text = PROMPT[0].tolist()
    hidden = [state[:-1] for state in states(target, PROMPT, draft.hidden_layers)]
    trees = []
    for one in (draft, cls.from_pretrained(tmp_path / "own", target), cls.from_pretrained(other, target)):
        assert one.head.config == draft.head.config
        assert one.hidden_layers == draft.hidden_layers
        for name, tensor in one.head.state_dict().items():
            assert torch.equal(tensor, own[name]), name
        one.begin(target)
        one.observe(text[:-1], hidden)
        trees.append(one.propose(text, 5))
    assert trees[0] == trees[1] == trees[2]
    if kind == "ids":
        assert torch.equal(one.vocabulary_ids, IDS)
        assert EagleDraft.from_pretrained(other, target, vocabulary_ids=None).vocabulary_ids is None
    assert not [file for file in (tmp_path / "own").iterdir() if file.name.startswith(".")]


def test_the_residual_scale(tiny_config, sparse_config, tmp_path):
    """The draft's `mup_denominator` where its config has one, else the target's layers and one."""
    target = build("dense", tiny_config, sparse_config)  # its own mup_denominator, 32, is not read
    EagleDraft(random_head("eagle", target)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for changes, scale in (
        ({}, 1.4 / 7**0.5),
        ({"mup_denominator": 32}, 1.4 / 32**0.5),
        ({"mup_denominator": None, "scale_depth": 2.8}, 2.8 / 7**0.5),
        ({"mup_denominator": None, "scale_depth": None}, 1.4 / 7**0.5),
    ):
        file.write_text(json.dumps({**config, **changes}))
        assert EagleDraft.from_pretrained(tmp_path, target).head.residual_scale == pytest.approx(scale, rel=1e-12)
    assert EagleHead(EagleConfig.for_target(build("llama", None, None).config)).residual_scale == 1


def test_files_that_do_not_fit_are_refused(tiny_config, sparse_config, tmp_path):
    target = build("dense", tiny_config, sparse_config)
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors and no \\*.bin"):
        EagleDraft.from_pretrained(tmp_path, target)
    EagleDraft(random_head("eagle", target)).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    good = load_file(weights)

    def refused(match, changes=None, without=(), cls=EagleDraft, **fields):
        (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
        save_file({n: t for n, t in {**good, **(changes or {})}.items() if n not in without}, weights)
        with pytest.raises(ValueError, match=match):
            cls.from_pretrained(tmp_path, target)

    refused("missing fc.weight, layers.0.mlp.up_proj.weight; unknown nothing",
            without=("fc.weight", "layers.0.mlp.up_proj.weight"))  # fmt: skip
    refused("unknown layers.1.mlp.up_proj.weight", {"layers.1.mlp.up_proj.weight": torch.zeros(2)})
    refused("unknown fc.qweight", {"fc.qweight": torch.zeros(2)})
    refused(r"input_norm1.weight has shape \(3,\), expected \(64,\)", {"input_norm1.weight": torch.zeros(3)})
    refused("vocabulary of 99 tokens and the target has 128", vocab_size=99)
    refused("hidden_size=32 and the target 64", hidden_size=32)
    refused("looks like a head for EagleDraft", cls=Eagle3Draft)
    for name in ("freq_2.pt", "freq_3.pt"):
        torch.save([1, 2], tmp_path / name)
    refused("2 lists of ids")


def test_arguments_and_targets_that_do_not_fit_are_refused(tiny_config, sparse_config):
    target = build("dense", tiny_config, sparse_config)
    head = random_head("eagle", target)
    for options, match in (
        ({"size": 65}, "at most 64"),
        ({"depth": 0}, "1 or more"),
        ({"window": 0}, "1 or more"),
        ({"vocabulary_ids": torch.tensor([1, 1])}, "1 of 2 ids to draft are there twice"),
        ({"vocabulary_ids": torch.tensor([1, 128])}, "the vocabulary from 0 to 127"),
        ({"vocabulary_ids": torch.tensor([0.5])}, "list of integers"),
    ):
        with pytest.raises(ValueError, match=match):
            EagleDraft(head, **options)
    other = build("llama", tiny_config, sparse_config)
    other.resize_token_embeddings(130)
    with pytest.raises(ValueError, match="vocabulary of 128 tokens and the target has 130"):
        run(other, PROMPT, EagleDraft(head), max_new_tokens=3)
    with pytest.raises(ValueError, match="three indices"):
        Eagle3Draft(random_head("eagle3", target), (2, 3))
    with pytest.raises(ValueError, match="the target has 6 layers"):
        run(target, PROMPT, Eagle3Draft(random_head("eagle3", target), (2, 16, 29)), max_new_tokens=3)
    draft = EagleDraft(head)
    draft.begin(target)
    with pytest.raises(ValueError, match="observed 0 tokens and is asked what follows 3"):
        draft.propose([1, 2, 3], 4)
