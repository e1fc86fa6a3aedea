"""
InfLLM v2 trainable block-sparse attention (MiniCPM4, arXiv 2506.07900): Triton kernels for NVIDIA and ROCm GPUs, a C++
kernel for CPUs.
"""

from . import layers, ops
from .attention import infllm_v2_attention
from .interface import flash_attn_forward, supports_flash_attn
from .ops import (
    block_scores,
    block_scores_decode,
    compress_keys,
    is_compiled,
    select_blocks,
    sparse_attention,
    sparse_attention_decode,
    update_compressed_keys,
)


__version__ = "0.1.0"

__all__ = [
    "block_scores",
    "block_scores_decode",
    "compress_keys",
    "flash_attn_forward",
    "infllm_v2_attention",
    "is_compiled",
    "layers",
    "ops",
    "select_blocks",
    "sparse_attention",
    "sparse_attention_decode",
    "supports_flash_attn",
    "update_compressed_keys",
]
