"""LoRA around latents and beside packed weights, with the real PEFT."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from tolerances import relative_rms
from transformers_minicpm4.quantization.bitcpm4.configuration import BitCPM4Config
from transformers_minicpm4.quantization.bitcpm4.packed_linear import TernaryLinear
from transformers_minicpm4.quantization.bitcpm4.peft_support import merge_and_requantize
from transformers_minicpm4.quantization.bitcpm4.qat import TernaryQATLinear, prepare_qat
from transformers_minicpm4.quantization.bitcpm4.quantizer import freeze
from transformers_minicpm4.quantization.bitcpm4.recipe import TernaryMonitorCallback
from transformers_minicpm4.quantization.bitcpm4.ternary import fake_quantize


peft = pytest.importorskip("peft")

# Relative RMS of float32 logits. 0 measured: many rows at once meet the dense values; four roundings allowed.
LOGITS = 4.8e-7
# The same where an adapter is added to the weights instead of to the outputs: 7.1e-7 measured.
MERGED = 2.8e-6


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def latents(tiny_llama):
    return prepare_qat(tiny_llama(), BitCPM4Config(group_size=16))


def packed(tiny_llama):
    return freeze(latents(tiny_llama))


def with_adapter(model, scale=0.0, **fields):
    """`model` with LoRA; `scale` > 0 makes the adapter do something."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **fields})
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale) if scale else parameter.zero_()
    return model


def train(model, rows, folder, steps=20, callbacks=()):
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("build", [latents, packed])
def test_adapters_train_and_nothing_else_does(tiny_llama, rows, tmp_path, build):
    model = with_adapter(build(tiny_llama))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train(model, rows, tmp_path)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in changed} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize("build", [latents, packed])
def test_an_adapter_of_zeros_changes_nothing_and_can_be_switched_off(tiny_llama, ids, build):
    wanted = logits(build(tiny_llama), ids)
    assert torch.equal(logits(with_adapter(build(tiny_llama)), ids), wanted)
    model = with_adapter(build(tiny_llama), scale=0.1)
    assert not torch.allclose(logits(model, ids), wanted, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), wanted)


def test_the_adapter_around_latents_is_rounded_with_them(tiny_llama):
    model = with_adapter(latents(tiny_llama), scale=0.1)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    weight = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.equal(layer(x), torch.nn.functional.linear(x, fake_quantize(weight, 16)))


def test_the_monitor_sees_what_the_adapter_does_to_the_codes(tiny_llama, rows, tmp_path):
    model, monitor = with_adapter(latents(tiny_llama)), TernaryMonitorCallback()
    train(model, rows, tmp_path, steps=4, callbacks=[monitor])
    assert sum(entry["ternary/flip_rate"] for entry in monitor.history) > 0


def test_merging_into_latents_is_exact_and_then_freezes(tiny_llama, rows, ids, tmp_path):
    model = with_adapter(latents(tiny_llama))
    train(model, rows, tmp_path, steps=5)
    before = logits(model, ids)
    for unmerged in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="adapters that are not merged"):
            freeze(unmerged)
    merged = model.merge_and_unload()
    assert isinstance(merged.model.layers[0].mlp.up_proj, TernaryQATLinear)
    assert torch.equal(logits(merged, ids), before)
    assert relative_rms(logits(freeze(merged), ids), before) < LOGITS


def test_merging_can_be_undone_in_place(tiny_llama, ids):
    model = with_adapter(latents(tiny_llama), scale=0.1)
    before = logits(model, ids)
    model.merge_adapter()
    assert torch.equal(logits(model, ids), before)
    model.unmerge_adapter()
    # 2e-8 measured. A code at a threshold may flip, so latents are compared.
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    wanted = latents(tiny_llama).model.layers[0].mlp.up_proj
    assert relative_rms(layer.weight, wanted.weight) < 2.4e-7


def test_merging_into_packed_weights_is_refused_and_changes_nothing(tiny_llama, ids):
    model = with_adapter(packed(tiny_llama), scale=0.1)
    before = logits(model, ids)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged into packed.*merge_and_requantize"):
            merge()
    assert torch.equal(logits(model, ids), before)
    assert isinstance(model.unload().model.layers[0].mlp.up_proj, TernaryLinear)


