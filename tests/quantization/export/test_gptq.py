"""GPTQ checkpoints: what is written is what any reader computes, and what is damaged is refused by name."""

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from transformers_minicpm4.quantization.export.gptq import (
    gptq_config,
    gptq_tensors,
    load_gptq,
    read_gptq,
    save_gptq,
)
from transformers_minicpm4.quantization.export.ternary_gptq import ternary_weight
from transformers_minicpm4.quantization.p_gptq.quantizer import PGPTQQuantizer
from transformers_minicpm4.quantization.quantized_weight import QuantizedWeight


LAYER = "model.layers.0.self_attn.q_proj"
PEER = Path(__file__).resolve().parents[3] / "build" / "peers" / "gptqmodel" / "bin" / "python"

VARIANTS = [
    {"bits": 4, "symmetric": True, "checkpoint_format": "gptq"},
    {"bits": 4, "symmetric": False, "checkpoint_format": "gptq"},
    {"bits": 4, "symmetric": False, "checkpoint_format": "gptq_v2"},
    {"bits": 2, "symmetric": True, "checkpoint_format": "gptq_v2"},
    {"bits": 2, "symmetric": False, "checkpoint_format": "gptq"},
]

READ_BY_GPTQMODEL = """
import importlib.util, json, sys
assert importlib.util.find_spec("transformers_minicpm4") is None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTQConfig
for folder in sys.argv[1:]:
    with open(folder + "/config.json") as file:
        bits = json.load(file)["quantization_config"]["bits"]
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, device_map="cpu", quantization_config=GPTQConfig(bits=bits, backend="gptq_torch")
    )
    found = {
        name: module.dequantize_weight().T.contiguous()
        for name, module in model.named_modules()
        if hasattr(module, "qweight")
    }
    found["logits"] = model(torch.arange(16)[None]).logits.float()
    save_file(found, folder + ".read")
assert "transformers_minicpm4" not in sys.modules
"""


