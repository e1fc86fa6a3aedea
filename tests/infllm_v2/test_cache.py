"""The cache layer: after any mix of operations it holds what a fresh computation from the kept tokens would hold."""

import copy
import random

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import Cache, StaticLayer

from transformers_minicpm4.infllm_v2 import InfLLMv2CacheLayer, InfLLMv2Config
from transformers_minicpm4.infllm_v2.cache import make_sparse
from transformers_minicpm4.infllm_v2.reference import compress_keys


CONFIG = InfLLMv2Config(kernel_size=8, kernel_stride=4, block_size=8, window_size=16, topk=3)
NOPE = InfLLMv2Config(kernel_size=6, kernel_stride=4, block_size=8, window_size=16, topk=3, use_nope=True)


class Recomputed:
    """What the layer should hold, kept as whole tensors and recomputed at every look."""

    def __init__(self, config, batch, starts):
        self.config, self.starts = config, starts
        self.keys, self.values, self.plain = (torch.zeros(batch, 2, 0, 4, dtype=torch.float64) for _ in range(3))

    def append(self, layer, count):
        new = [torch.randn(len(self.starts), 2, count, 4, dtype=torch.float64) for _ in range(3)]
        self.keys, self.values, self.plain = (
            torch.cat([old, more], 2) for old, more in zip((self.keys, self.values, self.plain), new)
        )
        layer.update(new[0], new[1], selection_key=new[2] if self.config.use_nope else None, row_starts=self.starts)

    def map(self, function, starts):
        self.keys, self.values, self.plain = (function(t) for t in (self.keys, self.values, self.plain))
        self.starts = starts

    def check(self, layer):
        assert layer.get_seq_length() == self.keys.shape[2]
        assert torch.equal(layer.keys, self.keys)
        assert torch.equal(layer.values, self.values)
        source = self.plain if self.config.use_nope else self.keys
        for stored, coarse in zip(layer.compressed_keys, (False, True)):
            for row, start in enumerate(self.starts):
                wanted = compress_keys(source[row, :, start:], *self.config.windows(coarse))
                got = stored[row, :, : wanted.shape[1]]
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("config", [CONFIG, NOPE], ids=["rotated", "use_nope"])
@pytest.mark.parametrize("seed", range(6))
def test_any_mix_of_operations_equals_recomputation(config, seed):
    rng = random.Random(seed)
    starts = [0, 0] if seed % 2 else [0, 11]
    layer, truth = InfLLMv2CacheLayer(config), Recomputed(config, 2, starts)
    truth.append(layer, 30 + rng.randrange(20))
    for _ in range(60):
        rows = len(truth.starts)
        action = rng.choice(["append", "append", "one", "one", "one", "crop", "reorder", "select", "repeat", "move"])
        if action == "append":
            truth.append(layer, rng.randrange(1, 60))
        elif action == "one":
            truth.append(layer, 1)
        elif action == "crop":
            count = rng.randrange(0, min(40, truth.keys.shape[2] - 12))
            layer.crop(-count)
            kept = truth.keys.shape[2] - count
            truth.map(lambda t, kept=kept: t[:, :, :kept], truth.starts)
            truth.append(layer, 1)  # compressed keys are settled by the next update
        elif action in ("reorder", "select"):
            chosen = [rng.randrange(rows) for _ in range(rows if action == "reorder" else rng.randrange(1, 3))]
            index = torch.tensor(chosen)
            (layer.reorder_cache if action == "reorder" else layer.batch_select_indices)(index)
            truth.map(lambda t, index=index: t[index], [truth.starts[i] for i in chosen])
        elif action == "repeat" and rows < 4:
            layer.batch_repeat_interleave(2)
            truth.map(lambda t: t.repeat_interleave(2, 0), [s for s in truth.starts for _ in range(2)])
        elif action == "move":
            layer.offload()
            layer.prefetch()
            layer = copy.deepcopy(layer)
        truth.check(layer)
    layer.reset()
    assert layer.get_seq_length() == 0
    truth = Recomputed(config, 2, [3, 0])
    truth.append(layer, 41)
    truth.check(layer)


