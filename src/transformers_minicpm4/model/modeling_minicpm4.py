"""
MiniCPM4: Llama with scaled embeddings, residual branches and logits (arXiv 2506.07900), LongRoPE, and InfLLM v2.

What equals Llama is inherited. Shape letters: `B` batch, `S` query tokens, `N` key tokens, `H` query heads, `G`
key/value heads, `D` head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_kernelized_func
from transformers.integrations.hub_kernels import is_kernel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..infllm_v2 import ATTN_IMPLEMENTATION
from ..infllm_v2.attention_interface import packed_segments
from ..infllm_v2.backend import row_starts
from ..infllm_v2.cache import make_sparse
from ..infllm_v2.kernel import kernelized
from ..infllm_v2.tree import tree_attention
from .configuration_minicpm4 import MiniCPM4Config


logger = logging.get_logger(__name__)


class MiniCPM4RMSNorm(LlamaRMSNorm):
    pass


class MiniCPM4ScaledWordEmbedding(Gemma3TextScaledWordEmbedding):
    pass


class MiniCPM4MLP(LlamaMLP):
    pass


class MiniCPM4RotaryEmbedding(LlamaRotaryEmbedding):
    """
    LongRoPE without memory of earlier calls: a row uses the long factors iff
    `max(max_position_embeddings, its length) > original_max_position_embeddings`. Tables are at least float32.
    """

    def __init__(self, config: MiniCPM4Config):
        super().__init__(config)
        if self.rope_type == "longrope":
            original = config.rope_parameters["original_max_position_embeddings"]
            ratio = config.max_position_embeddings / original
            # The released code derives the factor from the two lengths and reads neither `factor` nor an override.
            self.attention_scaling = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
            self.long_inv_freq = nn.Buffer(self.compute_long_inv_freq(config), persistent=False)

    @staticmethod
    def compute_long_inv_freq(config: MiniCPM4Config) -> torch.Tensor:
        default, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        return default / torch.tensor(config.rope_parameters["long_factor"], dtype=torch.float)

    @torch.no_grad()
    def forward(self, x, position_ids):
        """Cosines and sines `[B, S, D]` for `position_ids` `[B, S]`."""
        if self.rope_type != "longrope":
            return super().forward(x, position_ids)
        original = self.config.rope_parameters["original_max_position_embeddings"]
        length = (position_ids.amax(-1) + 1).clamp_min(self.config.max_position_embeddings)
        inv_freq = torch.where((length > original)[:, None], self.long_inv_freq, self.original_inv_freq)
        freqs = position_ids[..., None].float() * inv_freq[:, None].float()
        angles = torch.cat((freqs, freqs), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def warn_if_cache_crosses(self, position_ids: torch.Tensor) -> None:
        """Cached keys keep the short factors when a row grows past the original length: say so, once."""
        parameters = self.config.rope_parameters
        original = parameters.get("original_max_position_embeddings")
        if (
            self.rope_type != "longrope"
            or parameters["short_factor"] == parameters["long_factor"]
            or self.config.max_position_embeddings > original
        ):
            return
        if bool(((position_ids[:, 0] <= original) & (position_ids.amax(-1) + 1 > original)).any()):
            logger.warning_once(
                f"The sequence grows past original_max_position_embeddings ({original} tokens), where LongRoPE "
                "changes its factors, while earlier tokens are cached with the short ones. Answers differ from those "
                "without a cache; to avoid that, raise max_position_embeddings before the first token."
            )


def apply_rotary_pos_emb(query, key, cos, sin):
    """Rotate in the precision of the tables (at least float32) and return to the tensors' own dtype."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    dtype = torch.promote_types(query.dtype, cos.dtype)
    rotated = ((x.to(dtype) * cos + rotate_half(x.to(dtype)) * sin).to(x.dtype) for x in (query, key))
    return tuple(rotated)


