"""
InfLLM v2 over a tree of drafted tokens: each path attends exactly as if it had been decoded alone.

Which blocks a token reads depends on the keys of its own path, so a mask over all nodes would not be the rule. The
projections of all nodes are computed at once; here each path is put behind the cache in turn, attended with the usual
code, and taken off again. Shape letters: `T` rows of the pass, `H` query heads, `G` key/value heads, `D` head size.
"""

from __future__ import annotations

import torch

from .backend import infllm_v2_attention
from .cache import InfLLMv2CacheLayer
from .configuration import InfLLMv2Config


def tree_attention(
    layer: InfLLMv2CacheLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    paths: list[list[int]],
    config: InfLLMv2Config,
    *,
    scaling: float | None = None,
    selection_query: torch.Tensor | None = None,
    selection_key: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Attention of one sequence's drafted rows over the cache and their own paths.

    Args:
        layer: the cache of this sequence, without the rows; it is left as it was, but for `layer.drafted`.
        query (`[1, H, T, D]`), key and value (`[1, G, T, D]`): of all rows, rotated at their own positions.
        paths: rows from the root to each leaf, in order; every row is on one.
        selection_query, selection_key: the un-rotated tensors, with `config.use_nope`.

    Returns:
        output `[1, T, H, D]`. `layer.keep_drafted(rows)` appends the rows that were accepted.
    """
    output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    for path in paths:
        rows = torch.tensor(path, device=query.device)
        own_key = None if selection_key is None else selection_key[:, :, rows]
        keys, values = layer.update(key[:, :, rows], value[:, :, rows], selection_key=own_key, row_starts=[0])
        attended = infllm_v2_attention(
            query[:, :, rows],
            keys,
            values,
            config,
            selection_query=None if selection_query is None else selection_query[:, :, rows],
            compressed_keys=layer.compressed_keys,
            scaling=scaling,
        )
        output[:, rows] = attended.transpose(1, 2)
        layer.crop(-len(path))
    layer.drafted = (key, value, selection_key)
    return output
