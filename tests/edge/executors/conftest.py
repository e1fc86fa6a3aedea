"""One tiny checkpoint in several forms, exported once; every scale differs from 1."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import make_config
from transformers_minicpm4 import BitCPM4Config, MiniCPM4ForCausalLM
from transformers_minicpm4.quantization.bitcpm4.quantizer import round_to_ternary, save_packed


FACTORS = [1.0 + i / 8 for i in range(16)]


def byte_level() -> PreTrainedTokenizerFast:
    """All bytes, most of them no character by themselves, and one merge (llama.cpp takes no file without)."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab={**letters, "th": 256}, merges=[("t", "h")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def longrope(original):
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": FACTORS,
        "long_factor": [3 * factor for factor in FACTORS],
        "original_max_position_embeddings": original,
    }


def tiny(**changes):
    """Embedding, residual and logit scales 12, 0.99 and 4; LongRoPE with the long factors."""
    fields = {
        "vocab_size": 260,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "dim_model_base": 64,
        "initializer_range": 0.15,
        "eos_token_id": 259,
        "max_position_embeddings": 1024,
        "rope_parameters": longrope(512),
    }
    torch.manual_seed(0)
    return MiniCPM4ForCausalLM(make_config(**{**fields, **changes})).eval()


@pytest.fixture(scope="session")
def token_ids():
    """Any bytes: also such as are no text."""
    return torch.randint(0, 257, (48,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders `plain`, `short` (LongRoPE's short factors) and `ternary` (packed)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny().save_pretrained(folder / "plain")
    tiny(max_position_embeddings=256, rope_parameters=longrope(256)).save_pretrained(folder / "short")
    save_packed(round_to_ternary(tiny(), BitCPM4Config(group_size=256)), folder / "ternary")
    for name in ("plain", "short", "ternary"):
        byte_level().save_pretrained(folder / name)
    return folder
