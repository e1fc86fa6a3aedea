r"""
InfLLM v2 with the answers of `reference`, in memory of the blocks that are read and never `[H, S, N]`.

Prefill: the blocks that every query of a tile reads (initial blocks and window) are one dense attention per tile; the
freely chosen ones are grouped by block, so that each block meets all its queries in one matrix product. Decode: the
chosen blocks are gathered into a reused buffer and read once. Training recomputes the products block by block.

Shape letters: `B` batch, `S` query tokens, `N` key tokens, `H` query heads, `G` key/value heads, `R` query heads a
group, `D` head size, `M` blocks, `K` compressed keys. Rows have no padding here (see `backend`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from .configuration import InfLLMv2Config
from .reference import visible_windows


# Queries worked on together: enough that a block meets many of them, few enough that their state stays small.
CHUNK = 2048
# Queries scored together: their scores against all compressed keys are what selection holds in memory at once.
SCORE_CHUNK = 64
# Up to this many queries, gathering each one's blocks beats grouping the queries by block.
GATHER_MAX = 8
# Blocks gathered at once: of one head, 1 MB in float32 at the released sizes.
GATHER_BLOCKS = 32
# Mask rows built at once where many queries attend densely over a longer past.
DENSE_CHUNK = 512


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: InfLLMv2Config,
    *,
    selection_query: torch.Tensor,
    compressed_keys: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    scaling: float,
    longest: int,
    return_blocks: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Same arguments, shapes and results as `reference.attend`."""
    length, total = query.shape[2], key.shape[2]
    first = total - length
    dense = min(max(config.first_sparse_position(longest) - first, 0), length)
    outputs, blocks = [], []
    if dense:
        upto = first + dense
        outputs.append(dense_attention(query[:, :, :dense], key[:, :, :upto], value[:, :, :upto], scaling))
        if return_blocks:
            own = torch.arange(first, upto, device=query.device) // config.block_size
            num_blocks = -(-total // config.block_size)
            past = torch.arange(num_blocks, device=query.device) <= own[:, None]
            blocks.append(past.expand(key.shape[0], key.shape[1], -1, -1))
    if dense < length:
        rest, selection_query = query[:, :, dense:], selection_query[:, :, dense:].detach()
        fine, coarse = (keys.detach() for keys in compressed_keys())
        needs_grad = torch.is_grad_enabled() and (rest.requires_grad or key.requires_grad or value.requires_grad)
        arguments = (fine, coarse, config, scaling)
        if needs_grad:
            pieces = [_GroupedAttention.apply(rest, key, value, selection_query, *arguments, return_blocks)]
        elif rest.shape[2] <= GATHER_MAX:
            chosen = _select(selection_query, fine, coarse, first + dense, total, config, scaling)
            pieces = [(_gather_attention(rest, key, value, chosen, config, scaling), chosen)]
        else:
            # Up to half as much again as a query reads, reading all under a mask is faster than picking.
            masked = 3 * config.selected_blocks * config.block_size // 2 - (first + dense)
            masked = min(max(masked, 0), rest.shape[2])
            upto = first + dense + masked
            pieces = []
            if masked:
                pieces.append(
                    _masked_attention(
                        rest[:, :, :masked], key[:, :, :upto], value[:, :, :upto], selection_query, *arguments
                    )
                )
            if masked < rest.shape[2]:
                late = (rest[:, :, masked:], key, value, selection_query[:, :, masked:])
                pieces.append(_GroupedAttention.apply(*late, *arguments, return_blocks))
        for output, chosen in pieces:
            outputs.append(output)
            if return_blocks:
                blocks.append(pad(chosen, (0, -(-total // config.block_size) - chosen.shape[-1])))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output, torch.cat(blocks, dim=2) if return_blocks else None


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention of the last `S` of `N` positions; query `[B, H, S, D]`, key and value `[B, G, N, D]`."""
    batch, heads, length, size = query.shape
    groups, total = key.shape[1:3]
    if length == 1:
        # One query sees everything: folding the group into the query axis reads each key once, not once a head.
        folded = query.reshape(batch, groups, heads // groups, size)
        return scaled_dot_product_attention(folded, key, value, scale=scaling).reshape(query.shape)
    gqa = heads != groups
    if length == total:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=gqa)
    outputs = []
    for start in range(0, length, DENSE_CHUNK):
        rows = query[:, :, start : start + DENSE_CHUNK]
        begin = total - length + start
        end = begin + rows.shape[2]
        mask = _causal_mask(begin, end, 0, end, query.device)
        outputs.append(
            scaled_dot_product_attention(
                rows, key[:, :, :end], value[:, :, :end], attn_mask=mask, scale=scaling, enable_gqa=gqa
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _causal_mask(begin: int, end: int, low: int, high: int, device) -> torch.Tensor:
    """Keys `low ... high` at or before queries `begin ... end` (bool)."""
    return torch.arange(low, high, device=device) <= torch.arange(begin, end, device=device)[:, None]


def _select(
    query: torch.Tensor,
    fine: torch.Tensor,
    coarse: torch.Tensor,
    begin: int,
    total: int,
    config: InfLLMv2Config,
    scaling: float,
) -> torch.Tensor:
    """
    Blocks that the queries at positions `begin ...` read; bool `[B, G, S, M]`, `M` the blocks of `total` tokens.

    `reference.block_scores` and `select_blocks`, a few queries at a time and in place.
    """
    batch, heads, length, size = query.shape
    groups = fine.shape[1]
    num_blocks = -(-total // config.block_size)
    chosen = torch.zeros(batch, groups, length, num_blocks, dtype=torch.bool, device=query.device)
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = query.reshape(batch * groups, heads // groups, length, size).to(dtype) * scaling
    fine = fine.reshape(batch * groups, -1, size).to(dtype).transpose(1, 2)
    coarse = coarse.reshape(batch * groups, -1, size).to(dtype).transpose(1, 2)
    flat = chosen.view(batch * groups, length, num_blocks)
    for start in range(0, length, SCORE_CHUNK):
        stop = min(start + SCORE_CHUNK, length)
        span = (begin + start, begin + stop)
        upto = -(-span[1] // config.block_size)
        for pair in range(batch * groups) if stop - start > 1 else [slice(None)]:
            rows = query[pair, ..., start:stop, :]
            scores = _block_scores(rows, fine[pair], coarse[pair], span, upto, config)
            flat[pair, start:stop, :upto] = _top_blocks(scores, span, config)
    return chosen


def _block_scores(query, fine, coarse, span, num_blocks, config):
    """Block scores `[..., S, M]`: scaled query `[..., R, S, D]` at positions `span`, compressed keys `[..., D, K]`."""
    begin, end = span
    rows = query.flatten(-3, -2)
    few = rows.shape[-2] <= rows.shape[-1]  # fewer rows than features: see _gather_attention

    def scores(keys, is_coarse):
        size, stride = config.windows(is_coarse)
        first, count = (max((position + 1 - size) // stride + 1, 0) for position in (begin, end - 1))
        logits = (keys[..., :count].mT @ rows.mT).mT if few else rows @ keys[..., :count]
        hidden = None
        if first < count:  # seen by the last query and not yet by the first
            seen = visible_windows(torch.arange(begin, end, device=query.device), size, stride)[:, None]
            hidden = torch.arange(first, count, device=query.device) >= seen
        return logits.unflatten(-2, query.shape[-3:-1]), hidden, first

    logits, hidden, first = scores(coarse, True)
    if hidden is not None:
        logits[..., first:].masked_fill_(hidden, -torch.inf)
    normaliser = logits.logsumexp(-1, keepdim=True)
    weight, hidden, first = scores(fine, False)
    weight = weight.sub_(normaliser).exp_().sum(-3)
    if hidden is not None:
        weight[..., first:].masked_fill_(hidden, 0)
    blind = min(config.windows(coarse=True)[0] - 1 - begin, end - begin)
    if blind > 0:  # no coarse key yet
        weight[..., :blind, :] = 0

    step = config.block_size // config.kernel_stride
    return pool_windows(pad(weight, (0, num_blocks * step - weight.shape[-1])), num_blocks, config)


def pool_windows(weight: torch.Tensor, num_blocks: int, config: InfLLMv2Config) -> torch.Tensor:
    """The largest weight of the windows that overlap each block; `weight` has those of whole blocks, `[..., K]`."""
    # A block overlaps the windows that start in it and the `before` windows that reach into it.
    step = config.block_size // config.kernel_stride
    before = (config.kernel_size - 1) // config.kernel_stride
    padded = pad(weight, (before, 0))
    best = weight.unflatten(-1, (num_blocks, step)).amax(-1)
    for shift in range(before):
        best = torch.maximum(best, padded[..., shift::step][..., :num_blocks])
    return best


def best_blocks(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` best of the last axis, bool: everything above the last admitted score, then ties from the left."""
    least = scores.topk(min(count, scores.shape[-1]), dim=-1).values[..., -1:]
    above, tied = scores > least, scores == least
    room = count - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


def _top_blocks(scores, span, config):
    """`reference.select_blocks` without a sort."""
    begin, end = span
    scores = scores.clamp_max_(torch.finfo(scores.dtype).max)
    if end - begin == 1:
        own = begin // config.block_size
        scores[..., max(own - config.window_blocks, 0) :] = torch.inf
        scores[..., : config.init_blocks] = torch.inf
        future = None
    else:
        block = torch.arange(scores.shape[-1], device=scores.device)
        own = torch.arange(begin, end, device=scores.device)[:, None] // config.block_size
        forced = (block < config.init_blocks) | (block >= own - config.window_blocks)
        future = block > own
        scores.masked_fill_(forced, torch.inf).masked_fill_(future, -torch.inf)
    if config.selected_blocks >= scores.shape[-1]:
        chosen = torch.ones_like(scores, dtype=torch.bool)
    else:
        chosen = best_blocks(scores, config.selected_blocks)
    return chosen if future is None else chosen & ~future


def _masked_attention(query, key, value, selection_query, fine, coarse, config, scaling):
    """The last `S` queries over all keys, the blocks not chosen hidden by a mask, some queries at a time."""
    batch, heads, length, size = query.shape
    groups, total = key.shape[1:3]
    first = total - length
    chosen = _select(selection_query[:, :, :length], fine, coarse, first, total, config, scaling)
    grouped = query.reshape(batch * groups, heads // groups, length, size)
    output = grouped.new_empty(grouped.shape)
    tokens = torch.arange(total, device=query.device)
    for start in range(0, length, DENSE_CHUNK):
        stop = min(start + DENSE_CHUNK, length)
        end = first + stop
        allowed = chosen[:, :, start:stop].flatten(0, 1)[..., tokens[:end] // config.block_size]
        allowed &= _causal_mask(first + start, end, 0, end, query.device)
        keys, values = (
            tensor[:, :, :end].reshape(batch * groups, 1, end, size).expand(-1, heads // groups, -1, -1)
            for tensor in (key, value)
        )
        output[:, :, start:stop] = scaled_dot_product_attention(
            grouped[:, :, start:stop], keys, values, attn_mask=allowed[:, None], scale=scaling
        )
    return output.view(query.shape), chosen


_scratch = threading.local()


def _buffer(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A buffer of `shape` kept between calls: allocating it anew costs more than filling it."""
    kept, size = getattr(_scratch, "buffer", None), math.prod(shape)
    if (
        kept is None
        or (kept.dtype, kept.device) != (like.dtype, like.device)
        or kept.numel() < size
        or (kept.is_inference() and not torch.is_inference_mode_enabled())
    ):
        kept = _scratch.buffer = torch.empty(size, dtype=like.dtype, device=like.device)
    return kept[:size].view(shape)


def _gather_attention(query, key, value, chosen, config, scaling):
    """A few queries, each over its own blocks; query `[B, H, S, D]`, chosen bool `[B, G, S, M]`."""
    batch, heads, length, size = query.shape
    groups, total = key.shape[1:3]
    block = config.block_size
    folded = query.reshape(batch * groups, heads // groups, length, size) * scaling
    output = folded.new_empty(folded.shape)
    dtype = torch.promote_types(query.dtype, torch.float32)
    for s in range(length):
        end = total - length + s + 1
        own = (end - 1) // block
        low = max(own - config.window_blocks, 0)
        # Every pair reads equally many blocks: the window, which is one stretch of memory and read in place, and the
        # ones before it, gathered a few at a time into a buffer small enough to stay in the processor's cache.
        index = chosen[:, :, s, :low].nonzero()[:, 2].view(batch * groups, -1)
        parts = index.split(GATHER_BLOCKS, dim=1) if index.numel() else ()
        rows = folded[:, :, s]

        def window(tensor, low=low, end=end):
            return tensor[:, :, low * block : end].reshape(batch * groups, -1, size)

        # Keys times queries, not queries times keys: the tall matrix first is a quarter faster on CPU.
        logits = [_gather(key, part, block) @ rows.mT for part in parts]
        weights = torch.cat([*logits, window(key) @ rows.mT], dim=1).softmax(1, dtype=dtype).to(query.dtype)
        read = weights[:, index.shape[1] * block :].mT @ window(value)
        for part, weight in zip(parts, weights.split(GATHER_BLOCKS * block, dim=1)):
            read.baddbmm_(weight[:, : part.shape[1] * block].mT, _gather(value, part, block))
        output[:, :, s] = read
    return output.view(query.shape)


def _gather(tensor: torch.Tensor, index: torch.Tensor, block: int) -> torch.Tensor:
    """Whole blocks of `[B, G, N, D]` by index `[B * G, T]` into the reused buffer: `[B * G, T * block, D]`."""
    groups, total, size = tensor.shape[1:]
    whole = total // block
    buffer = _buffer(tensor, (*index.shape, block * size))
    for pair in range(index.shape[0]):
        table = tensor[pair // groups, pair % groups, : whole * block].reshape(whole, block * size)
        torch.index_select(table, 0, index[pair], out=buffer[pair])
    return buffer.view(index.shape[0], -1, size)


class _GroupedAttention(torch.autograd.Function):
    """Many queries: select, then attend with the queries grouped by the block they read."""

    @staticmethod
    def forward(ctx, query, key, value, selection_query, fine, coarse, config, scaling, return_blocks):
        batch, heads, length, size = query.shape
        groups, total = key.shape[1:3]
        first = total - length
        keep = return_blocks or any(ctx.needs_input_grad[:3])
        dtype = torch.promote_types(query.dtype, torch.float32)
        output = torch.empty_like(query)
        normaliser = torch.empty(query.shape[:3], dtype=dtype, device=query.device) if keep else None
        kept = []
        for start in range(0, length, CHUNK):
            stop = min(start + CHUNK, length)
            upto = first + stop
            chosen = _select(selection_query[:, :, start:stop], fine, coarse, first + start, upto, config, scaling)
            for b in range(batch):
                for g in range(groups):
                    own = slice(g * heads // groups, (g + 1) * heads // groups)
                    rows = query[b, own, start:stop].to(dtype)
                    k, v = key[b, g, :upto].to(dtype), value[b, g, :upto].to(dtype)
                    result, lse = _grouped_forward(rows, k, v, chosen[b, g], first + start, config, scaling)
                    output[b, own, start:stop] = result
                    if keep:
                        normaliser[b, own, start:stop] = lse
            if keep:
                kept.append(chosen)
        blocks = None
        if keep:
            blocks = torch.zeros(
                batch, groups, length, -(-total // config.block_size), dtype=torch.bool, device=query.device
            )
            for start, chosen in zip(range(0, length, CHUNK), kept):
                blocks[:, :, start : start + chosen.shape[2], : chosen.shape[3]] = chosen
            ctx.mark_non_differentiable(blocks)
        ctx.save_for_backward(query, key, value, output, normaliser, blocks)
        ctx.config, ctx.scaling = config, scaling
        return output, blocks

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, _):
        query, key, value, output, normaliser, blocks = ctx.saved_tensors
        batch, heads, length = query.shape[:3]
        groups, total = key.shape[1:3]
        first = total - length
        dtype = normaliser.dtype
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
        for b in range(batch):
            for g in range(groups):
                own = slice(g * heads // groups, (g + 1) * heads // groups)
                k, v = key[b, g].to(dtype), value[b, g].to(dtype)
                dk, dv = torch.zeros_like(k), torch.zeros_like(v)
                for start in range(0, length, CHUNK):
                    rows = (slice(None), slice(start, start + CHUNK))
                    grad_query[b, own][rows] = _grouped_backward(
                        query[b, own][rows].to(dtype),
                        k,
                        v,
                        output[b, own][rows].to(dtype),
                        grad_output[b, own][rows].to(dtype),
                        normaliser[b, own][rows],
                        blocks[b, g, start : start + CHUNK],
                        first + start,
                        ctx.config.block_size,
                        ctx.scaling,
                        dk,
                        dv,
                    ).to(query.dtype)
                grad_key[b, g], grad_value[b, g] = dk, dv
        return grad_query, grad_key, grad_value, None, None, None, None, None, None


def _grouped_forward(query, key, value, chosen, begin, config, scaling):
    """
    One chunk of one key/value head: query `[R, S, D]` at positions `begin ...`, key and value `[N, D]`, chosen bool
    `[S, M]`. Returns output `[R, S, D]` and the log-sum-exp of the logits `[R, S]`.
    """
    heads, length, size = query.shape
    block = config.block_size
    query = query.transpose(0, 1).mul(scaling)  # [S, R, D]: the rows a block reads lie together
    total = torch.empty_like(query)
    peak = query.new_empty(length, heads, 1)
    mass = query.new_empty(length, heads, 1)

    # The part every query of a tile reads: initial blocks and window, one dense attention a tile (one block long).
    free = chosen.clone()
    start = 0
    while start < length:
        own = (begin + start) // block
        stop = min((own + 1) * block - begin, length)
        low = max(own - config.window_blocks, 0)
        initial = min(config.init_blocks, low)
        free[start:stop, low : own + 1] = False
        free[start:stop, :initial] = False
        end = begin + stop
        keys, values = key[low * block : end], value[low * block : end]
        if initial:
            keys = torch.cat([key[: initial * block], keys])
            values = torch.cat([value[: initial * block], values])
        logits = (query[start:stop].flatten(0, 1) @ keys.T).view(stop - start, heads, -1)
        ahead = ~_causal_mask(begin + start, end, own * block, end, query.device)
        logits[..., -(end - own * block) :].masked_fill_(ahead[:, None], -torch.inf)
        peak[start:stop] = logits.amax(-1, keepdim=True)
        logits.sub_(peak[start:stop]).exp_()
        mass[start:stop] = logits.sum(-1, keepdim=True)
        total[start:stop] = (logits.flatten(0, 1) @ values).view(stop - start, heads, size)
        start = stop

    # The part each query chose: all of these blocks lie before the tile, so no causal mask is needed.
    for index, rows in _queries_by_block(free):
        keys, values = key[index * block : (index + 1) * block], value[index * block : (index + 1) * block]
        logits = (query.index_select(0, rows).flatten(0, 1) @ keys.T).view(len(rows), heads, block)
        highest = peak.index_select(0, rows)
        raised = torch.maximum(highest, logits.amax(-1, keepdim=True))
        sums, partial = mass.index_select(0, rows), total.index_select(0, rows)
        if bool((raised > highest).any()):
            shrink = highest.sub_(raised).exp_()
            sums.mul_(shrink)
            partial.mul_(shrink)
            peak.index_copy_(0, rows, raised)
        logits.sub_(raised).exp_()
        # Read, add, write back: index_add_ takes a path many times slower on CPU.
        mass.index_copy_(0, rows, sums.add_(logits.sum(-1, keepdim=True)))
        partial.view(-1, size).addmm_(logits.flatten(0, 1), values)
        total.index_copy_(0, rows, partial)
    return total.div_(mass).transpose(0, 1), (peak + mass.log()).squeeze(-1).T


def _queries_by_block(chosen: torch.Tensor):
    """Pairs (block, indices of the queries that read it) of a bool `[S, M]`, empty blocks left out."""
    pairs = chosen.T.nonzero()
    counts = torch.bincount(pairs[:, 0], minlength=chosen.shape[1]).tolist()
    for index, rows in enumerate(pairs[:, 1].split(counts)):
        if len(rows):
            yield index, rows


def _grouped_backward(query, key, value, output, grad, normaliser, chosen, begin, block, scaling, dk, dv):
    """Gradient of one chunk's queries `[R, S, D]`; adds the keys' and values' to `dk` and `dv` `[N, D]`."""
    heads, length, size = query.shape
    query, output, grad = (tensor.transpose(0, 1).contiguous() for tensor in (query, output, grad))
    delta = (output * grad).sum(-1, keepdim=True)  # [S, R, 1]
    normaliser = normaliser.T.unsqueeze(-1)
    dq = torch.zeros_like(query)
    positions = torch.arange(begin, begin + length, device=query.device)
    for index, rows in _queries_by_block(chosen):
        span = slice(index * block, min((index + 1) * block, key.shape[0]))
        keys, values = key[span], value[span]
        q, g = query.index_select(0, rows).flatten(0, 1), grad.index_select(0, rows).flatten(0, 1)
        weights = (q @ keys.T).mul_(scaling).view(len(rows), heads, -1).sub_(normaliser.index_select(0, rows)).exp_()
        if span.stop > begin:  # the chunk reaches into this block: hide what lies ahead of each query
            ahead = torch.arange(span.start, span.stop, device=query.device) > positions[rows, None]
            weights.masked_fill_(ahead[:, None], 0)
        dv[span] += weights.flatten(0, 1).T @ g
        slope = (g @ values.T).view_as(weights).sub_(delta.index_select(0, rows)).mul_(weights).mul_(scaling)
        slope = slope.flatten(0, 1)
        dk[span] += slope.T @ q
        partial = dq.index_select(0, rows)
        partial.view(-1, size).addmm_(slope, keys)
        dq.index_copy_(0, rows, partial)
    return dq.transpose(0, 1)
