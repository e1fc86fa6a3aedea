"""`from_pretrained(..., quantization_config=PGPTQConfig(...))`, and what `save_pretrained` leaves for every reader."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPTQConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from small_models import OPTIONS, ROWS, logits, make
from transformers_minicpm4.model.prefix_cache import PrefixCache
from transformers_minicpm4.quantization.export.checkpoint_files import CheckpointTensors
from transformers_minicpm4.quantization.export.gptq import checkpoint_tensors, load_gptq, save_gptq
from transformers_minicpm4.quantization.p_gptq.configuration import PGPTQConfig
from transformers_minicpm4.quantization.p_gptq.quantizer import PGPTQQuantizer


@pytest.fixture
def source(tmp_path):
    make("qwen").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_is_the_quantizer_and_saves_as_gptq(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=PGPTQConfig(**OPTIONS))
    by_hand = make("qwen")
    PGPTQQuantizer(**OPTIONS).quantize_model(by_hand)
    assert torch.equal(logits(model), logits(by_hand))

    model.save_pretrained(tmp_path / "int4")
    saved = json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "gptq"
    assert saved["meta"]["method"] == "GPTQ"  # no prefix is stored, so nothing is left out
    # Transformers takes it for what it is.
    assert isinstance(AutoQuantizationConfig.from_dict(saved), GPTQConfig)
    assert torch.equal(logits(load_gptq(tmp_path / "int4", torch.float32)), logits(model))


def test_prefix_report_and_card_are_saved_too(source, tmp_path):
    config = PGPTQConfig(**OPTIONS, prefix_ids=[1], modules_in_block_to_quantize=[["mlp.gate_proj", "mlp.up_proj"]])
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(tmp_path / "int4")
    assert PrefixCache.load(tmp_path / "int4").token_ids == [1]
    names = {path.name for path in (tmp_path / "int4").iterdir()}
    assert {"README.md", "quantize_config.json", "quantization_report.json"} <= names
    saved = json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_config"]
    assert saved == json.loads((tmp_path / "int4" / "quantize_config.json").read_text())
    assert "modules_in_block_to_quantize" in saved
    assert torch.equal(logits(load_gptq(tmp_path / "int4", torch.float32)), logits(model))


def test_both_writers_list_the_same_tensors(source, tmp_path):
    """`save_pretrained` and `save_gptq`, tied embeddings and biases among them."""
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=PGPTQConfig(**OPTIONS))
    model.save_pretrained(tmp_path / "one")
    weights = model.hf_quantizer._quantizer.weights
    save_gptq(tmp_path / "two", model, weights)
    one, two = CheckpointTensors(tmp_path / "one"), CheckpointTensors(tmp_path / "two")
    listed = dict(checkpoint_tensors(model, weights))
    assert one.keys() == two.keys() == listed.keys()
    assert all(torch.equal(one[name], listed[name]) and torch.equal(two[name], listed[name]) for name in listed)
    assert any(name.endswith("q_proj.bias") for name in listed)
    assert "lm_head.weight" not in listed


def test_adapters_train_on_it(source):
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=PGPTQConfig(**OPTIONS))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    batch = torch.stack(ROWS[:4])
    model(batch, labels=batch).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_" in name]
    assert gradients
    assert all(float(gradient.norm()) > 0 for gradient in gradients)


def test_dequantize_gives_an_ordinary_model(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=PGPTQConfig(**OPTIONS))
    before = logits(model)
    model = model.dequantize()
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), before)


def test_missing_data_is_named(source):
    with pytest.raises(ValueError, match="PGPTQConfig has no calibration data"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=PGPTQConfig())
    # Transformers would make a Qwen tokenizer of one token up.
    with pytest.raises(ValueError, match="without a tokenizer"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=PGPTQConfig(dataset=["text"], group_size=32))


def test_a_save_that_fails_leaves_the_folder_as_it_was(source, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=PGPTQConfig(**OPTIONS))
    model.save_pretrained(tmp_path / "int4", max_shard_size="20KB")
    assert len(list((tmp_path / "int4").glob("model-*.safetensors"))) > 1
    (tmp_path / "int4" / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "int4").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PGPTQQuantizer, "write_extras", full)
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(tmp_path / "int4")
    assert {path.name: path.read_bytes() for path in (tmp_path / "int4").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int4", "source"]

    model.save_pretrained(tmp_path / "int4")  # one file now: the shards must not stay
    names = {path.name for path in (tmp_path / "int4").iterdir()}
    assert {"model.safetensors", "quantize_config.json"} <= names
    assert not any(name.startswith("model-") or name.endswith("index.json") for name in names)
    assert (tmp_path / "int4" / "README.md").read_text() == "mine"
    assert torch.equal(logits(load_gptq(tmp_path / "int4", torch.float32)), logits(model))


def test_a_save_takes_nothing_away_that_is_not_its_own(source, tmp_path):
    """Another process's weights, a variant's, an adapter's base, a stranger's file."""
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=PGPTQConfig(**OPTIONS, prefix_ids=[1]))
    folder = tmp_path / "int4"
    model.save_pretrained(folder)
    (folder / "model_notes.safetensors").write_bytes(b"notes")
    whole = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    model.save_pretrained(folder, is_main_process=False)
    model.save_pretrained(folder, variant="int4")
    assert (folder / "model.int4.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert {path: (folder / path).read_bytes() for path in whole} == whole
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").is_file()
    ours = {path: content for path, content in whole.items() if path.name != "README.md"}
    assert {path: (folder / path).read_bytes() for path in ours} == ours

    # A prefix of another model is not left to be taken for this one's.
    plain = AutoModelForCausalLM.from_pretrained(source, quantization_config=PGPTQConfig(**OPTIONS))
    plain.save_pretrained(folder)
    assert PrefixCache.load(folder) is None


def test_a_folder_may_lie_on_another_disk(source, tmp_path):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=PGPTQConfig(**OPTIONS))
    with tempfile.TemporaryDirectory(dir=other) as folder:
        (tmp_path / "int4").symlink_to(folder)
        model.save_pretrained(tmp_path / "int4")
        assert torch.equal(logits(load_gptq(tmp_path / "int4", torch.float32)), logits(model))
