"""
InfLLM v2 as one call: compress, score, select, attend, with the operators of `ops`.

A query that has nothing to choose from yet, or stands before `dense_len`, reads everything before it.

Shape letters: `B` batch, `S` query tokens, `N` key tokens, `H` query heads, `G` key/value heads, `D` head size, `M`
blocks, `T` selected blocks, `K` fine and `C` coarse compressed keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention

from .ops import (
    _block_size,
    _groups,
    _selection,
    _tensors,
    _windows,
    block_scores,
    block_scores_decode,
    compress_keys,
    row_bounds,
    select_blocks,
    sparse_attention,
    sparse_attention_decode,
)


# Coarse means are this much wider than the fine ones (MiniCPM4.1).
COARSE_RATIO = 4
# Up to this many queries a row, splitting each query's blocks over programs beats tiles of queries.
DECODE_QUERIES = 16
# Bytes of block scores held at once during prefill.
SCORE_BYTES = 1 << 28


def infllm_v2_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    init_blocks: int = 1,
    block_size: int = 64,
    window_size: int = 2048,
    topk: int = 64,
    dense_len: int = 8192,
    dense_switch: str = "position",
    longest: int | None = None,
    starts: list[int] | None = None,
    selection_query: torch.Tensor | None = None,
    selection_key: torch.Tensor | None = None,
    compressed_keys: Callable[[], tuple[torch.Tensor, torch.Tensor]] | tuple[torch.Tensor, torch.Tensor] | None = None,
    scaling: float | None = None,
    return_blocks: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""
    Causal block-sparse attention of the last `S` of `N` positions (MiniCPM4, arXiv 2506.07900, section 2.1). The
    fields are those of a checkpoint's `sparse_config`; the defaults are the released values.

    Args:
        query (`[B, H, S, D]`), key and value (`[B, G, N, D]`): rotated queries and keys, features next to each other.
        dense_len: queries at positions `p` with `p + 1 < dense_len` read everything; -1: always sparse.
        dense_switch: `"position"`, or `"call"`: the whole call is dense iff `longest` (tokens of the longest row, `N`
            by default) is below `dense_len`.
        starts: first slot of each row (left padding), by default 0.
        selection_query (`[B, H, S, D]`), selection_key (`[B, G, N, D]`): choose blocks with these (un-rotated)
        tensors. compressed_keys (fine `[B, G, K, D]`, coarse `[B, G, C, D]`,
        or a function that gives them): as kept by a cache,
            each row counted from its first token; computed from the keys if absent.
        scaling: factor on the logits, `D ** -0.5` if absent.

    Returns:
        output `[B, H, S, D]`, 0 before a row's first token; with `return_blocks` also which blocks each query read,
        bool `[B, G, S, M]`, counted from each row's first token.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or settings that contradict each other.
    """
    _tensors(4, query=query, key=key, value=value)
    if key.shape != value.shape or query.shape[0] != key.shape[0] or not 0 < query.shape[2] <= key.shape[2]:
        raise ValueError(
            f"infllm-v2: query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must be "
            "[batch, heads, tokens, head size], key and value alike, the queries being the last of the positions, at "
            "least one."
        )
    _groups(query.shape[1], key.shape[1], query.shape[3], key.shape[3])
    _block_size(block_size)
    _windows(kernel_size, kernel_stride, COARSE_RATIO, block_size)
    if dense_switch not in ("position", "call"):
        raise ValueError(f"infllm-v2: dense_switch must be 'position' or 'call', got {dense_switch!r}.")
    batch, heads, length, size = query.shape
    groups, total = key.shape[1:3]
    starts = [0] * batch if starts is None else list(starts)
    if not batch:
        blocks = torch.zeros((0, groups, length, -(-total // block_size)), dtype=torch.bool, device=query.device)
        return (torch.empty_like(query), blocks) if return_blocks else torch.empty_like(query)
    if len(starts) != batch or not all(0 <= start < total for start in starts):
        raise ValueError(f"infllm-v2: starts must name a slot below {total} for each of {batch} rows, got {starts}.")
    window_blocks = window_size // block_size
    num_selected = topk + window_blocks
    _selection(num_selected, init_blocks, window_blocks)
    covered = num_selected * block_size
    if dense_len == -1:
        first_sparse = covered
    elif dense_switch == "call":
        longest = total if longest is None else longest
        first_sparse = longest if longest < dense_len else covered
    else:
        first_sparse = max(dense_len - 1, covered)
    windows = {"size": kernel_size, "stride": kernel_stride, "ratio": COARSE_RATIO}
    choice = {"init_blocks": init_blocks, "window_blocks": window_blocks, "block_size": block_size}
    scaling = size**-0.5 if scaling is None else scaling
    selection_query = query if selection_query is None else selection_query
    selection_key = key if selection_key is None else selection_key

    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if length <= DECODE_QUERIES and not needs_grad and all(total - start >= length for start in starts):
        compressed = _compressed(compressed_keys, selection_key, starts, windows)
        output, chosen = _decode(
            query, key, value, selection_query, compressed, starts, first_sparse, num_selected, windows, choice,
            scaling, return_blocks,
        )  # fmt: skip
        blocks = _as_map(chosen, batch, -(-total // block_size)) if return_blocks else None
        return (output, blocks) if return_blocks else output

    outputs, maps = [], []
    for row, start in enumerate(starts):
        padding = max(start - (total - length), 0)
        own = slice(row, row + 1)
        compressed = _compressed(compressed_keys, selection_key, starts, windows, row)
        output, blocks = _prefill(
            query[own, :, padding:], key[own, :, start:], value[own, :, start:], selection_query[own, :, padding:],
            compressed, first_sparse, num_selected, windows, choice, scaling, return_blocks,
        )  # fmt: skip
        outputs.append(pad(output, (0, 0, padding, 0)) if padding else output)
        if return_blocks:
            maps.append(pad(blocks, (0, -(-total // block_size) - blocks.shape[-1], padding, 0)))
    output = outputs[0] if batch == 1 else torch.cat(outputs)
    return (output, torch.cat(maps)) if return_blocks else output


def _compressed(given, key, starts, windows, row=None):
    """A function giving fine and coarse keys, of all rows `[B, G, K, D]` or of one row packed `[K, G, D]`."""

    def compute(row):
        own = key[row, :, starts[row] :].detach().transpose(0, 1)
        return compress_keys(own, _bounds(own.shape[0], own.device), own.shape[0], **windows)

    def get():
        kept = given() if callable(given) else given
        if row is not None:
            return compute(row) if kept is None else tuple(keys[row].detach().transpose(0, 1) for keys in kept)
        if kept is not None:
            return kept
        rows = [compute(index) for index in range(len(starts))]
        return tuple(_stack([pair[kind].transpose(0, 1) for pair in rows]) for kind in (0, 1))

    return get


def _stack(rows):
    longest = max(keys.shape[1] for keys in rows)
    return torch.stack([pad(keys, (0, 0, 0, longest - keys.shape[1])) for keys in rows])


def _bounds(tokens: int, device) -> torch.Tensor:
    """`cu_seqlens` of one row, shared by the layers of a step."""
    return row_bounds(tokens, device) if torch.compiler.is_compiling() else _keep_bounds(tokens, device)


_keep_bounds = functools.lru_cache(maxsize=64)(row_bounds)


def _row_tensors(starts: tuple[int, ...], total: int, device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens and first slot of each row (int32 `[B]`; no slots where all begin at 0). One step's layers share them."""
    if torch.compiler.is_compiling():
        return _make_row_tensors(starts, total, device)
    return _keep_row_tensors(starts, total, device)


def _make_row_tensors(starts, total, device):
    lengths = torch.tensor([total - start for start in starts], dtype=torch.int32, device=device)
    return lengths, torch.tensor(starts, dtype=torch.int32, device=device) if any(starts) else None


_keep_row_tensors = functools.lru_cache(maxsize=4)(_make_row_tensors)


def _decode(
    query,
    key,
    value,
    selection_query,
    compressed,
    starts,
    first_sparse,
    num_selected,
    windows,
    choice,
    scaling,
    return_blocks,
):
    """A few queries a row, all rows in one go."""
    batch, _, length, _ = query.shape
    total = key.shape[2]
    device, block_size = query.device, choice["block_size"]
    queries = query.transpose(1, 2)
    lengths, offsets = _row_tensors(tuple(starts), total, device)
    first = [total - start - length for start in starts]
    all_sparse = min(first) >= first_sparse
    any_sparse = max(first) + length > first_sparse
    scores = None
    if any_sparse:
        fine, coarse = compressed()
        scores = block_scores_decode(
            selection_query.transpose(1, 2),
            fine,
            coarse,
            lengths,
            total - min(starts),
            block_size=block_size,
            scaling=scaling,
            **windows,
        )
    attend = {"starts": offsets, "scaling": scaling}
    if all_sparse and not return_blocks:
        output = sparse_attention_decode(
            queries, key, value, lengths, scores=scores, num_selected=num_selected, **choice, **attend
        )
        return output.transpose(1, 2), None

    # Rows before `first_sparse` read everything: as a list of all their blocks.
    positions = (lengths[:, None] - length + torch.arange(length, dtype=torch.int32, device=device)).flatten()
    dense = positions < first_sparse
    upto = -(-(total - min(starts)) // block_size) if not any_sparse else -(-min(first_sparse, total) // block_size)
    every = torch.arange(max(upto, num_selected if any_sparse else 0), dtype=torch.int32, device=device)
    blocks = torch.where((every <= positions[:, None] // block_size) & dense[:, None], every, -1)
    blocks = blocks.expand(key.shape[1], -1, -1)
    if any_sparse:
        chosen = select_blocks(scores, positions, num_selected, **choice)
        chosen = pad(chosen, (0, blocks.shape[-1] - chosen.shape[-1]), value=-1)
        blocks = torch.where(dense[:, None], blocks, chosen)
    blocks = blocks.contiguous()
    output = sparse_attention_decode(queries, key, value, lengths, blocks=blocks, block_size=block_size, **attend)
    return output.transpose(1, 2), blocks


def _prefill(
    query, key, value, selection_query, compressed, first_sparse, num_selected, windows, choice, scaling, return_blocks
):
    """Many queries of one row."""
    _, heads, length, size = query.shape
    groups, total = key.shape[1:3]
    block_size = choice["block_size"]
    first = total - length
    dense = min(max(first_sparse - first, 0), length)
    outputs, maps = [], []
    if dense:
        outputs.append(_dense(query[:, :, :dense], key[:, :, : first + dense], value[:, :, : first + dense], scaling))
        if return_blocks:
            own = torch.arange(first, first + dense, device=query.device) // block_size
            past = torch.arange(-(-total // block_size), device=query.device) <= own[:, None]
            maps.append(past.expand(1, groups, -1, -1))
    if dense < length:
        fine, coarse = compressed()
        rows = selection_query[0, :, dense:].detach().transpose(0, 1)
        chosen = []
        step = max(SCORE_BYTES // (4 * groups * -(-total // block_size)), 64)
        for begin in range(0, rows.shape[0], step):
            part = rows[begin : begin + step]
            upto = first + dense + begin + part.shape[0]
            scores = block_scores(
                part, fine, coarse, _bounds(part.shape[0], query.device), _bounds(upto, query.device), part.shape[0],
                upto, block_size=block_size, scaling=scaling, **windows,
            )  # fmt: skip
            positions = torch.arange(upto - part.shape[0], upto, dtype=torch.int32, device=query.device)
            blocks = select_blocks(scores, positions, num_selected, **choice)
            chosen.append(pad(blocks, (0, num_selected - blocks.shape[-1]), value=-1))
        blocks = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=1)
        output, _ = sparse_attention(
            query[0, :, dense:].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), blocks,
            _bounds(length - dense, query.device), _bounds(total, query.device), length - dense, total,
            block_size=block_size, scaling=scaling,
        )  # fmt: skip
        outputs.append(output.transpose(0, 1)[None])
        if return_blocks:
            maps.append(_as_map(blocks, 1, -(-total // block_size)))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output, torch.cat(maps, dim=2) if return_blocks else None


def _dense(query, key, value, scaling):
    length, total = query.shape[2], key.shape[2]
    gqa = query.shape[1] != key.shape[1]
    if length == total:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=gqa)
    if gqa and query.dtype == torch.float32:  # no fused form takes grouped heads, a bias and float32 together
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
        gqa = False
    bias = causal_lower_right(length, total)
    if query.device.type == "cpu":  # the bias object has no CPU path of its own
        bias = torch.arange(total) <= torch.arange(total - length, total)[:, None]
    return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=gqa)


def _as_map(blocks: torch.Tensor, batch: int, num_blocks: int) -> torch.Tensor:
    """Indices `[G, B * S, T]` as bool `[B, G, S, M]`."""
    groups = blocks.shape[0]
    read = torch.zeros((*blocks.shape[:2], num_blocks + 1), dtype=torch.bool, device=blocks.device)
    read.scatter_(-1, blocks.long().masked_fill(blocks < 0, num_blocks), True)
    return read[..., :num_blocks].view(groups, batch, -1, num_blocks).transpose(0, 1)
