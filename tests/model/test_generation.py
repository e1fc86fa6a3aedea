"""Every way of generating with a cache equals generating without one, sparse, greedy, in float64."""

import pytest
import torch
from transformers import DynamicCache

from tolerances import assert_close
from transformers_minicpm4 import InfLLMv2Config
from transformers_minicpm4.infllm_v2 import InfLLMv2CacheLayer


PROMPT, NEW = 120, 24


@pytest.fixture(params=["rotated", "use_nope", "crossing_dense_len"])
def model(request, tiny_model, sparse_config):
    changes = {
        "rotated": {},
        "use_nope": {"use_nope": True},
        "crossing_dense_len": {"dense_len": PROMPT + 10},  # the answer begins dense and ends sparse
    }[request.param]
    model = tiny_model(sparse_config=InfLLMv2Config(**{**sparse_config.to_dict(), **changes}))
    model.generation_config.eos_token_id = None  # random weights: let every row run to the end
    return model


@pytest.fixture
def ids():
    return torch.randint(1, 120, (2, PROMPT))


@pytest.fixture
def padded(ids):
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    return ids * mask, mask


def generate(model, ids, mask=None, **options):
    return model.generate(
        ids, attention_mask=mask, **{"max_new_tokens": NEW, "do_sample": False, "use_cache": True, **options}
    )


def test_greedy_batched_left_padded(model, padded):
    assert torch.equal(generate(model, *padded), generate(model, *padded, use_cache=False))


def test_padded_row_is_as_if_alone(model, padded):
    ids, mask = padded
    together = generate(model, ids, mask)
    alone = generate(model, ids[1:, 17:])
    assert torch.equal(together[1, 17:], alone[0])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 1.5},
        {"prefill_chunk_size": 31},
    ],
    ids=["beams", "beam_returns", "sampling", "chunked_prefill"],
)
def test_other_ways_equal_no_cache(model, padded, options):
    torch.manual_seed(5)
    cached = generate(model, *padded, **options)
    torch.manual_seed(5)
    chunkless = {name: value for name, value in options.items() if name != "prefill_chunk_size"}
    assert torch.equal(cached, generate(model, *padded, **chunkless, use_cache=False))


def test_prompt_lookup_equals_greedy(model):
    ids = torch.randint(1, 6, (1, PROMPT))  # few symbols: something is always found
    plain = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=4), plain)


def test_assisted_decoding_equals_greedy(model, tiny_model, ids):
    assistant = tiny_model("sdpa", num_hidden_layers=1)
    assistant.generation_config.eos_token_id = None
    plain = generate(model, ids[:1], use_cache=False)
    assert torch.equal(generate(model, ids[:1], assistant_model=assistant), plain)


def test_multi_turn_reuse_and_rollback(model, ids):
    """One cache through three turns, cropped back to the shared prefix between two of them."""
    cache = DynamicCache()
    first = model.generate(ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    assert all(type(layer) is InfLLMv2CacheLayer for layer in cache.layers)
    turn = torch.cat([first, torch.randint(1, 120, (2, 9))], 1)
    second = model.generate(turn, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(second, generate(model, turn, use_cache=False))
    cache.crop(PROMPT - cache.get_seq_length())
    other = torch.cat([ids, torch.randint(1, 120, (2, 13))], 1)
    third = model.generate(other, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(third, generate(model, other, use_cache=False))


def test_logits_of_chunks_equal_one_call(model, padded):
    ids, mask = padded
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    cache, parts = DynamicCache(), []
    for begin, end in ((0, 50), (50, 51), (51, 90), (90, PROMPT)):
        output = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        parts.append(output.logits)
    logits = torch.cat(parts, 1)
    # positions differ by the padding between the two ways, and rotation is relative: float32 tables set the tolerance
    assert_close(logits[mask.bool()], whole[mask.bool()], "logits_float64", "logits")


def test_sparse_after_dense_on_one_cache(tiny_model, sparse_config, ids):
    """A cache filled by a dense pass is taken over: the sparse steps see all of it."""
    model = tiny_model(sparse_config=sparse_config)
    cache = DynamicCache()
    model(ids[:, :100], past_key_values=cache)
    sparse = model(ids[:, 100:], past_key_values=cache).logits
    model.set_attn_implementation("sdpa")
    other = DynamicCache()
    model(ids[:, :100], past_key_values=other)
    model.set_attn_implementation("infllm_v2")
    model(ids[:, 100:], past_key_values=other)
    assert torch.equal(other.layers[0].compressed_keys[0], cache.layers[0].compressed_keys[0])
    assert sparse.isfinite().all()


def test_static_and_quantized_caches_are_refused(model, ids):
    with pytest.raises(ValueError, match="dynamic cache"):
        generate(model, ids, cache_implementation="static")


def test_default_cache_of_generate_is_sparse(model, ids):
    output = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert all(type(layer) is InfLLMv2CacheLayer for layer in output.past_key_values.layers)
