"""
The operators: what each takes and gives, the checks at the door, and which kernel answers.

Each is a `torch.library` operator with a fake implementation, so that `torch.compile(fullgraph=True)` passes through
it. Tensors on a CUDA or ROCm device go to Triton, tensors on the CPU to C++ where a compiler is present, else to plain
PyTorch. With `TRITON_INTERPRET=1` in the environment (before the first import) CPU tensors go through the Triton
kernels.

Shape letters: `B` rows, `S` queries of all rows, `N` keys of all rows, `H` query heads, `G` key/value heads, `R = H
/ G` query heads a group, `D` head size, `M` blocks of the longest row, `T` selected blocks, `K` fine and `C` coarse
compressed keys.
"""

from __future__ import annotations

import functools
import os

import torch

from . import plain
from ._ops import add_op_namespace_prefix, ops


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_TRITON = (3, 3)  # tl.gather
# Rows, and rows times key/value heads in decoding: what a GPU's launch grid takes in its second and third dimension.
MAX_ROWS = 65_535
# `INFLLM_V2_CHECK=1` also looks at indices that lie on a GPU, which waits for it; the kernels skip what is out of
# range.
CHECK_ON_GPU = os.environ.get("INFLLM_V2_CHECK", "0") == "1"

_library = torch.library.Library(add_op_namespace_prefix("x").split("::")[0], "FRAGMENT")


def _operator(schema: str):
    """Define an operator whose one implementation serves every device."""

    def define(function):
        name = function.__name__.removeprefix("_")

        @functools.wraps(function)
        def on_its_device(first, *args):
            # Triton launches on the current device, and nothing else makes it that of the tensors.
            if first.is_cuda and first.device.index != torch.cuda.current_device():
                with torch.cuda.device(first.device):
                    return function(first, *args)
            return function(first, *args)

        _library.define(f"{name}{schema}")
        _library.impl(name, on_its_device, "CompositeExplicitAutograd")
        return function

    return define


def _fake(function):
    name = function.__name__.removeprefix("_fake_")
    torch.library.register_fake(add_op_namespace_prefix(name), function, lib=_library)
    return function


@functools.cache
def _triton():
    try:
        import triton

        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
            raise ImportError(f"it is {triton.__version__}, {'.'.join(map(str, MIN_TRITON))} or newer is needed")
        from . import triton_kernels
    except ImportError as error:
        raise RuntimeError(f"infllm-v2: tensors on a GPU need the triton package: {error}.") from error
    return triton_kernels


@functools.cache
def _cpu():
    """The C++ kernels, or `plain` where they cannot be built (said once)."""
    from . import cpu

    return cpu.kernels() or plain


def implementation(tensor: torch.Tensor):
    """The module whose functions answer for `tensor`'s device."""
    kind = tensor.device.type
    if kind == "cuda" or os.environ.get("TRITON_INTERPRET", "0") == "1":
        return _triton()
    if kind == "cpu":
        return _cpu()
    raise ValueError(f"infllm-v2: tensors are on {kind}; supported are cuda (NVIDIA and ROCm) and cpu.")


def is_compiled(tensor: torch.Tensor) -> bool:
    """
    Whether compiled kernels answer for `tensor`'s device; plain PyTorch, the slow form, does on a CPU without
    them.
    """
    return implementation(tensor) is not plain


# -------------------------------------------------------------------------------------------------------------- checks


