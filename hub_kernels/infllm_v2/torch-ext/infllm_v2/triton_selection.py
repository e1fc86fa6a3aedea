"""
Choosing blocks: compressed keys, block scores, top-k.

Scores are computed with the keys as rows and the queries as columns of the product, so that the heads of a query lie
next to each other in a thread and their sum costs few exchanges.

Shape letters: see `ops`. In kernels: `Q` queries a tile, `P` heads a query (padded to a power of two).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_common import LOG2E, count_windows, dot, power_of_two, tile


# Programs that a decode step is split into, at least: a few for each multiprocessor of a large GPU.
PROGRAMS = 256


@triton.jit
def _write_means(
    source, target, stride_n, stride_k, first, last, SIZE: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Means of windows `first ... first + COUNT - 1`, those below `last`, of keys at `source`."""
    window = first + tl.arange(0, COUNT)
    feature = tl.arange(0, DP)
    inside = (window < last)[:, None] & (feature < D)[None, :]
    at = source + (window * STRIDE).to(tl.int64)[:, None] * stride_n + feature[None, :]
    total = tl.zeros([COUNT, DP], tl.float32)
    for _ in range(SIZE):
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at += stride_n
    to = target + window.to(tl.int64)[:, None] * stride_k + feature[None, :]
    tl.store(to, (total / SIZE).to(target.dtype.element_ty), mask=inside)


