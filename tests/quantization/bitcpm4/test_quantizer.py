"""Packing: latents, dense weights and fake-quantized files to a checkpoint of 2 bits."""

import copy
import json

import pytest
import torch
from optimum.quantization_base import OptimumQuantizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tolerances import relative_rms
from transformers_minicpm4.quantization.bitcpm4 import quantizer as module
from transformers_minicpm4.quantization.bitcpm4.configuration import BitCPM4Config
from transformers_minicpm4.quantization.bitcpm4.packed_linear import TernaryLinear
from transformers_minicpm4.quantization.bitcpm4.qat import prepare_qat, qat_layers, set_qat
from transformers_minicpm4.quantization.bitcpm4.quantizer import (
    BitCPM4Quantizer,
    PackedWeights,
    freeze,
    import_fake_quantized,
    packed_sizes,
    save_packed,
)
from transformers_minicpm4.quantization.bitcpm4.ternary import fake_quantize
from transformers_minicpm4.quantization.export.gptq import load_gptq, save_gptq


# Relative RMS of float32 logits. 0 measured: many rows at once meet the dense values; four roundings allowed.
LOGITS = 4.8e-7
# The same in bfloat16, where latents round their scales to bfloat16 and packed layers do not: 1.4e-2 measured.
BFLOAT16 = 3e-2


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture
def latents(tiny_llama):
    return prepare_qat(tiny_llama(), BitCPM4Config(group_size=16))


@pytest.mark.parametrize("group_size", [8, 32, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_freezing_changes_nothing_that_the_model_computes(tiny_llama, ids, group_size, dtype):
    model = prepare_qat(tiny_llama().to(dtype), BitCPM4Config(group_size))
    weights = {name: layer.effective_weight() for name, layer in qat_layers(model)}
    before = logits(model, ids)
    assert freeze(model) is model
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).dequantize(dtype), weight), name
    assert relative_rms(logits(model, ids), before) < (LOGITS if dtype == torch.float32 else BFLOAT16)
    assert not list(qat_layers(model))
    assert model.config.quantization_config.weight_format == "packed"
    assert not model.hf_quantizer.is_qat_trainable


def test_what_cannot_be_frozen_is_refused_and_untouched(tiny_llama, latents):
    with pytest.raises(ValueError, match="no latents to pack"):
        freeze(tiny_llama())
    with torch.no_grad():
        latents.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj has weights that are NaN"):
        freeze(latents)
    assert len(list(qat_layers(latents))) == 14
    with torch.no_grad():
        latents.model.layers[1].mlp.down_proj.weight[0, 0] = 0
    freeze(latents)
    with pytest.raises(ValueError, match="packed ternary already"):
        freeze(latents)
    with pytest.raises(ValueError, match="with packed weights already"):
        prepare_qat(latents, BitCPM4Config(group_size=16))
    with pytest.raises(TypeError, match="got Linear"):
        freeze(torch.nn.Linear(8, 8))


def test_layers_that_do_not_round_are_not_packed(latents, ids):
    """Packing promises that outputs stay."""
    set_qat(latents, False)
    with pytest.raises(ValueError, match=r"rounding is off in 14 of 14.*set_qat\(model, True\)"):
        freeze(latents)
    assert len(list(qat_layers(latents))) == 14
    set_qat(latents, True)
    before = logits(latents, ids)
    assert relative_rms(logits(freeze(latents), ids), before) < LOGITS


def test_latents_in_memory_become_a_checkpoint_and_stay_as_they_are(latents, ids, tmp_path, tokenizer):
    before = logits(latents, ids)
    quantizer = BitCPM4Quantizer.from_pretrained(latents)
    assert isinstance(quantizer, OptimumQuantizer)
    folder = quantizer.quantize(tmp_path / "packed", tokenizer=tokenizer)
    assert len(list(qat_layers(latents))) == 14
    assert latents.config.quantization_config.weight_format == "latent"
    assert torch.equal(logits(latents, ids), before)
    packed = AutoModelForCausalLM.from_pretrained(folder)
    assert relative_rms(logits(packed, ids), before) < LOGITS
    assert PreTrainedTokenizerFast.from_pretrained(folder).vocab_size == 96


