"""Models whose layers fill whole words and blocks, and their linear layers rounded to codes."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from transformers_minicpm4.quantization.quantized_weight import QuantizedWeight


@pytest.fixture
def llama():
    """Builder of a small float32 Llama; keyword arguments change config fields."""

    def build(**changes):
        fields = {
            "vocab_size": 128,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.1,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": True,
        }
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, max_new_tokens=7)
        return model

    return build


def round_weight(weight, bits=4, group_size=32, symmetric=True, bias=None) -> QuantizedWeight:
    outputs, inputs = weight.shape
    group_size = inputs if group_size == -1 else group_size
    groups = weight.detach().float().reshape(outputs, -1, group_size)
    middle, last = 2 ** (bits - 1), 2**bits - 1
    if symmetric:
        scales = (groups.abs().amax(-1) / (middle - 0.4)).half().float()  # not exact in bfloat16
        zeros = torch.full(scales.shape, middle, dtype=torch.uint8)
    else:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scales = ((high - low) / last).half().float()
        zeros = (-low / scales).round().clamp(1, last).to(torch.uint8)
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, last)
    codes = codes.to(torch.uint8).reshape(outputs, inputs)
    return QuantizedWeight(codes, scales, zeros, bits, group_size, symmetric, bias=bias)


@pytest.fixture
def quantized():
    """All linear layers of a model's blocks, rounded to nearest."""

    def quantize(model, **settings) -> dict[str, QuantizedWeight]:
        return {
            name: round_weight(module.weight, bias=None if module.bias is None else module.bias.detach(), **settings)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and ".layers." in name
        }

    return quantize