@use_kernelized_func(kernelized)
class MiniCPM4Attention(LlamaAttention):
    """Grouped-query attention, dense or InfLLM v2 by `config._attn_implementation`."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        row_starts: list[int] | None = None,
        draft_paths: list[list[int]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)

        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        unrotated = (query_states, key_states)
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)

        sparse = self.config._attn_implementation == ATTN_IMPLEMENTATION
        settings = kwargs.get("infllm_v2_config")
        if settings is not None and settings.use_nope:
            kwargs["selection_query"], kwargs["selection_key"] = unrotated
        if sparse and draft_paths is not None:
            attn_output = tree_attention(
                past_key_values.layers[self.layer_idx],
                query_states,
                key_states,
                value_states,
                draft_paths,
                kwargs["infllm_v2_config"],
                scaling=self.scaling,
                selection_query=kwargs.get("selection_query"),
                selection_key=kwargs.get("selection_key"),
            )
            return self.o_proj(attn_output.reshape(*input_shape, -1)), None
        if past_key_values is not None:
            if sparse:
                key_states, value_states = past_key_values.update(
                    key_states,
                    value_states,
                    self.layer_idx,
                    selection_key=kwargs.pop("selection_key", None),
                    row_starts=row_starts,
                )
                kwargs["compressed_keys"] = past_key_values.layers[self.layer_idx].compressed_keys
            else:
                key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


class MiniCPM4DecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: MiniCPM4Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = MiniCPM4Attention(config=config, layer_idx=layer_idx)
        self.residual_scale = config.residual_scale

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        branch, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        # One fused pass: the scaled residual costs no more than Llama's plain one.
        hidden_states = torch.add(hidden_states, branch, alpha=self.residual_scale)
        branch = self.mlp(self.post_attention_layernorm(hidden_states))
        return torch.add(hidden_states, branch, alpha=self.residual_scale)


@auto_docstring
class MiniCPM4PreTrainedModel(LlamaPreTrainedModel):
    config: MiniCPM4Config
    config_class = MiniCPM4Config
    _no_split_modules = ["MiniCPM4DecoderLayer"]
    _can_record_outputs = {
        "hidden_states": MiniCPM4DecoderLayer,
        "attentions": MiniCPM4Attention,
    }

    @torch.no_grad()
    def _init_weights(self, module):
        PreTrainedModel._init_weights(self, module)
        if isinstance(module, MiniCPM4ScaledWordEmbedding):
            init.constant_(module.embed_scale, module.scalar_embed_scale)
        elif isinstance(module, MiniCPM4RotaryEmbedding) and module.rope_type == "longrope":
            init.copy_(module.long_inv_freq, module.compute_long_inv_freq(module.config))

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """A checkpoint with a `sparse_config` is sparse unless something else is asked for by name."""
        if requested_attention is None and self.config.sparse_config is not None:
            requested_attention = ATTN_IMPLEMENTATION
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        chosen = super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        by_kernel = is_kernel(chosen)  # a kernel named as "owner/repo" may be sparse and says itself what it is
        if self.config.sparse_config is not None and chosen != ATTN_IMPLEMENTATION and not by_kernel:
            logger.warning_once(
                f'attn_implementation="{chosen}" is dense: the sparse_config of this checkpoint is not used. Leave '
                f'attn_implementation unset or say "{ATTN_IMPLEMENTATION}" for sparse attention.'
            )
        return chosen


@auto_docstring
class MiniCPM4Model(MiniCPM4PreTrainedModel, LlamaModel):
    def __init__(self, config: MiniCPM4Config):
        PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = MiniCPM4ScaledWordEmbedding(
            config.vocab_size, config.hidden_size, self.padding_idx, embed_scale=config.scale_emb
        )
        self.layers = nn.ModuleList(
            [MiniCPM4DecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = MiniCPM4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MiniCPM4RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.shape[1] == 0:
            raise ValueError("The input has no tokens; give at least one (the tokenizer's <s> for an empty text).")

        past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)
        if past_seen_tokens:
            self.rotary_emb.warn_if_cache_crosses(position_ids)

        if self.config._attn_implementation == ATTN_IMPLEMENTATION:
            # Positions of a drafted tree repeat, but begin no new sequence.
            drafted = kwargs.get("draft_paths") is not None
            segments = None if drafted else packed_segments(position_ids, attention_mask, inputs_embeds.shape[0])
            if segments is not None and not past_seen_tokens:
                use_cache, past_key_values = False, None  # packed sequences share no past that could be continued
            kwargs.update(infllm_v2_config=self.config.infllm_v2, segments=segments)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if self.config._attn_implementation == ATTN_IMPLEMENTATION and past_key_values is not None:
            make_sparse(past_key_values, kwargs["infllm_v2_config"])
            batch = inputs_embeds.shape[0]
            kwargs["row_starts"] = [0] * batch if causal_mask is None else row_starts(causal_mask)[0]

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


@auto_docstring
class MiniCPM4ForCausalLM(MiniCPM4PreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: MiniCPM4Config):
        PreTrainedModel.__init__(self, config)
        self.model = MiniCPM4Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Example:

        ```python
        >>> import transformers_minicpm4
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer

        >>> tokenizer = AutoTokenizer.from_pretrained("openbmb/MiniCPM4-0.5B")
        >>> model = AutoModelForCausalLM.from_pretrained("openbmb/MiniCPM4-0.5B", attn_implementation="infllm_v2")
        >>> inputs = tokenizer("Beijing is", return_tensors="pt")
        >>> tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=20))[0]
        ```"""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states / self.config.logits_scaling)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MiniCPM4ForSequenceClassification(GenericForSequenceClassification, MiniCPM4PreTrainedModel):
    """A classification head on the last token; the hidden state is not divided by `logits_scaling`, as released."""


__all__ = ["MiniCPM4ForCausalLM", "MiniCPM4ForSequenceClassification", "MiniCPM4Model", "MiniCPM4PreTrainedModel"]
