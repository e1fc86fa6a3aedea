"""The blocked form against the definition: outputs, blocks and gradients; and what it promises about memory."""

import math

import pytest
import torch
from test_reference import CONFIGS, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from tolerances import assert_close, relative_rms, within
from transformers_minicpm4.infllm_v2 import InfLLMv2Config, blockwise, infllm_v2_attention


def run(implementation, inputs, config, **kwargs):
    output, blocks = infllm_v2_attention(*inputs, config, implementation=implementation, return_blocks=True, **kwargs)
    if not inputs[0].requires_grad:
        return output, blocks, ()
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return output, blocks, torch.autograd.grad((output * weight).sum(), inputs)


def assert_same(got, want):
    assert torch.equal(got[1], want[1]), f"{(got[1] != want[1]).sum()} of {want[1].numel()} blocks differ"
    assert_close(got[0], want[0], "attention_float64", "output")
    for name, mine, theirs in zip(("dq", "dk", "dv"), got[2], want[2]):
        assert_close(mine, theirs, "gradient_float64", name)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("heads, groups", [(2, 2), (4, 2), (16, 2), (16, 1)])
@pytest.mark.parametrize("length, total", [(1, 1), (33, 33), (301, 301), (20, 301), (7, 127)])
def test_equals_the_definition_with_gradients(config, heads, groups, length, total):
    inputs = [tensor.requires_grad_() for tensor in tensors(heads, groups, length, total, batch=2)]
    want = run("reference", inputs, config)
    assert_same(run("blockwise", inputs, config), want)
    with torch.no_grad():  # a path of its own for few queries
        output, blocks, _ = run("blockwise", [tensor.detach() for tensor in inputs], config)
    assert_same((output, blocks, ()), (want[0], want[1], ()))


@pytest.mark.parametrize("chunk, score_chunk, gather", [(1, 1, 0), (13, 5, 0), (40, 64, 3), (512, 7, 1000)])
def test_chunk_sizes_change_nothing(monkeypatch, chunk, score_chunk, gather):
    monkeypatch.setattr(blockwise, "CHUNK", chunk)
    monkeypatch.setattr(blockwise, "SCORE_CHUNK", score_chunk)
    monkeypatch.setattr(blockwise, "GATHER_MAX", gather)
    monkeypatch.setattr(blockwise, "DENSE_CHUNK", chunk)
    config = CONFIGS["no_window_no_init"]
    inputs = tensors(8, 2, 150, 210)
    assert_same(run("blockwise", inputs, config), run("reference", inputs, config))


def test_large_logits_are_safe():
    """The running maximum rises block by block: exponentials of the raw logits (up to 1e3) would overflow."""
    query, key, value = tensors(4, 2, 90, 160)
    inputs = [(query * 40).requires_grad_(), (key * 40).requires_grad_(), value.requires_grad_()]
    config = CONFIGS["window"]
    want, got = run("reference", inputs, config), run("blockwise", inputs, config)
    assert torch.isfinite(got[0]).all()
    assert_close(got[0], want[0], "attention_large_logits", "output")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_the_float64_definition(dtype):
    """Blocks are chosen in float32 from the same rounded inputs, so the error is that of the attention alone."""
    rounded = [tensor.to(dtype) for tensor in tensors(16, 2, 200, 200)]
    output, blocks, _ = run("blockwise", rounded, CONFIGS["window"])
    wanted, read, _ = run("reference", [tensor.double() for tensor in rounded], CONFIGS["window"])
    same = (blocks == read).all(-1).repeat_interleave(8, 1)
    assert same.float().mean() > 0.99
    name = "attention_" + str(dtype).removeprefix("torch.")
    assert within(relative_rms(output[same], wanted[same]), name)


def test_inference_mode_and_no_grad_may_alternate():
    """The buffer of few queries is kept between calls, whichever mode made it."""
    inputs = tensors(4, 2, 1, 150)
    with torch.inference_mode():
        first = infllm_v2_attention(*inputs, CONFIGS["window"])
    with torch.no_grad():
        second = infllm_v2_attention(*inputs, CONFIGS["window"])
    assert torch.equal(first, second)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives back."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.elements = max(self.elements, math.prod(tensor.shape))
        return result


def test_never_holds_all_scores():
    heads, total = 4, 4096
    inputs = [tensor.float() for tensor in tensors(heads, 1, total, total)]
    config = InfLLMv2Config(kernel_size=8, kernel_stride=4, block_size=16, window_size=64, topk=4, dense_len=-1)
    with torch.no_grad(), LargestTensor() as largest:
        infllm_v2_attention(*inputs, config, implementation="blockwise")
    assert largest.elements <= heads * total * 64  # of order S * (selected tokens), here [64 queries, H, K] and less
    with torch.no_grad(), LargestTensor() as largest:
        infllm_v2_attention(*inputs, config, implementation="reference")
    assert largest.elements >= heads * total * total  # the measure does see what the definition holds
