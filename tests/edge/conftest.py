"""What several tests of the edge room start from."""

import pytest
from transformers import AutoTokenizer

from transformers_minicpm4.cli.assets import smollm2_path
from transformers_minicpm4.edge.server_text import TAGS


@pytest.fixture(scope="module")
def tokenizer():
    """SmolLM2's, with the tags of thoughts and calls as special tokens."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    except FileNotFoundError as error:
        pytest.skip(f"no tokenizer of SmolLM2: {error}")
    tags = [tag for tag in TAGS if tag != "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tags}, replace_extra_special_tokens=False)
    return tokenizer
