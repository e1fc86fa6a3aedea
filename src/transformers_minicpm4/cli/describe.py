"""What a checkpoint is, as plain dictionaries: from its configuration and from the headers of its weights files."""

import copy
from collections import Counter

from .checkpoint import StoredTensor
from .errors import UserError, one_line


# Floating-point types in which weights and caches are kept: safetensors' name, PyTorch's name, bytes.
FLOAT_TYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
}
FLOAT_BYTES = dict(FLOAT_TYPES.values())
# Tokens that the published extension of MiniCPM4-8B and MiniCPM4.1-8B reaches.
EXTENDED_LENGTH = 131_072


def describe_config(config) -> dict:
    """What the configuration alone says, under the names that Transformers' configurations use."""
    config = config.get_text_config()
    try:
        num_heads = config.num_attention_heads
        sizes = {
            "num_hidden_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": num_heads,
            "num_key_value_heads": getattr(config, "num_key_value_heads", None) or num_heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            "vocab_size": config.vocab_size,
            "context_length": context_length(config),
        }
    except AttributeError as error:
        raise UserError(
            f"A configuration of type {config.model_type!r} describes no decoder-only language model "
            f"({one_line(error)}); give a MiniCPM4 or Llama-like checkpoint."
        ) from error
    dtype = getattr(config, "dtype", None)
    return {
        "model_type": config.model_type,
        "architectures": list(config.architectures or []),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        **sizes,
        "tie_word_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
        "rope": describe_rope(config),
        "attention": describe_attention(config),
        "quantization": describe_quantization(config),
    }


def context_length(config) -> int:
    """
    Positions, in tokens, that the checkpoint is meant for.

    The published 128K extension of MiniCPM4 swaps the rotary factors and leaves `max_position_embeddings` as it was,
    so it is known by its factors.
    """
    from transformers_minicpm4.model.conversion import extend_context

    try:
        extended = extend_context(copy.deepcopy(config)).rope_parameters
    except (ValueError, KeyError, AttributeError):  # not a configuration for which an extension is published
        return config.max_position_embeddings
    is_extended = extended["long_factor"] == config.rope_parameters["long_factor"]
    return max(config.max_position_embeddings, EXTENDED_LENGTH if is_extended else 0)


def describe_rope(config) -> dict | None:
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return None
    wanted = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings")
    report = {key: rope[key] for key in wanted if rope.get(key) is not None}
    if rope.get("long_factor"):
        report["long_factor_range"] = [min(rope["long_factor"]), max(rope["long_factor"])]
        report["short_equals_long"] = list(rope["short_factor"]) == list(rope["long_factor"])
    return report


def sparse_settings(config):
    """The `InfLLMv2Config` by which attention runs by default; None if it runs densely."""
    sparse_config = getattr(config, "sparse_config", None)
    if sparse_config is None:
        return None
    from transformers_minicpm4 import InfLLMv2Config

    return InfLLMv2Config.from_dict(sparse_config)


def describe_attention(config) -> dict:
    """Which attention runs by default, and the most that one query reads (in blocks, in tokens)."""
    settings = sparse_settings(config)
    if settings is None:
        return {"mode": "dense", "can_be_sparse": hasattr(config, "sparse_config"), "sparse_config": None}
    return {
        "mode": "infllm_v2",
        "can_be_sparse": True,
        "sparse_config": settings.to_dict(),
        "blocks_per_query": settings.selected_blocks,
        "tokens_per_query": settings.selected_blocks * settings.block_size,
    }


def describe_quantization(config) -> dict | None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    wanted = ("quant_method", "bits", "group_size", "sym", "desc_act", "load_in_4bit", "load_in_8bit")
    return {key: fields[key] for key in wanted if fields.get(key) is not None}


def describe_weights(headers: dict[str, list[StoredTensor]]) -> dict:
    """Totals over all files. Stored elements are counted: packed weights as packed, tied ones once."""
    tensors = [tensor for file in headers.values() for tensor in file]
    elements = Counter()
    for tensor in tensors:
        elements[tensor.dtype] += tensor.num_elements
    floats = [FLOAT_TYPES[dtype][0] for dtype, _ in elements.most_common() if dtype in FLOAT_TYPES]
    return {
        "parameters": sum(elements.values()),
        "tensors": len(tensors),
        "files": len(headers),
        "bytes": sum(tensor.num_bytes for tensor in tensors),
        "elements_by_dtype": dict(elements.most_common()),
        "float_dtype": floats[0] if floats else None,
    }


def kv_cache_bytes(config, num_tokens: int, dtype: str) -> dict[str, int]:
    """
    Bytes of the cache of one sequence: keys and values, and what sparse mode keeps beside them, the compressed keys
    and, with `use_nope`, the un-rotated keys.

    Args:
        num_tokens (`int`): length of the sequence in tokens.
        dtype (`str`): PyTorch's name of the type of the keys.
    """
    facts = describe_config(config)
    # One vector (of one head) per layer and key/value head.
    row = facts["num_hidden_layers"] * facts["num_key_value_heads"] * facts["head_dim"] * FLOAT_BYTES[dtype]
    settings = sparse_settings(config.get_text_config())
    means = unrotated = 0
    if settings is not None:
        unrotated = num_tokens if settings.use_nope else 0
        # Only windows that are complete have a mean.
        for size, stride in (settings.windows(coarse=False), settings.windows(coarse=True)):
            means += max((num_tokens - size) // stride + 1, 0)
    return {
        "keys_and_values": 2 * num_tokens * row,
        "compressed_keys": means * row,
        "unrotated_keys": unrotated * row,
    }
