"""
What Transformers looks for in a kernel named as `attn_implementation="<owner>/infllm-v2"`: InfLLM v2 for any
Llama-like model, from the masks that Transformers makes for torch SDPA.

Shape letters: `B` batch, `S` query tokens, `N` key tokens, `H` query heads, `G` key/value heads, `D` head size.
"""

from __future__ import annotations

import torch

from .attention import infllm_v2_attention


# Fields of a model's `sparse_config` that this attention honours, and those it need not look at.
FIELDS = (
    "kernel_size",
    "kernel_stride",
    "init_blocks",
    "block_size",
    "window_size",
    "topk",
    "dense_len",
    "dense_switch",
)
OTHER_FIELDS = ("use_nope", "implementation", "kernel")
# Queries whose mask is compared at once.
CHUNK = 1024


def supports_flash_attn() -> bool:
    """Transformers takes `flash_attn_forward` from a kernel that has this beside it."""
    return True


def flash_attn_forward(
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
    InfLLM v2 behind Transformers' attention interface. The rule's fields are those of `module.config.sparse_config`,
    or the released ones. Compressed keys are computed from the keys of each call.

    Args:
        query (`[B, H, S, D]`), key and value (`[B, G, N, D]`).
        attention_mask (bool `[B, 1, S, N]`): causal, with padding on the left or on the right; `None` where there is
            neither padding nor a cache that runs ahead.

    Returns:
        output `[B, S, H, D]`, and no attention weights.

    Raises:
        ValueError: a mask that is more than causal and padding, dropout, or a setting that sparse attention lacks.
    """
    if dropout:
        raise ValueError(f"infllm-v2: attention_dropout={dropout} is not available; set it to 0 in the config.")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"infllm-v2: {type(module).__name__} asks for {name}, which this attention lacks.")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"infllm-v2: {type(module).__name__} is not causal; this attention only looks back.")
    fields = _fields(getattr(module.config, "sparse_config", None))
    length, total = query.shape[2], key.shape[2]
    starts, used, longest = None, total, total
    if attention_mask is not None:
        starts, used, longest = _rows(attention_mask, query.shape[0], length, total)
    elif 1 < length < total:
        used = longest = length  # a static cache being filled: the keys after the queries are not there yet
    output = infllm_v2_attention(
        query, key[:, :, :used], value[:, :, :used], **fields, starts=starts, longest=longest, scaling=scaling
    )
    return output.transpose(1, 2).contiguous(), None


def _fields(sparse_config) -> dict:
    given = dict(sparse_config or {})
    unknown = sorted(set(given) - {*FIELDS, *OTHER_FIELDS})
    if unknown:
        raise ValueError(
            f"infllm-v2: sparse_config has unknown field(s) {', '.join(unknown)}; known are {', '.join(FIELDS)}."
        )
    if given.get("use_nope"):
        raise ValueError(
            "infllm-v2: use_nope selects with un-rotated queries and keys, which a model does not hand over here. Set "
            'it to false, or use attn_implementation="infllm_v2" of the package transformers_minicpm4.'
        )
    return {name: given[name] for name in FIELDS if name in given}


def _rows(mask: torch.Tensor, batch: int, length: int, total: int) -> tuple[list[int], int, int]:
    """First slot of each row, slots in use, tokens of the longest row; read once a mask, not once a layer."""
    if mask.is_inference():  # no version tells whether it was written to since
        return _read(mask, batch, length, total)
    seen = getattr(mask, "_infllm_v2_rows", None)
    if seen is None or seen[0] != mask._version:
        seen = mask._infllm_v2_rows = (mask._version, _read(mask, batch, length, total))
    return seen[1]


def _read(mask: torch.Tensor, batch: int, length: int, total: int) -> tuple[list[int], int, int]:
    wanted = (batch, 1, length, total)
    if mask.dtype != torch.bool or tuple(mask.shape) not in (wanted, (1, *wanted[1:])):
        raise ValueError(
            f"infllm-v2: the mask is {mask.dtype} {tuple(mask.shape)}; it must be bool [batch, 1, queries, keys] = "
            f"{wanted}. Pass the model a padding mask [batch, keys]."
        )
    mask = mask[:, 0].expand(batch, -1, -1)
    # What its last query sees are the tokens of a row. Slots that no row uses are a static cache's spare ones, unless
    # the queries are all positions: then they are padding on the right.
    last = mask[:, -1].int()
    starts = last.argmax(-1)
    stops = last.cumsum(-1).argmax(-1) + 1
    used = total if length == total else int(stops.max())
    slots = torch.arange(total, device=mask.device)
    tokens = (slots >= starts[:, None]) & (slots < stops[:, None])
    for begin in range(0, length, CHUNK):
        part = mask[:, begin : begin + CHUNK]
        positions = torch.arange(part.shape[1], device=mask.device)[:, None] + used - length + begin
        allowed = tokens[:, None] & (slots <= positions)
        # A query of the padding sees nothing, or with older Transformers everything; it is nobody's first sequence.
        padding = (positions < starts[:, None, None]) & part.all(-1, keepdim=True)
        if bool(((part != allowed) & ~padding).any()):
            raise ValueError(
                "infllm-v2: the mask is more than causal with padding on one side (packed sequences, a sliding "
                'window, a mask of your own), which this attention cannot honour. Use attn_implementation="sdpa".'
            )
    return starts.tolist(), used, int((stops - starts).max())