@pytest.mark.skipif(not PEER.is_file(), reason="no gptqmodel environment; `python benchmarks/peers.py` makes it")
def test_a_process_without_us_reads_the_same_weights(llama, quantized, tmp_path):
    """gptqmodel through Transformers in its own environment: float16 weights equal bit for bit, logits closely."""
    folders, expected = [], []
    for number, settings in enumerate(VARIANTS):
        settings = dict(settings)
        form = settings.pop("checkpoint_format")
        model = llama(attention_bias=True, num_hidden_layers=1).half()
        weights = quantized(model, group_size=64 if number % 2 else 32, **settings)
        folders.append(str(tmp_path / f"{number}"))
        save_gptq(folders[-1], model, weights, checkpoint_format=form, max_shard_size="5GB" if number else "100KB")
        expected.append(weights)
    # Some layers left as they were, and ternary weights: both forms that BitCPM4 exports.
    model = llama().half()
    ternary = {}
    for name in quantized(model):
        if "self_attn" not in name:
            outputs, inputs = model.get_submodule(name).weight.shape
            scales = (torch.rand(outputs, inputs // 64) / 8).half()
            ternary[name] = ternary_weight(torch.randint(-1, 2, (outputs, inputs), dtype=torch.int8), scales, 64)
    folders.append(str(tmp_path / "ternary"))
    save_gptq(folders[-1], model, ternary)
    expected.append(ternary)

    # And what the quantizer itself writes, with all that lies beside the weights.
    llama().bfloat16().save_pretrained(tmp_path / "source")
    rows = [torch.randint(0, model.config.vocab_size, (24,)) for _ in range(8)]
    folders.append(str(tmp_path / "p_gptq"))
    PGPTQQuantizer.from_pretrained(
        tmp_path / "source", compute_dtype=torch.float32, dataset=rows, group_size=32, num_samples=8, desc_act=True,
        smoothing=True, prefix_ids=[1],
    ).quantize(folders[-1])  # fmt: skip
    assert (tmp_path / "p_gptq" / "prefix_cache").is_dir()
    expected.append(read_gptq(folders[-1]))

    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [PEER, "-c", READ_BY_GPTQMODEL, *folders],
        env={**os.environ, **settings},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, weights in zip(folders, expected):
        found = load_file(folder + ".read")
        logits = found.pop("logits")
        assert set(found) == set(weights)
        for name, weight in weights.items():
            assert torch.equal(found[name], weight.dequantize(torch.float16)), f"{folder}: {name}"
        own = load_gptq(folder, dtype=torch.float32)(torch.arange(16)[None]).logits
        assert (logits - own).abs().max() < 5e-3 * own.abs().max()  # float16 matrix products there


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_reading_gives_back_what_was_written(llama, quantized, tmp_path, bits, symmetric, form):
    model = llama(attention_bias=True)
    weights = quantized(model, bits=bits, symmetric=symmetric)
    save_gptq(tmp_path / "x", model, weights, checkpoint_format=form)
    read = read_gptq(tmp_path / "x")
    assert set(read) == set(weights)
    for name, weight in weights.items():
        found = read[name]
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.zeros, weight.zeros)
        assert torch.equal(found.scales.float(), weight.scales)
        assert (found.bits, found.group_size, found.symmetric, found.g_idx) == (bits, 32, symmetric, None)
        assert (found.bias is None) == (weight.bias is None)
        assert found.bias is None or torch.equal(found.bias, weight.bias)
    assert "lm_head.weight" not in read.tensors  # tied
    dense = load_gptq(tmp_path / "x", dtype=torch.float32)
    for name, weight in weights.items():
        assert torch.equal(dense.get_submodule(name).weight, weight.dequantize())
    assert torch.equal(dense.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert not hasattr(dense.config, "quantization_config")
    assert dense.generation_config.max_new_tokens == 7


def test_v1_and_v2_differ_in_the_zero_points_alone(quantized, llama):
    weight = quantized(llama())[LAYER]
    first, second = gptq_tensors(weight, "gptq"), gptq_tensors(weight, "gptq_v2")
    assert set(first["qzeros"].unique().tolist()) == {0x77777777}
    assert set(second["qzeros"].unique().tolist()) == {0x88888888 - 2**32}
    assert all(torch.equal(first[part], second[part]) for part in ("qweight", "scales", "g_idx"))
    assert {part: (str(tensor.dtype), tuple(tensor.shape)) for part, tensor in first.items()} == {
        "qweight": ("torch.int32", (16, 128)),
        "qzeros": ("torch.int32", (4, 16)),
        "scales": ("torch.float16", (4, 128)),
        "g_idx": ("torch.int32", (128,)),
    }


def test_a_zero_point_of_zero_needs_v2():
    weight = QuantizedWeight(
        torch.zeros(8, 8, dtype=torch.uint8), torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.uint8), 4, 8, False
    )
    with pytest.raises(ValueError, match="'gptq_v2'"):
        gptq_tensors(weight, "gptq")
    assert not gptq_tensors(weight, "gptq_v2")["qzeros"].any()


def test_scales_that_float16_does_not_hold_are_refused(quantized, llama):
    weight = quantized(llama())[LAYER]
    for wrong in (1e-9, 1e9, 0.1):
        weight.scales[0, 0] = wrong
        with pytest.raises(ValueError, match="float16"):
            gptq_tensors(weight)


def test_the_config_has_every_key_that_converters_ask_for(llama, quantized, tmp_path):
    model = llama()
    meta = {"skip_first": 4, "prefix_ids": [1]}
    written = save_gptq(tmp_path / "x", model, quantized(model), meta=meta)
    own = json.loads((tmp_path / "x" / "quantize_config.json").read_text())
    inside = json.loads((tmp_path / "x" / "config.json").read_text())
    assert own == inside["quantization_config"] == written
    assert own["meta"]["skip_first"] == 4
    assert own["meta"]["quantizer"][0].startswith("transformers_minicpm4:")
    del own["meta"]
    assert own == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "static_groups": True,
        "damp_percent": 0.01,
        "true_sequential": True,
        "lm_head": False,
        "format": "gptq",
        "checkpoint_format": "gptq",
    }
    assert inside["architectures"] == ["LlamaForCausalLM"]
    assert inside["dtype"] == "float32"
    assert not hasattr(model.config, "quantization_config")  # the source is untouched


def test_one_scale_a_row_is_group_size_minus_one(llama, quantized, tmp_path):
    model = llama()
    assert save_gptq(tmp_path / "x", model, quantized(model, group_size=-1))["group_size"] == -1
    read = read_gptq(tmp_path / "x")
    assert read["model.layers.0.mlp.down_proj"].group_size == 256


