"""
MiniCPM4 for the Hugging Face ecosystem.

Importing this package registers the model, its tokenizer and `attn_implementation="infllm_v2"` with Transformers, so
that the Auto classes load MiniCPM4 checkpoints without `trust_remote_code`.
"""

from __future__ import annotations

from importlib import import_module

from .infllm_v2 import InfLLMv2Config, infllm_v2_attention
from .model.configuration_minicpm4 import MiniCPM4Config
from .model.conversion import extend_context, llama_to_minicpm4, minicpm4_to_llama
from .model.modeling_minicpm4 import (
    MiniCPM4ForCausalLM,
    MiniCPM4ForSequenceClassification,
    MiniCPM4Model,
    MiniCPM4PreTrainedModel,
)
from .quantization.bitcpm4.configuration import BitCPM4Config
from .quantization.p_gptq.configuration import PGPTQConfig
from .registration import register


__version__ = "0.1.0"

__all__ = [
    "BitCPM4Config",
    "BitCPM4Quantizer",
    "InfLLMv2Config",
    "MiniCPM4Config",
    "MiniCPM4ForCausalLM",
    "MiniCPM4ForSequenceClassification",
    "MiniCPM4Model",
    "MiniCPM4PreTrainedModel",
    "PGPTQConfig",
    "PGPTQQuantizer",
    "extend_context",
    "infllm_v2_attention",
    "llama_to_minicpm4",
    "minicpm4_to_llama",
]

# Quantizers are imported when they are asked for: most processes never quantize.
_QUANTIZERS = {"BitCPM4Quantizer": "bitcpm4", "PGPTQQuantizer": "p_gptq"}


def __getattr__(name: str):
    if name in _QUANTIZERS:
        return getattr(import_module(f".quantization.{_QUANTIZERS[name]}.quantizer", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
