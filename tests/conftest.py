"""Common ground of all tests: fixed seeds, two threads, no network, tiny models built from configs."""

import os


# Before any import of Transformers or TRL: nothing may look for the Hub or report home.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

from tolerances import MEASURED, TOLERANCES
from transformers_minicpm4 import InfLLMv2Config, MiniCPM4Config, MiniCPM4ForCausalLM


# Tiny models gain nothing from a second thread and lose tenfold where two busy processes share two cores.
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Small enough that 150 tokens have blocks to choose from: 5 blocks of 8 tokens are read.
SPARSE = InfLLMv2Config(
    kernel_size=8, kernel_stride=4, init_blocks=1, block_size=8, window_size=16, topk=3, dense_len=-1
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def shared_data():
    """The project's shared data folder, beside the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("../shared/data is not beside this checkout")
    return SHARED / "data"


def make_config(**changes) -> MiniCPM4Config:
    fields = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 16,
        "mup_denominator": 32,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 127,
    }
    return MiniCPM4Config(**{**fields, **changes})


@pytest.fixture
def tiny_config():
    """Builder of a tiny config with all three constants in play; keyword arguments change fields."""
    return make_config


@pytest.fixture
def tiny_model():
    """Builder of a tiny float64 model in eval mode."""

    def build(attn_implementation=None, **changes):
        config = make_config(**changes)
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        torch.manual_seed(0)
        return MiniCPM4ForCausalLM(config).double().eval()

    return build


@pytest.fixture
def sparse_config() -> InfLLMv2Config:
    return SPARSE


@pytest.fixture
def real_checkpoint():
    """Folder of the converted SmolLM2-135M-Instruct, and two threads while a test uses it."""
    from transformers_minicpm4.cli.assets import smollm2_path

    try:
        folder = smollm2_path()
    except FileNotFoundError as error:
        pytest.skip(f"no converted SmolLM2 weights: {error}")
    torch.set_num_threads(2)
    yield folder
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter, config):
    if config.get_verbosity() > 0 and MEASURED:
        terminalreporter.section("largest errors (tolerance)")
        for name, error in sorted(MEASURED.items()):
            terminalreporter.write_line(f"{name:26} {error:.1e} ({TOLERANCES[name][0]:.0e})")
