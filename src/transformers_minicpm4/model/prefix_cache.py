"""
The keys and values of a short constant prefix, stored with a checkpoint ("prefix isolation", MiniCPM4, arXiv
2506.07900, 4.1.2, after PrefixQuant, arXiv 2410.05265).

The first tokens of a sequence draw activations that low precision serves badly. Where every prompt begins with the
same tokens, most often `<s>`, their keys and values can be computed once, by the model in full precision, and be given
to the quantized model as a filled cache: it never computes these positions.

Shape letters: `B` batch, `S` tokens, `P` prefix tokens, `G` key/value heads, `D` head size.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel


# In a folder of its own: some engines read every safetensors file that lies beside a checkpoint's weights.
FILE_NAME = "prefix_cache/keys_values.safetensors"


def _device_of(module: nn.Module) -> torch.device:
    """Where a module computes, which is not where an offloaded one lies: accelerate's hooks, or its parameters."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            named = getattr(one, "execution_device", None)
            if named is not None:
                return torch.device(named)
    device = next(module.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def refuse_recurrent(config: PreTrainedConfig) -> None:
    """Raise ValueError for a model some of whose layers keep a state instead of keys and values."""
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    other = sorted({kind for kind in kinds if not kind.endswith("attention") or kind.startswith("linear")})
    if other:
        raise ValueError(
            f"prefix tokens were given for a model with layers of kind {', '.join(other)}, which have no keys and "
            "values to store; leave prefix_ids out"
        )


@dataclass
class PrefixCache:
    """
    Args:
        token_ids: the `P` tokens.
        keys: for each layer `[1, G, P, D]`, rotated for positions `0 .. P - 1`.
        values: for each layer `[1, G, P, D]`.
    """

    token_ids: list[int]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    @torch.no_grad()
    def from_model(cls, model: PreTrainedModel, token_ids: list[int]) -> PrefixCache:
        """What `model` computes for the prefix; give the model in full precision."""
        vocab = model.get_input_embeddings().num_embeddings
        if not token_ids or not all(0 <= token < vocab for token in token_ids):
            raise ValueError(f"prefix tokens {token_ids} were given; give at least one id, each below {vocab}")
        refuse_recurrent(model.config)
        cache = DynamicCache()
        ids = torch.tensor([token_ids], device=model.get_input_embeddings().weight.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        return cls(
            list(token_ids),
            [layer.keys.clone().cpu() for layer in cache.layers],
            [layer.values.clone().cpu() for layer in cache.layers],
        )

    def save(self, folder: str | Path) -> Path:
        """Write `prefix_cache/keys_values.safetensors` into a checkpoint's folder, whole or not at all."""
        tensors = {}
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            tensors[f"layers.{index}.keys"] = key.contiguous()
            tensors[f"layers.{index}.values"] = value.contiguous()
        target = Path(folder) / FILE_NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            save_file(tensors, partial, metadata={"format": "pt", "token_ids": json.dumps(self.token_ids)})
            os.replace(partial, target)
        except SafetensorError as error:  # what safetensors says of a full disk
            raise OSError(f"{partial} could not be written: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        return target

    @classmethod
    def load(cls, folder: str | Path) -> PrefixCache | None:
        """
        The prefix of a checkpoint's folder, or `None` where it has none.

        Raises:
            ValueError: the file is there and cannot be used.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                token_ids = json.loads((file.metadata() or {})["token_ids"])
                layers = len(file.keys()) // 2
                keys = [file.get_tensor(f"layers.{index}.keys") for index in range(layers)]
                values = [file.get_tensor(f"layers.{index}.values") for index in range(layers)]
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, or quantize again") from error
        if not layers or any(key.shape[2] != len(token_ids) for key in keys + values):
            raise ValueError(f"{path} is damaged: its tensors are not of {len(token_ids)} tokens; delete it")
        return cls(token_ids, keys, values)

    def to_cache(self, model: PreTrainedModel, batch_size: int = 1) -> DynamicCache:
        """
        A new cache of `model` that holds the prefix for `batch_size` rows; each call to `generate` needs its own, and
        beams and `num_return_sequences` multiply the rows.

        Raises:
            ValueError: the model has other layers or heads than the one that the prefix was computed with.
        """
        config: PreTrainedConfig = model.config.get_text_config(decoder=True)
        layers = config.num_hidden_layers
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if layers != len(self.keys) or heads != self.keys[0].shape[1]:
            raise ValueError(
                f"the prefix was computed by a model of {len(self.keys)} layers and {self.keys[0].shape[1]} key/value "
                f"heads; this one has {layers} and {heads}"
            )
        cache = DynamicCache()
        weight = model.get_input_embeddings().weight
        # A model may lie on several devices, and parts of it elsewhere until they are needed.
        blocks = getattr(model.get_decoder(), "layers", [])
        for index, pair in enumerate(zip(self.keys, self.values, strict=True)):
            device = _device_of(blocks[index] if index < len(blocks) else model.get_input_embeddings())
            cache.update(*(part.to(device, weight.dtype).expand(batch_size, -1, -1, -1) for part in pair), index)
        return cache

    def prepend(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `input_ids` and `attention_mask` with the prefix in front, as `generate` wants them beside `to_cache`'s cache.

        A prompt's own prefix tokens are not doubled: where rows begin with them, they become padding.

        Args:
            input_ids: `[B, S]`.
            attention_mask: `[B, S]`; left padding stays, between prefix and prompt, which InfLLM v2's sparse mode
                refuses: give it prompts of one length.

        Returns:
            `[B, P + S]` both, or `[B, S]` where the prompt had the prefix. At least one token follows the prefix.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prefix = torch.tensor(self.token_ids, device=input_ids.device).expand(len(input_ids), -1)
        width = prefix.shape[1]
        if input_ids.shape[1] > width and bool((input_ids[:, :width] == prefix).all() and mask[:, :width].all()):
            return input_ids, mask
        if input_ids.shape[1] == 0:
            raise ValueError("an empty prompt was given; a token must follow the prefix")
        # Each row's first real tokens, wherever its padding ends.
        starts = mask.long().argmax(-1, keepdim=True) + torch.arange(width, device=mask.device)
        places = starts.clamp(max=input_ids.shape[1] - 1)
        own = (input_ids.gather(1, places) == prefix).all(-1) & (mask.sum(-1) > width)
        mask = mask.scatter(1, places, mask.gather(1, places) * ~own[:, None])
        return torch.cat([prefix, input_ids], dim=1), torch.cat([torch.ones_like(prefix).to(mask.dtype), mask], dim=1)
