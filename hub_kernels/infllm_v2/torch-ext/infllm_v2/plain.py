"""
Every operator in plain PyTorch: the definition that the Triton and C++ kernels are checked against, and what runs
where neither can.

Rows of different length lie packed one after another, as in FlashAttention's variable-length functions: row `b` owns
queries `cu_seqlens_q[b] ... cu_seqlens_q[b + 1] - 1` and keys alike; its queries are the last of its positions.

Shape letters: `B` rows, `S` queries of all rows, `N` keys of all rows, `H` query heads, `G` key/value heads, `R = H
/ G` query heads a group, `D` head size, `M` blocks of the longest row, `T` selected blocks, `K` fine and `C` coarse
compressed keys.
"""

from __future__ import annotations

import torch


# Queries whose logits against a whole row are in memory at once.
CHUNK = 256


def compress_keys(key, cu_seqlens, max_seqlen, size, stride, ratio):
    """See `ops.compress_keys`."""
    bounds = cu_seqlens.tolist()
    compressed = []
    for wide, apart in ((size, stride), (size * ratio, stride * ratio)):
        out = key.new_zeros((key.shape[0] // apart, *key.shape[1:]))
        for start, stop in zip(bounds[:-1], bounds[1:]):
            means = _means(key[start:stop], wide, apart)
            out[start // apart : start // apart + len(means)] = means
        compressed.append(out)
    return tuple(compressed)


def _means(key, size, stride):
    """Mean of every complete window of a row `[N, ..., D]`."""
    if key.shape[0] < size:
        return key[:0]
    return key.unfold(0, size, stride).float().mean(-1).to(key.dtype)


def update_compressed_keys(key, fine, coarse, starts, done, lengths, max_new, size, stride, ratio):
    """See `ops.update_compressed_keys`."""
    for b, (start, old, new) in enumerate(zip(starts.tolist(), done.tolist(), lengths.tolist())):
        for out, wide, apart in ((fine, size, stride), (coarse, size * ratio, stride * ratio)):
            first, last = windows(old, wide, apart), windows(new, wide, apart)
            if last > first:
                row = key[b, :, start + first * apart : start + new].transpose(0, 1)
                out[b, :, first:last] = _means(row, wide, apart)[: last - first].transpose(0, 1)


def windows(length: int, size: int, stride: int) -> int:
    """Complete windows of `length` tokens."""
    return max((length - size) // stride + 1, 0)


def block_scores(
    query,
    fine,
    coarse,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    block_size,
    size,
    stride,
    ratio,
    scaling,
):
    """See `ops.block_scores`."""
    groups = fine.shape[1]
    num_blocks = -(-max_seqlen_k // block_size)
    out = query.new_zeros((groups, query.shape[0], num_blocks), dtype=torch.float32)
    if not out.numel():
        return out
    wide = ratio * stride
    for (q0, q1), (k0, k1) in zip(_rows(cu_seqlens_q), _rows(cu_seqlens_k)):
        positions = torch.arange(k1 - k0 - (q1 - q0), k1 - k0, device=query.device)
        keys = fine[k0 // stride : k0 // stride + windows(k1 - k0, size, stride)]
        means = coarse[k0 // wide : k0 // wide + windows(k1 - k0, size * ratio, wide)]
        out[:, q0:q1] = _scores(
            query[q0:q1], keys, means, positions, num_blocks, block_size, size, stride, ratio, scaling
        )
    return out


def block_scores_decode(query, fine, coarse, lengths, positions, max_length, block_size, size, stride, ratio, scaling):
    """See `ops.block_scores_decode`."""
    batch, queries, _, _ = query.shape
    num_blocks = -(-max_length // block_size)
    out = query.new_zeros((fine.shape[1], batch * queries, num_blocks), dtype=torch.float32)
    for b, (length, at) in enumerate(zip(lengths.tolist(), _positions(lengths, positions, queries))):
        keys = fine[b, :, : windows(length, size, stride)].transpose(0, 1)
        means = coarse[b, :, : windows(length, size * ratio, stride * ratio)].transpose(0, 1)
        out[:, b * queries : (b + 1) * queries] = _scores(
            query[b], keys, means, at, num_blocks, block_size, size, stride, ratio, scaling
        )
    return out


def _positions(lengths, positions, queries):
    """Position of each query `[B, S]`: as given, or the last ones of each row."""
    if positions is not None:
        return positions
    return lengths[:, None] - queries + torch.arange(queries, device=lengths.device)


def _scores(query, fine, coarse, positions, num_blocks, block_size, size, stride, ratio, scaling):
    """One row: query `[S, H, D]`, fine `[K, G, D]`, coarse `[C, G, D]`, positions `[S]`; returns `[G, S, M]`."""
    groups = fine.shape[1]
    grouped = query.float().unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # [G, R, S, D]
    parts = []
    for begin in range(0, max(len(positions), 1), CHUNK):
        rows, at = grouped[:, :, begin : begin + CHUNK], positions[begin : begin + CHUNK]

        def seen(count, wide, apart, at=at):
            visible = ((at + 1 - wide).div(apart, rounding_mode="floor") + 1).clamp_min(0)
            return torch.arange(count, device=query.device) < visible[:, None]

        sees_coarse = seen(len(coarse), size * ratio, stride * ratio)
        logits = rows @ coarse.float().permute(1, 2, 0)[:, None] * scaling
        normaliser = logits.masked_fill(~sees_coarse, -torch.inf).logsumexp(-1, keepdim=True)
        weight = (rows @ fine.float().permute(1, 2, 0)[:, None] * scaling - normaliser).exp()
        sees = seen(len(fine), size, stride) & sees_coarse.any(-1, keepdim=True)
        weight = weight.masked_fill(~sees, 0).sum(1)
        step, before = block_size // stride, (size - 1) // stride
        padded = torch.nn.functional.pad(weight, (before, max(num_blocks * step - weight.shape[-1], 0)))
        parts.append(padded.unfold(-1, step + before, step).amax(-1)[..., :num_blocks])
    return torch.cat(parts, dim=1)


def select_blocks(scores, positions, num_selected, init_blocks, window_blocks, block_size):
    """See `ops.select_blocks`."""
    num_blocks = scores.shape[-1]
    block = torch.arange(num_blocks, device=scores.device)
    own = (positions // block_size)[:, None]
    forced = (block < init_blocks) | (block >= own - window_blocks)
    scores = scores.clamp_max(torch.finfo(scores.dtype).max).masked_fill(forced, torch.inf)
    scores = scores.masked_fill(block > own, -torch.inf)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :num_selected]
    best = best.masked_fill(best > own, num_blocks).sort(-1).values
    return best.masked_fill(best == num_blocks, -1).int()


def _rows(cu_seqlens):
    bounds = cu_seqlens.tolist()
    return list(zip(bounds[:-1], bounds[1:]))


def _allowed(blocks, positions, keys, block_size):
    """Keys that queries may read: blocks `[G, S, T]`, positions `[S]`; returns bool `[G, S, N]`."""
    num_blocks = -(-keys // block_size)
    read = torch.zeros((*blocks.shape[:2], num_blocks + 1), dtype=torch.bool, device=blocks.device)
    index = blocks.long().masked_fill((blocks < 0) | (blocks >= num_blocks), num_blocks)
    read.scatter_(-1, index, True)
    token = torch.arange(keys, device=blocks.device)
    return read[..., token // block_size] & (token <= positions[:, None])


def _attend(query, key, value, allowed, scaling):
    """One row's chunk: query `[S, H, D]`, key and value `[N, G, D]`, allowed `[G, S, N]`; output and log-sum-exp."""
    groups = key.shape[1]
    grouped = query.float().unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
    logits = grouped @ key.float().permute(1, 2, 0)[:, None] * scaling
    logits = logits.masked_fill(~allowed[:, None], -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    output = weights @ value.float().permute(1, 0, 2)[:, None]
    return output.permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype), lse.permute(2, 0, 1).flatten(1, 2)


def sparse_attention(
    query, key, value, blocks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size, scaling
):
    """See `ops.sparse_attention`."""
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
    for at, keys, positions in _chunks(cu_seqlens_q, cu_seqlens_k, query.device):
        allowed = _allowed(blocks[:, at], positions, keys.stop - keys.start, block_size)
        output[at], lse[at] = _attend(query[at], key[keys], value[keys], allowed, scaling)
    return output, lse


def sparse_attention_backward(
    grad,
    query,
    key,
    value,
    output,
    lse,
    blocks,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    block_size,
    scaling,
):
    """See `ops.sparse_attention_backward`."""
    grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
    grad_value = torch.zeros_like(grad_key)
    groups = key.shape[1]

    def fold(tensor):  # [S, H, ...] -> [G, R, S, ...]
        tensor = tensor.float().unflatten(1, (groups, -1))
        return tensor.movedim(0, 2)

    for at, keys, positions in _chunks(cu_seqlens_q, cu_seqlens_k, query.device):
        allowed = _allowed(blocks[:, at], positions, keys.stop - keys.start, block_size)[:, None]
        q, g, o = fold(query[at]), fold(grad[at]), fold(output[at])
        k, v = (tensor[keys].float().permute(1, 0, 2)[:, None] for tensor in (key, value))
        normaliser = fold(lse[at])
        logits = (q @ k.mT * scaling).masked_fill(~allowed, -torch.inf)
        weights = (logits - normaliser.masked_fill(normaliser == -torch.inf, 0)[..., None]).exp()
        slope = weights * (g @ v.mT - (g * o).sum(-1, keepdim=True)) * scaling
        grad_query[at] = (slope @ k).permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
        grad_key[keys] += (slope.mT @ q).sum(1).transpose(0, 1)
        grad_value[keys] += (weights.mT @ g).sum(1).transpose(0, 1)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _chunks(cu_seqlens_q, cu_seqlens_k, device):
    for (q0, q1), (k0, k1) in zip(_rows(cu_seqlens_q), _rows(cu_seqlens_k)):
        for begin in range(q0, q1, CHUNK):
            end = min(begin + CHUNK, q1)
            shift = k1 - k0 - (q1 - q0) - q0
            positions = torch.arange(begin + shift, end + shift, device=device)
            # Keys after the last query of the chunk are hidden from all of it.
            yield slice(begin, end), slice(k0, k0 + end + shift), positions


def sparse_attention_decode(
    query,
    key,
    value,
    blocks,
    scores,
    lengths,
    positions,
    starts,
    page_table,
    tree_mask,
    num_selected,
    init_blocks,
    window_blocks,
    block_size,
    scaling,
):
    """See `ops.sparse_attention_decode`."""
    batch, queries = query.shape[:2]
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for b, (length, at) in enumerate(zip(lengths.tolist(), _positions(lengths, positions, queries))):
        own = slice(b * queries, (b + 1) * queries)
        if blocks is None:
            chosen = select_blocks(scores[:, own], at, num_selected, init_blocks, window_blocks, block_size)
        else:
            chosen = blocks[:, own]
        k, v = (_cached_row(tensor, b, length, starts, page_table) for tensor in (key, value))
        if tree_mask is None:
            allowed = _allowed(chosen, at, length, block_size)
        else:
            base = at.clamp_max(length - queries - 1)  # the last token that is not a draft
            allowed = _allowed(chosen, base, length, block_size)
            draft = torch.arange(queries, device=query.device)
            allowed[..., length - queries :] = (tree_mask[b, :, None] >> draft & 1).bool()
        output[b] = _attend(query[b], k, v, allowed, scaling)[0]
    return output


def _cached_row(cache, b, length, starts, page_table):
    """Row `b` of a cache as `[N, G, D]`."""
    if page_table is not None:
        pages = page_table[b, : -(-length // cache.shape[2])].long()
        return cache[pages].transpose(1, 2).flatten(0, 1)[:length]
    start = 0 if starts is None else int(starts[b])
    return cache[b, :, start : start + length].transpose(0, 1)
