"""
The only module that writes into other libraries' registries. `register()` is idempotent and does nothing else.
"""

from __future__ import annotations

import functools
import importlib.util

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedConfig,
)
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from .infllm_v2 import ATTN_IMPLEMENTATION, infllm_v2_attention_forward, infllm_v2_mask
from .infllm_v2.slots import SLOT_ATTENTION, slot_attention_forward
from .model.configuration_minicpm4 import MiniCPM4Config
from .model.conversion import MiniCPMConfig, is_unnamed_minicpm
from .model.modeling_minicpm4 import MiniCPM4ForCausalLM, MiniCPM4ForSequenceClassification, MiniCPM4Model
from .quantization.bitcpm4 import configuration as bitcpm4
from .quantization.bitcpm4.hf_quantizer import BitCPM4HfQuantizer
from .quantization.p_gptq import configuration as p_gptq
from .quantization.p_gptq.hf_quantizer import PGPTQHfQuantizer


# The seven linears of the released fine-tuning guides; sparse attention adds none.
LORA_TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def register() -> None:
    """Make Transformers (and PEFT, where installed) know MiniCPM4 and InfLLM v2."""
    # exist_ok: a Transformers with a dense `minicpm4` of its own must neither break us nor win over us.
    AutoConfig.register(MiniCPM4Config.model_type, MiniCPM4Config, exist_ok=True)
    AutoConfig.register(MiniCPMConfig.model_type, MiniCPMConfig, exist_ok=True)
    AutoModel.register(MiniCPM4Config, MiniCPM4Model, exist_ok=True)
    AutoModelForCausalLM.register(MiniCPM4Config, MiniCPM4ForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(MiniCPM4Config, MiniCPM4ForSequenceClassification, exist_ok=True)
    AutoTokenizer.register(MiniCPM4Config, tokenizer_class=LlamaTokenizer, exist_ok=True)
    AttentionInterface.register(ATTN_IMPLEMENTATION, infllm_v2_attention_forward)
    AttentionMaskInterface.register(ATTN_IMPLEMENTATION, infllm_v2_mask)
    # No mask function: a step over slots brings its own, and Transformers then makes none.
    AttentionInterface.register(SLOT_ATTENTION, slot_attention_forward)
    for method, config, quantizer in (
        (bitcpm4.QUANT_METHOD, bitcpm4.BitCPM4Config, BitCPM4HfQuantizer),
        (p_gptq.QUANT_METHOD, p_gptq.PGPTQConfig, PGPTQHfQuantizer),
    ):
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a name given twice is refused
            register_quantization_config(method)(config)
            register_quantizer(method)(quantizer)
    _name_unnamed_configs()
    if importlib.util.find_spec("peft"):
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(MiniCPM4Config.model_type, LORA_TARGET_MODULES)


def _name_unnamed_configs() -> None:
    """
    MiniCPM4-0.5B's config.json has no `model_type`, and Transformers has no seam for that: name it as it is read.
    Every other config passes through untouched.
    """
    original = PreTrainedConfig.get_config_dict
    if getattr(original, "_names_minicpm", False):
        return

    @functools.wraps(original)
    def get_config_dict(cls, *args, **kwargs):
        config_dict, unused = original.__func__(cls, *args, **kwargs)
        if is_unnamed_minicpm(config_dict):
            config_dict["model_type"] = MiniCPMConfig.model_type
        return config_dict, unused

    get_config_dict._names_minicpm = True
    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)