def test_single_steps_do_not_copy_the_past():
    """Growth is in place: over 1,000 steps the buffer moves a handful of times, not 1,000."""
    layer = InfLLMv2CacheLayer(CONFIG)
    state = torch.randn(1, 2, 500, 4)
    layer.update(state, state, row_starts=[0])
    places = set()
    for _ in range(1000):
        layer.update(state[:, :, :1], state[:, :, :1], row_starts=[0])
        places.add(layer.keys.data_ptr())
    assert len(places) <= 10


def test_backward_through_earlier_steps_survives_growth():
    """With gradients the layer never writes into what autograd still needs."""
    layer = InfLLMv2CacheLayer(CONFIG)
    first = torch.randn(1, 2, 5, 4, requires_grad=True)
    second = torch.randn(1, 2, 3, 4, requires_grad=True)
    early, _ = layer.update(first, first, row_starts=[0])
    loss = (early**2).sum()
    late, _ = layer.update(second, second, row_starts=[0])
    (loss + (late**3).sum()).backward()
    torch.testing.assert_close(first.grad, 2 * first + 3 * first**2)
    torch.testing.assert_close(second.grad, 3 * second**2)


def test_a_cache_filled_in_inference_mode_can_be_continued():
    layer, truth = InfLLMv2CacheLayer(CONFIG), Recomputed(CONFIG, 1, [0])
    with torch.inference_mode():
        truth.append(layer, 40)
    with torch.no_grad():
        truth.append(layer, 1)
    truth.check(layer)


def test_a_changed_padding_is_taken_up():
    layer, truth = InfLLMv2CacheLayer(CONFIG), Recomputed(CONFIG, 2, [0, 0])
    truth.append(layer, 50)
    truth.starts = [0, 7]
    truth.append(layer, 1)
    truth.check(layer)


def test_dense_steps_leave_compression_to_the_next_sparse_one():
    layer, truth = InfLLMv2CacheLayer(CONFIG), Recomputed(CONFIG, 1, [0])
    truth.append(layer, 20)
    state = torch.randn(1, 2, 30, 4, dtype=torch.float64)
    layer.update(state, state)
    truth.keys, truth.values = torch.cat([truth.keys, state], 2), torch.cat([truth.values, state], 2)
    truth.append(layer, 1)
    truth.check(layer)


def test_use_nope_cannot_continue_a_dense_cache():
    layer = InfLLMv2CacheLayer(NOPE)
    state = torch.randn(1, 2, 30, 4)
    layer.update(state, state)
    with pytest.raises(ValueError, match="30 keys but 0 un-rotated.*empty cache"):
        layer.update(state[:, :, :0], state[:, :, :0], row_starts=[0])


def test_crop_takes_a_negative_count():
    layer = InfLLMv2CacheLayer(CONFIG)
    with pytest.raises(ValueError, match="negative number.*got 5"):
        layer.crop(5)


@pytest.mark.parametrize("lazy", [True, False])
def test_make_sparse_keeps_what_a_plain_cache_holds(lazy):
    cache = DynamicCache() if lazy else DynamicCache(config=LlamaConfig(num_hidden_layers=2))
    state = torch.randn(2, 2, 40, 4, dtype=torch.float64)
    for layer in range(2):
        cache.update(state, state + 1, layer)
    make_sparse(cache, CONFIG)
    keys, values = cache.update(state[:, :, :1], state[:, :, :1], 1, row_starts=[0, 0])
    assert torch.equal(keys, torch.cat([state, state[:, :, :1]], 2))
    assert torch.equal(values[:, :, :40], state + 1)
    torch.testing.assert_close(cache.layers[1].compressed_keys[0], compress_keys(keys, 8, 4), rtol=0, atol=1e-15)


def test_caches_without_room_for_compressed_keys_are_refused():
    cache = Cache(layers=[StaticLayer(max_cache_len=16)])
    with pytest.raises(ValueError, match="needs a dynamic cache, got a layer of type StaticLayer"):
        make_sparse(cache, CONFIG)
