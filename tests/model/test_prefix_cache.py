"""Stored keys and values stand for the prefix's tokens, in every call that a model has."""

import accelerate
import pytest
import torch

from transformers_minicpm4.model.prefix_cache import FILE_NAME, PrefixCache


PREFIX = [3, 9]


def test_a_filled_cache_answers_as_the_whole_prompt(tiny_model):
    model = tiny_model()
    prefix = PrefixCache.from_model(model, PREFIX)
    ids = torch.randint(1, 120, (2, 7))
    whole = torch.cat([torch.tensor(PREFIX).expand(2, -1), ids], dim=1)
    with torch.no_grad():
        expected = model(whole).logits[:, len(PREFIX) :]
        got = model(ids, past_key_values=prefix.to_cache(model, 2), use_cache=True).logits
    assert torch.allclose(got, expected, atol=1e-12)


def test_the_cache_lies_where_offloaded_blocks_compute(tiny_model):
    """accelerate puts weights away (meta) and brings them for a moment."""
    model = tiny_model()
    prefix = PrefixCache.from_model(model, PREFIX)
    ids = torch.randint(1, 120, (1, 7))
    with torch.no_grad():
        expected = model(ids, past_key_values=prefix.to_cache(model), use_cache=True).logits
        accelerate.cpu_offload(model, execution_device="cpu")
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
        got = model(ids, past_key_values=prefix.to_cache(model), use_cache=True).logits
    assert torch.equal(got, expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_generates_what_the_whole_prompt_generates(tiny_model, sparse_config, sparse):
    model = tiny_model(sparse_config=sparse_config if sparse else None)
    prefix = PrefixCache.from_model(model, PREFIX)
    prompt = torch.randint(1, 120, (2, 60))
    mask = torch.ones_like(prompt)
    if not sparse:  # sparse attention takes no gap between prefix and prompt
        mask[1, :5] = 0
    ids, mask = prefix.prepend(prompt, mask)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    got = model.generate(
        ids, attention_mask=mask, past_key_values=prefix.to_cache(model, 2), max_new_tokens=8, do_sample=False
    )
    assert torch.equal(got, expected)
    # `prepend` leaves a prompt alone that begins with the prefix.
    again, _ = prefix.prepend(ids, mask)
    assert torch.equal(again, ids)


def test_a_prompts_own_prefix_is_not_doubled_behind_padding(tiny_model):
    model = tiny_model()
    prefix = PrefixCache.from_model(model, PREFIX)
    prompts = torch.tensor([[0, 0, 3, 9, 17, 18], [3, 9, 14, 15, 16, 17]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    expected = model.generate(prompts, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, -6:]
    ids, mask = prefix.prepend(prompts, mask)
    got = model.generate(
        ids, attention_mask=mask, past_key_values=prefix.to_cache(model, 2), max_new_tokens=6, do_sample=False
    )[:, -6:]
    assert torch.equal(got, expected)


def test_round_trip_and_damage(tiny_model, tmp_path):
    prefix = PrefixCache.from_model(tiny_model(), PREFIX)
    assert PrefixCache.load(tmp_path) is None
    prefix.save(tmp_path)
    read = PrefixCache.load(tmp_path)
    assert read.token_ids == PREFIX
    assert all(map(torch.equal, read.keys + read.values, prefix.keys + prefix.values))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / FILE_NAME]
    whole = (tmp_path / FILE_NAME).read_bytes()
    for damaged in (whole[:-9], b"", whole[:40]):
        (tmp_path / FILE_NAME).write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            PrefixCache.load(tmp_path)


def test_bad_input_is_named(tiny_model):
    model = tiny_model()
    for ids in ([], [500], [-1]):
        with pytest.raises(ValueError, match="prefix tokens"):
            PrefixCache.from_model(model, ids)
    prefix = PrefixCache.from_model(model, PREFIX)
    with pytest.raises(ValueError, match="of 3 layers and 2 key/value heads; this one has 2"):
        prefix.to_cache(tiny_model(num_hidden_layers=2))
    with pytest.raises(ValueError, match="empty prompt"):
        prefix.prepend(torch.empty(1, 0, dtype=torch.long))