@triton.jit
def _compress_kernel(
    key, fine, coarse, starts, done, lengths,
    stride_kb, stride_kg, stride_kn, stride_fb, stride_fg, stride_fk, stride_cb, stride_cg, stride_ck,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PACKED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Program: some coarse windows and the fine ones between their starts, of one row and key/value head."""
    part, b, g = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tl.load(starts + b).to(tl.int64)
    if PACKED:
        length = (tl.load(starts + b + 1) - start).to(tl.int32)
        before = 0
        fine += start // STRIDE * stride_fk
        coarse += start // (STRIDE * RATIO) * stride_ck
    else:
        length = tl.load(lengths + b)
        before = tl.load(done + b)
    source = key + b * stride_kb + g * stride_kg + start * stride_kn
    first = count_windows(before, SIZE, STRIDE) + part * COUNT * RATIO
    last = count_windows(length, SIZE, STRIDE)
    _write_means(
        source,
        fine + b * stride_fb + g * stride_fg,
        stride_kn,
        stride_fk,
        first,
        last,
        SIZE,
        STRIDE,
        D,
        DP,
        COUNT * RATIO,
    )
    first = count_windows(before, SIZE * RATIO, STRIDE * RATIO) + part * COUNT
    last = count_windows(length, SIZE * RATIO, STRIDE * RATIO)
    _write_means(
        source, coarse + b * stride_cb + g * stride_cg, stride_kn, stride_ck, first, last, SIZE * RATIO,
        STRIDE * RATIO, D, DP, COUNT,
    )  # fmt: skip


def _compress(key, fine, coarse, starts, done, lengths, tokens, strides, rows, groups, size, stride, ratio, packed):
    width, count = key.shape[-1], 4
    grid = (triton.cdiv(tokens // stride + 1, count * ratio), rows, groups)
    _compress_kernel[grid](
        key, fine, coarse, starts, done, lengths, *strides, size, stride, ratio, width, power_of_two(width), packed,
        count, num_warps=4,
    )  # fmt: skip


def compress_keys(key, cu_seqlens, max_seqlen, size, stride, ratio):
    """See `ops.compress_keys`."""
    tokens, groups, width = key.shape
    fine, coarse = (key.new_zeros((tokens // apart, groups, width)) for apart in (stride, stride * ratio))
    rows = cu_seqlens.shape[0] - 1
    strides = (0, key.stride(1), key.stride(0), 0, width, groups * width, 0, width, groups * width)
    _compress(
        key,
        fine,
        coarse,
        cu_seqlens,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        strides,
        rows,
        groups,
        size,
        stride,
        ratio,
        True,
    )
    return fine, coarse


def update_compressed_keys(key, fine, coarse, starts, done, lengths, max_new, size, stride, ratio):
    """See `ops.update_compressed_keys`."""
    strides = (*key.stride()[:3], *fine.stride()[:3], *coarse.stride()[:3])
    _compress(
        key,
        fine,
        coarse,
        starts,
        done,
        lengths,
        max_new,
        strides,
        key.shape[0],
        key.shape[1],
        size,
        stride,
        ratio,
        False,
    )


# -------------------------------------------------------------------------------------------------------------- scores


@triton.jit
def _columns(query, stride_s, stride_h, index, head, inside, D: tl.constexpr, DP: tl.constexpr):
    """Queries as columns `[DP, Q * P]`."""
    feature = tl.arange(0, DP)
    at = query + index.to(tl.int64)[None, :] * stride_s + head[None, :] * stride_h + feature[:, None]
    return tl.load(at, mask=inside[None, :] & (feature < D)[:, None], other=0.0)


@triton.jit
def _normaliser(
    columns, coarse, stride_k, seen, begin, end, scale, D: tl.constexpr, DP: tl.constexpr, KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """
    Largest logit (base 2) and sum of `exp2(logit - largest)` over coarse keys `begin ... end - 1`, a column
    each.
    """
    feature = tl.arange(0, DP)
    peak = tl.full([COLUMNS], float("-inf"), tl.float32)
    mass = tl.zeros([COLUMNS], tl.float32)
    for k0 in range(begin, end, KEYS):
        k = k0 + tl.arange(0, KEYS)
        at = coarse + k.to(tl.int64)[:, None] * stride_k + feature[None, :]
        keys = tl.load(at, mask=(k < end)[:, None] & (feature < D)[None, :], other=0.0)
        logits = tl.where((k < end)[:, None] & (k[:, None] < seen[None, :]), dot(keys, columns) * scale, float("-inf"))
        raised = tl.maximum(peak, tl.max(logits, 0))
        base = tl.where(raised == float("-inf"), 0.0, raised)
        mass = mass * tl.exp2(peak - base) + tl.sum(tl.exp2(logits - base[None, :]), 0)
        peak = raised
    return peak, mass


@triton.jit
def _pool(
    columns, lse, fine, stride_k, seen, windows, begin, end, to, real, scale, D: tl.constexpr, DP: tl.constexpr,
    BLOCKS: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, STEP: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """
    Scores of blocks `begin ... end - 1`, to rows of memory `to` (`[Q]`): the largest, over the fine keys that
    overlap a block, of the sum over heads. A block overlaps the `STEP` windows that start in it and the `BEFORE`
    that reach into it; one loop over both keeps one tile of keys in flight, not one for each window.
    """
    feature = tl.arange(0, DP)
    best = tl.zeros([BLOCKS, Q], tl.float32)
    for i in range(tl.cdiv(end - begin, BLOCKS) * (STEP + BEFORE)):
        j = i % (STEP + BEFORE)
        block = begin + i // (STEP + BEFORE) * BLOCKS + tl.arange(0, BLOCKS)
        k = block * STEP + (j - BEFORE)
        inside = (k >= 0) & (k < windows)
        at = fine + k.to(tl.int64)[:, None] * stride_k + feature[None, :]
        keys = tl.load(at, mask=inside[:, None] & (feature < D)[None, :], other=0.0)
        weight = tl.exp2(dot(keys, columns) * scale - lse[None, :])
        weight = tl.where(inside[:, None] & (k[:, None] < seen[None, :]), weight, 0.0)
        total = tl.sum(tl.reshape(weight, [BLOCKS, Q, P]), 2)
        best = tl.where(j == 0, total, tl.maximum(best, total))
        complete = (block < end) & (block * 0 + j == STEP + BEFORE - 1)
        tl.store(to[None, :] + block[:, None], best, mask=complete[:, None] & real[None, :])


@triton.jit
def _scores_kernel(
    query, fine, coarse, scores, cu_seqlens_q, cu_seqlens_k,
    stride_qs, stride_qh, stride_fk, stride_fg, stride_ck, stride_cg, num_queries, num_blocks, scale,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program: a tile of one row's queries, the longest past first."""
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    b, g = tl.program_id(1), tl.program_id(2).to(tl.int64)
    q_start, k_start = tl.load(cu_seqlens_q + b), tl.load(cu_seqlens_k + b)
    q_length, k_length = tl.load(cu_seqlens_q + b + 1) - q_start, tl.load(cu_seqlens_k + b + 1) - k_start
    if part * Q >= q_length:
        return
    column = tl.arange(0, Q * P)
    index, head = part * Q + column // P, column % P
    inside = (index < q_length) & (head < R)
    position = k_length - q_length + index
    sees_coarse = count_windows(position + 1, SIZE * RATIO, STRIDE * RATIO)
    sees_fine = tl.where(inside & (sees_coarse > 0), count_windows(position + 1, SIZE, STRIDE), 0)
    columns = _columns(query + g * R * stride_qh, stride_qs, stride_qh, q_start + index, head, inside, D, DP)
    last = k_length - q_length + tl.minimum(part * Q + Q, q_length) - 1
    coarse += (k_start // (STRIDE * RATIO)).to(tl.int64) * stride_ck + g * stride_cg
    end = count_windows(last + 1, SIZE * RATIO, STRIDE * RATIO)
    peak, mass = _normaliser(columns, coarse, stride_ck, sees_coarse, 0, end, scale, D, DP, KEYS, Q * P)
    lse = tl.where(mass > 0, peak + tl.log2(tl.where(mass > 0, mass, 1.0)), 0.0)
    fine += (k_start // STRIDE).to(tl.int64) * stride_fk + g * stride_fg
    row = part * Q + tl.arange(0, Q)
    to = scores + (g * num_queries + q_start + row).to(tl.int64) * num_blocks
    _pool(
        columns, lse, fine, stride_fk, sees_fine, count_windows(last + 1, SIZE, STRIDE), 0,
        tl.minimum(last // BLOCK + 1, num_blocks), to,
        row < q_length, scale, D, DP, BLOCKS, Q, P, BLOCK // STRIDE, (SIZE - 1) // STRIDE,
    )  # fmt: skip


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
    queries, heads, width = query.shape
    groups = fine.shape[1]
    num_blocks = triton.cdiv(max_seqlen_k, block_size)
    scores = query.new_zeros((groups, queries, num_blocks), dtype=torch.float32)
    if queries:
        columns, padded = tile(heads // groups, power_of_two(width) * query.element_size())
        grid = (triton.cdiv(max_seqlen_q, columns), cu_seqlens_q.shape[0] - 1, groups)
        _scores_kernel[grid](
            query, fine, coarse, scores, cu_seqlens_q, cu_seqlens_k, *query.stride()[:2], *fine.stride()[:2],
            *coarse.stride()[:2], queries, num_blocks, scaling * LOG2E, size, stride, ratio, block_size,
            heads // groups, width, power_of_two(max(width, 16)), columns, padded, 64, 64,
            num_warps=4 if query.element_size() == 2 else 8, num_stages=2,
        )  # fmt: skip
    return scores


@triton.jit
def _decode_tile(
    lengths, positions, b, part, S, R: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, POSITIONS: tl.constexpr
):
    """A tile's queries: index, head, whether real, position, and its row's length."""
    column = tl.arange(0, Q * P)
    index, head = part * Q + column // P, column % P
    length = tl.load(lengths + b)
    if POSITIONS:
        position = tl.load(positions + b * S + index, mask=index < S, other=0)
    else:
        position = length - S + index
    return index, head, (index < S) & (head < R), position, length


@triton.jit
def _decode_normaliser_kernel(
    query, coarse, partial, lengths, positions, stride_qb, stride_qs, stride_qh, stride_cb, stride_cg, stride_ck, S,
    scale, SIZE: tl.constexpr, STRIDE: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, POSITIONS: tl.constexpr, KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Program: a share of one row's coarse keys (`SIZE` and `STRIDE` are theirs)."""
    pair, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = (pair // GROUPS).to(tl.int64), (pair % GROUPS).to(tl.int64)
    index, head, inside, position, length = _decode_tile(lengths, positions, b, part, S, R, Q, P, POSITIONS)
    seen = tl.where(inside, count_windows(position + 1, SIZE, STRIDE), 0)
    columns = _columns(query + b * stride_qb + g * R * stride_qh, stride_qs, stride_qh, index, head, inside, D, DP)
    total = count_windows(length, SIZE, STRIDE)
    share = tl.cdiv(tl.cdiv(total, SPLITS), KEYS) * KEYS
    begin = split * share
    peak, mass = _normaliser(
        columns, coarse + b * stride_cb + g * stride_cg, stride_ck, seen, begin, tl.minimum(begin + share, total),
        scale, D, DP, KEYS, Q * P,
    )  # fmt: skip
    column = tl.arange(0, Q * P)
    to = partial + ((pair * tl.num_programs(1) + part) * SPLITS + split).to(tl.int64) * (2 * Q * P)
    tl.store(to + column, peak)
    tl.store(to + Q * P + column, mass)


@triton.jit
def _decode_scores_kernel(
    query, fine, scores, partial, lengths, positions, stride_qb, stride_qs, stride_qh, stride_fb, stride_fg, stride_fk,
    S, num_rows, num_blocks, share, scale, SIZE: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, Q: tl.constexpr,
    P: tl.constexpr, POSITIONS: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program: `share` blocks of one row."""
    pair, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = (pair // GROUPS).to(tl.int64), (pair % GROUPS).to(tl.int64)
    index, head, inside, position, length = _decode_tile(lengths, positions, b, part, S, R, Q, P, POSITIONS)
    column = tl.arange(0, Q * P)
    piece = tl.arange(0, SPLITS)
    at = partial + (pair * tl.num_programs(1) + part).to(tl.int64) * (SPLITS * 2 * Q * P)
    at += piece[:, None] * (2 * Q * P) + column[None, :]
    peaks, masses = tl.load(at), tl.load(at + Q * P)
    peak = tl.max(peaks, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.sum(masses * tl.exp2(peaks - base[None, :]), 0)
    lse = tl.where(mass > 0, base + tl.log2(tl.where(mass > 0, mass, 1.0)), 0.0)
    seen = tl.where(inside & (mass > 0), count_windows(position + 1, SIZE, STRIDE), 0)
    columns = _columns(query + b * stride_qb + g * R * stride_qh, stride_qs, stride_qh, index, head, inside, D, DP)
    fine += b * stride_fb + g * stride_fg
    row = part * Q + tl.arange(0, Q)
    to = scores + (g * num_rows + b * S + row).to(tl.int64) * num_blocks
    _pool(
        columns, lse, fine, stride_fk, seen, count_windows(length, SIZE, STRIDE), split * share,
        tl.minimum(split * share + share, num_blocks), to, row < S, scale, D, DP, BLOCKS, Q, P, BLOCK // STRIDE,
        (SIZE - 1) // STRIDE,
    )  # fmt: skip


def block_scores_decode(query, fine, coarse, lengths, positions, max_length, block_size, size, stride, ratio, scaling):
    """See `ops.block_scores_decode`. Two launches."""
    batch, queries, heads, width = query.shape
    groups = fine.shape[1]
    num_blocks = triton.cdiv(max_length, block_size)
    scores = query.new_empty((groups, batch * queries, num_blocks), dtype=torch.float32)
    if not batch:
        return scores
    columns, padded = tile(heads // groups, power_of_two(width) * query.element_size())
    columns = max(min(columns, power_of_two(queries)), 16 // padded, 1)  # at least 16 columns for the tensor cores
    parts = triton.cdiv(queries, columns)
    wanted = max(PROGRAMS // (batch * groups * parts), 1)
    keys = blocks = 32
    splits = min(power_of_two(wanted), power_of_two(triton.cdiv(max_length // (stride * ratio) + 1, keys)))
    partial = query.new_empty((batch * groups, parts, splits, 2, columns * padded), dtype=torch.float32)
    shared = (groups, heads // groups, width, power_of_two(max(width, 16)), columns, padded, positions is not None)
    positions = lengths if positions is None else positions
    _decode_normaliser_kernel[batch * groups, parts, splits](
        query, coarse, partial, lengths, positions, *query.stride()[:3], *coarse.stride()[:3], queries,
        scaling * LOG2E, size * ratio, stride * ratio, *shared, keys, splits, num_warps=4,
    )  # fmt: skip
    share = triton.cdiv(triton.cdiv(num_blocks, wanted), blocks) * blocks
    _decode_scores_kernel[batch * groups, parts, triton.cdiv(num_blocks, share)](
        query, fine, scores, partial, lengths, positions, *query.stride()[:3], *fine.stride()[:3], queries,
        batch * queries, num_blocks, share, scaling * LOG2E, size, stride, ratio, block_size, *shared, blocks, splits,
        num_warps=4,
    )  # fmt: skip
    return scores


# ----------------------------------------------------------------------------------------------------------- selection


@triton.jit
def choose(
    scores, position, num_blocks, SELECTED: tl.constexpr, INIT: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """
    Which of a query's blocks are chosen (bool `[MP]`) and the place of each among them (int32 `[MP]`).

    The bits of a float, read as a signed integer (negative ones mirrored), keep its order: the last admitted score is
    found bit by bit, whatever the order of execution.
    """
    block = tl.arange(0, MP)
    own = position // BLOCK
    real = (block <= own) & (block < num_blocks)
    score = tl.minimum(tl.load(scores + block, mask=real, other=0.0), 3.4028234663852886e38) + 0.0  # -0 is 0
    order = score.to(tl.int32, bitcast=True)
    order = tl.where(order < 0, order ^ 0x7FFFFFFF, order)
    order = tl.where((block < INIT) | (block >= own - WINDOW), 0x7FFFFFFF, order)
    order = tl.where(real, order, -0x7FFFFFFF - 1)
    least = tl.where(tl.sum((order >= 0).to(tl.int32), 0) >= SELECTED, 0, -0x7FFFFFFF - 1)
    bit = 1 << 30
    for _ in range(31):
        least = tl.where(tl.sum((order >= least + bit).to(tl.int32), 0) >= SELECTED, least + bit, least)
        bit = bit >> 1
    above = real & (order > least)
    tied = real & (order == least)
    room = SELECTED - tl.sum(above.to(tl.int32), 0)
    chosen = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
    return chosen, tl.cumsum(chosen.to(tl.int32), 0) - 1


@triton.jit
def _select_kernel(
    scores, positions, blocks, num_queries, num_blocks, width,
    SELECTED: tl.constexpr, INIT: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, MP: tl.constexpr,
    TP: tl.constexpr,
):  # fmt: skip
    """Program: one query of one key/value head."""
    s, g = tl.program_id(0), tl.program_id(1)
    row = g.to(tl.int64) * num_queries + s
    position = tl.load(positions + s)
    chosen, place = choose(scores + row * num_blocks, position, num_blocks, SELECTED, INIT, WINDOW, BLOCK, MP)
    tl.store(blocks + row * width + place, tl.arange(0, MP), mask=chosen)
    rest = tl.arange(0, TP)
    tl.store(blocks + row * width + rest, -1, mask=(rest >= tl.sum(chosen.to(tl.int32), 0)) & (rest < width))


def warps(elements: int) -> int:
    """Warps for a vector kept in registers: about 16 elements a thread."""
    return min(max(elements // 512, 1), 16)


def select_blocks(scores, positions, num_selected, init_blocks, window_blocks, block_size):
    """See `ops.select_blocks`."""
    groups, queries, num_blocks = scores.shape
    width = min(num_selected, num_blocks)
    blocks = torch.empty((groups, queries, width), dtype=torch.int32, device=scores.device)
    if blocks.numel():
        padded = power_of_two(num_blocks)
        _select_kernel[queries, groups](
            scores, positions, blocks, queries, num_blocks, width, num_selected, init_blocks, window_blocks,
            block_size, padded, power_of_two(width), num_warps=warps(padded),
        )  # fmt: skip
    return blocks
