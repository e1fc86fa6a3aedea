"""The model against a forward pass written here from the formulas, and which attention runs when."""

import logging
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tolerances import assert_close
from transformers_minicpm4 import InfLLMv2Config, MiniCPM4ForCausalLM, MiniCPM4ForSequenceClassification
from transformers_minicpm4.infllm_v2 import infllm_v2_attention


def rotate(x, positions, theta=10_000.0):
    """Rotary embedding as a complex product: pairs (i, i + D / 2) turn by position * theta ** (-2 i / D)."""
    half = x.shape[-1] // 2
    frequency = (theta ** (-torch.arange(0, half, dtype=torch.float32) * 2 / x.shape[-1])).float()
    angle = (positions[:, None].float() * frequency).double()
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def forward_by_formula(state, config, ids, attend):
    """MiniCPM4's logits from a state dict; `attend(q, k, v)` on `[B, heads, S, D]`."""
    batch, length = ids.shape
    size = config.hidden_size // config.num_attention_heads
    branch = config.scale_depth / math.sqrt(config.num_hidden_layers)

    def norm(x, weight):
        wide = x.float()  # the released norm works in float32 whatever the model's dtype
        return weight * (wide * (wide.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()).to(x.dtype)

    hidden = state["model.embed_tokens.weight"][ids] * config.scale_emb
    for i in range(config.num_hidden_layers):
        w = {name.removeprefix(f"model.layers.{i}."): t for name, t in state.items() if f"layers.{i}." in name}
        x = norm(hidden, w["input_layernorm.weight"])
        heads = [
            (x @ w[f"self_attn.{name}_proj.weight"].T).view(batch, length, -1, size).transpose(1, 2) for name in "qkv"
        ]
        positions = torch.arange(length)
        mixed = attend(rotate(heads[0], positions), rotate(heads[1], positions), heads[2])
        mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
        hidden = hidden + mixed @ w["self_attn.o_proj.weight"].T * branch
        x = norm(hidden, w["post_attention_layernorm.weight"])
        gate = x @ w["mlp.gate_proj.weight"].T
        x = gate * gate.sigmoid() * (x @ w["mlp.up_proj.weight"].T)
        hidden = hidden + x @ w["mlp.down_proj.weight"].T * branch
    hidden = norm(hidden, state["model.norm.weight"]) / (config.hidden_size / config.dim_model_base)
    head = state["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return hidden @ head.T


def dense(query, key, value):
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).mT / math.sqrt(query.shape[-1])
    logits = logits + torch.full_like(logits, -torch.inf).triu(1)
    return logits.softmax(-1) @ value.repeat_interleave(group, 1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dense_logits_equal_the_formula(tiny_model, tied, implementation):
    model = tiny_model(implementation, tie_word_embeddings=tied)
    ids = torch.randint(1, 120, (2, 45))
    wanted = forward_by_formula(model.state_dict(), model.config, ids, dense)
    assert_close(model(ids).logits, wanted, "logits_norm_float32", "logits")


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("length", [37, 130])
def test_sparse_logits_equal_the_formula(tiny_model, sparse_config, groups, length):
    model = tiny_model(num_attention_heads=8, num_key_value_heads=8 // groups, sparse_config=sparse_config)
    ids = torch.randint(1, 120, (2, length))

    def attend(query, key, value):
        return infllm_v2_attention(query, key, value, sparse_config, implementation="reference")

    wanted = forward_by_formula(model.state_dict(), model.config, ids, attend)
    assert_close(model(ids).logits, wanted, "logits_norm_float32", "logits")


def test_residual_scale_ignores_mup_denominator(tiny_model):
    ids = torch.randint(1, 120, (1, 20))
    logits = [tiny_model("sdpa", mup_denominator=value)(ids).logits for value in (None, 3, 32)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_inputs_embeds_and_logits_to_keep(tiny_model):
    model = tiny_model("sdpa")
    ids = torch.randint(1, 120, (2, 20))
    logits = model(ids).logits
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)
    assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:], "logits_float64", "last logits")
    # What is passed as inputs_embeds is taken as it is, as in the released code: no scale on top.
    plain = torch.nn.functional.embedding(ids, model.model.embed_tokens.weight)
    assert torch.equal(model(inputs_embeds=plain * model.config.scale_emb).logits, logits)


def test_classification_head_does_not_divide(tiny_config):
    config = tiny_config(num_labels=3)
    model = MiniCPM4ForSequenceClassification(config).double().eval()
    ids = torch.randint(1, 120, (2, 12))
    hidden = model.model(ids).last_hidden_state[:, -1]
    assert_close(model(ids).logits, hidden @ model.score.weight.T, "logits_float64", "scores")


def test_loss_is_cross_entropy_of_the_shifted_logits(tiny_model):
    model = tiny_model("sdpa")
    ids = torch.randint(1, 120, (2, 20))
    output = model(ids, labels=ids)
    logits = output.logits[:, :-1].reshape(-1, 128)
    wanted = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].reshape(-1))
    assert_close(output.loss.double(), wanted.double(), "loss_float32", "loss")