def _tensors(dims: int, **tensors: torch.Tensor) -> None:
    """One device, one supported dtype, `dims` dimensions, features next to each other."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dim() != dims:
            raise ValueError(f"infllm-v2: {name} must have {dims} dimensions, got shape {tuple(tensor.shape)}.")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"infllm-v2: {name} is {tensor.dtype}; allowed are float32, bfloat16 and float16.")
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise ValueError(
                f"infllm-v2: {name} is {tensor.dtype} on {tensor.device}, {first_name} is {first.dtype} on "
                f"{first.device}; they must agree."
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"infllm-v2: {name} has stride {tensor.stride(-1)} between features; call {name}.contiguous() first."
            )


def _indices(like: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != torch.int32 or tensor.device != like.device or not tensor.is_contiguous():
            raise ValueError(
                f"infllm-v2: {name} must be a contiguous int32 tensor on {like.device}, got {tensor.dtype} on "
                f"{tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}."
            )


def _groups(query_heads: int, groups: int, size: int, key_size: int) -> None:
    if groups == 0 or query_heads % groups:
        raise ValueError(f"infllm-v2: {query_heads} query heads do not divide among {groups} key/value heads.")
    if size != key_size:
        raise ValueError(f"infllm-v2: queries have head size {size}, keys {key_size}.")
    if not 1 <= query_heads // groups <= 32:
        raise ValueError(f"infllm-v2: {query_heads // groups} query heads a group; 1 to 32 are supported.")
    _head_size(size)


def _head_size(size: int) -> None:
    if not 1 <= size <= 256:
        raise ValueError(f"infllm-v2: head size {size}; 1 to 256 is supported.")


def _windows(size: int, stride: int, ratio: int, block_size: int | None = None) -> None:
    if not 0 < stride <= size or ratio < 1:
        raise ValueError(
            f"infllm-v2: windows of {size} tokens every {stride} (coarse: {ratio} times); need 0 < stride <= size."
        )
    if block_size is not None and (block_size < 1 or block_size % stride):
        raise ValueError(f"infllm-v2: block_size {block_size} must be a positive multiple of stride {stride}.")


def _block_size(block_size: int) -> None:
    if not 1 <= block_size <= 128:
        raise ValueError(f"infllm-v2: block_size {block_size}; 1 to 128 tokens are supported.")


def _looks_at_values(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" or CHECK_ON_GPU


def row_bounds(tokens: int, device) -> torch.Tensor:
    """`cu_seqlens` of one row; its values are known and never read back."""
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    bounds._infllm_v2_bounds = (None if bounds.is_inference() else bounds._version, [0, tokens])
    return bounds


def _host_bounds(cu_seqlens: torch.Tensor) -> list[int] | None:
    """The values of `cu_seqlens`, read once a tensor (or version of it); `None` while a graph is captured."""
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    kept = getattr(cu_seqlens, "_infllm_v2_bounds", None)
    if kept is not None and kept[0] == version:
        return kept[1]
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    bounds = cu_seqlens.tolist()
    if version is not None:
        cu_seqlens._infllm_v2_bounds = (version, bounds)
    return bounds


def _cu_seqlens(name: str, cu_seqlens: torch.Tensor, tokens: int | None, longest: int) -> list[tuple[int, int]] | None:
    """Rows as (first, length); `tokens`, where given, is where the last one ends."""
    rows = cu_seqlens.shape[0] - 1 if cu_seqlens.dim() == 1 else 0
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(
            f"infllm-v2: {name} must be [rows + 1] with at least one row and at most {MAX_ROWS}, got shape "
            f"{tuple(cu_seqlens.shape)}."
        )
    bounds = _host_bounds(cu_seqlens)
    if bounds is None:
        return None
    lengths = [after - before for before, after in zip(bounds[:-1], bounds[1:])]
    if bounds[0] != 0 or (tokens is not None and bounds[-1] != tokens) or min(lengths) < 0:
        end = "" if tokens is None else f" to {tokens}, the number of tokens"
        shown = f"{bounds[:8]}{'...' if len(bounds) > 8 else ''}"
        raise ValueError(f"infllm-v2: {name} must rise from 0{end}; got {shown}.")
    if max(lengths) > longest:
        raise ValueError(f"infllm-v2: {name} has a row of {max(lengths)} tokens, but the maximum given is {longest}.")
    return list(zip(bounds, lengths))


def _pair(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> None:
    """The queries are the last of each row's positions."""
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        rows = cu_seqlens_q.shape[0] - 1, cu_seqlens_k.shape[0] - 1
        raise ValueError(f"infllm-v2: {rows[0]} rows of queries, {rows[1]} of keys.")
    bounds = _host_bounds(cu_seqlens_q), _host_bounds(cu_seqlens_k)
    if None in bounds:
        return
    for row in range(len(bounds[0]) - 1):
        q, k = (values[row + 1] - values[row] for values in bounds)
        if q > k:
            raise ValueError(
                f"infllm-v2: row {row} has {q} queries and {k} keys; the queries are the last of the keys."
            )