def test_requantizing_says_what_is_lost(tiny_llama):
    """Against the error recomputed from the dense weights; larger adapters lose a smaller share."""
    shares = []
    for scale in (0.01, 1.0):
        model = with_adapter(packed(tiny_llama), scale=scale)
        wanted, deltas, steps = {}, {}, {}
        for name, module in model.named_modules():
            if hasattr(module, "base_layer"):
                name = name.removeprefix("base_model.model.")
                deltas[name] = module.get_delta_weight("default").detach()
                wanted[name] = module.base_layer.dequantize() + deltas[name]
                old = module.base_layer.weight_scale.float().repeat_interleave(16, 1)
                steps[name] = (wanted[name] / old).round().clamp(-1, 1)
        merged, errors = merge_and_requantize(model)
        assert errors.keys() == wanted.keys()
        for name, error in errors.items():
            layer = merged.get_submodule(name)
            assert isinstance(layer, TernaryLinear)
            assert torch.equal(layer.dequantize().sign(), steps[name])
            found = (layer.dequantize() - wanted[name]).norm() / deltas[name].norm()
            assert error == pytest.approx(found.item(), rel=1e-5)
        shares.append(sum(errors.values()) / len(errors))
    assert shares[0] > 0.9
    assert shares[1] < 0.6


def test_requantizing_merges_into_layers_that_stayed_dense_too(tiny_llama, ids):
    model = freeze(prepare_qat(tiny_llama(), BitCPM4Config(group_size=16, modules_to_not_convert=["q_proj"])))
    model = with_adapter(model, scale=0.05)
    dense = [module for name, module in model.named_modules() if name.endswith("q_proj")]
    wanted = [module.base_layer.weight + module.get_delta_weight("default") for module in dense]
    merged, errors = merge_and_requantize(model)
    got = [module.weight for name, module in merged.named_modules() if name.endswith("q_proj")]
    assert all(map(torch.equal, got, wanted))
    assert not any(name.endswith("q_proj") for name in errors)


def test_requantizing_refuses_scales_that_the_file_cannot_hold(tiny_llama):
    model = with_adapter(packed(tiny_llama), scale=1e7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="too large: a scale would be infinite; nothing was merged"):
        merge_and_requantize(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_requantizing_an_adapter_of_zeros_changes_no_bit(tiny_llama):
    before = copy.deepcopy(packed(tiny_llama)).state_dict()
    merged, errors = merge_and_requantize(with_adapter(packed(tiny_llama)))
    assert set(errors.values()) == {0.0}
    after = merged.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_cannot_be_requantized_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="no active LoRA adapter on a packed ternary layer"):
        merge_and_requantize(with_adapter(latents(tiny_llama)))
    model = with_adapter(packed(tiny_llama), scale=0.1)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    codes = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has NaN"):
        merge_and_requantize(model)
    assert torch.equal(layer.base_layer.weight, codes)


def test_an_adapter_is_saved_alone_and_loads_onto_packed_files_in_a_fresh_process(tiny_llama, ids, tmp_path):
    base = packed(tiny_llama)
    base.save_pretrained(tmp_path / "packed")
    model = with_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), scale=0.1)
    model.save_pretrained(tmp_path / "adapter")
    wanted = logits(model, ids)
    code = f"""
import torch, transformers_minicpm4
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "packed")!r})
model = PeftModel.from_pretrained(model, {str(tmp_path / "adapter")!r})
print(type(model.base_model.model.model.layers[0].mlp.up_proj).__name__)
print(model(input_ids=torch.tensor({ids.tolist()})).logits.sum().item())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kind, total = result.stdout.split()[-2:]
    assert kind == "TernaryLoraLinear"
    assert float(total) == wanted.sum().item()


def test_an_adapter_merges_into_the_dequantized_model(tiny_llama, ids, tmp_path):
    """What the refusal advises."""
    model = with_adapter(packed(tiny_llama), scale=0.1)
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    dense = packed(tiny_llama).dequantize()
    merged = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert relative_rms(logits(merged, ids), wanted) < MERGED


@pytest.mark.parametrize(
    "build, fields, words",
    [
        (packed, {"use_dora": True}, "use_dora: not available on ternary layers"),
        (packed, {"init_lora_weights": "pissa"}, "init_lora_weights='pissa': not available"),
        (latents, {"lora_bias": True}, "lora_bias: not available"),
        (latents, {"lora_dropout": 0.1}, "lora_dropout=0.1.*Set lora_dropout=0"),
    ],
)
def test_what_lora_cannot_do_here_is_refused(tiny_llama, build, fields, words):
    with pytest.raises(ValueError, match=words):
        with_adapter(build(tiny_llama), **fields)


def test_plain_linear_layers_are_left_to_peft(tiny_llama):
    packed(tiny_llama)  # registers
    model = with_adapter(tiny_llama(), scale=0.1)
    assert type(model.base_model.model.model.layers[0].mlp.up_proj) is peft.tuners.lora.layer.Linear


TARGETS = ["q_proj", "up_proj"]


def other_methods():
    """PEFT's methods that change linear layers, all but LoRA, at sizes that fit; found, not listed: new ones count."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    changes = {
        "IA3": {"feedforward_modules": ["up_proj"]},
        "ADALORA": {"total_step": 10},
        "C3A": {"block_size": 16},
        "ROAD": {"group_size": 16},
        "VBLORA": {"vector_length": 16},
    }
    elsewhere = {"LORA", "LN_TUNING", "TRAINABLE_TOKENS", "ADAPTION_PROMPT", "SHADOW", "XLORA"}
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        fields = {field.name for field in dataclasses.fields(config)}
        if kind.value not in elsewhere and "target_modules" in fields:
            yield pytest.param(config, {"target_modules": TARGETS, **changes.get(kind.value, {})}, id=kind.value)


