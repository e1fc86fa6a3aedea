"""`from_pretrained` and `save_pretrained` with `quant_method: bitcpm4`, in this process and in fresh ones."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.distributed import DistributedConfig

from tolerances import relative_rms
from transformers_minicpm4 import MiniCPM4ForCausalLM
from transformers_minicpm4.quantization.bitcpm4.configuration import BitCPM4Config
from transformers_minicpm4.quantization.bitcpm4.packed_linear import TernaryLinear
from transformers_minicpm4.quantization.bitcpm4.qat import TernaryQATLinear, prepare_qat
from transformers_minicpm4.quantization.bitcpm4.quantizer import freeze
from transformers_minicpm4.quantization.bitcpm4.ternary import fake_quantize


# Relative RMS of float32 logits. 0 measured: many rows at once meet the dense values; four roundings allowed.
LOGITS = 4.8e-7
# The same in bfloat16, for scales that are rounded to it: 1.3e-2 measured.
BFLOAT16 = 3e-2


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def dense(tiny_llama, tmp_path):
    """Folder of a dense checkpoint."""
    tiny_llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_a_dense_checkpoint_loads_as_latents(dense, tiny_llama, ids):
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=BitCPM4Config(group_size=16))
    wanted = prepare_qat(tiny_llama(), BitCPM4Config(group_size=16))
    assert torch.equal(logits(model, ids), logits(wanted, ids))
    assert model.hf_quantizer.is_qat_trainable
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_dense_checkpoint_loads_packed(dense, ids):
    latents = AutoModelForCausalLM.from_pretrained(dense, quantization_config=BitCPM4Config(group_size=16))
    config = BitCPM4Config(group_size=16, weight_format="packed")
    model, info = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert relative_rms(logits(model, ids), logits(latents, ids)) < LOGITS
    assert not model.hf_quantizer.is_qat_trainable
    packed = [module for module in model.modules() if isinstance(module, TernaryLinear)]
    assert len(packed) == 14
    assert all(layer.weight.dtype == torch.uint8 for layer in packed)


def test_latents_are_saved_under_the_ordinary_names_and_load_as_latents(dense, ids, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=BitCPM4Config(group_size=16))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.01
    model.save_pretrained(tmp_path / "latents")
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "latents"))
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.float32 for name in after)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "latents")
    assert isinstance(again.model.layers[0].mlp.up_proj, TernaryQATLinear)
    assert again.hf_quantizer.is_qat_trainable
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_a_reader_without_this_package_gets_the_latents(dense, ids, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=BitCPM4Config(group_size=16))
    model.save_pretrained(tmp_path / "latents")
    found = run(f"""
import torch
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained({str(tmp_path / "latents")!r})
print(type(model.model.layers[0].mlp.up_proj).__name__, model(torch.tensor({ids.tolist()})).logits.sum().item())
""").splitlines()[-1]
    kind, total = found.split()
    assert kind == "Linear"
    assert float(total) == logits(LlamaForCausalLM.from_pretrained(dense), ids).sum().item()


def test_saving_and_loading_packed_weights_changes_no_bit(dense, ids, tmp_path):
    config = BitCPM4Config(group_size=16, weight_format="packed")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(again, ids), logits(model, ids))
    again.save_pretrained(tmp_path / "twice", max_shard_size="20KB")
    assert len(list((tmp_path / "twice").glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "twice"), ids), logits(model, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_scales_are_as_stored_whatever_dtype_is_asked_for(dense, tmp_path, dtype):
    config = BitCPM4Config(group_size=16, weight_format="packed")
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=dtype)
    model.to(dtype)
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    assert layer.weight_scale.dtype == torch.float16
    assert torch.equal(layer.weight_scale, stored[f"{name}.weight_scale"])
    assert torch.equal(layer.weight, stored[f"{name}.weight"])
    assert model.model.norm.weight.dtype == dtype
    assert model(torch.tensor([[5, 6]])).logits.dtype == dtype


def test_a_fresh_process_that_imports_the_package_loads_and_generates(dense, ids, tmp_path):
    config = BitCPM4Config(group_size=16, weight_format="packed")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    found = run(f"""
