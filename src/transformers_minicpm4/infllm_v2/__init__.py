"""How a token looks back: InfLLM v2 block-sparse attention. Knows tensors, knows no model."""

from .attention_interface import ATTN_IMPLEMENTATION, infllm_v2_attention_forward, infllm_v2_mask
from .backend import infllm_v2_attention
from .cache import InfLLMv2CacheLayer
from .configuration import InfLLMv2Config


__all__ = [
    "ATTN_IMPLEMENTATION",
    "InfLLMv2CacheLayer",
    "InfLLMv2Config",
    "infllm_v2_attention",
    "infllm_v2_attention_forward",
    "infllm_v2_mask",
]
