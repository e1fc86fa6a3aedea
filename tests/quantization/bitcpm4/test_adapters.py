"""What adapters (PEFT) must not do to ternary models: get lost, be taken for layers, or become another model."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from ternary_training import train_sft
from tolerances import relative_rms
from transformers_minicpm4.quantization.bitcpm4.configuration import BitCPM4Config
from transformers_minicpm4.quantization.bitcpm4.export import export_ternary
from transformers_minicpm4.quantization.bitcpm4.packed_linear import TernaryLinear
from transformers_minicpm4.quantization.bitcpm4.peft_support import merge_and_requantize
from transformers_minicpm4.quantization.bitcpm4.qat import prepare_qat
from transformers_minicpm4.quantization.bitcpm4.quantizer import (
    BitCPM4Quantizer,
    PackedWeights,
    freeze,
    import_fake_quantized,
    round_to_ternary,
    save_packed,
)


peft = pytest.importorskip("peft")

# Relative RMS of float32 logits. 0 measured: many rows at once meet the dense values; four roundings allowed.
LOGITS = 4.8e-7


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def latents(tiny_llama, **fields):
    return prepare_qat(tiny_llama(), BitCPM4Config(group_size=16, **fields))


def packed(tiny_llama, **fields):
    return freeze(latents(tiny_llama, **fields))


def lora(**fields):
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **fields})


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("mixed", [False, True])
def test_a_merge_that_is_refused_leaves_dense_layers_alone_too(tiny_llama, ids, mixed):
    base = packed(tiny_llama, modules_to_not_convert=["q_proj"])
    model = peft.get_peft_model(base, lora(target_modules=["q_proj", "up_proj"]), mixed=mixed)
    before, wanted = snapshot(model), logits(model, ids)
    for merge in [model.merge_and_unload] if mixed else [model.merge_and_unload, model.merge_adapter]:
        with pytest.raises(ValueError, match="cannot be merged into packed"):
            merge()
    assert_untouched(model, before)
    assert torch.equal(logits(model, ids), wanted)


def test_dense_layers_alone_merge_beside_packed_ones(tiny_llama, ids):
    base = packed(tiny_llama, modules_to_not_convert=["q_proj"])
    model = peft.get_peft_model(base, lora(target_modules=["q_proj"]))
    wanted = logits(model, ids)
    assert relative_rms(logits(model.merge_and_unload(), ids), wanted) < 4 * LOGITS


def test_requantizing_keeps_trained_tokens(tiny_llama):
    model = peft.get_peft_model(packed(tiny_llama), lora(trainable_token_indices=[5, 6]))
    rows = torch.randn(2, 64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.copy_(rows)
    merged, errors = merge_and_requantize(model)
    plain = packed(tiny_llama).model.embed_tokens.weight
    wanted = plain.detach().clone()
    wanted[[5, 6]] = rows
    assert torch.equal(merged.get_input_embeddings().weight, wanted)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert len(errors) == 14
    assert not any(hasattr(module, "base_layer") for module in merged.modules())


def test_requantizing_wants_the_model_of_peft(tiny_llama):
    model = packed(tiny_llama)
    model.add_adapter(lora())
    before = snapshot(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM that adapters were put into"):
        merge_and_requantize(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("autocast", [False, True])
def test_merging_latents_is_exact_for_two_adapters_and_under_autocast(tiny_llama, ids, autocast):
    """What was trained in bfloat16 is what is merged in float32."""
    model = peft.get_peft_model(latents(tiny_llama), lora())
    model.add_adapter("second", lora(r=2))
    model.base_model.set_adapter(["default", "second"])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = logits(model, ids)
    merged = model.merge_and_unload()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(logits(merged, ids), before)


# --------------------------------------------------------------------------- an adapter around latents, somewhere else


def test_an_adapter_around_latents_loads_around_such_latents_alone(tiny_llama, ids, tmp_path):
    config = lora()
    model = peft.get_peft_model(latents(tiny_llama), config)
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    for base, words in (
        (tiny_llama(), "trained around latents of group size 16, .*has no latents.*group_size=16"),
        (packed(tiny_llama), "has no latents"),
        (prepare_qat(tiny_llama(), BitCPM4Config(group_size=8)), "has latents of group size 8"),
    ):
        before = snapshot(base)
        with pytest.raises(ValueError, match=words):
            peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        with pytest.raises(ValueError, match=words):
            base.load_adapter(tmp_path / "adapter")
        assert_untouched(base, before)
    # No warning, and saved once more it still knows.
    again = peft.PeftModel.from_pretrained(latents(tiny_llama), tmp_path / "adapter")
    assert torch.equal(logits(again, ids), wanted)
    again.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="has no latents"):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")
    # The caller's config is good for other models, whose adapters load as ever, while the first one lives.
    plain = peft.get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path / "still")
    with pytest.raises(ValueError, match="has no latents"):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "still")
    plain.save_pretrained(tmp_path / "plain")
    assert "bitcpm4" not in (tmp_path / "plain" / "adapter_config.json").read_text()
    peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")


def test_the_config_of_an_adapter_around_latents_is_pickled(tiny_llama):
    config = peft.get_peft_model(latents(tiny_llama), lora()).peft_config["default"]
    for found in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert isinstance(found, peft.LoraConfig)
        assert found.to_dict() == config.to_dict()
        assert found.to_dict()["bitcpm4_latents_group_size"] == 16


def test_peft_alone_warns_of_an_adapter_around_latents(tiny_llama, tmp_path):
    """In a process that has not loaded a ternary model."""
    tiny_llama().save_pretrained(tmp_path / "dense")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=BitCPM4Config(group_size=16))
    peft.get_peft_model(base, lora()).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["bitcpm4_latents_group_size"] == 16
    code = f"""
