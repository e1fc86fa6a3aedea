"""Tiny models and token rows for the ternary tests."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()


@pytest.fixture
def tiny_llama():
    """Builder of a tiny float32 Llama with tied embeddings; keyword arguments change config fields."""
    return make_llama


@pytest.fixture
def ids():
    """int64 `[3, 12]`."""
    return torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(1))


class Rows(torch.utils.data.Dataset):
    """Rows with a pattern to learn: token n + 1 is token n plus a step of the row."""

    def __init__(self, count: int = 64, length: int = 16):
        start = torch.arange(count)[:, None]
        self.rows = 3 + (start * 7 + torch.arange(length) * (1 + start % 3)) % 90

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


@pytest.fixture
def rows():
    return Rows()


@pytest.fixture
def tokenizer():
    """96 words, "w0" to "w95"."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(96)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
