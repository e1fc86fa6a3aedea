"""
Attention of a few queries against a long cache, split over the blocks they read; two launches.

Shape letters: see `ops`. In kernels: `P` heads a query, padded to 16 or more for the tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_common import LOG2E, dot, inside_of, power_of_two
from .triton_selection import PROGRAMS, choose


@triton.jit
def _step(q, k, v, allowed, scale, peak, mass, total):
    """Read one stretch of keys `[BP, DP]`, of which `allowed` (`[BP]`) count."""
    logits = tl.where(allowed[None, :], dot(q, tl.trans(k)) * scale, float("-inf"))
    raised = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(raised == float("-inf"), 0.0, raised)
    shrink = tl.exp2(peak - base)
    weight = tl.exp2(logits - base[:, None])
    mass = mass * shrink + tl.sum(weight, 1)
    return raised, mass, total * shrink[:, None] + dot(weight.to(v.dtype), v)


@triton.jit
def _slots(n, b, start, page_table, pages, stride_b, stride_n, PAGE: tl.constexpr, PAGED: tl.constexpr, inside):
    """Offsets of tokens `n` (`[BP]`) of row `b` in a cache."""
    if PAGED:
        page = tl.load(page_table + b * pages + n // PAGE, mask=inside, other=0).to(tl.int64)
        return page * stride_b + (n % PAGE).to(tl.int64) * stride_n
    else:
        return b.to(tl.int64) * stride_b + (start + n).to(tl.int64) * stride_n


@triton.jit
def _decode_kernel(
    query, key, value, blocks, scores, lengths, positions, starts, page_table, tree_mask, output, partial,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn,
    S, num_rows, T, num_blocks, pages, scale,
    SELECTED: tl.constexpr, INIT: tl.constexpr, WINDOW: tl.constexpr, MP: tl.constexpr, TP: tl.constexpr,
    CHOOSES: tl.constexpr, POSITIONS: tl.constexpr, STARTS: tl.constexpr, PAGED: tl.constexpr, PAGE: tl.constexpr,
    TREE: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr, BP: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr,
    P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program: a share of one query's blocks, for the heads of one group."""
    split, s, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = pair // GROUPS, (pair % GROUPS).to(tl.int64)
    row = g * num_rows + b * S + s
    length = tl.load(lengths + b)
    if POSITIONS:
        position = tl.load(positions + b * S + s)
    else:
        position = length - S + s
    if TREE:
        limit = tl.minimum(position + 1, length - S)
    else:
        limit = tl.minimum(position + 1, length)
    start = 0
    if STARTS:
        start = tl.load(starts + b)
    head, feature, token = tl.arange(0, P), tl.arange(0, DP), tl.arange(0, BP)
    both = inside_of(head < R, feature, D, DP)
    at = query + b.to(tl.int64) * stride_qb + s * stride_qs + (g * R + head)[:, None] * stride_qh + feature[None, :]
    q = tl.load(at, mask=both, other=0.0)
    key += g * stride_kg
    value += g * stride_vg

    if CHOOSES:
        chosen, place = choose(scores + row * num_blocks, position, num_blocks, SELECTED, INIT, WINDOW, BLOCK, MP)
        count = tl.sum(chosen.to(tl.int32), 0)
    else:
        place = tl.arange(0, TP)
        listed = tl.load(blocks + row * T + place, mask=place < T, other=-1)
        count = tl.max(tl.where(listed >= 0, place + 1, 0), 0)
    share = tl.cdiv(count, SPLITS)
    peak = tl.full([P], float("-inf"), tl.float32)
    mass = tl.zeros([P], tl.float32)
    total = tl.zeros([P, DP], tl.float32)
    for i in range(split * share, tl.minimum(split * share + share, count)):
        if CHOOSES:
            block = tl.sum(tl.where(chosen & (place == i), tl.arange(0, MP), 0), 0)
        else:
            block = tl.sum(tl.where(place == i, listed, 0), 0)
        of = token * 0 + block
        n = of * BLOCK + token
        # An index that is no block of the row reads nothing; comparing blocks, since a huge one overflows as tokens.
        allowed = (token < BLOCK) & (n < limit) & (of >= 0) & (of < (length + BLOCK - 1) // BLOCK)
        there = inside_of(allowed, feature, D, DP)
        k_at = _slots(n, b, start, page_table, pages, stride_kb, stride_kn, PAGE, PAGED, allowed)
        v_at = _slots(n, b, start, page_table, pages, stride_vb, stride_vn, PAGE, PAGED, allowed)
        k = tl.load(key + k_at[:, None] + feature[None, :], mask=there, other=0.0)
        v = tl.load(value + v_at[:, None] + feature[None, :], mask=there, other=0.0)
        peak, mass, total = _step(q, k, v, allowed, scale, peak, mass, total)
    if TREE:  # noqa: SIM102 - decided when compiling, the inner one on the device
        if split == SPLITS - 1:
            draft = tl.arange(0, SP)
            n = length - S + draft
            allowed = (draft < S) & (((tl.load(tree_mask + b * S + s) >> draft) & 1) == 1) & (n >= 0)
            there = inside_of(allowed, feature, D, DP)
            k_at = _slots(n, b, start, page_table, pages, stride_kb, stride_kn, PAGE, PAGED, allowed)
            v_at = _slots(n, b, start, page_table, pages, stride_vb, stride_vn, PAGE, PAGED, allowed)
            k = tl.load(key + k_at[:, None] + feature[None, :], mask=there, other=0.0)
            v = tl.load(value + v_at[:, None] + feature[None, :], mask=there, other=0.0)
            peak, mass, total = _step(q, k, v, allowed, scale, peak, mass, total)
    total = total / tl.where(mass > 0, mass, 1.0)[:, None]
    if SPLITS == 1:
        to = output + ((b * S + s).to(tl.int64) * GROUPS * R + g * R + head)[:, None] * D + feature[None, :]
        tl.store(to, total.to(output.dtype.element_ty), mask=both)
    else:
        to = partial + (row * SPLITS + split) * (P * (DP + 1))
        tl.store(to + head[:, None] * DP + feature[None, :], total)
        tl.store(to + P * DP + head, peak + tl.log2(tl.where(mass > 0, mass, 1.0)))


@triton.jit
def _combine_kernel(
    partial, output, num_rows, GROUPS: tl.constexpr, R: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program: one query and head; adds the shares, weighted by their log-sum-exp."""
    s, g, h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    feature, split = tl.arange(0, DP), tl.arange(0, SPLITS)
    at = partial + ((g.to(tl.int64) * num_rows + s) * SPLITS + split) * (P * (DP + 1))
    lse = tl.load(at + P * DP + h)
    peak = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(peak == float("-inf"), 0.0, peak))
    mass = tl.sum(weight, 0)
    parts = tl.load(at[:, None] + h * DP + feature[None, :])
    total = tl.sum(parts * weight[:, None], 0) / tl.where(mass > 0, mass, 1.0)
    to = output + (s.to(tl.int64) * GROUPS * R + g * R + h) * D + feature
    tl.store(to, total.to(output.dtype.element_ty), mask=feature < D)


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
    """See `ops.sparse_attention_decode`. Two launches, or one where the rows alone fill the device."""
    batch, queries, heads, width = query.shape
    groups, page = key.shape[1:3]
    group = heads // groups
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not output.numel():
        return output
    padded, features = max(power_of_two(group), 16), power_of_two(max(width, 16))
    listed = 1 if blocks is None else blocks.shape[2]
    columns = 1 if scores is None else scores.shape[2]
    wanted = power_of_two(triton.cdiv(PROGRAMS, batch * groups * queries))
    splits = max(min(wanted, power_of_two(max(listed if scores is None else min(num_selected, columns), 1))), 1)
    rows = batch * queries
    partial = (
        output
        if splits == 1
        else query.new_empty((groups, rows, splits, padded * (features + 1)), dtype=torch.float32)
    )
    vector = power_of_two(max(columns, listed))
    _decode_kernel[splits, queries, batch * groups](
        query, key, value, lengths if blocks is None else blocks, query if scores is None else scores, lengths,
        lengths if positions is None else positions, lengths if starts is None else starts,
        lengths if page_table is None else page_table, lengths if tree_mask is None else tree_mask, output, partial,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], queries, rows, listed, columns,
        0 if page_table is None else page_table.shape[1], scaling * LOG2E, num_selected, init_blocks, window_blocks,
        power_of_two(columns), power_of_two(max(listed, 1)), scores is not None, positions is not None,
        starts is not None, page_table is not None, page, tree_mask is not None, max(power_of_two(queries), 16),
        block_size, power_of_two(max(block_size, 16)), groups, group, padded, width, features, splits,
        num_warps=8 if vector > 512 else 4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[rows, groups, group](
            partial, output, rows, groups, group, padded, width, features, splits, num_warps=4
        )
    return output
