"""
Foreign names and shapes: the Hub's legacy configs, Llama weights, the published context extension.

This is the one module that knows what others call things.
"""

from __future__ import annotations

import json
import math
from importlib import resources
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import LlamaConfig, LlamaForCausalLM

from .configuration_minicpm4 import MiniCPM4Config
from .modeling_minicpm4 import MiniCPM4ForCausalLM


# Heads of the released repositories and ours, by what the config's `architectures` says.
ARCHITECTURES = {
    "MiniCPMForCausalLM": "MiniCPM4ForCausalLM",
    "MiniCPMForSequenceClassification": "MiniCPM4ForSequenceClassification",
    "MiniCPMModel": "MiniCPM4Model",
    **{name: name for name in ("MiniCPM4ForCausalLM", "MiniCPM4ForSequenceClassification", "MiniCPM4Model")},
}


class MiniCPMConfig(MiniCPM4Config):
    """
    The Hub's `model_type: minicpm`: reads MiniCPM4, MiniCPM4.1 and the 2024 MiniCPM-1B/2B, and becomes a
    [`MiniCPM4Config`]. Other models under that name are refused.
    """

    model_type = "minicpm"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        return MiniCPM4Config.from_dict(modernize_config(config_dict), **kwargs)


def is_unnamed_minicpm(config_dict: dict[str, Any]) -> bool:
    """Whether a config without `model_type` (MiniCPM4-0.5B's) is one of these checkpoints."""
    architectures = config_dict.get("architectures") or []
    return "model_type" not in config_dict and "MiniCPMForCausalLM" in architectures and "scale_depth" in config_dict


def modernize_config(config_dict: dict[str, Any]) -> dict[str, Any]:
    """
    A released `config.json` (`model_type` "minicpm" or absent) as fields of `MiniCPM4Config`.

    Raises:
        ValueError: the config asks for something this model does not compute; names it.
    """
    config = dict(config_dict)
    name = config.get("_name_or_path") or config.get("name_or_path") or "this checkpoint"

    def refuse(what: str):
        raise ValueError(
            f"{name} says model_type 'minicpm' but has {what}, which MiniCPM4 does not compute. Supported under that "
            "name are MiniCPM4, MiniCPM4.1 and the 2024 MiniCPM-1B/2B; load others with their own code "
            "(trust_remote_code=True, without importing transformers_minicpm4)."
        )

    architectures = config.get("architectures") or ["MiniCPMForCausalLM"]
    unknown = [architecture for architecture in architectures if architecture not in ARCHITECTURES]
    if unknown:
        refuse(f"architectures {unknown}")
    if config.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {config['hidden_act']!r} (MiniCPM-S)")
    if config.get("num_experts") or config.get("num_local_experts"):
        refuse("experts (MiniCPM-MoE)")
    if config.get("is_causal") is False:
        refuse("is_causal false (an embedding model)")
    if (config.get("pretraining_tp") or 1) != 1:
        refuse(f"pretraining_tp {config['pretraining_tp']}")
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if scaling:
        scaling = dict(scaling)
        kind = scaling.pop("type", None)
        kind = scaling.get("rope_type") or kind
        scaling["rope_type"] = {"su": "longrope"}.get(kind, kind)
        if scaling["rope_type"] not in ("longrope", "default"):
            refuse(f"rope_scaling {kind!r} (MiniCPM-2B-128k)")
        config.pop("rope_scaling", None)
        config["rope_parameters"] = scaling

    config["architectures"] = [ARCHITECTURES[architecture] for architecture in architectures]
    config["model_type"] = MiniCPM4Config.model_type
    # The repository's own code is what this replaces: keeping the pointer would make others ask to trust it.
    config.pop("auto_map", None)
    return config


def extend_context(config: MiniCPM4Config, target: str = "128k") -> MiniCPM4Config:
    """
    The published extension of MiniCPM4-8B and MiniCPM4.1-8B to 131,072 tokens: other LongRoPE factors at every length,
    `max_position_embeddings` untouched (it would change the attention factor).

    Returns:
        the same config object, changed in place, to be passed to `from_pretrained(..., config=config)`.

    Raises:
        ValueError: no published factors for this config.
    """
    if target != "128k":
        raise ValueError(f"target must be '128k' (the one published extension), got {target!r}.")
    text = resources.files(__package__).joinpath("context_presets.json").read_text(encoding="utf-8")
    presets = json.loads(text)["factors_128k"]
    parameters = config.rope_parameters
    original = parameters.get("original_max_position_embeddings")
    factors = presets.get(str(original))
    if parameters["rope_type"] != "longrope" or factors is None or len(factors) != config.head_dim // 2:
        raise ValueError(
            "Factors for 128K are published for MiniCPM4-8B (original length 32768) and MiniCPM4.1-8B (65536), both "
            f"with head size 128; got rope_type {parameters['rope_type']!r}, original length {original}, head size "
            f"{config.head_dim}."
        )
    config.rope_parameters = {**parameters, "long_factor": list(factors), "short_factor": list(factors)}
    return config