class FromDisk(Mapping):
    """Layers that come into memory when asked for, as P-GPTQ's stream leaves them; counts the times."""

    def __init__(self, weights):
        self.weights, self.asked = weights, []

    def __getitem__(self, name):
        self.asked.append(name)
        return self.weights[name]

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)


def test_layers_that_are_gone_from_memory_are_asked_for_once(llama, quantized, tmp_path):
    model = llama()
    weights = FromDisk(quantized(model))
    save_gptq(tmp_path / "whole", model, weights)
    for name in weights:
        model.get_submodule(name).to("meta")
    weights.asked.clear()
    save_gptq(tmp_path / "gone", model, weights)
    assert sorted(weights.asked) == sorted(weights)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "gone"))
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    model.model.norm.to("meta")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is on the meta device"):
        save_gptq(tmp_path / "no", model, weights)
    assert not (tmp_path / "no").exists()


def test_shards_hold_the_same_tensors_as_one_file(llama, quantized, tmp_path):
    model = llama(tie_word_embeddings=False)
    weights = quantized(model)
    save_gptq(tmp_path / "one", model, weights)
    save_gptq(tmp_path / "many", model, weights, max_shard_size="60KB")
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one, many = read_gptq(tmp_path / "one").tensors, read_gptq(tmp_path / "many").tensors
    assert set(one) == set(many)
    assert "lm_head.weight" in one
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(many[name].nbytes for name in many)
    for file in files:
        if len(load_file(tmp_path / "many" / file)) > 1:
            assert (tmp_path / "many" / file).stat().st_size < 70_000


def test_our_own_architecture_keeps_its_plain_tensors(tiny_model, quantized, tmp_path):
    """MiniCPM4 in bfloat16: norms and embeddings stay bfloat16, scales are float16, biases and constants survive."""
    model = tiny_model(hidden_size=64, intermediate_size=128).bfloat16()
    weights = quantized(model)
    save_gptq(tmp_path / "x", model, weights)
    tensors = read_gptq(tmp_path / "x").tensors
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith("weight")} <= {
        torch.bfloat16,
        torch.int32,
    }
    assert tensors[f"{LAYER}.scales"].dtype == torch.float16
    dense = load_gptq(tmp_path / "x")
    assert type(dense) is type(model)
    assert dense.dtype == torch.bfloat16
    assert dense.config.scale_emb == model.config.scale_emb
    # Rounded to bfloat16 once, from the exact product.
    assert torch.equal(dense.get_submodule(LAYER).weight, weights[LAYER].dequantize().bfloat16())


def test_files_of_others_are_read(llama, quantized, tmp_path):
    """bfloat16 scales, no format key, an activation order in g_idx, settings in quantize_config.json alone."""
    model = llama()
    weights = quantized(model)
    save_gptq(tmp_path / "x", model, weights)
    file = tmp_path / "x" / "model.safetensors"
    tensors = load_file(file)
    order = torch.randperm(128) // 32
    tensors[f"{LAYER}.g_idx"] = order.to(torch.int32)
    tensors[f"{LAYER}.scales"] = tensors[f"{LAYER}.scales"].bfloat16()
    other = "model.layers.1.mlp.down_proj"
    del tensors[f"{other}.g_idx"]
    save_file(tensors, file)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    settings = config.pop("quantization_config")
    for key in ("format", "checkpoint_format", "quant_method"):
        settings.pop(key)
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    (tmp_path / "x" / "quantize_config.json").write_text(json.dumps(settings))
    read = read_gptq(tmp_path / "x")
    steps = weights[LAYER].codes.float() - 8
    expected = weights[LAYER].scales.bfloat16().float()[:, order] * steps
    assert torch.equal(read[LAYER].dequantize(), expected)
    assert torch.equal(read[other].dequantize(), weights[other].dequantize())
    assert torch.equal(load_gptq(tmp_path / "x").get_submodule(LAYER).weight, expected)