def test_latents_on_disk_bring_their_tokenizer(latents, ids, tmp_path, tokenizer):
    latents.save_pretrained(tmp_path / "latents")
    tokenizer.save_pretrained(tmp_path / "latents")
    folder = BitCPM4Quantizer.from_pretrained(tmp_path / "latents").quantize(tmp_path / "packed")
    assert relative_rms(logits(AutoModelForCausalLM.from_pretrained(folder), ids), logits(latents, ids)) < LOGITS
    assert (folder / "tokenizer.json").read_text() == (tmp_path / "latents" / "tokenizer.json").read_text()


def test_dense_weights_are_rounded_and_the_source_stays(tiny_llama, latents, ids, tmp_path):
    """In memory and from files, with the same answer."""
    dense = tiny_llama()
    before = copy.deepcopy(dense.state_dict())
    dense.save_pretrained(tmp_path / "dense")
    for number, source in enumerate((dense, tmp_path / "dense")):
        quantizer = BitCPM4Quantizer.from_pretrained(source, group_size=16)
        folder = quantizer.quantize(tmp_path / f"packed-{number}")
        packed = AutoModelForCausalLM.from_pretrained(folder)
        assert relative_rms(logits(packed, ids), logits(latents, ids)) < LOGITS
    assert not hasattr(dense.config, "quantization_config")
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_the_rest_can_be_stored_smaller_and_the_source_keeps_its_own(latents, tmp_path):
    before = copy.deepcopy(latents.state_dict())
    folder = BitCPM4Quantizer.from_pretrained(latents).quantize(tmp_path / "packed", dtype=torch.bfloat16)
    packed = AutoModelForCausalLM.from_pretrained(folder)
    assert packed.dtype == torch.bfloat16
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    assert torch.equal(packed.model.embed_tokens.weight, before["model.embed_tokens.weight"].bfloat16())
    for name, layer in qat_layers(latents):
        assert torch.equal(packed.get_submodule(name).dequantize(), layer.effective_weight()), name
    after = latents.state_dict()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == torch.float32 for name in before)


@pytest.mark.parametrize("tied", [True, False])
def test_a_rest_that_overflows_is_refused_by_name(tiny_llama, tmp_path, tied):
    latents = prepare_qat(tiny_llama(tie_word_embeddings=tied), BitCPM4Config(group_size=16))
    with torch.no_grad():
        latents.model.norm.weight[0] = -1e6
    with pytest.raises(ValueError, match=r"model\.norm\.weight has values up to 1e\+06, beyond .*float16.*bfloat16"):
        BitCPM4Quantizer.from_pretrained(latents).quantize(tmp_path / "packed", dtype=torch.float16)
    assert not (tmp_path / "packed").exists()
    folder = BitCPM4Quantizer.from_pretrained(latents).quantize(tmp_path / "packed", dtype=torch.bfloat16)
    found = AutoModelForCausalLM.from_pretrained(folder).model.norm.weight[0]
    assert found == latents.model.norm.weight[0].bfloat16()


def test_a_classifier_s_head_is_not_lost(tiny_llama, ids, tmp_path):
    """A path is loaded as a causal LM; in memory any model is packed."""
    tiny_llama().save_pretrained(tmp_path / "dense")
    config = BitCPM4Config(group_size=16)
    kind = AutoModelForSequenceClassification
    model = kind.from_pretrained(tmp_path / "dense", num_labels=3, quantization_config=config)
    model.save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="holds a LlamaForSequenceClassification, .*save_packed"):
        BitCPM4Quantizer.from_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="holds a LlamaForSequenceClassification"):
        import_fake_quantized(tmp_path / "classifier")
    wanted = logits(model, ids)
    folder = save_packed(freeze(model), tmp_path / "packed")
    assert relative_rms(logits(kind.from_pretrained(folder), ids), wanted) < LOGITS


