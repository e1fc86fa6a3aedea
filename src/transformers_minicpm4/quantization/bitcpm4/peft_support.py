"""
LoRA (PEFT) on ternary layers; other methods of PEFT are refused there.

Beside packed weights an adapter stays a matrix of its own, as in QLoRA: `y = ternary(x) + scaling * B(A x)`. Merging
it into 2 bits would lose most of it, so `merge` refuses; `merge_and_requantize` does it and says what was lost.

Around latents the adapter is part of what is rounded: `y = x ternarize(W + scaling * B A)^T`. Merging it into the
latents is exact therefore, and the merged model is what was trained. Anywhere else such an adapter is another model:
its `adapter_config.json` says what it needs (`LATENTS_FIELD`), and loading checks that.

PEFT's other methods (IA3, LoHa, AdaLoRA, OFT, VeRA, ...) read a weight matrix that packed layers do not have, or act
beside latents what they later merge into them, before the rounding: another model. On layers that stayed dense, norms
and embeddings, and as prompts, they work as ever.

Shape letters: `O` outputs, `I` inputs, `Q` groups.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from .packed_linear import TernaryLinear
from .qat import TernaryQATLinear, qat_layers
from .ternary import dequantize
from .ternary_linear import without_autocast
from .ternary_packing import pack_ternary


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


MERGE_REFUSED = (
    "a LoRA adapter cannot be merged into packed ternary weights without losing most of it. Keep the adapter beside "
    "the packed model (save_pretrained writes it alone); or get a dense model: load the packed model, call "
    "dequantize(), load the adapter onto that and merge there; or call merge_and_requantize(model) of "
    "transformers_minicpm4.quantization.bitcpm4.peft_support, which rounds and reports the error of every layer."
)


# Field of adapter_config.json: the group size of the latents that an adapter was rounded with. PEFT by itself warns
# that it does not know the field, which is as it should be.
LATENTS_FIELD = "bitcpm4_latents_group_size"


@functools.cache
def register_with_peft() -> None:
    """
    Let PEFT wrap ternary layers in the classes below, in `get_peft_model` and when adapters are loaded, and in no
    others. Does nothing without PEFT.
    """
    if not importlib.util.find_spec("peft"):
        return
    from peft.config import PeftConfigMixin
    from peft.tuners.lora import model as lora_model
    from peft.tuners.mixed.model import MixedModel
    from peft.tuners.tuners_utils import BaseTuner

    packed, latent = _lora_classes()
    default = lora_model.dispatch_default

    @functools.wraps(default)
    def dispatch_default(target, adapter_name, config, parameter_name=None, **kwargs):
        kind = {TernaryLinear: packed, TernaryQATLinear: latent}.get(type(_unwrapped(target)))
        if kind is None or parameter_name is not None:
            return default(target, adapter_name, config, parameter_name=parameter_name, **kwargs)
        return kind(target, adapter_name, config=config, **kwargs)

    # PEFT's own seam, LoraConfig._register_custom_module, is not saved with an adapter: loading one would miss it.
    lora_model.dispatch_default = dispatch_default

    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        # A copy: what is marked below is this adapter's, and a config may be given to several models.
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        _refuse_whole(config, model)
        _refuse_elsewhere(config, model)
        _mark(config, model)
        create = self._create_and_replace

        def create_and_replace(config, name, target, *rest, current_key=None, **named):
            _refuse_target(config, target, current_key, named.get("parameter_name"))
            return create(config, name, target, *rest, current_key=current_key, **named)

        # Every method overrides it, and the base class calls it for each layer that a method is about to change.
        self._create_and_replace = create_and_replace
        try:
            return inject(self, model, adapter_name, *args, **kwargs)
        finally:
            del self._create_and_replace

    BaseTuner.inject_adapter = inject_adapter

    # PEFT asks this before it merges the first layer; layer by layer, dense ones would be merged when a packed one
    # refuses.
    allowed = BaseTuner._check_merge_allowed

    @functools.wraps(allowed)
    def check_merge_allowed(self):
        _refuse_merge(self.model)
        return allowed(self)

    BaseTuner._check_merge_allowed = check_merge_allowed

    unload = MixedModel._unload_and_optionally_merge

    @functools.wraps(unload)
    def unload_and_optionally_merge(self, merge=True, *args, **kwargs):
        if merge:
            _refuse_merge(self.model)
        return unload(self, merge, *args, **kwargs)

    MixedModel._unload_and_optionally_merge = unload_and_optionally_merge

    read = PeftConfigMixin.from_peft_type.__func__

    @functools.wraps(read)
    def from_peft_type(cls, **fields):
        group_size = fields.pop(LATENTS_FIELD, None)
        config = read(cls, **fields)
        config._trained_around = group_size
        return config

    PeftConfigMixin.from_peft_type = classmethod(from_peft_type)


def _refuse_merge(model: nn.Module) -> None:
    packed, _ = _lora_classes()
    if any(isinstance(module, packed) for module in model.modules()):
        raise ValueError(MERGE_REFUSED)


def _latents_group_size(model: nn.Module) -> int | None:
    return next((layer.group_size for _, layer in qat_layers(model)), None)


@functools.cache
def _marked_class() -> type:
    from peft import LoraConfig

    reduce = {"__reduce__": lambda config: (_unpickled, (vars(config),))}  # pickle finds no class that is made here
    return dataclasses.make_dataclass(
        "LoraConfig", [(LATENTS_FIELD, int | None, None)], bases=(LoraConfig,), namespace=reduce
    )


def _unpickled(fields: dict) -> object:
    config = _marked_class().__new__(_marked_class())
    config.__dict__.update(fields)
    return config


def _mark(config, model: nn.Module) -> None:
    """Give a `LoraConfig` around latents a field more, which is saved with it; and take it back on other models."""
    from peft import LoraConfig

    if type(config) in (LoraConfig, _marked_class()):
        group_size = _latents_group_size(model)
        config.__class__ = LoraConfig if group_size is None else _marked_class()
        setattr(config, LATENTS_FIELD, group_size)


def _refuse_elsewhere(config, model: nn.Module) -> None:
    """An adapter that was trained within the rounding of latents, on anything else."""
    wanted, found = getattr(config, "_trained_around", None), _latents_group_size(model)
    if wanted is not None and wanted != found:
        here = "has no latents" if found is None else f"has latents of group size {found}"
        raise ValueError(
            f"this adapter was trained around latents of group size {wanted}, where it is rounded with the weights; "
            f"the model here {here}, and with the adapter it would be another model than was trained. Load the base "
            f"as it was: from_pretrained(..., quantization_config=BitCPM4Config(group_size={wanted})), and then "
            "PeftModel.from_pretrained(model, folder). For a new adapter with these settings make a new LoraConfig."
        )


def _unwrapped(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _method(config) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _refuse_whole(config, model: nn.Module) -> None:
    """What is not decided layer by layer."""
    layers = {
        name: type(module)
        for name, module in model.named_modules()
        if isinstance(module, TernaryLinear | TernaryQATLinear)
    }
    if layers and _method(config) == "XLORA":
        raise ValueError(
            f"XLORA is not available on models with ternary layers such as {next(iter(layers))}: it computes LoRA "
            "beside every layer itself. Use one LoraConfig at a time."
        )
    copied = tuple(getattr(config, "modules_to_save", None) or ())
    tops = {name for name, _ in model.named_modules() if name.endswith(copied)} if copied else ()
    for name, kind in layers.items():
        if kind is TernaryLinear and any(name == top or name.startswith(f"{top}.") for top in tops):
            raise ValueError(
                f"modules_to_save={list(config.modules_to_save)} would train a copy of {name}, whose packed ternary "
                "weight has no gradient. Name layers that are not ternary there, and adapt this one with LoRA "
                "(target_modules)."
            )


def _refuse_target(config, target: nn.Module, name: str | None, parameter: str | None) -> None:
    if not isinstance(_unwrapped(target), TernaryLinear | TernaryQATLinear):
        return
    if _method(config) != "LORA":
        raise ValueError(
            f"{_method(config)} is not available on ternary layers, and {name} is one: of PEFT's methods only LoRA "
            "is. Give a LoraConfig, or target_modules that are not ternary (prompts, norms and embeddings are free)."
        )
    if parameter is not None:
        raise ValueError(
            f"target_parameters with {name} is not available on ternary layers: name the layer in target_modules, "
            "for LoRA that knows about the rounding."
        )


@functools.cache
def _lora_classes() -> tuple[type, type]:
    """The two LoRA layers; made here because PEFT is optional."""
    from peft.tuners.lora.layer import Linear

    class _Ternary(Linear):
        def __init__(self, base_layer, adapter_name, config, **kwargs):
            _refuse(config)
            super().__init__(base_layer, adapter_name, config=config, **kwargs)

        def update_layer(self, adapter_name, *args, config, **kwargs):
            _refuse(config)
            super().update_layer(adapter_name, *args, config=config, **kwargs)

        @property
        def lora_variants(self):
            return {(): None}

        def get_delta_weight(self, adapter):
            # Under autocast it would be another number in training than in merging.
            with without_autocast(self.lora_B[adapter].weight.device.type):
                return super().get_delta_weight(adapter)

        def adds(self) -> list[str]:
            """The active adapters; none if they are merged or switched off."""
            if self.merged or self.disable_adapters:
                return []
            return [name for name in self.active_adapters if name in self.lora_A]

        def deltas(self) -> list[torch.Tensor]:
            """`[O, I]` of each active adapter."""
            return [self.get_delta_weight(name) for name in self.adds()]

    class TernaryLoraLinear(_Ternary):
        """LoRA beside a `TernaryLinear`."""

        def merge(self, safe_merge=False, adapter_names=None):
            raise ValueError(MERGE_REFUSED)

    class TernaryQATLoraLinear(_Ternary):
        """LoRA within the rounding of a `TernaryQATLinear`."""

        def __init__(self, base_layer, adapter_name, config, **kwargs):
            _refuse_dropout(config)
            super().__init__(base_layer, adapter_name, config=config, **kwargs)

        def update_layer(self, adapter_name, *args, config, **kwargs):
            _refuse_dropout(config)
            super().update_layer(adapter_name, *args, config=config, **kwargs)

        def forward(self, x, *args, **kwargs):
            self._check_forward_args(x, *args, **kwargs)
            if kwargs.pop("adapter_names", None) is not None:
                raise ValueError(
                    "adapter_names mixes adapters within a batch; latents are rounded together with one set of them. "
                    "Run the adapters one after the other."
                )
            if self.disable_adapters:
                if self.merged:
                    self.unmerge()
                return self.base_layer(x, *args, **kwargs)
            return F.linear(x, self.base_layer.effective_weight(*self.deltas()), self.base_layer.bias)

    return TernaryLoraLinear, TernaryQATLoraLinear


# Fields of LoraConfig that make it something else than B A beside a linear layer. PEFT itself ignores some of them on
# layers that it does not know.
_VARIANTS = (
    "use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "use_bdlora", "velora_config",
)  # fmt: skip


def _refuse(config) -> None:
    asked = [name for name in _VARIANTS if getattr(config, name, None)]
    # Initialisations that decompose the weight, or put a part of it into the adapter.
    if config.init_lora_weights not in (True, False, "gaussian"):
        asked.append(f"init_lora_weights={config.init_lora_weights!r}")
    if asked:
        raise ValueError(
            f"{', '.join(asked)}: not available on ternary layers. Plain LoRA is (init_lora_weights True, False or "
            "'gaussian'), with or without use_rslora."
        )


def _refuse_dropout(config) -> None:
    if config.lora_dropout:
        raise ValueError(
            f"lora_dropout={config.lora_dropout}: an adapter around latents is added to the weights and sees no "
            "inputs to drop. Set lora_dropout=0."
        )


@torch.no_grad()
def merge_and_requantize(model: PeftModel) -> tuple[PreTrainedModel, dict[str, float]]:
    """
    Merge LoRA adapters into packed layers by rounding the sum to ternary again, in place; into layers that stayed
    dense, and into the embedding (`trainable_token_indices`), they merge as ever.

    Codes are the sum divided by the old scale, rounded; the new scale is then the least-squares one of the codes. (The
    absmean of weights that are mostly ternary would shrink them.) A group that the adapter does not touch keeps its
    bits. Expect to lose much: a step of a ternary weight is large against a usual adapter.

    Args:
        model: a packed model in a `PeftModel`.

    Returns:
        the packed model without adapters; and by layer the share of the adapter that is lost, in the Frobenius norm:
        |merged - (packed + adapter)| / |adapter|. 1 is as bad as leaving the adapter out; 0 for an adapter of zeros.

    Raises:
        ValueError: no adapter on a packed layer, or an adapter with NaN, infinite or too large values, or no
            `PeftModel`; the model is as it was.
    """
    packed_class, _ = _lora_classes()
    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, packed_class)}
    if not any(module.adds() for module in wrapped.values()):
        raise ValueError(
            "there is no active LoRA adapter on a packed ternary layer here. Merge others with merge_and_unload()."
        )
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"merge_and_requantize takes the model of get_peft_model or PeftModel.from_pretrained; this is a "
            f"{type(model).__name__} that adapters were put into. Save them (save_pretrained) and load them with "
            "PeftModel.from_pretrained onto the packed model."
        )
    errors, refits = {}, {}
    for name, module in wrapped.items():
        if not module.adds():
            continue
        base, delta = module.base_layer, sum(module.deltas()).float()
        if not bool(torch.isfinite(delta).all()):
            raise ValueError(f"the adapter of {name} has NaN or infinite values; nothing was merged.")
        wanted = base.dequantize() + delta
        codes, scales = _refit(wanted, base)
        if not bool(torch.isfinite(scales).all()):
            raise ValueError(f"the adapter of {name} is too large: a scale would be infinite; nothing was merged.")
        size = delta.norm()
        lost = (dequantize(codes, scales, base.group_size) - wanted).norm()
        errors[name.removeprefix("base_model.model.")] = float(lost / size) if size else 0.0
        refits[name] = pack_ternary(codes), scales
    # What is left is PEFT's own to merge: layers that stayed dense, and tokens.
    for name, module in wrapped.items():
        model.set_submodule(name, module.base_layer)
    try:
        merged = model.merge_and_unload()
    except ValueError:  # PEFT refuses before it changes anything
        for name, module in wrapped.items():
            model.set_submodule(name, module)
        raise
    for name, (codes, scales) in refits.items():
        base = wrapped[name].base_layer
        base.weight, base.weight_scale = nn.Parameter(codes, requires_grad=False), scales
    return merged, errors


def _refit(wanted: torch.Tensor, base: TernaryLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales for float32 `[O, I]`, starting from the scales of `base`."""
    groups = wanted.unflatten(1, (base.weight_scale.shape[1], -1))
    old = base.weight_scale.float()[..., None]
    steps = torch.where(old > 0, groups / old.clamp(min=torch.finfo(torch.float32).tiny), 0).round().clamp(-1, 1)
    nonzero = steps.abs().sum(2)
    fitted = (groups * steps).sum(2) / nonzero.clamp(min=1)
    scales = torch.where(nonzero > 0, fitted, old[..., 0]).to(base.weight_scale.dtype)
    return steps.flatten(1).to(torch.int8), scales