@pytest.mark.parametrize("build", [latents, packed])
@pytest.mark.parametrize("kind, fields", list(other_methods()))
def test_methods_other_than_lora_are_refused_by_name(tiny_llama, ids, build, kind, fields):
    """Their merge would be another model (latents), or end in an error about shapes (packed)."""
    try:
        config = kind(**fields)
    except ImportError as error:
        pytest.skip(str(error))
    model = build(tiny_llama)
    wanted = logits(model, ids)
    name = config.peft_type.value
    with pytest.raises(
        ValueError, match=rf"^{name} is not available on ternary layers, and .*q_proj is one: .*only LoRA"
    ):
        peft.get_peft_model(model, config)
    assert torch.equal(logits(model, ids), wanted)


def test_other_methods_are_refused_beside_lora_too(tiny_llama):
    model = peft.get_peft_model(packed(tiny_llama), peft.LoraConfig(target_modules=TARGETS), mixed=True)
    with pytest.raises(ValueError, match="LOHA is not available on ternary layers, and .*q_proj"):
        model.add_adapter("second", peft.LoHaConfig(target_modules=TARGETS))


@pytest.mark.filterwarnings("ignore:Unsupported layer type.*RMSNorm")  # PEFT 0.21 does not know the norm's shape
def test_other_methods_work_where_nothing_is_ternary(tiny_llama, ids):
    """On a layer that stayed dense, on norms, as a prompt; and merge exactly where they merge."""
    base = freeze(prepare_qat(tiny_llama(), BitCPM4Config(group_size=16, modules_to_not_convert=["q_proj"])))
    for config in (
        peft.LoHaConfig(target_modules=["q_proj"], init_weights=False),
        peft.LNTuningConfig(target_modules=["input_layernorm"]),
    ):
        model = peft.get_peft_model(copy.deepcopy(base), config)
        wanted = logits(model, ids)
        assert relative_rms(logits(model.merge_and_unload(), ids), wanted) < MERGED
    model = peft.get_peft_model(copy.deepcopy(base), peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "build, fields, words",
    [
        (packed, {"target_parameters": ["q_proj.weight"], "target_modules": []}, "target_parameters with .*q_proj"),
        (latents, {"target_parameters": ["q_proj.weight"], "target_modules": []}, "target_parameters with .*q_proj"),
        (packed, {"modules_to_save": ["down_proj"], "target_modules": TARGETS}, "modules_to_save=.*down_proj.*packed"),
        (packed, {"use_qalora": True}, "use_qalora: not available"),
        (latents, {"fan_in_fan_out": True}, "fan_in_fan_out: not available"),
        (packed, {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens: not available"),
    ],
)
def test_what_lora_cannot_do_on_ternary_layers_is_named(tiny_llama, build, fields, words):
    with pytest.raises(ValueError, match=words):
        with_adapter(build(tiny_llama), **fields)


def test_x_lora_is_refused(tiny_llama, tmp_path):
    model = packed(tiny_llama)
    model.config.use_cache = False
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, adapters={"0": str(tmp_path)})
    with pytest.raises(ValueError, match="XLORA is not available on models with ternary layers such as model"):
        peft.get_peft_model(model, config)
