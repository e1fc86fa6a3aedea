"""Ternary layers in training: what they compute, what is converted, what is refused, and that they learn."""

import copy
import logging

import pytest
import torch
from accelerate import Accelerator

from ternary_training import train
from transformers_minicpm4.quantization.bitcpm4.configuration import BitCPM4Config
from transformers_minicpm4.quantization.bitcpm4.qat import TernaryQATLinear, prepare_qat, qat_layers, set_qat
from transformers_minicpm4.quantization.bitcpm4.quantizer import freeze
from transformers_minicpm4.quantization.bitcpm4.ternary import fake_quantize


CONVERTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


# ----------------------------------------------------------------------------------------------------------- the model


def test_a_prepared_model_is_the_plain_model_with_fake_quantized_weights(tiny_llama, ids):
    model = tiny_llama()
    plain = copy.deepcopy(model)
    prepare_qat(model, BitCPM4Config(group_size=16))
    names = {name.rpartition(".")[2] for name, _ in qat_layers(model)}
    assert names == CONVERTED
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, plain(ids).logits, atol=0.1)
        for name, _ in qat_layers(model):
            weight = plain.get_submodule(name).weight
            weight.copy_(fake_quantize(weight, 16))
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_off_it_is_the_model_that_it_was(tiny_llama, ids):
    model = tiny_llama()
    before = model(ids).logits
    prepare_qat(model, BitCPM4Config(group_size=16))
    set_qat(model, False)
    assert torch.equal(model(ids).logits, before)


def test_parameters_stay_the_same_objects_under_the_same_names(tiny_llama):
    model = tiny_llama()
    before = dict(model.named_parameters())
    prepare_qat(model, BitCPM4Config(group_size=16))
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_latents_get_the_gradient_of_the_fake_quantized_weight(tiny_llama, ids):
    """The straight-through estimator through a whole model."""
    model = tiny_llama()
    plain = copy.deepcopy(model)
    prepare_qat(model, BitCPM4Config(group_size=-1))
    with torch.no_grad():
        for name, _ in qat_layers(model):
            weight = plain.get_submodule(name).weight
            weight.copy_(fake_quantize(weight, -1))
    for each in (model, plain):
        each(input_ids=ids, labels=ids).loss.backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, wanted[name].grad), name


@pytest.mark.parametrize(
    "given, kept", [(["down_proj"], {"down_proj"}), (["model.layers.0"], set()), (None, set())], ids=str
)
def test_modules_to_not_convert_stay_linear(tiny_llama, given, kept):
    model = prepare_qat(tiny_llama(), BitCPM4Config(group_size=16, modules_to_not_convert=given))
    found = {name for name, _ in qat_layers(model)}
    assert {name.rpartition(".")[2] for name in found} == CONVERTED - kept
    assert not any(name.endswith("lm_head") for name in found)
    assert any(".layers.0." in name for name in found) == (given != ["model.layers.0"])


def test_a_misspelt_name_is_mentioned(tiny_llama, caplog):
    logging.getLogger("transformers_minicpm4").propagate = True
    prepare_qat(tiny_llama(), BitCPM4Config(16, ["down_prj", "up_proj"]))
    assert "has 'down_prj', which is the name of no linear layer" in caplog.text
    assert "'up_proj'" not in caplog.text


def test_the_head_stays_where_it_is_not_tied(tiny_llama):
    model = prepare_qat(tiny_llama(tie_word_embeddings=False), BitCPM4Config(16, ["q_proj"]))
    assert type(model.lm_head) is torch.nn.Linear


def test_what_cannot_be_prepared_is_refused_and_untouched(tiny_llama):
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj has 64 inputs.*group_size=24"):
        prepare_qat(model, BitCPM4Config(group_size=24))
    assert not list(qat_layers(model))
    with pytest.raises(ValueError, match="mlp.down_proj has 96 inputs"):
        prepare_qat(model, BitCPM4Config(group_size=64))
    with pytest.raises(ValueError, match="no linear layer to make ternary"):
        prepare_qat(model, BitCPM4Config(16, [".*proj"]))
    with pytest.raises(ValueError, match="weight_format must be 'latent'"):
        prepare_qat(model, BitCPM4Config(16, weight_format="packed"))
    prepare_qat(model, BitCPM4Config(16))
    with pytest.raises(ValueError, match="BitCPM4 model with latent weights already"):
        prepare_qat(model, BitCPM4Config(16))


def test_values_that_are_ternary_already_are_no_latents(tiny_llama):
    """Nor after dequantizing, and rows of zeros hide nothing."""
    packed = freeze(prepare_qat(tiny_llama(), BitCPM4Config(group_size=16)))
    with pytest.raises(ValueError, match="LoRA adapters beside them.*dequantized they stay ternary"):
        prepare_qat(packed, BitCPM4Config(group_size=16))
    model = packed.dequantize()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[:20] = 0
    with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj is ternary already.*import_fake_quantized.*latents"):
        prepare_qat(model, BitCPM4Config(group_size=16))
    assert not list(qat_layers(model))
    assert before.keys() == model.state_dict().keys()


def test_a_layer_says_what_it_is():
    assert "group_size=8" in repr(TernaryQATLinear(torch.nn.Linear(16, 4), 8))


# ------------------------------------------------------------------------------------------------------------ training


def test_trainer_trains_latents_and_the_loss_falls(tiny_llama, rows, tmp_path):
    model = prepare_qat(tiny_llama(), BitCPM4Config(group_size=16))
    before = {name: layer.weight.detach().clone() for name, layer in qat_layers(model)}
    trainer = train(model, rows, tmp_path, steps=30)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(not torch.equal(layer.weight, before[name]) for name, layer in qat_layers(model))


def test_a_bare_accelerate_loop_trains(tiny_llama, rows):
    model = prepare_qat(tiny_llama(), BitCPM4Config(group_size=16))
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = torch.utils.data.DataLoader(rows, batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in [*loader] * 3:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
