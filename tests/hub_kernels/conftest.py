"""The kernel, assembled once for all tests and loaded as its users load it."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from transformers_minicpm4.infllm_v2 import kernel as hub_kernel


KERNEL = Path(__file__).resolve().parents[2] / "hub_kernels" / "infllm_v2"
REPO = "test-org/infllm-v2"

if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
    os.environ["INFLLM_V2_CPU_KERNEL"] = "0"  # plain PyTorch, without the warning about it


@pytest.fixture(scope="session")
def build():
    """`scripts/build.py` as a module."""
    spec = importlib.util.spec_from_file_location("infllm_v2_build", KERNEL / "scripts" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def kernel_folder(build, tmp_path_factory):
    """A folder whose `build/` was just assembled."""
    folder = tmp_path_factory.mktemp("infllm_v2")
    build.build(folder / "build")
    return folder


@pytest.fixture(scope="session")
def kernel(kernel_folder):
    """The kernel's module, loaded by `kernels`."""
    from kernels import get_local_kernel

    return get_local_kernel(kernel_folder)


@pytest.fixture
def forget():
    """Forget which kernels were loaded or failed, and which warnings were given, before and after a test."""
    from transformers.utils.logging import warning_once

    def clear():
        hub_kernel.load.__wrapped__.cache_clear()
        warning_once.cache_clear()

    clear()
    yield clear
    clear()


@pytest.fixture
def named(kernel_folder, forget, monkeypatch):
    """As a user does it: INFLLM_V2_KERNEL names a repository, LOCAL_KERNELS says that it lies here."""
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPO}={kernel_folder}")
    monkeypatch.setenv("INFLLM_V2_KERNEL", REPO)
    return REPO


@pytest.fixture
def said(caplog, monkeypatch):
    """Warnings about the implementation so far, as a list."""
    import logging

    monkeypatch.setattr(logging.getLogger("transformers_minicpm4"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return lambda: [record.message for record in caplog.records if "blockwise form" in record.message]