def _compressed_rows(rows, fine, coarse, size, stride, ratio) -> None:
    """The packed compressed keys hold the windows of every row."""
    for name, keys, wide, apart in (("fine", fine, size, stride), ("coarse", coarse, size * ratio, stride * ratio)):
        for start, length in rows or ():
            if (needed := start // apart + plain.windows(length, wide, apart)) > keys.shape[0]:
                raise ValueError(
                    f"infllm-v2: {name} holds {keys.shape[0]} means; rows of these cu_seqlens_k need {needed}. "
                    "Compress the same keys (compress_keys)."
                )


def _blocks(blocks: torch.Tensor, groups: int, queries: int, num_blocks: int) -> None:
    if blocks.dim() != 3 or tuple(blocks.shape[:2]) != (groups, queries):
        raise ValueError(
            f"infllm-v2: blocks must be [key/value heads, queries, selected] = [{groups}, {queries}, T], got "
            f"{tuple(blocks.shape)}."
        )
    if blocks.numel() and _looks_at_values(blocks):
        low, high = int(blocks.min()), int(blocks.max())
        if low < -1 or high >= num_blocks:
            raise ValueError(
                f"infllm-v2: blocks holds {low} ... {high}; allowed are 0 ... {num_blocks - 1}, and -1 for none."
            )
        before, after = blocks[..., :-1], blocks[..., 1:]
        if bool(((after >= 0) & ((after <= before) | (before < 0))).any()):
            raise ValueError(
                "infllm-v2: each query's blocks must rise, with -1 only at the end; sort and de-duplicate them."
            )


def _rows(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"infllm-v2: {name} must have shape {shape}, got {tuple(tensor.shape)}.")


# ----------------------------------------------------------------------------------------------------- compressed keys


@_operator("(Tensor key, Tensor cu_seqlens, int max_seqlen, int size, int stride, int ratio) -> (Tensor, Tensor)")
def _compress_keys(key, cu_seqlens, max_seqlen, size, stride, ratio):
    _tensors(3, key=key)
    _head_size(key.shape[2])
    _indices(key, cu_seqlens=cu_seqlens)
    _windows(size, stride, ratio)
    _cu_seqlens("cu_seqlens", cu_seqlens, key.shape[0], max_seqlen)
    return implementation(key).compress_keys(key, cu_seqlens, max_seqlen, size, stride, ratio)


@_fake
def _fake_compress_keys(key, cu_seqlens, max_seqlen, size, stride, ratio):
    shape = key.shape
    return tuple(key.new_empty((shape[0] // apart, *shape[1:])) for apart in (stride, stride * ratio))


def compress_keys(
    key: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, *, size: int = 32, stride: int = 16, ratio: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Means of the keys over windows of `size` tokens every `stride` tokens, and over windows `ratio` times as wide and
    apart, in one pass. Only complete windows count. No gradient (the selection has none).

    Args:
        key (`[N, G, D]`), cu_seqlens (int32 `[B + 1]`), max_seqlen: tokens of the longest row.

    Returns:
        fine `[N // stride, G, D]` and coarse `[N // (stride * ratio), G, D]` in the dtype of `key`; row `b` begins at
        `cu_seqlens[b] // stride` (coarse: `// (stride * ratio)`), entries between rows are 0.

    Raises:
        ValueError: dtype, shape, device or `cu_seqlens` that do not fit.
    """
    return ops.compress_keys(key, cu_seqlens, max_seqlen, size, stride, ratio)


@_operator(
    "(Tensor key, Tensor(a!) fine, Tensor(b!) coarse, Tensor starts, Tensor done, Tensor lengths, int max_new, int "
    "size, int stride, int ratio) -> ()"
)
def _update_compressed_keys(key, fine, coarse, starts, done, lengths, max_new, size, stride, ratio):
    _tensors(4, key=key, fine=fine, coarse=coarse)
    _head_size(key.shape[3])
    _indices(key, starts=starts, done=done, lengths=lengths)
    _windows(size, stride, ratio)
    batch, groups, total, width = key.shape
    for name, tensor in (("fine", fine), ("coarse", coarse)):
        if (tensor.shape[0], tensor.shape[1], tensor.shape[3]) != (batch, groups, width):
            raise ValueError(f"infllm-v2: {name} {tuple(tensor.shape)} does not fit key {tuple(key.shape)}.")
        if torch._debug_has_internal_overlap(tensor) == 1:
            raise ValueError(
                f"infllm-v2: {name} is written to and overlaps itself (an expanded view); clone it first."
            )
    for name, tensor in (("starts", starts), ("done", done), ("lengths", lengths)):
        _rows(name, tensor, (batch,))
    if _looks_at_values(lengths):
        for row, (start, old, new) in enumerate(zip(starts.tolist(), done.tolist(), lengths.tolist())):
            room = min(
                (fine.shape[2] - 1) * stride + size + stride,
                (coarse.shape[2] - 1) * stride * ratio + (size + stride) * ratio,
            )
            if not 0 <= old <= new <= total - start or start < 0 or new - old > max_new or new >= max(room, size):
                raise ValueError(
                    f"infllm-v2: row {row} starts at {start} and goes from {old} to {new} tokens; the cache holds "
                    f"{total} keys and compressed keys for fewer than {room} tokens, and max_new is {max_new}."
                )
    implementation(key).update_compressed_keys(key, fine, coarse, starts, done, lengths, max_new, size, stride, ratio)


@_fake
def _fake_update_compressed_keys(key, fine, coarse, starts, done, lengths, max_new, size, stride, ratio):
    return None


def update_compressed_keys(
    key: torch.Tensor,
    fine: torch.Tensor,
    coarse: torch.Tensor,
    starts: torch.Tensor,
    done: torch.Tensor,
    lengths: torch.Tensor,
    max_new: int,
    *,
    size: int = 32,
    stride: int = 16,
    ratio: int = 4,
) -> None:
    """
    Write, in place, the compressed keys of the windows completed since a cache row had `done` tokens.

    Args:
        key (`[B, G, N, D]`): cached keys, row `b` from slot `starts[b]` on.
        fine (`[B, G, K, D]`), coarse (`[B, G, C, D]`): written to; windows count from each row's first token.
        starts, done, lengths (int32 `[B]`): first slot, tokens accounted for before, tokens now.
        max_new: at least the largest `lengths - done`.

    Raises:
        ValueError: dtype, shape, device or lengths that do not fit; an output that overlaps itself.
    """
    ops.update_compressed_keys(key, fine, coarse, starts, done, lengths, max_new, size, stride, ratio)


# -------------------------------------------------------------------------------------------------------------- scores


def _score_tensors(dims, query, fine, coarse, heads_at, groups_at):
    _tensors(dims, query=query, fine=fine, coarse=coarse)
    _groups(query.shape[heads_at], fine.shape[groups_at], query.shape[-1], fine.shape[-1])
    if coarse.shape[groups_at] != fine.shape[groups_at] or coarse.shape[-1] != fine.shape[-1]:
        raise ValueError(
            f"infllm-v2: fine {tuple(fine.shape)} and coarse {tuple(coarse.shape)} differ in heads or head size."
        )


@_operator(
    "(Tensor query, Tensor fine, Tensor coarse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int "
    "max_seqlen_k, int block_size, int size, int stride, int ratio, float scaling) -> Tensor"
)
def _block_scores(
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
    _score_tensors(3, query, fine, coarse, 1, 1)
    _indices(query, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    _windows(size, stride, ratio, block_size)
    _cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.shape[0], max_seqlen_q)
    rows = _cu_seqlens("cu_seqlens_k", cu_seqlens_k, None, max_seqlen_k)
    _compressed_rows(rows, fine, coarse, size, stride, ratio)
    _pair(cu_seqlens_q, cu_seqlens_k)
    return implementation(query).block_scores(
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
    )


@_fake
def _fake_block_scores(
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
    num_blocks = (max_seqlen_k + block_size - 1) // block_size
    return query.new_empty((fine.shape[1], query.shape[0], num_blocks), dtype=torch.float32)


def block_scores(
    query: torch.Tensor,
    fine: torch.Tensor,
    coarse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_size: int = 64,
    size: int = 32,
    stride: int = 16,
    ratio: int = 4,
    scaling: float | None = None,
) -> torch.Tensor:
    """
    How much each block promises each query: `exp(q k_fine - LSE over visible coarse keys)`, summed over the query
    heads of a group, then the maximum over the fine keys that overlap the block (MiniCPM4, arXiv 2506.07900, section
    2.1). Windows that do not end at or before the query count 0; so does everything before the first coarse window
    ends.

    Args:
        query (`[S, H, D]`), fine and coarse (from `compress_keys`), cu_seqlens_q, cu_seqlens_k (int32 `[B + 1]`; the
        queries are the last of each row's positions), scaling: factor on the logits, `D ** -0.5` if absent.

    Returns:
        float32 `[G, S, M]`, `M = ceil(max_seqlen_k / block_size)`. Never forms `[H, S, K]`. No gradient.

    Raises:
        ValueError: dtype, shape, device or `cu_seqlens` that do not fit.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return ops.block_scores(
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
    )


@_operator(
    "(Tensor query, Tensor fine, Tensor coarse, Tensor lengths, Tensor? positions, int max_length, int block_size, "
    "int size, int stride, int ratio, float scaling) -> Tensor"
)
def _block_scores_decode(
    query, fine, coarse, lengths, positions, max_length, block_size, size, stride, ratio, scaling
):
    _score_tensors(4, query, fine, coarse, 2, 1)
    _indices(query, lengths=lengths, positions=positions)
    _windows(size, stride, ratio, block_size)
    batch, queries = query.shape[:2]
    _decode_rows(query, lengths, positions, fine=fine, coarse=coarse)
    if _looks_at_values(lengths) and batch:
        longest = int(lengths.max())
        for name, keys, wide, apart in (
            ("fine", fine, size, stride),
            ("coarse", coarse, size * ratio, stride * ratio),
        ):
            if plain.windows(longest, wide, apart) > keys.shape[2]:
                raise ValueError(
                    f"infllm-v2: a row of {longest} tokens has {plain.windows(longest, wide, apart)} {name} keys, the "
                    f"tensor holds {keys.shape[2]}."
                )
        if longest > max_length:
            raise ValueError(f"infllm-v2: lengths holds {longest}, but max_length is {max_length}.")
    return implementation(query).block_scores_decode(
        query, fine, coarse, lengths, positions, max_length, block_size, size, stride, ratio, scaling
    )


def _decode_rows(query, lengths, positions, **caches):
    batch, queries = query.shape[:2]
    if not 1 <= queries <= 64:
        raise ValueError(
            f"infllm-v2: {queries} queries a row; decoding takes 1 to 64. Use block_scores and sparse_attention."
        )
    if batch * query.shape[2] > MAX_ROWS and query.is_cuda:
        raise ValueError(f"infllm-v2: {batch} rows of {query.shape[2]} heads; together at most {MAX_ROWS} on a GPU.")
    for name, cache in caches.items():
        if cache.shape[0] != batch:
            raise ValueError(f"infllm-v2: {batch} rows of queries, {cache.shape[0]} of {name}.")
    _rows("lengths", lengths, (batch,))
    _rows("positions", positions, (batch, queries))
    if _looks_at_values(lengths) and batch and int(lengths.min()) < queries and positions is None:
        raise ValueError(f"infllm-v2: a row of {int(lengths.min())} tokens cannot end with {queries} queries.")


@_fake
def _fake_block_scores_decode(
    query, fine, coarse, lengths, positions, max_length, block_size, size, stride, ratio, scaling
):
    num_blocks = (max_length + block_size - 1) // block_size
    return query.new_empty((fine.shape[1], query.shape[0] * query.shape[1], num_blocks), dtype=torch.float32)


def block_scores_decode(
    query: torch.Tensor,
    fine: torch.Tensor,
    coarse: torch.Tensor,
    lengths: torch.Tensor,
    max_length: int,
    *,
    positions: torch.Tensor | None = None,
    block_size: int = 64,
    size: int = 32,
    stride: int = 16,
    ratio: int = 4,
    scaling: float | None = None,
) -> torch.Tensor:
    """
    `block_scores` for a few queries a row against compressed keys in a cache, split over the keys.

    Args:
        query (`[B, S, H, D]`, `S` 1 to 64), fine (`[B, G, K, D]`), coarse (`[B, G, C, D]`).
        lengths (int32 `[B]`): tokens that the compressed keys account for; a window beyond them is not seen.
        max_length: at least the largest length; it fixes the output's size.
        positions (int32 `[B, S]`): position of each query, by default the last `S` of `lengths`.

    Returns:
        float32 `[G, B * S, M]`, `M = ceil(max_length / block_size)`.

    Raises:
        ValueError: dtype, shape, device or lengths that do not fit.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return ops.block_scores_decode(
        query, fine, coarse, lengths, positions, max_length, block_size, size, stride, ratio, scaling
    )


# ----------------------------------------------------------------------------------------------------------- selection


@_operator(
    "(Tensor scores, Tensor positions, int num_selected, int init_blocks, int window_blocks, int block_size) -> Tensor"
)
def _select_blocks(scores, positions, num_selected, init_blocks, window_blocks, block_size):
    if scores.dim() != 3 or scores.dtype != torch.float32 or not scores.is_contiguous():
        raise ValueError(
            f"infllm-v2: scores must be contiguous float32 [key/value heads, queries, blocks], got {scores.dtype} "
            f"{tuple(scores.shape)}."
        )
    _indices(scores, positions=positions)
    _rows("positions", positions, (scores.shape[1],))
    _selection(num_selected, init_blocks, window_blocks)
    _block_size(block_size)
    if positions.numel() and _looks_at_values(positions):
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= scores.shape[2] * block_size:
            raise ValueError(
                f"infllm-v2: positions hold {low} ... {high}; {scores.shape[2]} blocks of {block_size} tokens allow "
                f"0 ... {scores.shape[2] * block_size - 1}."
            )
    return implementation(scores).select_blocks(
        scores, positions, num_selected, init_blocks, window_blocks, block_size
    )


def _selection(num_selected, init_blocks, window_blocks):
    if init_blocks < 0 or window_blocks < 0 or num_selected < init_blocks + window_blocks + 1:
        raise ValueError(
            f"infllm-v2: {num_selected} blocks selected, of which {init_blocks} initial, {window_blocks} of the "
            "window and the query's own are forced; num_selected must be at least their sum."
        )


@_fake
def _fake_select_blocks(scores, positions, num_selected, init_blocks, window_blocks, block_size):
    return scores.new_empty((*scores.shape[:2], min(num_selected, scores.shape[2])), dtype=torch.int32)


def select_blocks(
    scores: torch.Tensor,
    positions: torch.Tensor,
    num_selected: int = 96,
    *,
    init_blocks: int = 1,
    window_blocks: int = 32,
    block_size: int = 64,
) -> torch.Tensor:
    """
    The blocks each query reads: the initial ones, its own and the `window_blocks` before it, then the best by score.
    Deterministic: ties go to the lower block. None lies ahead of the query.

    Args:
        scores (float32 `[G, S, M]`), positions (int32 `[S]`): each query's position in its row.

    Returns:
        int32 `[G, S, T]`, `T = min(num_selected, M)`, rising, -1 after the last.

    Raises:
        ValueError: shapes or dtypes that do not fit, a position beyond the blocks.
    """
    return ops.select_blocks(scores, positions, num_selected, init_blocks, window_blocks, block_size)


# ----------------------------------------------------------------------------------------------------------- attention


def _attention_inputs(query, key, value, blocks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size):
    _tensors(3, query=query, key=key, value=value)
    if key.shape != value.shape:
        raise ValueError(f"infllm-v2: key {tuple(key.shape)} and value {tuple(value.shape)} must have one shape.")
    _groups(query.shape[1], key.shape[1], query.shape[2], key.shape[2])
    _block_size(block_size)
    _indices(query, blocks=blocks, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    _cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.shape[0], max_seqlen_q)
    _cu_seqlens("cu_seqlens_k", cu_seqlens_k, key.shape[0], max_seqlen_k)
    _pair(cu_seqlens_q, cu_seqlens_k)
    _blocks(blocks, key.shape[1], query.shape[0], -(-max_seqlen_k // block_size))


@_operator(
    "(Tensor query, Tensor key, Tensor value, Tensor blocks, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int "
    "max_seqlen_q, int max_seqlen_k, int block_size, float scaling) -> (Tensor, Tensor)"
)
def _sparse_attention(
    query, key, value, blocks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size, scaling
):
    _attention_inputs(query, key, value, blocks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size)
    return implementation(query).sparse_attention(
        query, key, value, blocks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size, scaling
    )


@_fake
def _fake_sparse_attention(
    query, key, value, blocks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size, scaling
):
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


@_operator(
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, Tensor blocks, Tensor "
    "cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, int block_size, float scaling) -> "
    "(Tensor, Tensor, Tensor)"
)
def _sparse_attention_backward(
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
    """
    Gradients of `sparse_attention` for `grad` (`[S, H, D]`): of query, key and value. Bit for bit the same in every
    run: each key block gathers the queries that read it, nothing is added atomically.
    """
    _attention_inputs(query, key, value, blocks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size)
    if grad.shape != query.shape or output.shape != query.shape or lse.shape != query.shape[:2]:
        raise ValueError(
            f"infllm-v2: grad {tuple(grad.shape)}, output {tuple(output.shape)} and lse {tuple(lse.shape)} do not "
            f"fit query {tuple(query.shape)}."
        )
    module = implementation(query)
    backward = getattr(module, "sparse_attention_backward", plain.sparse_attention_backward)
    return backward(
        grad.contiguous(), query, key, value, output, lse, blocks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, block_size, scaling,
    )  # fmt: skip


@_fake
def _fake_sparse_attention_backward(
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
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:6])
    ctx.constants = inputs[6:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    query, key, value, output, lse, blocks, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    gradients = ops.sparse_attention_backward(
        grad, query, key, value, output, lse, blocks, cu_seqlens_q, cu_seqlens_k, *ctx.constants
    )
    return (*gradients, *[None] * 7)


torch.library.register_autograd(
    add_op_namespace_prefix("sparse_attention"), _backward, setup_context=_save, lib=_library
)


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_size: int = 64,
    scaling: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Exact causal softmax attention of each query over the tokens of its blocks, accumulated in float32. Differentiable
    in query, key and value; deterministic forward and backward.

    Args:
        query (`[S, H, D]`), key and value (`[N, G, D]`): rows one after another, `H` a multiple of `G`.
        blocks (int32 `[G, S, T]`): from `select_blocks`, or any rising indices with -1 after the last. A query without
            a block gives 0.
        cu_seqlens_q, cu_seqlens_k (int32 `[B + 1]`): the queries are the last of each row's positions.
        max_seqlen_q, max_seqlen_k: tokens of the longest row. scaling: `D ** -0.5` if absent.

    Returns:
        output `[S, H, D]` and the log-sum-exp of the logits, float32 `[S, H]` (no gradient).

    Raises:
        ValueError: dtype, shape, device, `cu_seqlens` or indices that do not fit.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return ops.sparse_attention(
        query, key, value, blocks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size, scaling
    )


@_operator(
    "(Tensor query, Tensor key, Tensor value, Tensor? blocks, Tensor? scores, Tensor lengths, Tensor? positions, "
    "Tensor? starts, Tensor? page_table, Tensor? tree_mask, int num_selected, int init_blocks, int window_blocks, "
    "int block_size, float scaling) -> Tensor"
)
def _sparse_attention_decode(
    query, key, value, blocks, scores, lengths, positions, starts, page_table, tree_mask, num_selected, init_blocks,
    window_blocks, block_size, scaling,
):  # fmt: skip
    _tensors(4, query=query, key=key, value=value)
    if key.shape != value.shape:
        raise ValueError(f"infllm-v2: key {tuple(key.shape)} and value {tuple(value.shape)} must have one shape.")
    _groups(query.shape[2], key.shape[1], query.shape[3], key.shape[3])
    _block_size(block_size)
    _indices(query, lengths=lengths, positions=positions, starts=starts, page_table=page_table, blocks=blocks)
    batch, queries = query.shape[:2]
    _decode_rows(query, lengths, positions, **({"key": key} if page_table is None else {}))
    if (blocks is None) == (scores is None):
        raise ValueError(
            "infllm-v2: pass either blocks (chosen before) or scores (to choose from), not both and not neither."
        )
    if scores is not None:
        _selection(num_selected, init_blocks, window_blocks)
        if (
            scores.dim() != 3
            or scores.dtype != torch.float32
            or tuple(scores.shape[:2]) != (key.shape[1], batch * queries)
            or not scores.is_contiguous()
        ):
            raise ValueError(
                f"infllm-v2: scores must be contiguous float32 [{key.shape[1]}, {batch * queries}, blocks], got "
                f"{scores.dtype} {tuple(scores.shape)}."
            )
    if page_table is not None:
        if key.shape[2] % block_size:
            raise ValueError(f"infllm-v2: pages of {key.shape[2]} tokens must hold whole blocks of {block_size}.")
        if page_table.dim() != 2 or page_table.shape[0] != batch:
            raise ValueError(f"infllm-v2: page_table must be [{batch}, pages], got {tuple(page_table.shape)}.")
        if starts is not None:
            raise ValueError("infllm-v2: starts is for contiguous caches; a paged row begins with its first page.")
    _rows("starts", starts, (batch,))
    if tree_mask is not None and (
        tree_mask.dtype != torch.int64 or tuple(tree_mask.shape) != (batch, queries) or not tree_mask.is_contiguous()
    ):
        raise ValueError(
            f"infllm-v2: tree_mask must be contiguous int64 [{batch}, {queries}], bit j of an entry allowing draft "
            f"j; got {tree_mask.dtype} {tuple(tree_mask.shape)}."
        )
    if _looks_at_values(lengths) and batch:
        longest = int((lengths if starts is None else lengths + starts).max())
        room = key.shape[2] if page_table is None else page_table.shape[1] * key.shape[2]
        least = queries if tree_mask is not None else 1
        if longest > room or int(lengths.min()) < least or (starts is not None and int(starts.min()) < 0):
            begin = "" if starts is None else f" from slots {starts.tolist()[:8]} on"
            raise ValueError(
                f"infllm-v2: rows of {lengths.tolist()[:8]} tokens{begin}; the cache has room for {room}, and a row "
                f"has at least {least}."
            )
        if positions is not None and int(positions.min()) < 0:
            raise ValueError(f"infllm-v2: positions holds {int(positions.min())}; the first token is at 0.")
        if scores is not None and scores.shape[2] * block_size < int(lengths.max()):
            raise ValueError(
                f"infllm-v2: scores of {scores.shape[2]} blocks of {block_size} tokens for a row of "
                f"{int(lengths.max())}."
            )
        if page_table is not None:
            used = page_table[torch.arange(page_table.shape[1], device=key.device) * key.shape[2] < lengths[:, None]]
            if int(used.min()) < 0 or int(used.max()) >= key.shape[0]:
                raise ValueError(
                    f"infllm-v2: page_table names pages {int(used.min())} ... {int(used.max())} of {key.shape[0]}."
                )
        if blocks is not None:
            _blocks(blocks, key.shape[1], batch * queries, -(-room // block_size))
    elif blocks is not None:
        _blocks(blocks, key.shape[1], batch * queries, 1 << 30)
    return implementation(query).sparse_attention_decode(
        query, key, value, blocks, scores, lengths, positions, starts, page_table, tree_mask, num_selected,
        init_blocks, window_blocks, block_size, scaling,
    )  # fmt: skip


@_fake
def _fake_sparse_attention_decode(
    query, key, value, blocks, scores, lengths, positions, starts, page_table, tree_mask, num_selected, init_blocks,
    window_blocks, block_size, scaling,
):  # fmt: skip
    return query.new_empty(query.shape)


def sparse_attention_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    *,
    blocks: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    num_selected: int = 96,
    init_blocks: int = 1,
    window_blocks: int = 32,
    block_size: int = 64,
    scaling: float | None = None,
) -> torch.Tensor:
    """
    Attention of the last 1 to 64 tokens of each row over the blocks they read in a long cache, split over the blocks.

    Give `blocks`, or `scores` to choose from on the way (the same choice as `select_blocks`, one launch less).

    Args:
        query (`[B, S, H, D]`).
        key, value (`[B, G, N, D]`): the cache, the queries' own keys included; with `page_table` `[pages, G,
        page size,
            D]`, a page being a whole number of blocks.
        lengths (int32 `[B]`): tokens of each row, the queries included.
        blocks (int32 `[G, B * S, T]`) or scores (float32 `[G, B * S, M]`, from `block_scores_decode`).
        positions (int32 `[B, S]`): of each query, by default the last `S` of the row. A tree's queries share
        positions. starts (int32 `[B]`): first slot of each row (left padding), by default 0.
        page_table (int32 `[B, pages of the longest row]`).
        tree_mask (int64 `[B, S]`): the last `S` slots of a row are drafts; query `i` reads draft `j` if bit `j` is set
            (its ancestors and itself), and of the tokens before the drafts those of its blocks.

    Returns:
        `[B, S, H, D]`; 0 for a query that may read nothing.

    Raises:
        ValueError: dtype, shape, device, lengths, pages or indices that do not fit.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return ops.sparse_attention_decode(
        query, key, value, blocks, scores, lengths, positions, starts, page_table, tree_mask, num_selected,
        init_blocks, window_blocks, block_size, scaling,
    )  # fmt: skip
