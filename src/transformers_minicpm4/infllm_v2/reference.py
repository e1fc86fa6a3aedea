r"""
InfLLM v2 as its definition: compress, score, pool, select, attend, one short function each.

MiniCPM4 (arXiv 2506.07900, section 2.1) and InfLLM-V2 (arXiv 2509.24663), in the selection rule of the current
checkpoints (log-sum-exp over coarse means, window counted beside the top-k). Plain PyTorch, any head and group size,
memory `[H, S, N]`: the truth that everything faster must agree with.

Here a row has no padding: key `n` is at position `n`, and the queries are the last `S` of `N` positions.

Shape letters: `B` batch, `S` query tokens, `N` key tokens, `H` query heads, `G` key/value heads, `D` head size, `M`
blocks, `K` compressed keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .configuration import InfLLMv2Config


def compress_keys(key: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """
    Mean of every complete window of `size` keys, one each `stride` tokens.

    Args:
        key (`[B, G, N, D]`): keys, rotated unless the config says `use_nope`.

    Returns:
        `[B, G, K, D]` in the dtype of `key`, `K = (N - size) // stride + 1`, or 0 where `N < size`.
    """
    if key.shape[-2] < size:
        return key[..., :0, :]
    return key.unfold(-2, size, stride).mean(-1)


def visible_windows(position: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """Number of windows that end at or before `position`: window `j` covers tokens `j * stride ... + size - 1`."""
    return ((position + 1 - size).div(stride, rounding_mode="floor") + 1).clamp_min(0)


def block_scores(
    query: torch.Tensor,
    fine: torch.Tensor,
    coarse: torch.Tensor,
    positions: torch.Tensor,
    num_blocks: int,
    config: InfLLMv2Config,
    scaling: float,
) -> torch.Tensor:
    r"""
    How much each block promises each query: `exp(q k_j - LSE over visible coarse keys)`, summed over the heads of a
    group, then the maximum over the compressed keys that overlap the block.

    A compressed key whose tokens are not all at or before the query counts 0, and so does everything for a query that
    sees no coarse key yet. Scores are float32, or float64 for float64 inputs.

    Args:
        query (`[B, H, S, D]`), fine (`[B, G, K, D]`), coarse (`[B, G, K', D]`), positions (`[S]`).

    Returns:
        `[B, G, S, M]`.
    """
    batch, heads, length, size = query.shape
    groups = fine.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = query.to(dtype).view(batch, groups, heads // groups, length, size)

    def scores(keys):
        return torch.einsum("bghsd,bgkd->bghsk", query, keys.to(dtype)) * scaling

    def visible(keys, coarse):
        count = visible_windows(positions, *config.windows(coarse))
        return torch.arange(keys.shape[2], device=query.device) < count[:, None]

    sees_fine, sees_coarse = visible(fine, False), visible(coarse, True)
    normaliser = scores(coarse).masked_fill(~sees_coarse, -torch.inf).logsumexp(-1, keepdim=True)
    weight = (scores(fine) - normaliser).exp()
    weight = weight.masked_fill(~(sees_fine & sees_coarse.any(-1, keepdim=True)), 0).sum(2)

    # Block b overlaps the windows that start in it and the `before` windows that reach into it.
    step = config.block_size // config.kernel_stride
    before = (config.kernel_size - 1) // config.kernel_stride
    padded = torch.nn.functional.pad(weight, (before, max(num_blocks * step - weight.shape[-1], 0)))
    return padded.unfold(-1, step + before, step).amax(-1)[..., :num_blocks]


def select_blocks(scores: torch.Tensor, positions: torch.Tensor, config: InfLLMv2Config) -> torch.Tensor:
    """
    The blocks each query reads: the initial ones, its own and the window before it, then the best by score. Ties go to
    the lower block.

    Args:
        scores (`[B, G, S, M]`), positions (`[S]`).

    Returns:
        bool `[B, G, S, M]`; at most `config.selected_blocks` true in a row, none in the future.
    """
    block = torch.arange(scores.shape[-1], device=scores.device)
    own = positions[:, None] // config.block_size
    forced = (block < config.init_blocks) | (block >= own - config.window_blocks)
    scores = scores.clamp_max(torch.finfo(scores.dtype).max)  # only forced blocks are infinite
    scores = scores.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : config.selected_blocks]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & (block <= own)


def reads_densely(positions: torch.Tensor, config: InfLLMv2Config, longest: int) -> torch.Tensor:
    """Which queries read every block (bool `[S]`); `longest` is the longest row of the call, in tokens."""
    if config.dense_switch == "call":
        return torch.full_like(positions, longest < config.dense_len, dtype=torch.bool)
    return positions + 1 < config.dense_len


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
    return_blocks: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention of the last `S` positions over the blocks they select. Gradients flow through the attention stage alone.

    Args:
        query (`[B, H, S, D]`), key and value (`[B, G, N, D]`), selection_query (`[B, H, S, D]`), compressed_keys
        (gives fine `[B, G, K, D]` and coarse `[B, G, K', D]`).

    Returns:
        output `[B, H, S, D]` and, if asked, the blocks read, bool `[B, G, S, M]`.
    """
    length, total = query.shape[2], key.shape[2]
    positions = torch.arange(total - length, total, device=query.device)
    tokens = torch.arange(total, device=query.device)
    with torch.no_grad():
        num_blocks = -(-total // config.block_size)
        scores = block_scores(selection_query, *compressed_keys(), positions, num_blocks, config, scaling)
        blocks = select_blocks(scores, positions, config)
        past = torch.arange(num_blocks, device=query.device) <= (positions // config.block_size)[:, None]
        blocks = blocks | (reads_densely(positions, config, longest)[:, None] & past)
        allowed = blocks[..., tokens // config.block_size] & (tokens <= positions[:, None])

    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
    logits = logits.masked_fill(~allowed.repeat_interleave(group, 1), -torch.inf)
    dtype = torch.promote_types(query.dtype, torch.float32)
    weights = logits.softmax(-1, dtype=dtype).to(query.dtype)
    return weights @ value.repeat_interleave(group, 1), blocks if return_blocks else None
