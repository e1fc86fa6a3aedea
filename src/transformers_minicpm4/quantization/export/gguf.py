"""
GGUF files for llama.cpp, with the `gguf` package (extra `edge`).

Names, keys and row order follow llama.cpp's converters (conversion/llama.py, minicpm.py, qwen.py of
github.com/ggml-org/llama.cpp): the architectures "llama" and "minicpm" rotate neighbouring pairs of a head
(LLAMA_ROPE_TYPE_NORM in src/llama-model.cpp), Transformers rotates halves, so rows of q and k are reordered for them;
"qwen2" and "qwen3" rotate halves. "minicpm" has the three constants as keys: `embedding_scale`, `residual_scale`, and
`logit_scale`, by which logits are divided (src/models/granite.cpp). llama.cpp attends densely: `sparse_config` is not
written.

Shape letters: `O` outputs, `I` inputs.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from ..quantized_weight import QuantizedWeight
from .checkpoint_files import new_file
from .gguf_blocks import QUANTIZATIONS, LossyExport, gguf_blocks
from .gguf_tokenizer import add_tokenizer
from .gptq import plain_tensors, read_gptq


# model_type of Transformers to llama.cpp's architecture.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "minicpm4": "minicpm",
    "minicpm": "minicpm",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
PAIRWISE_ROTATION = ("llama", "minicpm")
FLOAT_TYPES = ("auto", "F32", "F16", "BF16")
DTYPES = {torch.float32: "F32", torch.float64: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def save_gguf(
    path: str | os.PathLike,
    model,
    weights: Mapping[str, QuantizedWeight] | None = None,
    *,
    tokenizer=None,
    quantization: str = "auto",
    float_type: str = "auto",
    tokenizer_pre: str | None = None,
) -> dict[str, str]:
    """
    Writes a model as GGUF; the file appears when all of it is written.

    Args:
        path: the file, replaced if it is there.
        model: a `PreTrainedModel` of the Llama family, MiniCPM4 or Qwen 2 and 3. Not changed.
        weights: quantized layers by module name, each asked for once; without any the file is dense.
        tokenizer: a fast tokenizer; without one the file takes token ids alone.
        quantization: of the layers in `weights`: "auto" for the smallest type that is exact for each; "TQ1_0",
            "TQ2_0", "Q4_0", "Q4_1", "Q8_0", refused where they would change a value; "F16" or "F32" for dense values
            (F16 as readers of the GPTQ format compute them, and refused for scales that float16 would round).
        float_type: of all other matrices: "auto" as they are, or "F32", "F16", "BF16", to which they are rounded.
            Norms and biases are always F32, as llama.cpp wants them.
        tokenizer_pre: see [`add_tokenizer`].

    Returns:
        each tensor's type, by its name in the file.

    Raises:
        ImportError: the `gguf` package is not installed.
        LossyExport: a type that cannot hold a layer; names the layer and the reason.
        ValueError: an architecture, position encoding or tokenizer that is not written.
    """
    weights = weights or {}
    state = plain_tensors(model, model.state_dict(), list(weights))
    return _write(path, model.config, state, weights, tokenizer, quantization, float_type, tokenizer_pre)


def gptq_to_gguf(
    folder: str | os.PathLike,
    path: str | os.PathLike,
    *,
    quantization: str = "auto",
    float_type: str = "auto",
    tokenizer_pre: str | None = None,
) -> dict[str, str]:
    """
    Writes a GPTQ folder (4-bit, or 2-bit ternary) as GGUF with the folder's own tokenizer, layer by layer.

    Arguments, result and errors as in [`save_gguf`]; a folder without tokenizer gives a file without one.
    """
    from transformers import AutoConfig, AutoTokenizer

    weights = read_gptq(folder)
    config = AutoConfig.from_pretrained(folder)
    has_tokenizer = (weights.folder / "tokenizer.json").is_file() or (weights.folder / "tokenizer.model").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    state = ((name, weights.tensors[name]) for name in weights.plain() if name not in tied)
    return _write(path, config, state, weights, tokenizer, quantization, float_type, tokenizer_pre)


def _write(
    path: str | os.PathLike,
    config,
    state: Iterable[tuple[str, torch.Tensor]],
    weights: Mapping[str, QuantizedWeight],
    tokenizer,
    quantization: str,
    float_type: str,
    tokenizer_pre: str | None,
) -> dict[str, str]:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "writing GGUF needs the `gguf` package; install it with: pip install 'transformers_minicpm4[edge]'"
        )
    import gguf

    for name, given, allowed in (
        ("quantization", quantization, QUANTIZATIONS),
        ("float_type", float_type, FLOAT_TYPES),
    ):
        if given not in allowed:
            raise ValueError(f"{name} is one of {', '.join(allowed)}, got {given!r}.")
    arch = _architecture(config)
    names = gguf.get_tensor_name_map(_arch_key(gguf, arch), config.num_hidden_layers)
    types: dict[str, str] = {}

    with new_file(path) as work:
        writer = gguf.GGUFWriter(work, arch, use_temp_file=True)
        try:
            _add_metadata(writer, config, arch)
            add_tokenizer(writer, tokenizer, config.vocab_size, tokenizer_pre)
            # Positions first: llama.cpp's converters write them in front.
            for name, tensor in _rope_tensors(config):
                types[name] = _add_floats(writer, name, tensor, "F32")
            for name, tensor in state:
                if name.endswith("rotary_emb.inv_freq"):  # old checkpoints kept the table
                    continue
                tensor = _reordered(name, tensor, config, arch)
                own = _own_name(names, name, arch)
                kind = "F32" if tensor.dim() == 1 else float_type
                types[own] = _add_floats(writer, own, tensor, kind)
            for name in weights:
                weight = weights[name]
                own = _own_name(names, f"{name}.weight", arch)
                order = _row_order(name, config, arch)
                types[own] = _add_quantized(writer, name, own, _take_rows(weight, order), quantization)
                if weight.bias is not None:
                    bias = weight.bias if order is None else weight.bias[order]
                    own = _own_name(names, f"{name}.bias", arch)
                    types[own] = _add_floats(writer, own, bias, "F32")
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(_file_type(gguf, types))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
            if writer.temp_file is not None:  # left open where writing stopped early
                writer.temp_file.close()
    return types


def _architecture(config) -> str:
    arch = ARCHITECTURES.get(config.model_type)
    if arch is None:
        raise ValueError(
            f"model_type {config.model_type!r} has no GGUF writer here ({', '.join(sorted(ARCHITECTURES))} have); "
            "convert it with llama.cpp's convert_hf_to_gguf.py."
        )
    if config.hidden_act != "silu":
        raise ValueError(f"llama.cpp computes {arch} with silu, this model has hidden_act {config.hidden_act!r}.")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ValueError(f"llama.cpp's {arch} has no sliding window, this model has {config.sliding_window} tokens.")
    return arch


def _arch_key(gguf, arch: str):
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_metadata(writer, config, arch: str) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    if config.name_or_path:
        writer.add_name(os.path.basename(os.path.normpath(config.name_or_path)))
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch == "minicpm":
        writer.add_embedding_scale(float(config.scale_emb))
        writer.add_residual_scale(config.residual_scale)
        writer.add_logit_scale(config.logits_scaling)
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "longrope" and arch == "minicpm":
        original = rope["original_max_position_embeddings"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(original)
        ratio = config.max_position_embeddings / original
        if ratio > 1:  # the released models' rule, see MiniCPM4RotaryEmbedding
            writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(ratio) / np.log(original))))
    elif kind not in ("default", "llama3"):
        raise ValueError(
            f"rope_type {kind!r} is not written for llama.cpp's {arch}; default, linear and llama3 are, and longrope "
            "for MiniCPM4."
        )


def _rope_tensors(config) -> list[tuple[str, torch.Tensor]]:
    """LongRoPE's factors, and llama3's as what each frequency is divided by; float32 `[head_dim / 2]`."""
    rope = config.rope_parameters
    if rope["rope_type"] == "longrope":
        return [(f"rope_factors_{kind}.weight", torch.tensor(rope[f"{kind}_factor"])) for kind in ("long", "short")]
    if rope["rope_type"] == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        size = _head_dim(config)
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
        return [("rope_freqs.weight", plain / scaled)]
    return []


def _own_name(names, name: str, arch: str) -> str:
    own = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if own is None:
        raise ValueError(f"llama.cpp's {arch} has no place for tensor {name!r}.")
    return own


def _row_order(name: str, config, arch: str) -> torch.Tensor | None:
    """int64 `[O]`: the rows of q or k as pairs (first half, second half) of each head, or `None`."""
    kind = name.rsplit(".", 1)[-1]
    if arch not in PAIRWISE_ROTATION or kind not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
    rows = torch.arange(heads * _head_dim(config))
    return rows.reshape(heads, 2, -1).transpose(1, 2).flatten()


def _reordered(name: str, tensor: torch.Tensor, config, arch: str) -> torch.Tensor:
    order = _row_order(name.rpartition(".")[0], config, arch)
    return tensor if order is None else tensor[order]


def _take_rows(weight: QuantizedWeight, order: torch.Tensor | None) -> QuantizedWeight:
    if order is None:
        return weight
    taken = copy.copy(weight)
    taken.codes, taken.scales, taken.zeros = weight.codes[order], weight.scales[order], weight.zeros[order]
    return taken


def _add_quantized(writer, name: str, own: str, weight: QuantizedWeight, quantization: str) -> str:
    import gguf

    if quantization in ("F16", "F32"):
        dtype = torch.float16 if quantization == "F16" else torch.float32
        if not torch.equal(weight.scales.to(dtype).to(weight.scales.dtype), weight.scales):
            raise LossyExport(
                f"{name}: its scales are not float16 numbers, and {quantization} would round them. Use "
                "quantization='F32'."
            )
        return _add_floats(writer, own, weight.dequantize(dtype), quantization)
    try:
        kind, blocks = gguf_blocks(weight, quantization)
    except LossyExport as error:
        raise LossyExport(f"{name}: {error}") from error
    writer.add_tensor(own, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    return kind


def _add_floats(writer, own: str, tensor: torch.Tensor, kind: str) -> str:
    import gguf

    if kind == "auto":
        kind = DTYPES[tensor.dtype]
    tensor = tensor.detach().cpu().contiguous()
    if kind == "BF16":
        array = tensor.to(torch.bfloat16).view(torch.uint8).numpy()
        writer.add_tensor(own, array, raw_dtype=gguf.GGMLQuantizationType.BF16)
        return kind
    rounded = tensor.to(torch.float32 if kind == "F32" else torch.float16)
    if not torch.equal(rounded.isfinite(), tensor.isfinite()):
        raise LossyExport(f"{own} has values beyond {kind}'s range; use float_type='F32' or 'BF16'.")
    writer.add_tensor(own, rounded.numpy())
    return kind


def _file_type(gguf, types: dict[str, str]) -> int:
    """llama.cpp shows it to people: the type of most matrices."""
    matrices = [kind for name, kind in types.items() if ".attn" in name or ".ffn" in name]
    matrices = [kind for kind in matrices if kind != "F32"] or ["F32"]
    most = max(sorted(set(matrices)), key=matrices.count)
    return int(gguf.LlamaFileType["ALL_F32" if most == "F32" else f"MOSTLY_{most}"])


__all__ = ["LossyExport", "gptq_to_gguf", "save_gguf"]