def test_the_card_says_what_is_ternary_and_how_large(latents, tmp_path):
    folder = BitCPM4Quantizer.from_pretrained(latents).quantize(tmp_path / "mine", base_model="someone/base")
    card = (folder / "README.md").read_text()
    assert "base_model: someone/base" in card
    assert "base_model_relation: quantized" in card
    assert "its 14 converted linear layers" in card
    assert "one for 16 inputs" in card
    assert "{{" not in card
    assert 'from_pretrained("path/to/mine")' in card
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert f"the weight files {files / 1e6:,.1f} MB" in card


@pytest.mark.parametrize("group_size, ratio", [(64, 0.125 + 1 / 64), (-1, 0.14)])
def test_converted_layers_take_a_seventh_of_bfloat16(tiny_llama, group_size, ratio):
    model = freeze(prepare_qat(tiny_llama(intermediate_size=128), BitCPM4Config(group_size)))
    sizes = packed_sizes(model)
    assert sizes["ternary"] <= ratio * sizes["ternary_bfloat16"] <= 0.15 * sizes["ternary_bfloat16"]
    assert sizes["rest"] == sum(4 * p.numel() for p in model.parameters() if p.dtype == torch.float32)


def test_nothing_half_written_stays(latents, tmp_path, tokenizer):
    """The tokenizer's turn comes after the weights'; where it fails, no folder is left."""
    tokenizer.save_pretrained = None
    with pytest.raises(TypeError):
        BitCPM4Quantizer.from_pretrained(latents).quantize(tmp_path / "packed", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="full is a folder with files in it"):
        BitCPM4Quantizer.from_pretrained(latents).quantize(tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_what_is_quantized_already_is_refused_by_name(tiny_llama, latents, tmp_path):
    freeze(latents).save_pretrained(tmp_path / "packed")
    for source in (latents, tmp_path / "packed"):
        with pytest.raises(ValueError, match="packed ternary already"):
            BitCPM4Quantizer.from_pretrained(source)
    tiny_llama().save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized with gptq already"):
        BitCPM4Quantizer.from_pretrained(tmp_path / "other")
    other = tiny_llama()
    other.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(ValueError, match="quantized with awq already"):
        prepare_qat(other, BitCPM4Config(group_size=16))
    with pytest.raises(ValueError, match="quantized with awq already"):
        import_fake_quantized(other)


def test_arguments_of_other_formats_are_refused(tiny_llama, tmp_path):
    latents = prepare_qat(tiny_llama(), BitCPM4Config(group_size=16))
    with pytest.raises(ValueError, match=r"file_name='model\.onnx'"):
        BitCPM4Quantizer.from_pretrained(latents, "model.onnx")
    with pytest.raises(ValueError, match="file_prefix='q'"):
        BitCPM4Quantizer.from_pretrained(latents).quantize(tmp_path / "packed", "q")
    with pytest.raises(ValueError, match="group_size: given for latents"):
        BitCPM4Quantizer.from_pretrained(latents, group_size=32)
    with pytest.raises(ValueError, match="no packed layer; call freeze"):
        save_packed(latents, tmp_path / "packed")


# -------------------------------------------------------------------------------------------------------------- import


def fused(tiny_llama, group_size, dtype, keep=()):
    """A dense model with ternary values, as the released checkpoints are, and its latents."""
    model = tiny_llama().to(dtype)
    prepared = prepare_qat(tiny_llama().to(dtype), BitCPM4Config(group_size))
    with torch.no_grad():
        for name, _ in qat_layers(prepared):
            if not name.endswith(tuple(keep) or ("-",)):
                weight = model.get_submodule(name).weight
                weight.copy_(fake_quantize(weight, group_size))
    return model, prepared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size, found", [(8, 8), (16, 16), (32, 32), (-1, -1)])
def test_fake_quantized_weights_are_imported_exactly(tiny_llama, ids, tmp_path, group_size, found, dtype):
    model, _ = fused(tiny_llama, group_size, dtype)
    model.save_pretrained(tmp_path / "fused")
    for source in (model, tmp_path / "fused"):
        packed = import_fake_quantized(source)
        assert packed.config.quantization_config.group_size == found
        assert packed.config.quantization_config.scale_dtype == "float16"
        for name, layer in packed.named_modules():
            if isinstance(layer, TernaryLinear):
                assert torch.equal(layer.dequantize(dtype), model.get_submodule(name).weight), name
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    folder = save_packed(packed, tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(folder)
    error = relative_rms(logits(again, ids), logits(model, ids))
    assert error < (LOGITS if dtype == torch.float32 else BFLOAT16)


def test_layers_that_are_not_ternary_stay_dense(tiny_llama, ids, tmp_path):
    model, _ = fused(tiny_llama, 16, torch.float32, keep=["down_proj"])
    packed = import_fake_quantized(model, modules_to_not_convert=["q_proj"])
    kinds = {name.rpartition(".")[2]: type(layer) for name, layer in packed.named_modules()}
    assert kinds["down_proj"] is kinds["q_proj"] is torch.nn.Linear
    assert kinds["up_proj"] is TernaryLinear
    again = AutoModelForCausalLM.from_pretrained(save_packed(packed, tmp_path / "packed"))
    assert relative_rms(logits(again, ids), logits(model, ids)) < LOGITS


def test_a_gptq_folder_is_no_fake_quantized_checkpoint(tiny_llama, tmp_path):
    model = freeze(prepare_qat(tiny_llama(), BitCPM4Config(group_size=32)))
    weights = PackedWeights(model)
    save_gptq(tmp_path / "gptq", model, weights, state_dict=weights.rest)
    with pytest.raises(ValueError, match="quantized with gptq already"):
        import_fake_quantized(tmp_path / "gptq")


def test_dense_weights_are_no_fake_quantized_weights(tiny_llama):
    with pytest.raises(ValueError, match="none of 14 linear layers is ternary"):
        import_fake_quantized(tiny_llama())


def test_fake_quantized_weights_are_not_rounded_a_second_time(tiny_llama, tmp_path):
    model, prepared = fused(tiny_llama, 16, torch.float32)
    with torch.no_grad():
        for name, _ in qat_layers(prepared):
            model.get_submodule(name).weight[:9] = 0  # pruned rows say nothing
    model.save_pretrained(tmp_path / "fused")
    for source in (model, tmp_path / "fused"):
        with pytest.raises(ValueError, match="is ternary already .fake-quantized.*import_fake_quantized"):
            BitCPM4Quantizer.from_pretrained(source, group_size=16).quantize(tmp_path / "packed")
        assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("group_size", [32, -1])
def test_a_packed_model_is_exported_as_plain_gptq_exactly(tiny_llama, tmp_path, group_size):
    model = freeze(prepare_qat(tiny_llama(), BitCPM4Config(group_size, ["down_proj"])))
    weights = PackedWeights(model)
    assert len(weights) == 12
    save_gptq(tmp_path / "gptq", model, weights, state_dict=weights.rest)
    dense = load_gptq(tmp_path / "gptq")
    for name in weights:
        assert torch.equal(dense.get_submodule(name).weight.float(), model.get_submodule(name).dequantize()), name
    assert model.config.quantization_config.quant_method == "bitcpm4"


@pytest.mark.real
def test_real_weights_pack_to_a_seventh_and_answer_alike(real_checkpoint, tmp_path):
    """SmolLM2-135M, rounded: nonsense, but the same nonsense from latents and from 2 bits."""
    ids = torch.arange(300, 316)[None]
    config = BitCPM4Config(group_size=64)
    latents = AutoModelForCausalLM.from_pretrained(real_checkpoint, dtype=torch.float32, quantization_config=config)
    wanted = logits(latents, ids)
    folder = save_packed(freeze(latents), tmp_path / "packed")
    packed = AutoModelForCausalLM.from_pretrained(folder)
    # 30 layers, 16 rows, sums in another order: 2.9e-6 measured.
    assert relative_rms(logits(packed, ids), wanted) < 1e-5
    sizes = packed_sizes(packed)
    assert sizes["ternary"] <= 0.15 * sizes["ternary_bfloat16"]
    found = import_fake_quantized(packed.dequantize())
    assert found.config.quantization_config.group_size == 64
    assert torch.equal(logits(found, ids), logits(AutoModelForCausalLM.from_pretrained(folder), ids))


def test_the_template_is_packaged():
    assert module.CARD.is_file()