import torch, transformers_minicpm4
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "packed")!r})
ids = torch.tensor({ids.tolist()})
print(model(ids).logits.sum().item())
print(model.generate(ids[:1], max_new_tokens=5, do_sample=False)[0, ids.shape[1]:].tolist())
""").splitlines()
    assert float(found[-2]) == logits(model, ids).sum().item()
    wanted = model.generate(ids[:1], max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert json.loads(found[-1]) == wanted.tolist()


def test_the_file_has_two_bits_a_weight(dense, tmp_path):
    config = BitCPM4Config(group_size=-1, weight_format="packed")
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj"
    assert tensors[f"{name}.weight"].numel() == 64 * 96 // 4
    assert tensors[f"{name}.weight_scale"].shape == (96, 1)
    written = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "bitcpm4"
    assert written["weight_format"] == "packed"


@pytest.mark.parametrize("weight_format", ["latent", "packed"])
def test_dequantize_gives_a_plain_model_of_the_same_values(dense, ids, tmp_path, weight_format):
    config = BitCPM4Config(group_size=16, weight_format=weight_format)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    before = logits(model, ids)
    model = model.dequantize()
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert relative_rms(logits(model, ids), before) < LOGITS
    model.save_pretrained(tmp_path / "dequantized")
    assert "quantization_config" not in json.loads((tmp_path / "dequantized" / "config.json").read_text())
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "dequantized")
    assert torch.equal(logits(plain, ids), logits(model, ids))


@pytest.mark.parametrize("weight_format", ["latent", "packed"])
def test_dequantizing_gives_one_dtype(dense, ids, weight_format):
    """The model's own after a cast, which is not its config's; or the one asked for."""
    config = BitCPM4Config(group_size=16, weight_format=weight_format)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    for dtype in (torch.bfloat16, "bfloat16"):
        found = copy.deepcopy(model).dequantize(dtype)
        assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
        wanted = copy.deepcopy(model).dequantize().to(torch.bfloat16)
        assert torch.equal(logits(found, ids), logits(wanted, ids))
    model = model.to(torch.bfloat16)
    before = logits(model, ids)
    model = model.dequantize()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    error = relative_rms(logits(model, ids), before)
    # Packed layers do not round their scales to bfloat16.
    assert error == 0 if weight_format == "latent" else error < BFLOAT16


def test_qwen2_keeps_its_biases(ids, tmp_path):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    source = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    source.save_pretrained(tmp_path / "dense")
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=BitCPM4Config(32, weight_format="packed")
    )
    packed.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for name, parameter in source.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(again.get_parameter(name), parameter), name
    assert torch.equal(logits(again, ids), logits(packed, ids))
    # Against the definition: the plain model with weights that are rounded here.
    with torch.no_grad():
        for module in source.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(fake_quantize(module.weight, 32))
    assert relative_rms(logits(again, ids), logits(source, ids)) < LOGITS
    assert relative_rms(logits(again.dequantize(), ids), logits(source, ids)) < LOGITS


def test_minicpm4_with_its_scalars_and_no_head(tiny_model, ids, tmp_path):
    tiny_model().float().save_pretrained(tmp_path / "dense")
    config = BitCPM4Config(group_size=32)
    latents = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert isinstance(latents, MiniCPM4ForCausalLM)
    before = logits(latents, ids)
    freeze(latents).save_pretrained(tmp_path / "packed")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert relative_rms(logits(packed, ids), before) < LOGITS
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed", num_labels=2)
    assert type(classifier.score) is torch.nn.Linear
    assert isinstance(classifier.model.layers[0].mlp.up_proj, TernaryLinear)


def test_a_width_that_the_group_does_not_divide_is_named(dense):
    for weight_format in ("latent", "packed"):
        config = BitCPM4Config(group_size=64, weight_format=weight_format)
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj has 96 inputs, which group_size=64"):
            AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)


def test_nan_weights_are_not_packed(dense):
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    config = BitCPM4Config(group_size=16, weight_format="packed")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has weights that are NaN"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)


def test_damaged_packed_checkpoints_are_not_loaded(dense, tmp_path):
    config = BitCPM4Config(group_size=16, weight_format="packed")
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.up_proj"

    def with_changes(**changes):
        tensors = {**whole, **{f"{name}.{part}": tensor for part, tensor in changes.items()}}
        save_file({key: t for key, t in tensors.items() if t is not None}, file, metadata={"format": "pt"})

    with_changes(weight_scale=whole[f"{name}.weight_scale"][:, :-1].contiguous())
    with pytest.raises(ValueError, match=rf"{name}.*do not fit 96 outputs of 64 inputs"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with_changes(weight_scale=whole[f"{name}.weight_scale"] * float("inf"))
    with pytest.raises(ValueError, match=f"{name}: a scale is NaN or infinite"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for part in ("weight", "weight_scale"):
        with_changes(**{part: None})
        with pytest.raises(ValueError, match=rf"{name}\.{part} is not in the checkpoint"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def edit(folder, changes):
    """Replace tensors of a checkpoint by name, or leave them out (`None`)."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("weight_format", ["latent", "packed"])
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(
    "name, shape",
    [
        ("model.norm.weight", (1,)),
        ("model.embed_tokens.weight", (90, 64)),
        ("model.layers.1.mlp.up_proj.weight", (96, 48)),
    ],
    ids=str,
)
def test_a_tensor_of_another_shape_is_named(dense, tmp_path, weight_format, saved, name, shape):
    """Saved in the format or made while loading; Transformers compares no shapes for quantized models."""
    config = BitCPM4Config(group_size=16, weight_format=weight_format)
    folder, options = dense, {"quantization_config": config}
    if saved:
        folder, options = tmp_path / "saved", {}
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(folder)
    edit(folder, {name: torch.randn(shape)})
    layer = name.removesuffix(".weight") if "up_proj" in name else name
    with pytest.raises(ValueError, match=re.escape(layer)):
        AutoModelForCausalLM.from_pretrained(folder, **options)