def test_an_activation_order_is_kept_and_said(llama, quantized, tmp_path):
    model = llama()
    weights = quantized(model)
    weights[LAYER].g_idx = (torch.randperm(128) // 32).to(torch.int32)
    assert save_gptq(tmp_path / "x", model, weights)["desc_act"] is True
    found = read_gptq(tmp_path / "x")[LAYER]
    assert torch.equal(found.g_idx, weights[LAYER].g_idx)
    assert torch.equal(found.dequantize(), weights[LAYER].dequantize())


def test_layers_left_alone_are_named_for_both_readers(llama, quantized, tmp_path):
    model = llama()
    weights = {name: weight for name, weight in quantized(model).items() if "mlp" in name}
    written = save_gptq(tmp_path / "x", model, weights)
    assert written["modules_in_block_to_quantize"] == [["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]]
    assert "-:^model\\.layers\\.1\\.self_attn\\.o_proj$" in written["dynamic"]
    assert len(written["dynamic"]) == 8
    assert torch.equal(load_gptq(tmp_path / "x").get_submodule(LAYER).weight, model.get_submodule(LAYER).weight)
    # Blocks that differ need whole names: suffixes would name too much.
    del weights["model.layers.1.mlp.down_proj"]
    written = save_gptq(tmp_path / "y", model, weights)
    (names,) = written["modules_in_block_to_quantize"]
    assert "layers.0.mlp.down_proj" in names
    assert len(names) == 5


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


DAMAGES = {
    "scales": lambda tensors: tensors.update({f"{LAYER}.scales": tensors[f"{LAYER}.scales"][:2]}),
    "qweight": lambda tensors: tensors.update({f"{LAYER}.qweight": tensors[f"{LAYER}.qweight"].long()}),
    "g_idx": lambda tensors: tensors[f"{LAYER}.g_idx"].fill_(4),
    "qzeros": lambda tensors: tensors.pop(f"{LAYER}.qzeros"),
}


@pytest.mark.parametrize("part", DAMAGES)
def test_a_damaged_tensor_is_named_with_its_file(llama, quantized, tmp_path, part):
    model = llama()
    save_gptq(tmp_path / "x", model, quantized(model))
    damage(tmp_path / "x", DAMAGES[part])
    with pytest.raises(ValueError, match=rf"x/model\.safetensors is damaged.*{LAYER}.*{part}"):
        dict(read_gptq(tmp_path / "x"))


def test_nan_scales_are_refused(llama, quantized, tmp_path):
    model = llama()
    save_gptq(tmp_path / "x", model, quantized(model))
    damage(tmp_path / "x", lambda tensors: tensors[f"{LAYER}.scales"].fill_(float("nan")))
    with pytest.raises(ValueError, match="finite"):
        load_gptq(tmp_path / "x")


def test_cut_and_missing_files_are_named(llama, quantized, tmp_path):
    model = llama()
    save_gptq(tmp_path / "x", model, quantized(model), max_shard_size="60KB")
    second = sorted((tmp_path / "x").glob("*.safetensors"))[1]
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{second.name} is damaged"):
        load_gptq(tmp_path / "x")
    second.unlink()
    with pytest.raises(FileNotFoundError, match=second.name):
        load_gptq(tmp_path / "x")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"quant_method": "awq"}, "quant_method 'awq'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"bits": 5}, "bits 5"),
        ({"group_size": 0}, "group_size 0"),
        ({"dynamic": {"+:.*q_proj": {"bits": 8}}}, "mixes widths"),
    ],
)
def test_other_quantizations_are_refused(llama, quantized, tmp_path, change, message):
    model = llama()
    save_gptq(tmp_path / "x", model, quantized(model))
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["quantization_config"].update(change)
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_gptq(tmp_path / "x")


def test_unlike_layers_are_refused_and_leave_nothing(llama, quantized, tmp_path):
    model = llama()
    weights = quantized(model)
    for settings in ({"bits": 8}, {"symmetric": False}, {"group_size": 64}, {"group_size": -1}):
        weights["model.layers.1.mlp.down_proj"] = quantized(model, **settings)["model.layers.1.mlp.down_proj"]
        with pytest.raises(ValueError, match="one width, group size and symmetry"):
            save_gptq(tmp_path / "x", model, weights)
    assert list(tmp_path.iterdir()) == []


