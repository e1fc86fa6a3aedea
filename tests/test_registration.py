"""What importing the package does to other libraries, in fresh interpreters where it matters."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

import transformers_minicpm4
from transformers_minicpm4 import MiniCPM4ForCausalLM, registration


def run(code: str, **kwargs) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_registering_twice_changes_nothing():
    before = PreTrainedConfig.get_config_dict.__func__
    registration.register()
    assert PreTrainedConfig.get_config_dict.__func__ is before
    assert "infllm_v2" in AttentionInterface().valid_keys()


def test_a_later_transformers_with_its_own_minicpm4_does_not_break_us(tmp_path, tiny_config):
    """Simulates the dense upstream model: classes in `transformers.models.minicpm4`, registered before we come."""
    MiniCPM4ForCausalLM(tiny_config()).save_pretrained(tmp_path)
    out = run(
        f"""
import sys, types
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.auto import configuration_auto, modeling_auto
module = types.ModuleType("transformers.models.minicpm4")
class MiniCPM4Config(LlamaConfig):
    model_type = "minicpm4"
class MiniCPM4ForCausalLM(LlamaForCausalLM):
    config_class = MiniCPM4Config
for cls in (MiniCPM4Config, MiniCPM4ForCausalLM):
    cls.__module__ = module.__name__
    setattr(module, cls.__name__, cls)
sys.modules[module.__name__] = module
configuration_auto.CONFIG_MAPPING_NAMES["minicpm4"] = "MiniCPM4Config"
configuration_auto.CONFIG_MAPPING._mapping["minicpm4"] = "MiniCPM4Config"
configuration_auto.CONFIG_MAPPING._modules["minicpm4"] = module
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["minicpm4"] = "MiniCPM4ForCausalLM"
from transformers import AutoConfig, AutoModelForCausalLM
assert type(AutoConfig.from_pretrained({str(tmp_path)!r})) is MiniCPM4Config
import transformers_minicpm4
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, attn_implementation="infllm_v2")
print(type(model).__module__, model.config._attn_implementation)
"""
    )
    assert out.splitlines()[-1] == "transformers_minicpm4.model.modeling_minicpm4 infllm_v2"


def test_import_needs_none_of_the_optional_libraries():
    """peft, trl, optimum, matplotlib, gguf, triton and kernels may all be missing."""
    run(
        """
import importlib.abc, sys
blocked = {"peft", "trl", "optimum", "matplotlib", "gguf", "kernels", "datasets", "triton"}
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] in blocked else real(name, *a)
import transformers_minicpm4
from transformers import AutoConfig
assert type(AutoConfig.for_model("minicpm4")).__name__ == "MiniCPM4Config"
"""
    )


def test_import_does_not_touch_cuda_and_prints_nothing():
    out = run("import transformers_minicpm4, torch; assert not torch.cuda.is_initialized()")
    assert out == ""


def test_peft_knows_the_seven_linears():
    peft = pytest.importorskip("peft", reason="peft is not installed (extra: rl)")
    config = transformers_minicpm4.MiniCPM4Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = peft.get_peft_model(MiniCPM4ForCausalLM(config), peft.LoraConfig(task_type="CAUSAL_LM"))
    adapted = {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_tokenizer_of_a_folder_without_a_named_class(tmp_path, tiny_config):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tiny_config().save_pretrained(tmp_path)
    words = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")], unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>"}))
    assert 3 in AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"]


def test_sequence_classification_and_base_model_through_auto(tmp_path, tiny_config):
    from transformers import AutoModel, AutoModelForSequenceClassification

    model = MiniCPM4ForCausalLM(tiny_config()).eval()
    model.save_pretrained(tmp_path)
    ids = torch.randint(1, 100, (1, 9))
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    head = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(head).__name__ == "MiniCPM4ForSequenceClassification"


def test_truncated_weights_are_an_error_not_a_model(tmp_path, tiny_config):
    MiniCPM4ForCausalLM(tiny_config()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(Exception, match="[Ii]ncomplete|[Tt]runcated|[Ii]nvalid|header|buffer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
