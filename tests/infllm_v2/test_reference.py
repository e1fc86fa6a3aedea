"""The definition against a computation that shares nothing with it: plain loops over numpy arrays."""

import math

import numpy as np
import pytest
import torch

from tolerances import assert_close
from transformers_minicpm4.infllm_v2 import InfLLMv2Config, infllm_v2_attention


def by_hand(query, key, value, config, scaling):
    """InfLLM v2 (rule set of the current checkpoints), one query and one head group at a time."""
    query, key, value = (tensor.numpy() for tensor in (query, key, value))
    batch, heads, length, size = query.shape
    groups, total = key.shape[1:3]
    share = heads // groups
    output = np.zeros_like(query)
    read = np.zeros((batch, groups, length, math.ceil(total / config.block_size)), dtype=bool)

    def means(keys, position, ratio):
        width, step = config.kernel_size * ratio, config.kernel_stride * ratio
        found, start = [], 0
        while start + width - 1 <= position:
            found.append((start, start + width, keys[start : start + width].mean(0)))
            start += step
        return found

    for b in range(batch):
        for g in range(groups):
            for s in range(length):
                position = total - length + s
                own = position // config.block_size
                fine, coarse = means(key[b, g], position, 1), means(key[b, g], position, 4)
                scores = [0.0] * (own + 1)
                if coarse:
                    for start, stop, mean in fine:
                        weight = 0.0
                        for h in range(g * share, (g + 1) * share):
                            q = query[b, h, s] * scaling
                            weight += math.exp(q @ mean) / sum(math.exp(q @ other) for _, _, other in coarse)
                        for block in range(own + 1):
                            if start < (block + 1) * config.block_size and stop > block * config.block_size:
                                scores[block] = max(scores[block], weight)
                forced = [
                    block < config.init_blocks or block >= own - config.window_size // config.block_size
                    for block in range(own + 1)
                ]
                order = sorted(range(own + 1), key=lambda block: (not forced[block], -scores[block], block))
                budget = config.topk + config.window_size // config.block_size
                chosen = set(order[:budget]) if position + 1 >= config.dense_len else set(order)
                read[b, g, s, list(chosen)] = True
                tokens = [n for n in range(position + 1) if n // config.block_size in chosen]
                for h in range(g * share, (g + 1) * share):
                    logits = key[b, g, tokens] @ query[b, h, s] * scaling
                    weights = np.exp(logits - logits.max())
                    output[b, h, s] = weights @ value[b, g, tokens] / weights.sum()
    return torch.from_numpy(output), torch.from_numpy(read)


CONFIGS = {
    "window": InfLLMv2Config(kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=3, dense_len=-1),
    "no_window_no_init": InfLLMv2Config(
        kernel_size=8, kernel_stride=4, block_size=8, window_size=0, topk=2, init_blocks=0, dense_len=40
    ),
    "kernel_wider_than_block": InfLLMv2Config(
        kernel_size=12, kernel_stride=4, block_size=4, window_size=10, topk=5, init_blocks=2, dense_len=0
    ),
    "kernel_no_multiple_of_stride": InfLLMv2Config(
        kernel_size=7, kernel_stride=4, block_size=12, window_size=24, topk=2, dense_len=100
    ),
}


def tensors(heads, groups, length, total, size=16, batch=1):
    generator = torch.Generator().manual_seed(heads * 1000 + total)
    shapes = (batch, heads, length, size), (batch, groups, total, size), (batch, groups, total, size)
    # Laid out [B, tokens, heads, D], as a model's projections are.
    return tuple(
        torch.randn(b, n, h, d, generator=generator, dtype=torch.float64).transpose(1, 2) for b, h, n, d in shapes
    )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize(
    "heads, groups, length, total", [(2, 2, 131, 131), (4, 2, 20, 127), (16, 2, 9, 95), (16, 1, 3, 143), (8, 1, 1, 33)]
)
def test_equals_loops(config, heads, groups, length, total):
    query, key, value = tensors(heads, groups, length, total)
    output, blocks = infllm_v2_attention(
        query, key, value, config, scaling=0.3, implementation="reference", return_blocks=True
    )
    wanted, read = by_hand(query, key, value, config, 0.3)
    assert torch.equal(blocks, read)
    assert_close(output, wanted, "attention_float64", "output")


def test_topk_that_covers_everything_is_dense():
    query, key, value = tensors(4, 2, 200, 200)
    config = InfLLMv2Config(kernel_size=8, kernel_stride=4, block_size=8, window_size=8, topk=25, dense_len=-1)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    for implementation in ("reference", "blockwise"):
        output = infllm_v2_attention(query, key, value, config, implementation=implementation)
        assert_close(output, dense, "attention_float64", implementation)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_released_config_reads_what_was_published(implementation):
    """96 blocks: the first, the query's own and 32 before it, 62 chosen; none in the future."""
    config = InfLLMv2Config()
    query, key, value = (tensor.float() for tensor in tensors(16, 1, 70, 9_000, size=8))
    _, blocks = infllm_v2_attention(query, key, value, config, implementation=implementation, return_blocks=True)
    for s, row in enumerate(blocks[0, 0]):
        own = (9_000 - 70 + s) // 64
        assert row.sum() == 96
        assert row[0]
        assert row[own - 32 : own + 1].all()
        assert not row[own + 1 :].any()


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_ties_go_to_the_lower_block(implementation):
    """With all keys alike every block promises the same: the chosen ones are the first."""
    query = torch.randn(1, 4, 12, 16, dtype=torch.float64)
    key = torch.randn(1, 2, 1, 16, dtype=torch.float64).expand(1, 2, 200, 16).contiguous()
    config = InfLLMv2Config(
        kernel_size=8, kernel_stride=4, block_size=8, window_size=16, topk=4, init_blocks=0, dense_len=-1
    )
    _, blocks = infllm_v2_attention(query, key, key, config, implementation=implementation, return_blocks=True)
    for s, row in enumerate(blocks[0, 0]):
        own = (200 - 12 + s) // 8
        assert row.nonzero().squeeze(1).tolist() == [0, 1, 2, own - 2, own - 1, own]


def test_selection_carries_no_gradient():
    """Where the rotated tensors are constants, moving the un-rotated ones has no gradient path at all."""
    query, key, value = tensors(4, 2, 60, 60)
    selection_query, selection_key = query.clone().requires_grad_(), key.clone().requires_grad_()
    config = InfLLMv2Config(
        kernel_size=8, kernel_stride=4, block_size=8, window_size=0, topk=2, dense_len=-1, use_nope=True
    )
    value.requires_grad_()
    for implementation in ("reference", "blockwise"):
        output = infllm_v2_attention(
            query,
            key,
            value,
            config,
            selection_query=selection_query,
            selection_key=selection_key,
            implementation=implementation,
        )
        output.sum().backward()
        assert value.grad.abs().sum() > 0
        assert selection_query.grad is None
        assert selection_key.grad is None