def test_a_missing_latent_weight_is_named(dense):
    name = "model.layers.1.mlp.up_proj.weight"
    edit(dense, {name: None})
    with pytest.raises(ValueError, match=rf"{name} is not in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=BitCPM4Config(group_size=16))


def test_a_negative_scale_is_refused(dense, tmp_path):
    config = BitCPM4Config(group_size=16, weight_format="packed")
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(tmp_path / "packed")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    scales = load_file(tmp_path / "packed" / "model.safetensors")[name]
    scales[3, 1] *= -1
    edit(tmp_path / "packed", {name: scales})
    with pytest.raises(ValueError, match=f"{name} has a negative scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_values_that_are_ternary_already_do_not_load_as_latents(dense, tmp_path):
    config = BitCPM4Config(group_size=16)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).dequantize()
    model.save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj is ternary already.*import_fake_quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fused", quantization_config=config)


def test_a_checkpoint_of_another_method_is_not_taken_over(dense):
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet"}
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="BitNet"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=BitCPM4Config(group_size=16))


def test_offloading_to_disk_is_refused(dense):
    config = BitCPM4Config(group_size=16)
    with pytest.raises(ValueError, match="cannot be offloaded to disk"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map={"": "disk"})


@pytest.mark.parametrize("weight_format", ["latent", "packed"])
def test_tensor_parallelism_is_refused(dense, weight_format):
    config = BitCPM4Config(group_size=16, weight_format=weight_format)
    parallel = DistributedConfig(tp_plan="auto")
    with pytest.raises(ValueError, match=r"not split over devices \(tensor parallelism\)"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, distributed_config=parallel)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_packed_weights_load_onto_a_gpu(dense, ids):
    config = BitCPM4Config(group_size=16, weight_format="packed")
    on_cpu = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map="cuda")
    # Not measured yet: no GPU was at hand.
    assert relative_rms(logits(model, ids.cuda()).cpu(), logits(on_cpu, ids)) < 1e-4