def llama_to_minicpm4(model: LlamaForCausalLM, sparse_config: dict | None = None) -> MiniCPM4ForCausalLM:
    """
    A Llama-family model (Llama, SmolLM2, ...) as MiniCPM4 with neutral constants: same weights, same answers.

    The new model shares the old one's tensors.

    Raises:
        ValueError: an architecture that is not Llama, or MLP biases.
    """
    config = model.config
    if config.model_type != "llama":
        raise ValueError(
            f"llama_to_minicpm4 converts LlamaForCausalLM, got {type(model).__name__} (model_type "
            f"{config.model_type!r}): other families add parameters that MiniCPM4 has no place for."
        )
    if config.mlp_bias:
        raise ValueError("llama_to_minicpm4: this model has MLP biases (mlp_bias=True), MiniCPM4 has none.")
    fields = config.to_dict()
    for name in ("model_type", "architectures", "quantization_config", "transformers_version"):
        fields.pop(name, None)
    converted = MiniCPM4Config(
        **fields,
        architectures=["MiniCPM4ForCausalLM"],
        scale_emb=1,
        scale_depth=math.sqrt(config.num_hidden_layers),
        dim_model_base=config.hidden_size,
        sparse_config=sparse_config,
    )
    return _rebuild(MiniCPM4ForCausalLM, converted, dict(model.state_dict()), model)


def minicpm4_to_llama(model: MiniCPM4ForCausalLM) -> LlamaForCausalLM:
    """
    A MiniCPM4 as a plain dense Llama, for engines that know no MiniCPM: the three constants are folded into the
    weights (in float32, rounded once to the weights' dtype). `sparse_config` is dropped.

    Raises:
        ValueError: LongRoPE whose two factor lists differ, which Llama code switches by another rule.
    """
    config = model.config
    parameters = dict(config.rope_parameters)
    if parameters["rope_type"] == "longrope":
        if parameters["short_factor"] != parameters["long_factor"]:
            raise ValueError(
                "minicpm4_to_llama: short_factor and long_factor differ, and Llama chooses between them by another "
                "rule. Set both to the list for the length you need."
            )
        parameters["attention_factor"] = model.model.rotary_emb.attention_scaling
        parameters["factor"] = 1.0
    own = {"sparse_config", "scale_emb", "scale_depth", "dim_model_base", "mup_denominator"}
    own |= {"model_type", "architectures", "rope_parameters", "transformers_version"}
    fields = {name: value for name, value in config.to_dict().items() if name not in own}
    llama = LlamaConfig(**fields, rope_parameters=parameters, architectures=["LlamaForCausalLM"])

    def scaled(tensor, factor):
        return (
            tensor
            if factor == 1
            else (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor).to(tensor.dtype)
        )

    tied = config.tie_word_embeddings
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if name.endswith(("o_proj.weight", "o_proj.bias", "down_proj.weight")):
            state[name] = scaled(tensor, config.residual_scale)
    head = 1 / config.logits_scaling
    embedding = scaled(state["model.embed_tokens.weight"], config.scale_emb)
    state["model.embed_tokens.weight"] = embedding
    if tied:  # the head reads the scaled embedding: the last norm takes both factors
        state["lm_head.weight"] = embedding
        head /= config.scale_emb
    state["model.norm.weight"] = scaled(state["model.norm.weight"], head)
    return _rebuild(LlamaForCausalLM, llama, state, model)


def _rebuild(model_class, config, state: dict[str, torch.Tensor], source):
    """`model_class` around existing tensors: nothing is initialised, nothing copied."""
    with init_empty_weights(include_buffers=False):
        model = model_class(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    missing = [name for name in missing if name != "lm_head.weight" or not config.tie_word_embeddings]
    if missing or unexpected:
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    model.generation_config = source.generation_config
    return model.train(source.training)
