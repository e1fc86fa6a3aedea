"""Foreign configs and weights: every released config loads, what cannot be honoured is refused by name."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import SHARED
from tolerances import assert_close, relative_rms, within
from transformers_minicpm4 import (
    InfLLMv2Config,
    MiniCPM4Config,
    MiniCPM4ForCausalLM,
    extend_context,
    llama_to_minicpm4,
    minicpm4_to_llama,
)


FACTORS = [1.0 + i / 8 for i in range(8)]

# The fields of the released config files (specification of the checkpoints), at a size that fits a test.
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MINICPM4_05B = {
    "_name_or_path": "openbmb/MiniCPM4-0.5B",
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_minicpm.MiniCPMConfig",
        "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": [2, 120],
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "rope_type": "longrope",
        "long_factor": FACTORS,
        "short_factor": FACTORS,
        "original_max_position_embeddings": 32768,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "scale_emb": 12,
    "dim_model_base": 256,
    "scale_depth": 1.4,
    **SMALL,
}
MINICPM4_8B = {
    **MINICPM4_05B,
    "_name_or_path": "openbmb/MiniCPM4-8B",
    "model_type": "minicpm",
    "tie_word_embeddings": False,
    "pad_token_id": 2,
    "rope_theta": 10000.0,
    "mup_denominator": 32,
    "rms_norm_eps": 1e-06,
}
LONG_SPARSE_BASE = {
    **MINICPM4_8B,
    "_name_or_path": "openbmb/MiniCPM4-8B",
    "rope_scaling": {**MINICPM4_8B["rope_scaling"], "factor": 1.0},
    "sparse_config": InfLLMv2Config().to_dict(),
}
AGENT_REPORT = {**MINICPM4_8B, "eos_token_id": 120, "pad_token_id": 120, "pretraining_tp": 1, "attention_bias": False}
MINICPM_2B = {
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": MINICPM4_05B["auto_map"],
    "model_type": "minicpm",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "scale_emb": 12,
    "dim_model_base": 256,
    "scale_depth": 1.4,
    "torch_dtype": "bfloat16",
    **SMALL,
    "num_key_value_heads": 4,
}
MINICPM_1B_SU = {**MINICPM_2B, "rope_scaling": {**MINICPM4_05B["rope_scaling"], "type": "su"}}
MINICPM_1B_SU["rope_scaling"].pop("rope_type")
UPSTREAM = {**MINICPM4_8B, "model_type": "minicpm4", "architectures": ["MiniCPM4ForCausalLM"]}
del UPSTREAM["auto_map"]

RELEASED = {
    "MiniCPM4-0.5B (no model_type)": MINICPM4_05B,
    "MiniCPM4-8B": MINICPM4_8B,
    "InfLLM-V2-Long-Sparse-Base": LONG_SPARSE_BASE,
    "AgentCPM-Report": AGENT_REPORT,
    "MiniCPM-2B": MINICPM_2B,
    "MiniCPM-1B (type su)": MINICPM_1B_SU,
    "model_type minicpm4": UPSTREAM,
}


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("released", RELEASED.values(), ids=RELEASED.keys())
def test_released_config_loads_without_remote_code(tmp_path, released):
    config = AutoConfig.from_pretrained(write(tmp_path, released))
    assert type(config) is MiniCPM4Config
    for name in (*SMALL, "scale_emb", "scale_depth", "dim_model_base", "rms_norm_eps", "eos_token_id"):
        assert getattr(config, name) == released[name], name
    assert config.tie_word_embeddings == released.get("tie_word_embeddings", True)
    assert config.rope_parameters["rope_theta"] == 10_000.0
    wanted = "longrope" if released["rope_scaling"] else "default"
    assert config.rope_parameters["rope_type"] == wanted
    assert config.auto_map == {}  # nothing left that would ask for trust_remote_code
    config.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_code_of_its_own_is_one_configs_alone():
    """`register_for_auto_class` and `save_pretrained` write into the map that they find."""
    config, other = MiniCPM4Config(), MiniCPM4Config()
    config.auto_map["AutoModelForCausalLM"] = "mine.Mine"
    assert config.to_dict()["auto_map"] == config.auto_map == {"AutoModelForCausalLM": "mine.Mine"}
    assert other.auto_map == {}
    assert "auto_map" not in other.to_dict()
    assert other == MiniCPM4Config()


@pytest.mark.parametrize("released", RELEASED.values(), ids=RELEASED.keys())
@pytest.mark.parametrize("trust", [None, True, False])
def test_checkpoint_loads_and_saves_through_the_auto_classes(tmp_path, released, trust):
    torch.manual_seed(1)
    source = MiniCPM4ForCausalLM(AutoConfig.from_pretrained(write(tmp_path, released)))
    source.save_pretrained(tmp_path)
    write(tmp_path, released)  # weights of ours under the released config file
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust, dtype=torch.float32)
    assert type(model) is MiniCPM4ForCausalLM
    ids = torch.randint(3, 100, (1, 20))
    logits = model.eval()(ids).logits
    assert torch.equal(logits, source.eval()(ids).logits)
    assert torch.equal(MiniCPM4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()(ids).logits, logits)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "minicpm4"
    assert torch.equal(again(ids).logits, logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == released.get("tie_word_embeddings", True)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_act": "fatrelu"}, "hidden_act 'fatrelu' .MiniCPM-S"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling 'dynamic' .MiniCPM-2B-128k"),
        ({"num_experts": 8}, "experts .MiniCPM-MoE"),
        ({"architectures": ["MiniCPMReranker"]}, "architectures .'MiniCPMReranker'"),
        ({"is_causal": False}, "is_causal false"),
        ({"pretraining_tp": 2}, "pretraining_tp 2"),
    ],
)
def test_what_we_cannot_honour_is_refused_by_name(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        AutoConfig.from_pretrained(write(tmp_path, {**MINICPM_2B, **change}))


def test_other_configs_without_model_type_pass_through(tmp_path):
    with pytest.raises(ValueError, match="Should have a `model_type` key"):
        AutoConfig.from_pretrained(write(tmp_path, {"architectures": ["SomethingElse"], "scale_depth": 1.0}))


def test_the_released_files_themselves():
    path = SHARED / "specs" / "minicpm4_configs.json"
    if not path.is_file():
        pytest.skip("../shared/specs/minicpm4_configs.json is not beside this checkout")
    released = json.loads(path.read_text())
    from transformers_minicpm4.model.conversion import modernize_config

    for name in ("openbmb/MiniCPM4-8B", "openbmb/MiniCPM4-0.5B"):
        source = released["checkpoints"][name]["config"]
        config = MiniCPM4Config.from_dict(modernize_config(source))
        assert config.rope_parameters["long_factor"] == source["rope_scaling"]["long_factor"]
        with torch.device("meta"):
            parameters = MiniCPM4ForCausalLM(config).num_parameters()
        published = {"openbmb/MiniCPM4-8B": 8.18e9, "openbmb/MiniCPM4-0.5B": 434e6}[name]  # file sizes / 2 bytes
        assert abs(parameters / published - 1) < 2e-3
    config = MiniCPM4Config.from_dict(modernize_config(released["checkpoints"]["openbmb/MiniCPM4-8B"]["config"]))
    edit = released["long_context_edits"]["MiniCPM4-8B to 128K (README June 2025)"]
    extend_context(config)
    assert config.rope_parameters["long_factor"] == config.rope_parameters["short_factor"] == edit["long_factor"]
    assert config.max_position_embeddings == 32768


def test_context_extension_is_refused_where_nothing_was_published(tiny_config):
    with pytest.raises(ValueError, match="published for MiniCPM4-8B.*got rope_type 'default'"):
        extend_context(tiny_config())
    with pytest.raises(ValueError, match="'128k'.*got '1m'"):
        extend_context(tiny_config(), "1m")


def llama(**changes):
    config = LlamaConfig(**{**SMALL, "initializer_range": 0.3, "eos_token_id": 120, **changes})
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double().eval()


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
@pytest.mark.parametrize("tied", [True, False])
def test_llama_becomes_minicpm4_with_the_same_logits(tied, rope):
    source = llama(tie_word_embeddings=tied, rope_parameters=rope)
    model = llama_to_minicpm4(source)
    ids = torch.randint(1, 100, (2, 90))
    assert_close(model(ids).logits, source(ids).logits, "logits_rope_tables_float32", "logits")
    assert model.model.layers[0].mlp.up_proj.weight is not None
    assert model.model.embed_tokens.weight.data_ptr() == source.model.embed_tokens.weight.data_ptr()  # no copy
    back = minicpm4_to_llama(model)
    assert torch.equal(back(ids).logits, source(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_minicpm4_folds_into_llama(tiny_model, tied):
    for dtype, name in ((torch.float64, "logits_float64"), (torch.float32, "fold_float32")):
        model = tiny_model("sdpa", tie_word_embeddings=tied).to(dtype)
        folded = minicpm4_to_llama(model)
        assert type(folded) is LlamaForCausalLM
        ids = torch.randint(1, 100, (2, 40))
        got, wanted = folded(ids).logits, model(ids).logits
        if dtype == torch.float64:
            assert_close(got, wanted, "logits_norm_float32", "logits")
        else:
            assert within(relative_rms(got, wanted), name)


def test_longrope_folds_only_where_llama_means_the_same(tiny_model):
    def longrope(long):
        return {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": FACTORS,
            "long_factor": long,
            "original_max_position_embeddings": 64,
        }

    model = tiny_model("sdpa", rope_parameters=longrope(FACTORS), max_position_embeddings=128)
    ids = torch.randint(1, 100, (1, 100))
    folded = minicpm4_to_llama(model)
    assert_close(folded(ids).logits, model(ids).logits, "logits_norm_float32", "logits")
    with pytest.raises(ValueError, match="short_factor and long_factor differ"):
        minicpm4_to_llama(tiny_model("sdpa", rope_parameters=longrope([2.0] * 8), max_position_embeddings=128))


def test_conversion_refuses_other_families():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with pytest.raises(ValueError, match="got Qwen2ForCausalLM .model_type 'qwen2'"):
        llama_to_minicpm4(Qwen2ForCausalLM(Qwen2Config(**SMALL)))
    with pytest.raises(ValueError, match="MLP biases"):
        llama_to_minicpm4(llama(mlp_bias=True))
