"""
Ternary linear layers in training, and how a model in memory gets them: quantization-aware training (QAT) of MiniCPM4,
arXiv 2506.07900, section 4.2. What goes into the ordinary `Trainer` with them: `recipe`, `distillation`.

Shape letters: `O` outputs, `I` inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from ..adapters import refuse_adapters
from .configuration import QUANT_METHOD, BitCPM4Config
from .ternary import detect_group_size, fake_quantize, inputs_per_group, ternary_codes_and_scales


logger = logging.get_logger(__name__)


class TernaryQATLinear(nn.Linear):
    """
    `nn.Linear` whose weight is rounded to ternary in the forward pass. `weight` stays the ordinary floating-point
    parameter `[O, I]` (the latents): optimizers, checkpoints and other readers see a plain linear layer.

    Args:
        linear: the layer whose parameters it takes over (the same tensors, no copies).
        group_size: inputs that share a scale, or -1.
        scale_dtype: what scales are rounded to.
        name: of the layer, for errors.

    Raises:
        ValueError: the inputs are not divisible by `group_size`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        group_size: int,
        scale_dtype: torch.dtype = torch.float16,
        name: str = "this layer",
    ):
        inputs_per_group(linear.in_features, group_size, name)
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.group_size = group_size
        self.scale_dtype = scale_dtype
        self.quantize = True  # False: a plain linear layer, for the stage before QAT
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., I]` to `[..., O]`."""
        return F.linear(x, self.effective_weight(), self.bias)

    def effective_weight(self, *deltas: torch.Tensor) -> torch.Tensor:
        """`[O, I]`: what the layer multiplies by, with `deltas` `[O, I]` added to the latents."""
        weight = self._latents(deltas)
        return fake_quantize(weight, self.group_size, self.scale_dtype) if self.quantize else weight

    def codes_and_scales(self, *deltas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 `[O, I]` and `scale_dtype` `[O, I / group_size]` for the latents with `deltas` `[O, I]` added."""
        return ternary_codes_and_scales(self._latents(deltas), self.group_size, self.scale_dtype)

    def _latents(self, deltas: tuple[torch.Tensor, ...]) -> torch.Tensor:
        weight = self.weight
        for delta in deltas:  # one after the other, as PEFT merges them: another order is another number
            weight = (weight + delta).to(self.weight.dtype)
        return weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


def convertible_linears(model: PreTrainedModel, config: BitCPM4Config) -> dict[str, nn.Linear]:
    """
    The linear layers that `config` makes ternary, by name.

    Raises:
        ValueError: there is none, or `config.group_size` does not divide the inputs of one (named), or the model has
            adapters, whose matrices are no layers of it.
    """
    refuse_adapters(model)
    kept = HfQuantizer.get_modules_to_not_convert(model, config.modules_to_not_convert, add_default_skips=True)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in config.modules_to_not_convert or ():
        if all(should_convert_module(linear, [name]) for linear in linears):
            logger.warning(f"modules_to_not_convert has {name!r}, which is the name of no linear layer: misspelt?")
    found = {name: module for name, module in linears.items() if should_convert_module(name, kept)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to make ternary beside those that stay: "
            f"{', '.join(sorted(kept))}."
        )
    for name, module in found.items():
        inputs_per_group(module.in_features, config.group_size, name)
    return found


def prepare_qat(model: PreTrainedModel, config: BitCPM4Config | None = None) -> PreTrainedModel:
    """
    Make the linear layers of a model in memory train as ternary ones, in place. `from_pretrained(...,
    quantization_config=BitCPM4Config())` does the same while it loads.

    Args:
        model: any model of Transformers; parameters stay the same objects, so an optimizer may exist already.
        config: what to convert; its `weight_format` must be `"latent"`.

    Returns:
        `model`.

    Raises:
        ValueError: the model is quantized already, its values are ternary already, or the config does not fit it.
    """
    config = BitCPM4Config() if config is None else config
    if config.weight_format != "latent":
        raise ValueError(
            f"prepare_qat trains latents: weight_format must be 'latent', got {config.weight_format!r}. Use freeze "
            "to pack a model."
        )
    refuse_quantized(model)
    replace_by_latents(model, config)
    mark_quantized(model, config)
    return model


def replace_by_latents(model: PreTrainedModel, config: BitCPM4Config) -> None:
    """
    Put a `TernaryQATLinear` in the place of every linear layer that `config` converts.

    Raises:
        ValueError: a weight is ternary already, or the config does not fit; nothing is changed then.
    """
    scale_dtype = getattr(torch, config.scale_dtype)
    linears = convertible_linears(model, config)
    for name, linear in linears.items():
        refuse_ternary(linear.weight, name)
    for name, linear in linears.items():
        if linear.weight.dtype in (torch.float16, torch.bfloat16):
            logger.warning_once(
                f"Latent weights in {linear.weight.dtype} swallow small updates. Load with dtype=torch.float32 to "
                "train, and let `bf16=True` of the TrainingArguments do the rest."
            )
        model.set_submodule(name, TernaryQATLinear(linear, config.group_size, scale_dtype, name))
    for _, layer in qat_layers(model):
        layer.quantize = config.rounding


def mark_quantized(model: PreTrainedModel, config: BitCPM4Config) -> None:
    """Say to Transformers (saving, Trainer, `dequantize()`) what `from_pretrained` would have said."""
    from .hf_quantizer import BitCPM4HfQuantizer
    from .peft_support import register_with_peft

    register_with_peft()
    model.config.quantization_config = config
    model.config._is_quantized = True
    model.hf_quantizer = BitCPM4HfQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD


def refuse_quantized(model: PreTrainedModel | PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: the model, or the one of this configuration, is quantized; says by which method.
    """
    config = getattr(getattr(model, "config", model), "quantization_config", None)
    if config is None and not getattr(model, "is_quantized", False):
        return
    method, form = quantization_of(config)
    if method == QUANT_METHOD:
        raise ValueError(
            f"this model is a BitCPM4 model with {form} weights already. "
            + (
                "Train it as it is, or pack it with freeze."
                if form == "latent"
                else "Train LoRA adapters beside them, or all weights from the latents or the dense checkpoint that "
                "they were made from; dequantized they stay ternary, and are no latents."
            )
        )
    raise ValueError(
        f"this model is quantized with {method} already; ternary weights are made from unquantized ones. Load the "
        "original checkpoint, or call model.dequantize() first."
    )


def refuse_ternary(weight: torch.Tensor, name: str) -> None:
    """
    Raises:
        ValueError: the weight `[O, I]` is ternary already; names the layer. Absmean would shrink its scales.
    """
    if weight.is_meta or weight.dim() != 2:  # not read yet, or partitioned
        return
    # A few rows rule out nearly every weight. Rows of zeros (pruned) say nothing.
    rows = weight.detach().any(1).nonzero()[:8, 0]
    if detect_group_size(weight[rows]) is not None:
        raise ValueError(
            f"{name} is ternary already (fake-quantized): rounding it by absmean would shrink its scales to 0.6 to "
            "0.8 of their size. Pack such weights with import_fake_quantized, which is exact, and train LoRA adapters "
            "beside them; to train or round all weights, take the latents or the dense checkpoint that they were made "
            "from. If this layer alone is ternary, name it in modules_to_not_convert."
        )


def quantization_of(config: object) -> tuple[str, str | None]:
    """(quant_method, weight_format) of a quantization config, an object or a dict."""
    fields = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    method = fields.get("quant_method", "an unknown method")
    return str(getattr(method, "value", method)), fields.get("weight_format")


def qat_layers(model: nn.Module) -> Iterator[tuple[str, TernaryQATLinear]]:
    """(name, layer) of every ternary layer in training, within PEFT wrappers too."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TernaryQATLinear))


def set_qat(model: nn.Module, quantize: bool) -> None:
    """Switch the rounding of all `TernaryQATLinear` layers on or off, in what the model's config says too."""
    for _, layer in qat_layers(model):
        layer.quantize = quantize
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, BitCPM4Config) and config.rounding != quantize:
        # A new one: other models may hold the old one.
        model.config.quantization_config = BitCPM4Config(**{**config.to_dict(), "rounding": quantize})


def is_rounding(model: nn.Module) -> bool:
    """Whether every layer that can round does."""
    return all(layer.quantize for _, layer in qat_layers(model))