def test_a_group_wider_than_a_layer_is_one_group(llama, quantized, tmp_path):
    """Group size 256: q_proj's rows of 128 are one short group, and the file says so to everyone."""
    model = llama()
    weights = quantized(model, group_size=-1)
    for weight in weights.values():
        weight.group_size = 256
    weights["model.layers.0.mlp.down_proj"] = quantized(model, group_size=128)["model.layers.0.mlp.down_proj"]
    assert save_gptq(tmp_path / "y", model, {LAYER: weights[LAYER]})["group_size"] == -1
    del weights["model.layers.1.mlp.down_proj"]
    assert save_gptq(tmp_path / "x", model, weights)["group_size"] == 128
    assert read_gptq(tmp_path / "x")[LAYER].scales.shape == (128, 1)


def test_names_and_ties_are_checked(llama, quantized, tmp_path):
    model = llama()
    weights = quantized(model)
    with pytest.raises(ValueError, match=r"'model\.layers\.9\.q' is no module"):
        save_gptq(tmp_path / "x", model, {"model.layers.9.q": weights[LAYER]})
    with pytest.raises(ValueError, match="tied"):
        save_gptq(tmp_path / "x", model, {"lm_head": weights[LAYER]})
    with pytest.raises(ValueError, match="no quantized weights"):
        save_gptq(tmp_path / "x", model, {})
    with pytest.raises(ValueError, match="max_shard_size"):
        save_gptq(tmp_path / "x", model, weights, max_shard_size="many")


def test_a_folder_with_something_in_it_is_left_alone(llama, quantized, tmp_path):
    model = llama()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="folder with files in it"):
        save_gptq(tmp_path / "x", model, quantized(model))
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "mine.txt"]
    (tmp_path / "x" / "mine.txt").unlink()
    save_gptq(tmp_path / "x", model, quantized(model))
    assert (tmp_path / "x" / "model.safetensors").is_file()


def test_a_full_disk_leaves_nothing(llama, quantized, tmp_path):
    """The system refuses bytes past 200,000 in a file, as a full disk would."""
    model = llama(vocab_size=1024)
    weights = quantized(model)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(OSError, match="(?i)too large|could not be written"):
            save_gptq(tmp_path / "x", model, weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_extras_are_part_of_the_whole(llama, quantized, tmp_path):
    model = llama()
    save_gptq(tmp_path / "x", model, quantized(model), extras=lambda folder: (folder / "README.md").write_text("card"))
    assert (tmp_path / "x" / "README.md").read_text() == "card"
    with pytest.raises(ZeroDivisionError):
        save_gptq(tmp_path / "y", model, quantized(model), extras=lambda folder: 1 / 0)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_ternary_weights_are_two_bit_codes_exactly():
    codes = torch.randint(-1, 2, (32, 128), dtype=torch.int8)
    scales = torch.rand(32, 2).half()
    weight = ternary_weight(codes, scales, 64)
    assert set(weight.codes.unique().tolist()) == {1, 2, 3}
    assert torch.equal(weight.dequantize(torch.float16), scales.repeat_interleave(64, 1) * codes.half())
    assert set(gptq_tensors(weight)["qzeros"].unique().tolist()) == {0x55555555}
    with pytest.raises(ValueError, match=r"-2 \.\. 0"):
        ternary_weight(codes - 1, scales, 64)
    with pytest.raises(ValueError, match=r"scales \[32, 2\] do not fit"):
        ternary_weight(codes, scales, 128)


def test_config_is_the_same_dictionary_for_every_writer():
    assert gptq_config(2, 64)["group_size"] == 64
    assert gptq_config(4, 128, meta={"a": 1})["meta"]["a"] == 1


@pytest.mark.real
def test_real_weights_read_back(real_checkpoint, tmp_path):
    """SmolLM2's layers, one block in 4 bits: the dense reader gives logits near the original's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(real_checkpoint, dtype=torch.float32)
    weight = model.get_submodule(LAYER).weight
    groups = weight.detach().reshape(weight.shape[0], -1, 64)
    scales = (groups.abs().amax(-1) / 7).half().float()
    codes = ((groups / scales[..., None]).round().clamp(-8, 7) + 8).to(torch.uint8).reshape(weight.shape)
    made = QuantizedWeight(codes, scales, torch.full(scales.shape, 8, dtype=torch.uint8), 4, 64)
    save_gptq(tmp_path / "x", model, {LAYER: made})
    dense = load_gptq(tmp_path / "x")
    assert torch.equal(dense.get_submodule(LAYER).weight, made.dequantize())
    assert torch.equal(dense.model.norm.weight, model.model.norm.weight)
    shutil.rmtree(tmp_path / "x")
