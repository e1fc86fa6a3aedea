"""Small models of several families, and calibration rows for them."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from conftest import make_config
from transformers_minicpm4 import MiniCPM4ForCausalLM


SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
ROWS = [torch.randint(0, 128, (24,), generator=torch.Generator().manual_seed(index)) for index in range(12)]
OPTIONS = {"dataset": ROWS, "group_size": 32, "num_samples": 12, "batch_size": 4}


def make(kind="llama", **changes):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()
    if kind == "qwen":
        model = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "tie_word_embeddings": True, **changes})).eval()
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        return model
    return MiniCPM4ForCausalLM(make_config(**changes)).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.stack(ROWS[:3])).logits