import peft
peft.AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "adapter")!r})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "bitcpm4_latents_group_size" in result.stderr


# -------------------------------------------------------------------------------------- models with adapters inside


def injected(model):
    model.add_adapter(lora(target_modules=["up_proj"]))
    return model


def wrapped(model):
    return peft.get_peft_model(model, lora(target_modules=["up_proj"]))


def copied(model):
    return peft.get_peft_model(model, lora(target_modules=["up_proj"], modules_to_save=["norm"])).get_base_model()


@pytest.mark.parametrize("put", [injected, wrapped, copied])
@pytest.mark.parametrize(
    "build, enter",
    [
        (packed, lambda model, folder: save_packed(model, folder)),
        (packed, lambda model, folder: PackedWeights(model)),
        (packed, lambda model, folder: export_ternary(model, folder)),
        (packed, lambda model, folder: model.dequantize()),
        (latents, lambda model, folder: model.dequantize()),
        (latents, lambda model, folder: freeze(model)),
        (latents, lambda model, folder: BitCPM4Quantizer.from_pretrained(model).quantize(folder)),
        (None, lambda model, folder: BitCPM4Quantizer.from_pretrained(model, group_size=16).quantize(folder)),
        (None, lambda model, folder: prepare_qat(model, BitCPM4Config(group_size=16))),
        (None, lambda model, folder: round_to_ternary(model, BitCPM4Config(16, weight_format="packed"))),
        (None, lambda model, folder: import_fake_quantized(model)),
    ],
    ids=[
        "save_packed", "PackedWeights", "export", "dequantize-packed", "dequantize-latents", "freeze",
        "quantize-latents", "quantize-dense", "prepare_qat", "round", "import",
    ],
)  # fmt: skip
def test_a_model_with_adapters_is_refused_everywhere_and_untouched(tiny_llama, ids, tmp_path, build, enter, put):
    model = put(tiny_llama() if build is None else build(tiny_llama))
    before, wanted = snapshot(model), logits(model, ids)
    with pytest.raises(ValueError, match="has adapters that are not merged.*merge_and_unload"):
        enter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert_untouched(model, before)
    assert torch.equal(logits(model, ids), wanted)


def test_a_module_around_packed_layers_is_not_copied(tiny_llama, ids):
    model = packed(tiny_llama)
    wanted = logits(model, ids)
    with pytest.raises(ValueError, match=r"modules_to_save=\['mlp'\] would train a copy of .*gate_proj, whose packed"):
        peft.get_peft_model(model, lora(target_modules=["q_proj"], modules_to_save=["mlp"]))
    assert torch.equal(logits(model, ids), wanted)


# ------------------------------------------------------------------------------------------------------------ training


def test_sft_trainer_trains_lora_beside_packed_weights(tiny_llama, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    base = packed(tiny_llama)
    codes = {name: layer.weight.clone() for name, layer in base.named_modules() if isinstance(layer, TernaryLinear)}
    adapter = peft.LoraConfig(r=4, target_modules="all-linear")
    settings = {"learning_rate": 1e-2, "bf16": True}
    trainer, losses = train_sft(trl, base, tokenizer, tmp_path, settings, peft_config=adapter)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    after = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): layer.weight
        for name, layer in trainer.model.named_modules()
        if isinstance(layer, TernaryLinear)
    }
    assert after.keys() == codes.keys()
    assert all(torch.equal(after[name], codes[name]) for name in codes)
