"""
What Transformers calls for `attn_implementation="infllm_v2"`: the attention function and its mask function.

Works for any Llama-like model. MiniCPM4 also hands over what its cache layers keep; for other models the compressed
keys are computed from the keys of the call.

Shape letters: `B` batch, `S` query tokens, `N` key tokens, `H` query heads, `G` key/value heads, `D` head size.
"""

from __future__ import annotations

import torch

from .backend import infllm_v2_attention
from .configuration import InfLLMv2Config


ATTN_IMPLEMENTATION = "infllm_v2"


def infllm_v2_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """
    The padding mask as it is (`[B, N]`, bool), or `None` where nothing is padded; causality is the rule's own.

    Raises:
        ValueError: a mask that does not cover all keys, or a static cache (whose keys run ahead of the queries).
    """
    if isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_length + kv_offset:
        raise ValueError(
            "InfLLM v2 needs a dynamic cache, and this one is static or sliding. Leave cache_implementation unset (or "
            '"dynamic", "offloaded"), or use attn_implementation="sdpa".'
        )
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected [batch, cached + new tokens] = "
            f"[{batch_size}, {kv_length}]."
        )
    return None if bool(attention_mask.all()) else attention_mask.bool()


def packed_segments(
    position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, batch: int
) -> list[list[tuple[int, int]]] | None:
    """
    Where the sequences packed into each row begin and end: a list of (start, stop) a row, or `None` where no row holds
    more than one. A new sequence begins where `position_ids` (`[B or 1, S]`) does not go on by one.
    """
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return None
    breaks = position_ids[:, 1:] - position_ids[:, :-1] != 1
    if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] >= position_ids.shape[1]:
        tokens = attention_mask[:, -position_ids.shape[1] :].bool()
        breaks = breaks & tokens[:, 1:] & tokens[:, :-1]  # jumps in or next to padding separate nothing
    if not bool(breaks.any()):
        return None
    segments = []
    for row in breaks.expand(batch, -1):
        cuts = [0, *(row.nonzero().squeeze(1) + 1).tolist(), position_ids.shape[1]]
        segments.append(list(zip(cuts[:-1], cuts[1:])))
    return segments


def infllm_v2_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    InfLLM v2 behind Transformers' attention interface.

    Args:
        query (`[B, H, S, D]`), key and value (`[B, G, N, D]`), attention_mask (`[B, N]` or `None`).
        kwargs: `infllm_v2_config`, `selection_query`, `selection_key`, `compressed_keys` and `segments` from MiniCPM4;
            `position_ids` from other models.

    Returns:
        output `[B, S, H, D]`, and no attention weights.

    Raises:
        ValueError: dropout on the attention weights, packed rows over a filled cache, or what
            `infllm_v2_attention` refuses.
    """
    if dropout:
        raise ValueError(
            f"attention_dropout={dropout} is not available with InfLLM v2, which never forms the weights. Set "
            'config.attention_dropout = 0.0, or use attn_implementation="eager".'
        )
    config = kwargs.get("infllm_v2_config")
    if config is None:
        sparse_config = getattr(module.config, "sparse_config", None)
        config = InfLLMv2Config() if sparse_config is None else InfLLMv2Config.from_dict(sparse_config)
    if config.use_nope and kwargs.get("selection_query") is None:
        raise ValueError(
            f"use_nope selects with un-rotated queries and keys, which {type(module).__name__} does not hand over: "
            "only MiniCPM4 does. Set use_nope to false in sparse_config, or convert the model (llama_to_minicpm4)."
        )
    if "segments" in kwargs:
        segments = kwargs["segments"]
    else:
        segments = packed_segments(kwargs.get("position_ids"), attention_mask, query.shape[0])
    selection = {name: kwargs.get(name) for name in ("selection_query", "selection_key")}

    if segments is None:
        output = infllm_v2_attention(
            query,
            key,
            value,
            config,
            attention_mask=attention_mask,
            compressed_keys=kwargs.get("compressed_keys"),
            scaling=scaling,
            **selection,
        )
    else:
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                "position_ids restart inside a call that continues a cache: packed sequences cannot share cached "
                "text. Pass packed rows without past_key_values."
            )
        output = _packed(query, key, value, config, attention_mask, segments, scaling, selection)
    return output.transpose(1, 2).contiguous(), None


def _packed(query, key, value, config, attention_mask, segments, scaling, selection):
    """Every packed sequence on its own, as if it were a row."""
    rows = []
    for row, bounds in enumerate(segments):
        parts = []
        for start, stop in bounds:
            own = (slice(row, row + 1), slice(None), slice(start, stop))
            parts.append(
                infllm_v2_attention(
                    query[own],
                    key[own],
                    value[own],
                    config,
                    attention_mask=None if attention_mask is None else attention_mask[row : row + 1, start:stop],
                    scaling=scaling,
                    **{name: None if tensor is None else tensor[own] for name, tensor in selection.items()},
                )
            )
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)
