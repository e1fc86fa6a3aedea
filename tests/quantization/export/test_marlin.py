"""CPM.cu's Marlin layout against where the tensor cores look for each code."""

import json

import pytest
import torch
from safetensors.torch import load_file

from transformers_minicpm4.quantization.export.gptq import save_gptq
from transformers_minicpm4.quantization.export.marlin import (
    gptq_to_marlin,
    marlin_codes,
    marlin_scales,
    unpack_marlin_codes,
)
from transformers_minicpm4.quantization.p_gptq.configuration import PGPTQConfig
from transformers_minicpm4.quantization.p_gptq.quantizer import PGPTQQuantizer


def nibbles():
    """
    Each nibble's (word, position, input, output) in one 16 x 64 tile, from the instruction's definition.

    `mma.m16n8k16` (PTX ISA, "Matrix Fragments for mma.m16n8k16", operand B): lane `t` holds inputs
    `2 * (t % 4) + {0, 1}` and the same plus 8, of output `t // 4`. A lane has a word of two such fragments, of
    outputs 8 apart, for each of four
    subtiles of 16 outputs. The kernel takes the halves of a pair of codes 16 bits apart: of the 8 codes in fragment
    order the even ones come first.
    """
    for lane in range(32):
        for subtile in range(4):
            fragment = [
                (2 * (lane % 4) + row, 16 * subtile + 8 * block + lane // 4)
                for block in (0, 1)
                for row in (0, 1, 8, 9)
            ]
            for position, (row, column) in enumerate(fragment[0::2] + fragment[1::2]):
                yield 4 * lane + subtile, position, row, column


def test_each_nibble_holds_the_code_its_lane_multiplies():
    codes = torch.randint(0, 16, (48, 192), dtype=torch.uint8)
    words = marlin_codes(codes)
    assert words.dtype == torch.int32
    assert words.shape == (3, 384)
    seen = set()
    for word, position, row, column in nibbles():
        seen.add((row, column))
        for tile_row in range(3):
            for tile_column in range(3):
                value = (int(words[tile_row, 128 * tile_column + word]) >> (4 * position)) & 15
                assert value == codes[16 * tile_row + row, 64 * tile_column + column]
    assert len(seen) == 16 * 64
    assert torch.equal(unpack_marlin_codes(words), codes)


def test_scales_of_64_outputs_lie_eight_apart():
    """Lane `t` needs the scales of outputs `t // 4 + 8 * n` for all n together."""
    scales = torch.arange(2 * 128, dtype=torch.float16).reshape(2, 128)
    found = marlin_scales(scales)
    assert found[0, :16].tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9, 17, 25, 33, 41, 49, 57]
    assert found[1, 64:67].tolist() == [192, 200, 208]
    assert torch.equal(marlin_scales(found), scales)


@pytest.fixture
def folder(llama, quantized, tmp_path):
    model = llama(hidden_size=256, intermediate_size=384, num_key_value_heads=2)
    weights = quantized(model, group_size=128)
    save_gptq(tmp_path / "gptq", model, weights, max_shard_size="100KB")
    return tmp_path / "gptq", weights, model


def test_a_checkpoint_becomes_fused_layers(folder, tmp_path):
    source, weights, model = folder
    gptq_to_marlin(source, tmp_path / "marlin")
    tensors = load_file(tmp_path / "marlin" / "model_gptq.safetensors")
    for number in range(2):
        stem = f"model.layers.{number}"
        joined = {
            f"{stem}.self_attn.qkv_proj": [f"{stem}.self_attn.{part}_proj" for part in "qkv"],
            f"{stem}.self_attn.o_proj": [f"{stem}.self_attn.o_proj"],
            f"{stem}.mlp.gate_up_proj": [f"{stem}.mlp.gate_proj", f"{stem}.mlp.up_proj"],
            f"{stem}.mlp.down_proj": [f"{stem}.mlp.down_proj"],
        }
        for name, parts in joined.items():
            codes = torch.cat([weights[part].codes for part in parts]).T
            words, scales = tensors.pop(f"{name}.qweight"), tensors.pop(f"{name}.scales")
            assert words.shape == (codes.shape[0] // 16, 2 * codes.shape[1])
            assert torch.equal(unpack_marlin_codes(words), codes)
            expected = torch.cat([weights[part].scales for part in parts]).T
            assert torch.equal(marlin_scales(scales).float(), expected)
            assert scales.dtype == torch.float16
    plain = {
        name: tensor for name, tensor in model.state_dict().items() if "proj" not in name and name != "lm_head.weight"
    }
    assert set(tensors) == set(plain)
    assert all(torch.equal(tensors[name], plain[name]) for name in plain)
    files = {path.name for path in (tmp_path / "marlin").iterdir()}
    assert files == {"model_gptq.safetensors", "config.json", "generation_config.json", "quantize_config.json"}


def test_the_minicpm4_preset_makes_what_the_engine_takes(llama, tmp_path):
    model = llama(hidden_size=256, intermediate_size=384, num_hidden_layers=1)
    rows = [torch.randint(0, 128, (24,), generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    quantizer = PGPTQQuantizer(PGPTQConfig.minicpm4(dataset=rows, num_samples=8, max_length=24))
    quantizer.quantize_model(model)
    quantizer.save(model, tmp_path / "gptq")
    gptq_to_marlin(tmp_path / "gptq", tmp_path / "marlin")
    words = load_file(tmp_path / "marlin" / "model_gptq.safetensors")["model.layers.0.mlp.down_proj.qweight"]
    assert torch.equal(unpack_marlin_codes(words), quantizer.weights["model.layers.0.mlp.down_proj"].codes.T)


@pytest.mark.parametrize(
    "key, value",
    [
        ("bits", 8),
        ("checkpoint_format", "gptq_v2"),
        ("desc_act", True),
        ("group_size", 64),
        ("lm_head", True),
        ("static_groups", False),
        ("sym", False),
        ("static_groups", None),
    ],
)
def test_each_setting_the_engine_takes_for_granted_is_checked(folder, tmp_path, key, value):
    source, *_ = folder
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"][key] = value
    if value is None:
        del config["quantization_config"][key]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"need {key} = .* it says {'nothing' if value is None else value!r}"):
        gptq_to_marlin(source, tmp_path / "marlin")
    assert not (tmp_path / "marlin").exists()


def test_layers_the_engine_cannot_run_are_named(llama, quantized, tmp_path):
    def convert(model, weights, name):
        save_gptq(tmp_path / name, model, weights)
        gptq_to_marlin(tmp_path / name, tmp_path / "marlin")

    model = llama(hidden_size=256, intermediate_size=416)
    weights = quantized(model, group_size=32)
    for weight in weights.values():
        size = -(-weight.codes.shape[1] // 128)
        weight.scales, weight.zeros, weight.group_size = weight.scales[:, :size], weight.zeros[:, :size], 128
    with pytest.raises(ValueError, match="416 inputs and 256 outputs; Marlin needs inputs divisible by 128"):
        convert(model, weights, "size")
    model = llama(hidden_size=256, attention_bias=True)
    with pytest.raises(ValueError, match="bias, which CPM.cu has no place for"):
        convert(model, quantized(model, group_size=128), "bias")
    model = llama(hidden_size=256)
    weights = quantized(model, group_size=128)
    del weights["model.layers.1.self_attn.k_proj"]
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj is not quantized"):
        convert(model, weights, "partial")
    weights = {name: weight for name, weight in quantized(model, group_size=128).items() if "layers.0" in name}
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.qkv_proj is not quantized"):
        convert(model, weights, "half")
    assert not (tmp_path / "marlin").exists()
