"""The door: rows of a batch, where dense ends, tensors of use_nope and of the cache, bad input."""

import pytest
import torch
from test_reference import tensors

from tolerances import assert_close
from transformers_minicpm4.infllm_v2 import InfLLMv2Config, infllm_v2_attention
from transformers_minicpm4.infllm_v2.reference import compress_keys


IMPLEMENTATIONS = ["reference", "blockwise"]
CONFIG = InfLLMv2Config(kernel_size=8, kernel_stride=4, block_size=8, window_size=16, topk=3, dense_len=-1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [97, 30, 1])
def test_padded_rows_are_as_if_alone(implementation, length):
    query, key, value = tensors(4, 2, length, 97, batch=3)
    mask = torch.ones(3, 97)
    mask[0, :13] = 0
    mask[2, :81] = 0
    output, blocks = infllm_v2_attention(
        query, key, value, CONFIG, attention_mask=mask, implementation=implementation, return_blocks=True
    )
    for row, start in enumerate((13, 0, 81)):
        padding = max(start - (97 - length), 0)
        alone, read = infllm_v2_attention(
            query[row : row + 1, :, padding:],
            key[row : row + 1, :, start:],
            value[row : row + 1, :, start:],
            CONFIG,
            implementation=implementation,
            return_blocks=True,
        )
        assert_close(output[row : row + 1, :, padding:], alone, "attention_float64", f"row {row}")
        assert torch.equal(blocks[row : row + 1, :, padding:, : read.shape[-1]], read)
        assert not output[row, :, :padding].any()
        assert not blocks[row, :, :padding].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_right_padding_is_never_read(implementation):
    query, key, value = tensors(4, 2, 90, 90)
    mask = torch.ones(1, 90)
    mask[:, 70:] = 0
    output = infllm_v2_attention(query, key, value, CONFIG, attention_mask=mask, implementation=implementation)
    alone = infllm_v2_attention(
        query[:, :, :70], key[:, :, :70], value[:, :, :70], CONFIG, implementation=implementation
    )
    assert_close(output[:, :, :70], alone, "attention_float64", "output")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dense_len", [-1, 0, 61, 150])
