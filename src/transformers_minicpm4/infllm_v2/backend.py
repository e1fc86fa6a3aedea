"""
The door to InfLLM v2: checks what comes in, separates the rows of a batch, and picks the implementation.

Shape letters: `B` batch, `S` query tokens, `N` key tokens, `H` query heads, `G` key/value heads, `D` head size, `M`
blocks, `K` compressed keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from transformers.utils import logging

from . import blockwise, kernel, reference
from .configuration import IMPLEMENTATION_CHOICES, InfLLMv2Config
from .reference import compress_keys


logger = logging.get_logger(__name__)

IMPLEMENTATIONS = {"reference": reference.attend, "blockwise": blockwise.attend}


def infllm_v2_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: InfLLMv2Config,
    *,
    attention_mask: torch.Tensor | None = None,
    selection_query: torch.Tensor | None = None,
    selection_key: torch.Tensor | None = None,
    compressed_keys: tuple[torch.Tensor, torch.Tensor] | None = None,
    scaling: float | None = None,
    implementation: str = "auto",
    return_blocks: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""
    Causal block-sparse attention in which each query chooses its blocks (MiniCPM4, arXiv 2506.07900, section 2.1).

    The queries are the last `S` of `N` positions. Rows of different length are padded (left for generation, right or
    left for training) and each is computed as if it were alone.

    Args:
        query (`[B, H, S, D]`): rotated queries; `H` a multiple of `G`.
        key, value (`[B, G, N, D]`): rotated keys, and values, of all positions so far; `N >= S`.
        config (`InfLLMv2Config`): the checkpoint's `sparse_config`.
        attention_mask (`[B, N]`, *optional*): non-zero where a token is; one unbroken run in each row.
        selection_query (`[B, H, S, D]`), selection_key (`[B, G, N, D]`): the un-rotated tensors, required by (and only
            read with) `config.use_nope`.
        compressed_keys (fine `[B, G, K, D]`, coarse `[B, G, K', D]`, *optional*): what the cache layer holds, each row
            counted from its first token; rows may have spare entries at the end. Computed here if absent.
        scaling (`float`, *optional*): factor on the logits, defaults to `D ** -0.5`.
        implementation (`str`): `"reference"` (the definition), `"blockwise"` (same answers, memory of the selected
            blocks), `"kernel"` (the Hub kernel that is named; an error where it cannot run) or `"auto"`: what
            `INFLLM_V2_IMPLEMENTATION`, else the config says, and if that is "auto" too, the kernel where it can run.
        return_blocks (`bool`): also return which blocks each query read.

    Returns:
        output `[B, H, S, D]`, zero where a query is padding; with `return_blocks` also bool `[B, G, S, M]`, blocks
        counted from each row's first token.

    Raises:
        ValueError: shapes that do not fit, a mask with holes, missing `use_nope` tensors, an unknown implementation,
            or the kernel asked for where it cannot run.
    """
    _check(query, key, value, config, selection_query, selection_key, compressed_keys)
    name = _name(implementation, config)
    hub_kernel = _kernel(name, config, query, key, value) if name in ("auto", "kernel") else None
    batch, _, _, size = query.shape
    total = key.shape[2]
    if not config.use_nope:
        selection_query, selection_key = query, key
    starts, longest = _rows(attention_mask, batch, total)
    arguments = {
        "starts": starts,
        "longest": longest,
        "selection_query": selection_query,
        "selection_key": selection_key,
        "compressed_keys": compressed_keys,
        "scaling": size**-0.5 if scaling is None else scaling,
        "return_blocks": return_blocks,
    }
    if hub_kernel is not None:
        output, blocks = _all_rows(hub_kernel, query, key, value, config, **arguments)
    else:
        output, blocks = _row_by_row(_implementation(name), query, key, value, config, **arguments)
    return (output, blocks) if return_blocks else output


