"""
The operators' tests: on a GPU where there is one, else through Triton's interpreter on the CPU.

    python -m pytest hub_kernels/infllm_v2/tests
"""

import os
import sys
from pathlib import Path

import pytest
import torch


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from load import load  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def kernel():
    return load(DEVICE)


@pytest.fixture(scope="session")
def plain(kernel):
    """The definition."""
    return kernel.ops.plain


@pytest.fixture(scope="session")
def device():
    return DEVICE
