"""The store of solved blocks: what is put in comes out, and each file is opened once."""

from pathlib import Path

import pytest
import torch

from transformers_minicpm4.quantization.p_gptq import store as module
from transformers_minicpm4.quantization.p_gptq.store import Store
from transformers_minicpm4.quantization.quantized_weight import QuantizedWeight


def layer(seed):
    generator = torch.Generator().manual_seed(seed)
    return QuantizedWeight(
        codes=torch.randint(0, 16, (8, 32), dtype=torch.uint8, generator=generator),
        scales=torch.rand(8, 2, generator=generator).half(),
        zeros=torch.full((8, 2), 8, dtype=torch.uint8),
        bits=4,
        group_size=16,
        symmetric=True,
        bias=torch.rand(8, generator=generator) if seed % 2 else None,
    )


def filled(folder):
    store = Store(folder, {"run": 1})
    for block in range(3):
        weights = {f"layers.{block}.{name}": layer(4 * block + number) for number, name in enumerate("abcd")}
        store.put(block, weights, {f"layers.{block}.norm": torch.full((8,), float(block))}, [{"block": block}])
    return store


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_is_put_in_comes_out(tmp_path, on_disk):
    store = filled(tmp_path / "work" if on_disk else None)
    if on_disk:
        store = Store(tmp_path / "work", {"run": 1})
    assert len(store) == 12
    for number, name in enumerate(store):
        wanted, found = layer(number), store[name]
        for part in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(found, part), getattr(wanted, part))
        assert (found.bits, found.group_size, found.symmetric) == (4, 16, True)
        assert (found.bias is None) == (wanted.bias is None)
        assert found.bias is None or torch.equal(found.bias, wanted.bias)
    assert store.rest(1).keys() == {"layers.1.norm"}
    assert store.report() == [{"block": block} for block in range(3)]


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_block_is_opened_once_for_all_its_layers(tmp_path, on_disk, monkeypatch):
    store = filled(tmp_path / "work" if on_disk else None)
    opened = []

    def counted(function):
        def count(first, *rest, **named):
            opened.append(first)
            return function(first, *rest, **named)

        return count

    monkeypatch.setattr(Path, "read_bytes", counted(Path.read_bytes))
    for name in ("load", "safe_open"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
    for name in store:
        store[name]
    assert len(opened) == 3


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_a_model_does_to_its_tensors_is_not_seen_by_the_next_access(tmp_path, on_disk):
    store = filled(tmp_path / "work" if on_disk else None)
    for _ in range(2):
        weight, rest = store["layers.0.b"], store.rest(0)["layers.0.norm"]
        assert torch.equal(weight.scales, layer(1).scales)
        assert torch.equal(weight.bias, layer(1).bias)
        assert torch.equal(rest, torch.zeros(8))
        for tensor in (weight.codes, weight.scales, weight.zeros, weight.bias, rest):
            tensor.add_(1)


def test_a_block_put_anew_is_the_new_one(tmp_path):
    store = filled(tmp_path / "work")
    store["layers.0.a"]
    store.put(0, {"layers.0.a": layer(9)}, {}, [])
    assert torch.equal(store["layers.0.a"].codes, layer(9).codes)