def _name(argument: str, config: InfLLMv2Config) -> str:
    """The argument's choice, else the environment's, else the config's."""
    name = argument
    if name == "auto":
        name = os.environ.get("INFLLM_V2_IMPLEMENTATION") or config.implementation
    if name not in IMPLEMENTATION_CHOICES:
        raise ValueError(
            f"implementation must be 'reference', 'blockwise', 'kernel' or 'auto', got {name!r} (as an argument, or "
            "in the environment variable INFLLM_V2_IMPLEMENTATION)."
        )
    return name


def _implementation(name: str) -> Callable:
    return IMPLEMENTATIONS.get(name, blockwise.attend)


def _kernel(name: str, config: InfLLMv2Config, query, key, value) -> Callable | None:
    """The kernel that answers, or `None` where `blockwise` must; that is said once, and is an error for "kernel"."""
    attend, reason = kernel.find(config)
    if attend is not None:
        reason = kernel.refusal(query, key, value, config)
        if reason is None and name == "auto":
            reason = kernel.slower(attend, query, key, value)
        if reason is None:
            return attend
    if name == "kernel":
        reason = reason or "no kernel is named (INFLLM_V2_KERNEL=owner/repo, or kernel='owner/repo' in the config)"
        raise ValueError(f"implementation='kernel' cannot run: {reason}; use 'auto' or 'blockwise'.")
    if reason is not None:
        logger.warning_once(f"InfLLM v2 runs its blockwise form: {reason}.")
    return None


