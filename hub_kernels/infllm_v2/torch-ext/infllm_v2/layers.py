"""Layers that the `kernels` library puts in place of a model's own (`kernelize`)."""

import torch
from torch import nn

from .attention import infllm_v2_attention


class InfLLMv2Attention(nn.Module):
    """`infllm_v2_attention` as a layer: the same arguments, the same results."""

    can_torch_compile = True
    has_backward = True

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options):
        return infllm_v2_attention(query, key, value, **options)