def test_dense_path_compiles_as_one_graph(tiny_model):
    model = tiny_model("sdpa").float()
    ids = torch.randint(1, 120, (2, 20))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.fixture
def warnings_of(caplog, monkeypatch):
    """Transformers' own warnings as a list; each is said once a process, so the memory of them is cleared first."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers_minicpm4"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return lambda: [record.message for record in caplog.records if "is dense" in record.message]


def test_which_attention_runs(tiny_config, sparse_config, tmp_path, warnings_of):
    MiniCPM4ForCausalLM(tiny_config()).save_pretrained(tmp_path / "dense")
    MiniCPM4ForCausalLM(tiny_config(sparse_config=sparse_config)).save_pretrained(tmp_path / "sparse")

    def load(name, **kwargs):
        return AutoModelForCausalLM.from_pretrained(tmp_path / name, **kwargs)

    assert load("dense").config._attn_implementation == "sdpa"
    assert load("sparse").config._attn_implementation == "infllm_v2"
    assert not warnings_of()
    asked = load("dense", attn_implementation="infllm_v2")
    assert asked.config._attn_implementation == "infllm_v2"
    assert asked.config.infllm_v2 == InfLLMv2Config()  # the released defaults
    given = load("dense", attn_implementation="infllm_v2", sparse_config=sparse_config)
    assert given.config.infllm_v2 == sparse_config
    assert not warnings_of()
    for _ in range(2):
        model = load("sparse", attn_implementation="sdpa")
    assert model.config._attn_implementation == "sdpa"
    assert len(warnings_of()) == 1
    assert 'attn_implementation="sdpa" is dense' in warnings_of()[0]
    ids = torch.randint(1, 120, (1, 150))
    sparse = load("sparse")
    assert (model(ids).logits - sparse(ids).logits).abs().max() > 1e-3
    sparse.set_attn_implementation("sdpa")
    assert torch.equal(model(ids).logits, sparse(ids).logits)


def test_custom_or_misshapen_masks_are_refused(tiny_model, sparse_config):
    model = tiny_model(sparse_config=sparse_config)
    ids = torch.randint(1, 120, (1, 40))
    with pytest.raises(ValueError, match="four-dimensional"):
        model(ids, attention_mask=torch.ones(1, 1, 40, 40))
    with pytest.raises(ValueError, match=r"\[1, 40\]"):
        model(ids, attention_mask=torch.ones(1, 41))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="no tokens; give at least one"):
        model(ids[:, :0])


def test_weight_names_are_the_hubs(tiny_model):
    names = set(tiny_model("sdpa", num_hidden_layers=1, tie_word_embeddings=False).state_dict())
    layer = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    layer += ["input_layernorm", "post_attention_layernorm"]
    wanted = {f"model.layers.0.{name}.weight" for name in layer}
    assert names == wanted | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