def _all_rows(
    attend, query, key, value, config, *, starts, selection_query, selection_key, compressed_keys, **options
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One call of the kernel for all rows."""

    def compressed():  # asked for only where something is selected
        longest = key.shape[2] - min(starts)
        pairs = zip(compressed_keys, (False, True))
        return tuple(_complete(keys, longest, *config.windows(coarse)) for keys, coarse in pairs)

    tensors = (query, key, value, selection_query, selection_key)
    # The kernel reads features that lie next to each other.
    query, key, value, selection_query, selection_key = (
        tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors
    )
    output = attend(
        query,
        key,
        value,
        **{name: getattr(config, name) for name in kernel.RULE},
        starts=starts,
        selection_query=selection_query,
        selection_key=selection_key,
        compressed_keys=None if compressed_keys is None else compressed,
        **options,
    )
    return output if options["return_blocks"] else (output, None)


def _row_by_row(
    attend, query, key, value, config, *, starts, selection_query, selection_key, compressed_keys, **options
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows that begin at one slot together, others on their own."""
    length, total = query.shape[2], key.shape[2]

    def attend_rows(rows: slice, start: int):
        # Queries before `start` are padding: the row begins at its first token.
        padding = max(start - (total - length), 0)
        row_keys = None if selection_key is None else selection_key[rows, :, start:]

        def compressed():  # asked for only where something is selected
            if compressed_keys is None:
                return tuple(compress_keys(row_keys.detach(), *config.windows(coarse)) for coarse in (False, True))
            return tuple(
                _complete(keys[rows], total - start, *config.windows(coarse))
                for keys, coarse in zip(compressed_keys, (False, True))
            )

        output, blocks = attend(
            query[rows, :, padding:],
            key[rows, :, start:],
            value[rows, :, start:],
            config,
            selection_query=selection_query[rows, :, padding:],
            compressed_keys=compressed,
            **options,
        )
        if padding:
            output = torch.nn.functional.pad(output, (0, 0, padding, 0))
        if blocks is not None:
            spare = -(-total // config.block_size) - blocks.shape[-1]
            blocks = torch.nn.functional.pad(blocks, (0, spare, padding, 0))
        return output, blocks

    if len(set(starts)) == 1:
        return attend_rows(slice(None), starts[0])
    parts = [attend_rows(slice(row, row + 1), start) for row, start in enumerate(starts)]
    blocks = torch.cat([part[1] for part in parts]) if options["return_blocks"] else None
    return torch.cat([part[0] for part in parts]), blocks


def row_starts(attention_mask: torch.Tensor) -> tuple[list[int], int]:
    """
    First token of each row of a padding mask (`[B, N]`), and the longest row in tokens.

    Raises:
        ValueError: not two-dimensional, or a row's tokens are not one unbroken run.
    """
    if attention_mask.ndim != 2:
        raise ValueError(
            f"InfLLM v2 takes a padding mask of shape [batch, keys], got {tuple(attention_mask.shape)}; it cannot "
            'honour a custom four-dimensional mask. Use attn_implementation="sdpa" for that.'
        )
    # One mask serves all layers of a step: on a GPU every look at it waits for the device.
    version = None if attention_mask.is_inference() or torch.compiler.is_compiling() else attention_mask._version
    kept = getattr(attention_mask, "_infllm_v2_rows", None) if version is not None else None
    if kept is None or kept[0] != version:
        kept = (version, *_read_rows(attention_mask))
        if version is not None:
            attention_mask._infllm_v2_rows = kept
    return kept[1:]


def _read_rows(attention_mask: torch.Tensor) -> tuple[list[int], int]:
    mask = attention_mask != 0
    starts = mask.int().argmax(-1)
    lengths = mask.sum(-1)
    index = torch.arange(mask.shape[1], device=mask.device)
    run = (index >= starts[:, None]) & (index < (starts + lengths)[:, None])
    if bool((run != mask).any()):
        row = int((run != mask).any(-1).nonzero()[0])
        raise ValueError(
            f"attention_mask row {row} has zeros between its ones; InfLLM v2 needs each row's tokens in one unbroken "
            "run (padding on the left or on the right only). Move the padding to one side."
        )
    return starts.tolist(), int(lengths.max())


def _rows(attention_mask: torch.Tensor | None, batch: int, total: int) -> tuple[list[int], int]:
    if attention_mask is None:
        return [0] * batch, total
    if attention_mask.ndim == 2 and attention_mask.shape != (batch, total):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected [batch, keys] = [{batch}, {total}]."
        )
    return row_starts(attention_mask)


def _complete(keys: torch.Tensor, length: int, size: int, stride: int) -> torch.Tensor:
    count = max((length - size) // stride + 1, 0)
    if keys.shape[2] < count:
        raise ValueError(
            f"compressed_keys has {keys.shape[2]} entries of {size} tokens each, but a row of {length} tokens has "
            f"{count}. Update the cache layer with every key, or pass compressed_keys=None."
        )
    return keys[:, :, :count]


def _check(query, key, value, config, selection_query, selection_key, compressed_keys) -> None:
    if not isinstance(config, InfLLMv2Config):
        raise TypeError(
            f"config must be an InfLLMv2Config, got {type(config).__name__}; use InfLLMv2Config.from_dict."
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, head size], got shape {tuple(tensor.shape)}.")
    batch, heads, length, size = query.shape
    if key.shape != value.shape:
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} must have one shape.")
    groups, total = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != size:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch or head size.")
    if heads % groups:
        raise ValueError(f"{heads} query heads do not divide among {groups} key/value heads.")
    if not 0 < length <= total:
        raise ValueError(
            f"{length} queries for {total} keys: the queries are the last of the positions, at least one."
        )
    if not config.use_nope:
        return
    if selection_query is None or (selection_key is None and compressed_keys is None):
        raise ValueError(
            "use_nope selects with un-rotated tensors: pass selection_query and either selection_key or "
            "compressed_keys."
        )
    if selection_query.shape != query.shape:
        raise ValueError(
            f"selection_query {tuple(selection_query.shape)} must have the shape of query {tuple(query.shape)}."
        )
    if selection_key is not None and selection_key.shape != key.shape:
        raise ValueError(f"selection_key {tuple(selection_key.shape)} must have the shape of key {tuple(key.shape)}.")
