"""
Real weights (SmolLM2-135M-Instruct) on real text in llama.cpp and OpenVINO, against torch in float32.

llama.cpp multiplies a layer kept in blocks (Q8_0, Q4_0) with activations that it rounds to 8 bits, 32 at a time. The
reference of those files therefore rounds its own in the same way, by a few lines of this file. What remains is the
export and the runtime; against exact activations the figures are in docs/executors.md.
"""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_minicpm4 import BitCPM4Config
from transformers_minicpm4.edge.alignment import align
from transformers_minicpm4.edge.executors import open_executor
from transformers_minicpm4.edge.executors.gguf_executor import export_gguf
from transformers_minicpm4.edge.executors.openvino_executor import export_openvino
from transformers_minicpm4.quantization.bitcpm4.quantizer import round_to_ternary, save_packed


pytestmark = pytest.mark.real

TOKENS, CONTEXT = 128, 160

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None or importlib.util.find_spec("gguf") is None,
    reason="xllamacpp or gguf is not installed",
)


@pytest.fixture
def text(real_checkpoint, shared_data):
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(shared_data / "wikitext2" / "test.parquet"), split="train")
    return AutoTokenizer.from_pretrained(real_checkpoint)("".join(rows["text"][:20]))["input_ids"][:TOKENS]


def rounded(inputs: torch.Tensor) -> torch.Tensor:
    """llama.cpp's Q8_0: 32 values share a float16 scale, the largest being 127 of it."""
    blocks = inputs.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scale.clamp(min=1e-30)).round() * scale.half().float()).flatten(-2)


def reference(checkpoint, activations=None, weights=None):
    """Torch's executor; `activations` and `weights` are applied to the layers' inputs and matrices."""
    executor = open_executor(checkpoint, CONTEXT, dtype="float32")
    for name, layer in executor.model.named_modules():
        if name.endswith("_proj") and activations is not None:
            layer.register_forward_pre_hook(lambda _, inputs: (activations(inputs[0]),))
        if name.endswith("_proj") and weights is not None:
            layer.weight.data = weights(layer.weight.data)
    return executor


@needs_llama_cpp
def test_llama_cpp_in_float32(real_checkpoint, text, tmp_path):
    export_gguf(real_checkpoint, tmp_path / "model.gguf", "f32")
    with open_executor(tmp_path / "model.gguf", CONTEXT) as made:
        found = align(reference(real_checkpoint), made, text)
    assert abs(found.slope - 1) < 1e-4, found.report()
    assert found.max_difference < 1e-3, found.report()  # nats; measured 2.7e-4
    assert found.agreement == 1


@needs_llama_cpp
def test_llama_cpp_in_q8_0(real_checkpoint, text, tmp_path):
    export_gguf(real_checkpoint, tmp_path / "model.gguf", "q8_0")
    with open_executor(tmp_path / "model.gguf", CONTEXT) as made:
        exact = align(reference(real_checkpoint), made, text)
        found = align(reference(real_checkpoint, rounded, rounded), made, text)
    assert exact.within(0.01), exact.report()  # measured 0.9945
    assert found.within(0.01), found.report()  # 0.9961


@needs_llama_cpp
def test_llama_cpp_in_ternary(real_checkpoint, text, tmp_path):
    """Groups of 64 are exact in Q4_0. Untrained ternary weights are no language model; the same numbers they are."""
    dense = AutoModelForCausalLM.from_pretrained(real_checkpoint, dtype=torch.float32)
    save_packed(round_to_ternary(dense, BitCPM4Config(group_size=64)), tmp_path / "ternary")
    AutoTokenizer.from_pretrained(real_checkpoint).save_pretrained(tmp_path / "ternary")
    types = export_gguf(tmp_path / "ternary", tmp_path / "model.gguf", "auto")
    assert list(types.values()).count("Q4_0") == 7 * dense.config.num_hidden_layers
    with open_executor(tmp_path / "model.gguf", CONTEXT) as made:
        found = align(reference(tmp_path / "ternary", rounded), made, text)
    assert found.within(0.01), found.report()  # measured 1.0005
    export_gguf(tmp_path / "ternary", tmp_path / "dense.gguf", "f32")
    with open_executor(tmp_path / "dense.gguf", CONTEXT) as made:
        found = align(reference(tmp_path / "ternary"), made, text)
    assert abs(found.slope - 1) < 1e-4, found.report()
    assert found.agreement == 1


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_in_float32(real_checkpoint, text, tmp_path):
    export_openvino(real_checkpoint, tmp_path / "made")
    found = align(reference(real_checkpoint), open_executor(tmp_path / "made", CONTEXT), text)
    assert abs(found.slope - 1) < 1e-4, found.report()
    assert found.max_difference < 2e-4, found.report()  # nats; measured 5.7e-5
    assert found.agreement == 1
