"""InfLLM v2 as any Llama-like model meets it: `attn_implementation="infllm_v2"` on a plain Llama."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tolerances import assert_close
from transformers_minicpm4.infllm_v2 import InfLLMv2Config


SPARSE = InfLLMv2Config(kernel_size=8, kernel_stride=4, block_size=8, window_size=16, topk=3, dense_len=-1)


@pytest.fixture
def llama():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=63,
        attn_implementation="infllm_v2",
    )
    config.sparse_config = SPARSE.to_dict()
    return LlamaForCausalLM(config).double().eval()


def test_covering_everything_equals_sdpa(llama):
    ids = torch.randint(1, 60, (2, 90))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    llama.config.sparse_config = InfLLMv2Config(kernel_size=8, kernel_stride=4, block_size=8, topk=20).to_dict()
    sparse = llama(ids, attention_mask=mask).logits
    llama.set_attn_implementation("sdpa")
    dense = llama(ids, attention_mask=mask).logits
    assert_close(sparse[mask.bool()], dense[mask.bool()], "logits_float64", "logits")


def test_cached_generation_equals_no_cache(llama):
    ids = torch.randint(1, 60, (2, 90))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(llama.generate(ids, **options), llama.generate(ids, **options, use_cache=False))
    llama.set_attn_implementation("sdpa")  # and it is not dense under another name
    assert not torch.equal(llama.generate(ids, **options)[:, 90:], ids[:, :20])


def test_packed_rows_are_isolated(llama):
    ids = torch.randint(1, 60, (1, 150))
    position_ids = torch.cat([torch.arange(70), torch.arange(80)])[None]
    packed = llama(ids, position_ids=position_ids, use_cache=False).logits
    apart = torch.cat([llama(ids[:, :70]).logits, llama(ids[:, 70:]).logits], 1)
    assert_close(packed, apart, "logits_float64", "logits")
    mixed = llama(ids, use_cache=False).logits
    assert (packed - mixed)[:, 70:].abs().max() > 1e-3  # packing would have been seen


def test_packed_rows_over_a_filled_cache_are_refused(llama):
    ids = torch.randint(1, 60, (1, 40))
    cache = llama(ids, use_cache=True).past_key_values
    position_ids = torch.tensor([[40, 41, 0, 1]])
    with pytest.raises(ValueError, match="position_ids restart"):
        llama(ids[:, :4], position_ids=position_ids, past_key_values=cache)


def test_what_the_interface_refuses(llama):
    ids = torch.randint(1, 60, (1, 40))
    with pytest.raises(ValueError, match="four-dimensional"):
        llama(ids, attention_mask=torch.ones(1, 1, 40, 40))
    with pytest.raises(ValueError, match=r"shape \(1, 39\), expected .* \[1, 40\]"):
        llama(ids, attention_mask=torch.ones(1, 39))
    with pytest.raises(ValueError, match="dynamic cache, and this one is static"):
        llama.generate(ids, max_new_tokens=3, cache_implementation="static", do_sample=False)
    llama.config.sparse_config = {**SPARSE.to_dict(), "use_nope": True}
    with pytest.raises(ValueError, match="LlamaAttention does not hand over"):
        llama(ids)
    llama.config.sparse_config = SPARSE.to_dict()
    llama.config.attention_dropout = 0.1
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.1
    llama.train()
    with pytest.raises(ValueError, match="attention_dropout=0.1 is not available"):
        llama(ids)
