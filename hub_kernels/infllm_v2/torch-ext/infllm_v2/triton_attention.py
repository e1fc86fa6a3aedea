"""
Block-sparse attention of many queries, forward and backward.

Neighbouring queries choose much the same blocks. A tile of them (64 rows: queries times heads of a group) therefore
walks through the union of its queries' blocks, each block with a bit mask of who reads it: a block is loaded once a
tile, and the products are large enough for the tensor cores.

The gradients of keys and values go the other way: the (query, block) pairs are sorted by block, and a program walks
through the queries of one block. Popular blocks (the first one is read by all) are cut into segments whose partial
sums are added in a fixed order, so nothing is atomic and every run gives the same bits.

Shape letters: see `ops`. In kernels: `Q` queries a tile, `P` heads a query (padded), `U = Q * T` room for a union.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_common import LOG2E, attention_warps, dot, inside_of, power_of_two, tile


# Queries of one block that one program of the backward pass walks through.
SEGMENT = 4096
# Block index and reader mask share one integer.
MAX_BLOCKS = 1 << 15


@triton.jit
def _union_kernel(
    blocks, union, counts, cu_seqlens_q, cu_seqlens_k, num_queries, num_tiles, T,
    BLOCK: tl.constexpr, Q: tl.constexpr, TP: tl.constexpr,
):  # fmt: skip
    """Program: the blocks that any query of a tile reads, `index << 16 | readers` each, and how many they are."""
    part, b, g = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q_start = tl.load(cu_seqlens_q + b)
    q_length = tl.load(cu_seqlens_q + b + 1) - q_start
    num_blocks = tl.cdiv(tl.load(cu_seqlens_k + b + 1) - tl.load(cu_seqlens_k + b), BLOCK)
    if part * Q >= q_length:
        return
    element = tl.arange(0, Q * TP)
    q, t = element // TP, element % TP
    row = part * Q + q
    at = blocks + (g * num_queries + q_start + row).to(tl.int64) * T + t
    index = tl.load(at, mask=(row < q_length) & (t < T), other=-1)
    index = tl.where((index >= 0) & (index < num_blocks), index, 1 << 15)
    ordered = tl.sort(index * 16 + q)
    index, q = ordered // 16, ordered % 16
    previous = tl.gather(index, tl.maximum(element - 1, 0), 0)
    real = index < 1 << 15
    fresh = (real & ((element == 0) | (index != previous))).to(tl.int32)
    place = tl.cumsum(fresh, 0) - 1
    own = g * num_tiles + q_start // Q + b + part
    tl.atomic_or(union + own * (Q * T) + place, (index << 16) | (1 << q), mask=real)
    tl.store(counts + own, tl.sum(fresh, 0))


def _union(blocks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, block_size, queries):
    """Unions `[G, tiles, U]` and their sizes `[G, tiles]`; row `b`'s tiles begin at `cu_seqlens_q[b] // Q + b`."""
    groups, total, selected = blocks.shape
    rows = cu_seqlens_q.shape[0] - 1
    tiles = total // queries + rows
    union = blocks.new_zeros((groups, tiles, queries * selected))
    counts = blocks.new_zeros((groups, tiles))
    elements = queries * power_of_two(selected)
    _union_kernel[triton.cdiv(max_seqlen_q, queries), rows, groups](
        blocks, union, counts, cu_seqlens_q, cu_seqlens_k, total, tiles, selected, block_size, queries,
        power_of_two(selected), num_warps=min(max(elements // 128, 1), 8),
    )  # fmt: skip
    return union, counts


@triton.jit
def _tile_rows(part, b, cu_seqlens_q, cu_seqlens_k, R: tl.constexpr, Q: tl.constexpr, P: tl.constexpr):
    """
    A tile's rows: query in its row of the batch, head, whether real, position; and where its row begins and
    ends.
    """
    q_start, k_start = tl.load(cu_seqlens_q + b), tl.load(cu_seqlens_k + b)
    q_length, k_length = tl.load(cu_seqlens_q + b + 1) - q_start, tl.load(cu_seqlens_k + b + 1) - k_start
    row = tl.arange(0, Q * P)
    query, head = part * Q + row // P, row % P
    inside = (query < q_length) & (head < R)
    return query, head, inside, k_length - q_length + query, q_start, q_length, k_start, k_length


@triton.jit
def _forward_kernel(
    query, key, value, output, lse, union, counts, cu_seqlens_q, cu_seqlens_k,
    stride_qs, stride_qh, stride_kn, stride_kg, stride_vn, stride_vg, num_tiles, room, heads, scale,
    BLOCK: tl.constexpr, BP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, Q: tl.constexpr,
    P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part, b, g = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    index, head, inside, position, q_start, q_length, k_start, k_length = _tile_rows(
        part, b, cu_seqlens_q, cu_seqlens_k, R, Q, P
    )
    if part * Q >= q_length:
        return
    feature, token = tl.arange(0, DP), tl.arange(0, BP)
    at = (q_start + index).to(tl.int64)
    head += g * R
    both = inside_of(inside, feature, D, DP)
    q = tl.load(query + at[:, None] * stride_qs + head[:, None] * stride_qh + feature[None, :], mask=both, other=0.0)
    key += k_start.to(tl.int64) * stride_kn + g * stride_kg
    value += k_start.to(tl.int64) * stride_vn + g * stride_vg
    bit = tl.arange(0, Q * P) // P
    peak = tl.full([Q * P], float("-inf"), tl.float32)
    mass = tl.zeros([Q * P], tl.float32)
    total = tl.zeros([Q * P, DP], tl.float32)
    own = g * num_tiles + q_start // Q + b + part
    for i in tl.range(0, tl.load(counts + own), num_stages=STAGES):
        entry = tl.load(union + own * room + i)
        first = (entry >> 16) * BLOCK
        n = first + token
        there = inside_of((token < BLOCK) & (n < k_length), feature, D, DP)
        k_at = key + first.to(tl.int64) * stride_kn
        v_at = value + first.to(tl.int64) * stride_vn
        k = tl.load(k_at + token[:, None] * stride_kn + feature[None, :], mask=there, other=0.0)
        allowed = (((entry >> bit) & 1) == 1)[:, None] & (n[None, :] <= position[:, None]) & (token < BLOCK)[None, :]
        logits = tl.where(allowed, dot(q, tl.trans(k)) * scale, float("-inf"))
        raised = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(raised == float("-inf"), 0.0, raised)
        shrink = tl.exp2(peak - base)
        weight = tl.exp2(logits - base[:, None])
        mass = mass * shrink + tl.sum(weight, 1)
        v = tl.load(v_at + token[:, None] * stride_vn + feature[None, :], mask=there, other=0.0)
        total = total * shrink[:, None] + dot(weight.to(v.dtype), v)
        peak = raised
    total = total / tl.where(mass > 0, mass, 1.0)[:, None]
    to = output + (at * heads + head)[:, None] * D + feature[None, :]
    tl.store(to, total.to(output.dtype.element_ty), mask=both)
    # Base 2 in here, base e at the door; a query without a key has -inf.
    tl.store(
        lse + at * heads + head, (peak + tl.log2(tl.where(mass > 0, mass, 1.0))) * 0.6931471805599453, mask=inside
    )


@triton.jit
def _backward_query_kernel(
    grad, query, key, value, output, lse, delta, grad_query, union, counts, cu_seqlens_q, cu_seqlens_k,
    stride_qs, stride_qh, stride_kn, stride_kg, stride_vn, stride_vg, num_tiles, room, heads, scaling, scale,
    BLOCK: tl.constexpr, BP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, Q: tl.constexpr,
    P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile's queries, and `delta = sum(grad * output)` of its rows for the other half."""
    part, b, g = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    index, head, inside, position, q_start, q_length, k_start, k_length = _tile_rows(
        part, b, cu_seqlens_q, cu_seqlens_k, R, Q, P
    )
    if part * Q >= q_length:
        return
    feature, token = tl.arange(0, DP), tl.arange(0, BP)
    at = (q_start + index).to(tl.int64)
    head += g * R
    both = inside_of(inside, feature, D, DP)
    q = tl.load(query + at[:, None] * stride_qs + head[:, None] * stride_qh + feature[None, :], mask=both, other=0.0)
    flat = (at * heads + head)[:, None] * D + feature[None, :]
    slope = tl.load(grad + flat, mask=both, other=0.0)
    result = tl.load(output + flat, mask=both, other=0.0)
    shift = tl.sum(slope.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + at * heads + head, shift, mask=inside)
    normaliser = tl.load(lse + at * heads + head, mask=inside, other=0.0) * 1.4426950408889634
    normaliser = tl.where(normaliser == float("-inf"), 0.0, normaliser)
    key += k_start.to(tl.int64) * stride_kn + g * stride_kg
    value += k_start.to(tl.int64) * stride_vn + g * stride_vg
    bit = tl.arange(0, Q * P) // P
    total = tl.zeros([Q * P, DP], tl.float32)
    own = g * num_tiles + q_start // Q + b + part
    for i in tl.range(0, tl.load(counts + own), num_stages=STAGES):
        entry = tl.load(union + own * room + i)
        first = (entry >> 16) * BLOCK
        n = first + token
        there = inside_of((token < BLOCK) & (n < k_length), feature, D, DP)
        k_at = key + first.to(tl.int64) * stride_kn
        v_at = value + first.to(tl.int64) * stride_vn
        k = tl.load(k_at + token[:, None] * stride_kn + feature[None, :], mask=there, other=0.0)
        v = tl.load(v_at + token[:, None] * stride_vn + feature[None, :], mask=there, other=0.0)
        allowed = (((entry >> bit) & 1) == 1)[:, None] & (n[None, :] <= position[:, None]) & (token < BLOCK)[None, :]
        weight = tl.where(allowed, tl.exp2(dot(q, tl.trans(k)) * scale - normaliser[:, None]), 0.0)
        change = weight * (dot(slope, tl.trans(v)) - shift[:, None])
        total += dot(change.to(k.dtype), k)
    tl.store(grad_query + flat, (total * scaling).to(grad_query.dtype.element_ty), mask=both)


@triton.jit
def _backward_key_kernel(
    grad, query, key, value, lse, delta, partial, readers, reader_starts, segment_blocks, segment_firsts, block_rows,
    cu_seqlens_q, cu_seqlens_k, stride_qs, stride_qh, stride_kn, stride_kg, stride_vn, stride_vg, blocks_a_head, heads,
    scale, BLOCK: tl.constexpr, BP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, Q: tl.constexpr,
    P: tl.constexpr, KEYS: tl.constexpr, SEGMENT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """
    Program: one segment of the queries that read one key block, and `KEYS` of its keys; unscaled sums `[2, BP, DP]` in
    float32.
    """
    segment = tl.program_id(0).to(tl.int64)
    flat = tl.load(segment_blocks + segment)
    if flat < 0:
        return
    g = (flat // blocks_a_head).to(tl.int64)
    b = tl.load(block_rows + flat % blocks_a_head)
    k_start, q_start = tl.load(cu_seqlens_k + b), tl.load(cu_seqlens_q + b)
    k_length = tl.load(cu_seqlens_k + b + 1) - k_start
    shift = k_length - (tl.load(cu_seqlens_q + b + 1) - q_start) - q_start  # from query to position
    block = flat % blocks_a_head - (k_start // BLOCK + b)
    feature, row = tl.arange(0, DP), tl.arange(0, Q * P)
    token = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    n = block * BLOCK + token
    present = (token < BLOCK) & (n < k_length)
    there = inside_of(present, feature, D, DP)
    at = (k_start + n).to(tl.int64)[:, None]
    k = tl.load(key + g * stride_kg + at * stride_kn + feature[None, :], mask=there, other=0.0)
    v = tl.load(value + g * stride_vg + at * stride_vn + feature[None, :], mask=there, other=0.0)
    grad_k = tl.zeros([KEYS, DP], tl.float32)
    grad_v = tl.zeros([KEYS, DP], tl.float32)
    first = tl.load(reader_starts + flat) + tl.load(segment_firsts + segment)
    last = tl.minimum(first + SEGMENT, tl.load(reader_starts + flat + 1))
    head = row % P
    for i in tl.range(first, last, Q, num_stages=STAGES):
        reader = i + row // P
        inside = (reader < last) & (head < R)
        s = tl.load(readers + reader, mask=inside, other=0)
        from_row = s.to(tl.int64) * heads + g * R + head
        both = inside_of(inside, feature, D, DP)
        q_at = s.to(tl.int64)[:, None] * stride_qs + (g * R + head)[:, None] * stride_qh + feature[None, :]
        q = tl.load(query + q_at, mask=both, other=0.0)
        normaliser = tl.load(lse + from_row, mask=inside, other=0.0) * 1.4426950408889634
        normaliser = tl.where(normaliser == float("-inf"), 0.0, normaliser)
        allowed = inside[None, :] & (n[:, None] <= (s + shift)[None, :]) & present[:, None]
        weight = tl.where(allowed, tl.exp2(dot(k, tl.trans(q)) * scale - normaliser[None, :]), 0.0)
        slope = tl.load(grad + from_row[:, None] * D + feature[None, :], mask=both, other=0.0)
        grad_v += dot(weight.to(slope.dtype), slope)
        offset = tl.load(delta + from_row, mask=inside, other=0.0)
        change = weight * (dot(v, tl.trans(slope)) - offset[None, :])
        grad_k += dot(change.to(q.dtype), q)
    to = partial + segment * (2 * BP * DP) + token[:, None] * DP + feature[None, :]
    tl.store(to, grad_k)
    tl.store(to + BP * DP, grad_v)


@triton.jit
def _sum_segments_kernel(
    partial, grad_key, grad_value, segment_starts, block_rows, cu_seqlens_k, blocks_a_head, groups, scaling,
    BLOCK: tl.constexpr, BP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Program: one key block; adds its segments in order and writes the gradients."""
    flat = tl.program_id(0)
    g = (flat // blocks_a_head).to(tl.int64)
    b = tl.load(block_rows + flat % blocks_a_head)
    k_start = tl.load(cu_seqlens_k + b)
    k_length = tl.load(cu_seqlens_k + b + 1) - k_start
    feature, token = tl.arange(0, DP), tl.arange(0, BP)
    n = (flat % blocks_a_head - (k_start // BLOCK + b)) * BLOCK + token
    grad_k = tl.zeros([BP, DP], tl.float32)
    grad_v = tl.zeros([BP, DP], tl.float32)
    first, last = tl.load(segment_starts + flat), tl.load(segment_starts + flat + 1)
    at = partial + first.to(tl.int64) * (2 * BP * DP) + token[:, None] * DP + feature[None, :]
    for _ in range(first, last):
        grad_k += tl.load(at)
        grad_v += tl.load(at + BP * DP)
        at += 2 * BP * DP
    to = ((k_start + n).to(tl.int64) * groups + g)[:, None] * D + feature[None, :]
    there = inside_of((token < BLOCK) & (n < k_length), feature, D, DP)
    tl.store(grad_key + to, (grad_k * scaling).to(grad_key.dtype.element_ty), mask=there)
    tl.store(grad_value + to, grad_v.to(grad_value.dtype.element_ty), mask=there)


def _stages(query: torch.Tensor, tiles: int) -> int:
    """Loads in flight: as many as fit beside the resident tile in the 99 KB of the smallest GPUs supported."""
    bytes_each = tiles * 64 * power_of_two(query.shape[-1]) * query.element_size()
    return max(min(3, 80_000 // max(bytes_each, 1)), 1)


def _shapes(query, key, block_size):
    group = query.shape[1] // key.shape[1]
    queries, padded = tile(group, power_of_two(query.shape[2]) * query.element_size())
    padded = max(padded, 16 // queries)  # tensor cores want 16 rows
    width = query.shape[2]
    return (
        group,
        queries,
        padded,
        (block_size, power_of_two(max(block_size, 16)), group, width, power_of_two(max(width, 16))),
    )


def sparse_attention(
    query, key, value, blocks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size, scaling
):
    """See `ops.sparse_attention`. Two launches."""
    _check_blocks(max_seqlen_k, block_size)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    if not output.numel() or not blocks.shape[2]:
        return output.zero_(), lse.fill_(-torch.inf)
    _, queries, padded, shapes = _shapes(query, key, block_size)
    union, counts = _union(blocks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, block_size, queries)
    grid = (triton.cdiv(max_seqlen_q, queries), cu_seqlens_q.shape[0] - 1, key.shape[1])
    _forward_kernel[grid](
        query, key, value, output, lse, union, counts, cu_seqlens_q, cu_seqlens_k, *query.stride()[:2],
        *key.stride()[:2], *value.stride()[:2], counts.shape[1], union.shape[2], query.shape[1], scaling * LOG2E,
        *shapes, queries, padded, _stages(query, 2), num_warps=attention_warps(query),
    )  # fmt: skip
    return output, lse


def _check_blocks(max_seqlen_k, block_size):
    if triton.cdiv(max_seqlen_k, block_size) > MAX_BLOCKS:
        raise ValueError(
            f"infllm-v2: rows of {max_seqlen_k} tokens have more than {MAX_BLOCKS} blocks of {block_size} tokens, "
            "which is the kernel's limit."
        )


def _readers(blocks, cu_seqlens_q, cu_seqlens_k, tokens, block_size):
    """
    For every key block of every head the queries that read it, in order. Blocks are numbered through: row `b`'s
    begin at `cu_seqlens_k[b] // block_size + b`.

    Returns:
        readers (int32), where each block's begin (int32), the row each number belongs to (int32).
    """
    groups, queries, selected = blocks.shape
    rows = cu_seqlens_k.shape[0] - 1
    device = blocks.device
    each = tokens // block_size + rows
    bases = cu_seqlens_k[:-1] // block_size + torch.arange(rows, dtype=torch.int32, device=device)
    row = (
        torch.searchsorted(
            cu_seqlens_q, torch.arange(queries, dtype=torch.int32, device=device), right=True, out_int32=True
        )
        - 1
    )
    limit = -(cu_seqlens_k.diff() // -block_size)
    real = (blocks >= 0) & (blocks < limit[row][:, None])
    real[..., 1:] &= blocks[..., 1:] != blocks[..., :-1]
    offset = torch.arange(groups, dtype=torch.int32, device=device)[:, None, None] * each
    number = torch.where(real, blocks + bases[row][:, None] + offset, groups * each)
    number, order = number.flatten().sort(stable=True)
    readers = (order // selected % queries).int()
    starts = torch.searchsorted(
        number, torch.arange(groups * each + 1, dtype=torch.int32, device=device), out_int32=True
    )
    block_rows = (
        torch.searchsorted(bases, torch.arange(each, dtype=torch.int32, device=device), right=True, out_int32=True) - 1
    )
    return readers, starts, block_rows


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
    _check_blocks(max_seqlen_k, block_size)
    grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = (torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in (key, value))
    if not grad_query.numel() or not blocks.shape[2]:
        return grad_query, grad_key, grad_value
    _, queries, padded, shapes = _shapes(query, key, block_size)
    groups, heads = key.shape[1], query.shape[1]
    union, counts = _union(blocks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, block_size, queries)
    delta = torch.empty_like(lse)
    grid = (triton.cdiv(max_seqlen_q, queries), cu_seqlens_q.shape[0] - 1, groups)
    strides = (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    _backward_query_kernel[grid](
        grad, query, key, value, output, lse, delta, grad_query, union, counts, cu_seqlens_q, cu_seqlens_k, *strides,
        counts.shape[1], union.shape[2], heads, scaling, scaling * LOG2E, *shapes, queries, padded, _stages(query, 2),
        num_warps=attention_warps(query),
    )  # fmt: skip
    del union

    readers, starts, block_rows = _readers(blocks, cu_seqlens_q, cu_seqlens_k, key.shape[0], block_size)
    total, each = starts.shape[0] - 1, block_rows.shape[0]
    segments = (starts.diff() + SEGMENT - 1) // SEGMENT
    segment_starts = torch.nn.functional.pad(segments.cumsum(0, dtype=torch.int32), (1, 0))
    most = total + readers.shape[0] // SEGMENT  # known without waiting for the device
    segment = torch.arange(most, dtype=torch.int32, device=key.device)
    owner = torch.searchsorted(segment_starts, segment, right=True, out_int32=True) - 1
    firsts = (segment - segment_starts[owner.clamp_max(total - 1)]) * SEGMENT
    owner = torch.where(owner < total, owner, -1)
    block, width = shapes[1], shapes[4]
    partial = torch.empty((most, 2, block, width), dtype=torch.float32, device=key.device)
    keys = block if width * query.element_size() <= 256 else min(block, 32)
    _backward_key_kernel[most, block // keys](
        grad, query, key, value, lse, delta, partial, readers, starts, owner, firsts, block_rows, cu_seqlens_q,
        cu_seqlens_k, *strides, each, heads, scaling * LOG2E, *shapes, queries, padded, keys, SEGMENT,
        _stages(query, 2), num_warps=8 if width >= 128 else 4,
    )  # fmt: skip
    _sum_segments_kernel[(total,)](
        partial, grad_key, grad_value, segment_starts, block_rows, cu_seqlens_k, each, groups, scaling, shapes[0],
        block, shapes[3], width, num_warps=4,
    )  # fmt: skip
    return grad_query, grad_key, grad_value
