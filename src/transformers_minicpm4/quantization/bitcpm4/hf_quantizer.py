"""What `from_pretrained` and `save_pretrained` do with `quant_method: bitcpm4`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from .configuration import BitCPM4Config


logger = logging.get_logger(__name__)


class BitCPM4HfQuantizer(HfQuantizer):
    """
    Loads dense checkpoints as trainable latents or packed on the fly, and BitCPM4 checkpoints in the form they have.

    Args:
        quantization_config: a `BitCPM4Config`.
    """

    quantization_config: BitCPM4Config

    def __init__(self, quantization_config: BitCPM4Config, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.refused: ValueError | None = None  # what was wrong with the first weight that could not be packed
        self.shapes: dict[str, torch.Size] = {}  # what the config asks for, while weights are read

    @property
    def packs(self) -> bool:
        """Whether the model's ternary layers are packed."""
        return self.quantization_config.weight_format == "packed"

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "BitCPM4 layers cannot be offloaded to disk, and device_map asks for that. Put them on 'cpu', where a "
                "packed layer takes 2 bits a weight."
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        from .peft_support import register_with_peft
        from .qat import convertible_linears, qat_layers, replace_by_latents

        parallel = getattr(model.config, "distributed_config", None)  # validate_environment is not told
        if parallel is not None and (parallel.tp_plan is not None or parallel.tp_size > 1):
            raise ValueError(
                "BitCPM4 layers are not split over devices (tensor parallelism), and tp_plan or tp_size, alone or in "
                "distributed_config, asks for that. Load without; device_map='auto' puts whole layers on several "
                "devices."
            )
        register_with_peft()
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if not self.packs:
            replace_by_latents(model, self.quantization_config)
            for _, layer in qat_layers(model):
                layer._is_hf_initialized = True  # as below
            if not self.quantization_config.rounding:
                logger.warning(
                    "These latents were saved before QAT began, with the rounding off, and load so: they compute in "
                    "full precision until QATStartCallback or set_qat(model, True) switches it on."
                )
            return
        from .packed_linear import TernaryLinear

        config = self.quantization_config
        for name, linear in convertible_linears(model, config).items():
            packed = TernaryLinear(
                linear.in_features,
                linear.out_features,
                config.group_size,
                bias=linear.bias is not None,
                scale_dtype=getattr(torch, config.scale_dtype),
                device="meta",
                dtype=linear.weight.dtype,
                name=name,
            )
            if not self.pre_quantized:
                # The dense weight is read in the dtype of what stands here; as uint8 it would be nothing.
                packed.weight = linear.weight
            # Transformers draws random numbers for tensors that a checkpoint lacks; here that is an error, see below.
            packed._is_hf_initialized = True
            model.set_submodule(name, packed)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs) -> bool:
        from .packed_linear import TernaryLinear

        module, _, tensor = param_name.rpartition(".")
        return self.packs and tensor == "weight" and isinstance(model.get_submodule(module), TernaryLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return PackTernary(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        from .packed_linear import TernaryLinear
        from .qat import TernaryQATLinear, refuse_ternary

        if self.refused is not None:
            raise self.refused
        packed = {name for name, module in model.named_modules() if isinstance(module, TernaryLinear)}
        for name, tensor in model.state_dict().items():
            layer, _, part = name.rpartition(".")
            # `check` looks at packed tensors. Extra states and added buffers have no shape to compare.
            wanted = None if layer in packed and part != "bias" else self.shapes.get(name)
            if wanted is not None and tensor.shape != wanted:
                raise ValueError(_wrong_shape(name, tensor.shape, wanted))
        self.shapes = {}
        for name, module in model.named_modules():
            if not isinstance(module, TernaryLinear | TernaryQATLinear):
                continue
            for part in ("weight", "weight_scale", "bias"):
                tensor = getattr(module, part, None)
                # Offloaded tensors (meta) are new objects, which lost the mark.
                if tensor is not None and not (tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)):
                    raise ValueError(
                        f"{name}.{part} is not in the checkpoint, and a ternary layer cannot do without: a file "
                        "is incomplete, or config.json belongs to another checkpoint."
                    )
            if isinstance(module, TernaryQATLinear):
                refuse_ternary(module.weight, name)
                continue
            module.check(name)
            if not module.weight_scale.is_meta and bool((module.weight_scale < 0).any()):
                raise ValueError(
                    f"{name}.weight_scale has a negative scale: the checkpoint is damaged, or another program wrote "
                    "it. Scales are 0 or more and signs are in the codes; pack the latents anew."
                )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Latents, or adapters beside packed weights."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return not self.packs

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """
        Plain linear layers in place of the ternary ones, with their values.

        Args:
            dtype: to cast the whole model to; by default layers get the model's own, which after a cast
                (`.to(torch.bfloat16)`) is not its config's.

        Raises:
            ValueError: the model has adapters; nothing is changed then.
        """
        if dtype is None:
            return super().dequantize(model, model.dtype)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return super().dequantize(model, dtype).to(dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        from ..adapters import refuse_adapters
        from .packed_linear import TernaryLinear
        from .qat import TernaryQATLinear

        refuse_adapters(model)
        with torch.no_grad():
            for name, module in list(model.named_modules()):
                if isinstance(module, TernaryLinear):
                    weight = module.dequantize(dtype)
                elif isinstance(module, TernaryQATLinear):
                    weight = module.effective_weight().to(dtype)
                else:
                    continue
                linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                linear.weight, linear.bias = nn.Parameter(weight), module.bias
                model.set_submodule(name, linear.train(module.training))
        return model

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        super().remove_quantization_config(model)
        model.config.__dict__.pop("_is_quantized", None)


def _wrong_shape(name: str, found: Iterable[int], wanted: Iterable[int]) -> str:
    return (
        f"{name} has shape {list(found)} in the checkpoint and {list(wanted)} by config.json: a file is damaged, or "
        "config.json belongs to another checkpoint."
    )


class PackTernary(ConversionOps):
    """
    One dense weight, as it is read, to packed codes and scales by absmean rounding.

    Args:
        hf_quantizer: told of weights that cannot be packed. Transformers would hide an error raised here in a report.
    """

    def __init__(self, hf_quantizer: BitCPM4HfQuantizer):
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], model: PreTrainedModel, full_layer_name: str, **kwargs
    ) -> dict[str, torch.Tensor]:
        from .quantizer import round_layer
        from .ternary_packing import pack_ternary

        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        name = full_layer_name.removesuffix(".weight")
        layer = model.get_submodule(name)
        try:
            if tuple(weight.shape) != (layer.out_features, layer.in_features):
                raise ValueError(_wrong_shape(full_layer_name, weight.shape, (layer.out_features, layer.in_features)))
            codes, scales = round_layer(weight, layer.group_size, layer.weight_scale.dtype, name)
        except ValueError as error:
            self.hf_quantizer.refused = self.hf_quantizer.refused or error
            codes = torch.zeros((layer.out_features, layer.in_features), dtype=torch.int8, device=weight.device)
            scales = torch.zeros_like(layer.weight_scale, device=weight.device)
        return {f"{name}.weight": pack_ternary(codes), f"{name}.weight_scale": scales}
