"""MiniCPM4 model configuration."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from ..infllm_v2 import InfLLMv2Config


def _valid_sparse_config(value: Any) -> None:
    """Validator of the field: raises where `InfLLMv2Config.from_dict` does."""
    if value is not None:
        InfLLMv2Config.from_dict(value)


class _NoAutoMap:
    """
    `auto_map` of a config without remote code: empty, where TRL 1.16 asks for it without looking whether it is there.
    Not a field, so config.json does not get it; what is set in it becomes this config's own.
    """

    def __get__(self, config, owner=None) -> dict[str, str]:
        return {} if config is None else _Entries(config)


class _Entries(dict):
    def __init__(self, config):
        super().__init__()
        self._config = config

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        vars(self._config)["auto_map"] = dict(self)


@strict
class MiniCPM4Config(LlamaConfig):
    r"""
    Configuration of MiniCPM4 (arXiv 2506.07900): a Llama with three constants and, where `sparse_config` is set,
    InfLLM v2 attention. Fields that a released config leaves out have the defaults of the released code.

    Args:
        scale_emb (`float`, *optional*, defaults to 1):
            Factor on the embeddings of `input_ids`.
        scale_depth (`float`, *optional*, defaults to 1):
            Each residual branch is multiplied by `scale_depth / sqrt(num_hidden_layers)`.
        dim_model_base (`int`, *optional*, defaults to 1):
            The last hidden state is divided by `hidden_size / dim_model_base` before the language-model head.
        mup_denominator (`float`, *optional*):
            Kept for the released draft heads; the model itself does not read it.
        sparse_config (`dict`, *optional*):
            Fields of [`InfLLMv2Config`]. Present: attention is sparse unless another implementation is asked for.

    Example:

    ```python
    >>> from transformers_minicpm4 import InfLLMv2Config, MiniCPM4Config

    >>> config = MiniCPM4Config(hidden_size=1024, dim_model_base=256, sparse_config=InfLLMv2Config(topk=32))
    >>> config.logits_scaling
    4.0
    ```
    """

    model_type = "minicpm4"
    auto_map = _NoAutoMap()

    # Redeclared where the released code's default is not Llama's: the 0.5B config does not name it.
    tie_word_embeddings: bool = True
    eos_token_id: int | list[int] | None = 2
    scale_emb: int | float = 1
    scale_depth: int | float = 1
    dim_model_base: int = 1
    mup_denominator: int | float | None = None
    sparse_config: dict | InfLLMv2Config | None = dataclasses.field(
        default=None, metadata={"validator": _valid_sparse_config}
    )

    def __setattr__(self, name, value):
        if name == "sparse_config" and isinstance(value, InfLLMv2Config):
            value = value.to_dict()  # config.json holds plain values
        super().__setattr__(name, value)

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Released files (`model_type` "minicpm") also load through this class by name."""
        config_dict, unused = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == "minicpm":
            from .conversion import modernize_config  # conversion knows this class, not the other way round

            config_dict = modernize_config(config_dict)
        return config_dict, unused

    def validate_minicpm4(self):
        """Part of the `@strict` validation: what the forward pass divides by and splits."""
        for name in ("scale_emb", "scale_depth", "dim_model_base"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})."
            )

    def _validate_longrope_rope_parameters(self, rope_parameters: dict, ignore_keys: set[str] | None = None) -> None:
        # The base class only warns, and about a field that released configs rightly leave out.
        for name in ("short_factor", "long_factor"):
            factors = rope_parameters.get(name)
            wanted = self.head_dim // 2
            if not isinstance(factors, list) or len(factors) != wanted:
                got = f"{len(factors)} values" if isinstance(factors, list) else repr(factors)
                raise ValueError(f"LongRoPE {name} must be a list of head_dim / 2 = {wanted} numbers, got {got}.")
        original = rope_parameters.get("original_max_position_embeddings")
        if not isinstance(original, int) or original < 2:
            raise ValueError(
                f"LongRoPE original_max_position_embeddings must be an integer above 1, in tokens; got {original!r}."
            )

    @property
    def logits_scaling(self) -> float:
        """What the last hidden state is divided by. TRL's fused losses read it under this name."""
        return self.hidden_size / self.dim_model_base

    @property
    def residual_scale(self) -> float:
        """Factor on every residual branch."""
        return self.scale_depth / math.sqrt(self.num_hidden_layers)

    @property
    def infllm_v2(self) -> InfLLMv2Config:
        """The sparse attention to use when it is on: `sparse_config`, or the released defaults."""
        return InfLLMv2Config() if self.sparse_config is None else InfLLMv2Config.from_dict(self.sparse_config)


__all__ = ["MiniCPM4Config"]