def test_the_answer_does_not_depend_on_the_cut(implementation, dense_len):
    config = InfLLMv2Config(**{**CONFIG.to_dict(), "dense_len": dense_len})
    query, key, value = tensors(4, 2, 170, 170)
    whole, read = infllm_v2_attention(query, key, value, config, implementation=implementation, return_blocks=True)
    for cuts in ([0, 1, 59, 60, 61, 62, 170], [0, 149, 150, 151, 170], list(range(0, 171, 17))):
        for begin, end in zip(cuts[:-1], cuts[1:]):
            part, blocks = infllm_v2_attention(
                query[:, :, begin:end],
                key[:, :, :end],
                value[:, :, :end],
                config,
                implementation=implementation,
                return_blocks=True,
            )
            assert_close(part, whole[:, :, begin:end], "attention_float64", f"queries {begin} to {end}")
            assert torch.equal(blocks, read[:, :, begin:end, : blocks.shape[-1]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dense_until_dense_len_by_position_or_by_call(implementation):
    query, key, value = tensors(4, 2, 120, 120)
    covered = CONFIG.selected_blocks * CONFIG.block_size  # 40 tokens
    fields = {**CONFIG.to_dict(), "dense_len": 100}

    def blocks(switch, total):
        config = InfLLMv2Config(**{**fields, "dense_switch": switch})
        _, read = infllm_v2_attention(
            query[:, :, :total],
            key[:, :, :total],
            value[:, :, :total],
            config,
            implementation=implementation,
            return_blocks=True,
        )
        return read.sum(-1)

    everything = (torch.arange(120) // 8 + 1).expand(1, 2, -1)
    assert torch.equal(blocks("call", 99), everything[..., :99])  # the released rule: this call is dense
    sparse = blocks("call", 100)  # ... and this one is not, for any of its queries
    assert torch.equal(sparse, everything[..., :100].clamp_max(CONFIG.selected_blocks))
    by_position = blocks("position", 120)
    assert torch.equal(by_position[..., :99], everything[..., :99])
    assert (by_position[..., 99:] == CONFIG.selected_blocks).all()
    differ = (blocks("call", 120) != by_position).any(1).any(0)
    assert differ.nonzero().min() >= covered
    assert differ.nonzero().max() < 99


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_call_switch_goes_by_the_longest_row(implementation):
    config = InfLLMv2Config(**{**CONFIG.to_dict(), "dense_len": 90, "dense_switch": "call"})
    query, key, value = tensors(4, 2, 97, 97, batch=2)
    mask = torch.ones(2, 97)
    mask[1, :40] = 0  # 57 tokens: short, but its neighbour is long
    _, blocks = infllm_v2_attention(
        query, key, value, config, attention_mask=mask, implementation=implementation, return_blocks=True
    )
    assert blocks[1, 0, -1].sum() == config.selected_blocks
    mask[0, :10] = 0  # now the longest row has 87
    _, blocks = infllm_v2_attention(
        query, key, value, config, attention_mask=mask, implementation=implementation, return_blocks=True
    )
    assert blocks[1, 0, -1].sum() == 8


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compressed_keys_may_come_from_outside(implementation):
    query, key, value = tensors(4, 2, 20, 130)
    compressed = tuple(compress_keys(key, *CONFIG.windows(coarse)) for coarse in (False, True))
    spare = tuple(torch.cat([keys, torch.full_like(keys[:, :, :3], torch.nan)], 2) for keys in compressed)
    own = infllm_v2_attention(query, key, value, CONFIG, implementation=implementation)
    for given in (compressed, spare):  # spare entries are never looked at
        output = infllm_v2_attention(query, key, value, CONFIG, compressed_keys=given, implementation=implementation)
        assert torch.equal(output, own)
    with pytest.raises(ValueError, match="compressed_keys has 30 entries"):
        infllm_v2_attention(query, key, value, CONFIG, compressed_keys=(compressed[0][:, :, :30], compressed[1]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_use_nope_selects_with_the_unrotated_tensors(implementation):
    config = InfLLMv2Config(**{**CONFIG.to_dict(), "use_nope": True})
    query, key, value = tensors(4, 2, 60, 110)
    other_query, other_key, _ = (tensor.flip(-1) * 1.5 for tensor in tensors(4, 2, 60, 110))
    output, blocks = infllm_v2_attention(
        query,
        key,
        value,
        config,
        selection_query=other_query,
        selection_key=other_key,
        implementation=implementation,
        return_blocks=True,
    )
    _, wanted = infllm_v2_attention(other_query, other_key, value, CONFIG, return_blocks=True)
    assert torch.equal(blocks, wanted)
    # Attention itself is over the rotated tensors: softmax over the tokens of those blocks, computed directly.
    tokens, positions = torch.arange(110), torch.arange(50, 110)
    allowed = wanted[..., tokens // 8] & (tokens <= positions[:, None])
    logits = (query @ key.repeat_interleave(2, 1).mT * 16**-0.5).masked_fill(
        ~allowed.repeat_interleave(2, 1), -torch.inf
    )
    assert_close(output, logits.softmax(-1) @ value.repeat_interleave(2, 1), "attention_float64", "output")


def refusals():
    query, key, value = tensors(4, 2, 10, 30)
    ones = torch.ones(1, 30)
    holes = ones.clone()
    holes[:, 12] = 0
    nope = InfLLMv2Config(use_nope=True)
    yield (query[:, :3], key, value, CONFIG), {}, ValueError, "3 query heads do not divide among 2"
    yield (query, key, value[:, :, 1:], CONFIG), {}, ValueError, "must have one shape"
    yield (query, key[:, :, :9], value[:, :, :9], CONFIG), {}, ValueError, "10 queries for 9 keys"
    yield (query[0], key, value, CONFIG), {}, ValueError, "query must be .batch, heads, tokens, head size"
    yield (query[..., :8], key, value, CONFIG), {}, ValueError, "differ in batch or head size"
    yield (query, key, value, CONFIG.to_dict()), {}, TypeError, "InfLLMv2Config.from_dict"
    yield (query, key, value, CONFIG), {"attention_mask": ones[:, 1:]}, ValueError, r"\[1, 30\]"
    yield (query, key, value, CONFIG), {"attention_mask": ones[None, None]}, ValueError, "four-dimensional"
    yield (query, key, value, CONFIG), {"attention_mask": holes}, ValueError, "row 0 has zeros between its ones"
    yield (query, key, value, CONFIG), {"implementation": "cuda"}, ValueError, "'reference', 'blockwise'"
    yield (query, key, value, CONFIG), {"implementation": "kernel"}, ValueError, "use 'auto' or 'blockwise'"
    yield (query, key, value, nope), {}, ValueError, "pass selection_query"
    yield (
        (query, key, value, nope),
        {"selection_query": query[:, :, 1:], "selection_key": key},
        ValueError,
        "shape of query",
    )


@pytest.mark.parametrize("args, kwargs, error, words", list(refusals()))
def test_bad_input_is_refused_in_one_sentence(args, kwargs, error, words):
    with pytest.raises(error, match=words):
        infllm_v2_attention(*args, **kwargs)
