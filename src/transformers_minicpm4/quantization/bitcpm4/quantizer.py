"""
From latents, dense weights or released fake-quantized files to a checkpoint of 2 bits a weight.

Shape letters: `O` outputs, `I` inputs, `Q` groups (`I / group_size`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from optimum.quantization_base import OptimumQuantizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ..adapters import refuse_adapters
from ..export.checkpoint_files import new_folder, own_tokenizer
from ..export.ternary_gptq import ternary_weight
from ..quantized_weight import QuantizedWeight
from .configuration import QUANT_METHOD, BitCPM4Config
from .packed_linear import TernaryLinear
from .qat import convertible_linears, mark_quantized, qat_layers, quantization_of, refuse_quantized, refuse_ternary
from .ternary import detect_group_size, fused_codes_and_scales, ternary_codes_and_scales
from .ternary_packing import unpack_ternary


logger = logging.get_logger(__name__)

CARD = Path(__file__).with_name("model_card.jinja")


class BitCPM4Quantizer(OptimumQuantizer):
    """
    Packs a causal LM, trained latents as a rule, into a checkpoint that `from_pretrained` loads packed:

        BitCPM4Quantizer.from_pretrained("my-latents").quantize("my-model-ternary")

    Make it with `from_pretrained`.

    Args:
        model_or_path: model in memory, folder or Hub id.
        config: for dense weights; latents bring their own.
    """

    def __init__(self, model_or_path: PreTrainedModel | str | Path, config: BitCPM4Config | None = None):
        self.model_or_path = model_or_path
        self.config = config

    @classmethod
    def from_pretrained(
        cls, model_or_path: PreTrainedModel | str | Path, file_name: str | None = None, **options: Any
    ) -> BitCPM4Quantizer:
        """
        A quantizer for `quantize`. Weights of a path are read by `quantize`, not yet.

        Args:
            model_or_path: a model in memory, which stays as it is, or a folder or Hub id: latents, or dense weights.
                Dense weights are rounded, which without training ruins a model; a warning says so.
            file_name: Optimum's argument for ONNX files; there is none here, and anything but `None` is refused.
            options: `group_size`, `modules_to_not_convert` and `scale_dtype` of `BitCPM4Config`, for dense weights.

        Raises:
            ValueError: packed already, or quantized by another method (named); options for latents that have them;
                adapters that are not merged; or a path to something else than a causal LM.
        """
        if file_name is not None:
            raise ValueError(f"file_name={file_name!r} was given; a checkpoint is named by folder or Hub id alone.")
        refuse_adapters(model_or_path)
        in_memory = isinstance(model_or_path, PreTrainedModel)
        config = model_or_path.config if in_memory else causal_lm_config(model_or_path)
        quantization = getattr(config, "quantization_config", None)
        if quantization is None:
            return cls(model_or_path, BitCPM4Config(weight_format="packed", **options))
        _refuse_all_but_latents(quantization)
        if options:
            raise ValueError(
                f"{', '.join(options)}: given for latents, which are packed as they were trained. Leave it out."
            )
        return cls(model_or_path)

    def quantize(
        self,
        save_dir: str | Path,
        file_prefix: str | None = None,
        tokenizer: Any = None,
        max_shard_size: int | str = "5GB",
        base_model: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Path:
        """
        Write the packed checkpoint. The folder appears when all of it is written, and not at all after an error.

        Args:
            save_dir: new or empty folder.
            file_prefix: Optimum's argument for ONNX files, refused.
            tokenizer: whose files to add; by default the one beside a path's weights, if there is one.
            max_shard_size: of the safetensors files, bytes or a text such as "5GB".
            base_model: Hub id for the card.
            dtype: of everything that is not ternary, embeddings above all; `None` leaves it. Latents are trained in
                float32 as a rule, and bfloat16 halves the rest.

        Returns:
            `save_dir`.

        Raises:
            FileExistsError: the folder has something in it.
            ValueError: NaN weights, inputs that the group size does not divide, weights that are ternary already.
        """
        if file_prefix is not None:
            raise ValueError(f"file_prefix={file_prefix!r} was given; readers look for model.safetensors alone.")
        source = self.model_or_path
        if isinstance(source, PreTrainedModel):
            model = sharing_copy(source)
            model = freeze(model) if self.config is None else round_to_ternary(model, self.config)
        else:
            if tokenizer is None:
                tokenizer = own_tokenizer(source)
            if self.config is None:
                model = freeze(AutoModelForCausalLM.from_pretrained(source))
            else:
                _warn_rounding()
                model = AutoModelForCausalLM.from_pretrained(source, quantization_config=self.config)
        if dtype is not None:
            cast_rest(model, dtype)
        return save_packed(model, save_dir, tokenizer, max_shard_size, base_model)


@torch.no_grad()
def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """
    Pack trained latents, in place: what each layer computes stays the same, its weight shrinks to 2 bits and scales.

    Args:
        model: prepared by `prepare_qat` or loaded with `BitCPM4Config()`. LoRA adapters must be merged first.

    Returns:
        `model`; `save_packed` or `save_pretrained` writes it.

    Raises:
        TypeError: not a model of Transformers.
        ValueError: no latents, adapters not merged, rounding switched off, or weights that are NaN or infinite;
            nothing is changed then.
    """
    refuse_adapters(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"freeze packs a PreTrainedModel, got {type(model).__name__}.")
    layers = dict(qat_layers(model))
    if not layers:
        quantization = getattr(model.config, "quantization_config", None)
        if quantization is not None:
            _refuse_all_but_latents(quantization)
        raise ValueError(
            "this model has no latents to pack. Train it with BitCPM4Config() first; to round dense weights without "
            "training, use BitCPM4Quantizer; for released fake-quantized weights, import_fake_quantized."
        )
    off = [name for name, layer in layers.items() if not layer.quantize]
    if off:
        raise ValueError(
            f"rounding is off in {len(off)} of {len(layers)} ternary layers ({off[0]}, ...), which compute in full "
            "precision: packed they would compute something else. It is off until QAT starts (QATStartCallback) or "
            "after set_qat(model, False). Train on, or call set_qat(model, True) to pack the weights as they are."
        )
    for name, layer in layers.items():
        _check_finite(layer.weight, name)
    config = _packed(model.config.quantization_config)
    for name, layer in layers.items():
        codes, scales = layer.codes_and_scales()
        _replace(model, name, layer, codes, scales, layer.group_size)
    mark_quantized(model, config)
    return model


@torch.no_grad()
def round_to_ternary(model: PreTrainedModel, config: BitCPM4Config) -> PreTrainedModel:
    """
    Round the linear layers of a dense model to packed ternary, in place and without training, which ruins a model
    that was not trained for it: a baseline, or the last step of a training of your own.

    Raises:
        ValueError: quantized already, NaN weights, inputs that the group size does not divide, adapters.
    """
    refuse_quantized(model)
    _warn_rounding()
    linears = convertible_linears(model, config)
    scale_dtype = getattr(torch, config.scale_dtype)
    for name, linear in linears.items():
        _check_dense(linear.weight, name)
    for name, linear in linears.items():
        codes, scales = round_layer(linear.weight, config.group_size, scale_dtype, name)
        _replace(model, name, linear, codes, scales, config.group_size)
    mark_quantized(model, _packed(config))
    return model


@torch.no_grad()
def import_fake_quantized(
    model_or_path: PreTrainedModel | str | Path, modules_to_not_convert: list[str] | None = None
) -> PreTrainedModel:
    """
    Pack weights that are ternary already but stored as floating-point numbers, as the released BitCPM checkpoints are.
    Exact: codes are signs and the scale is the group's magnitude. (Rounding them by absmean again would shrink the
    scales by the share of nonzeros.)

    Args:
        model_or_path: a dense causal LM with ternary values, in any dtype, which stays as it is; or where it is.
        modules_to_not_convert: layers to leave dense even if they are ternary. Those that are not ternary stay too.

    Returns:
        the packed model. Its config says which group size was found (the largest that all layers share, -1 if each
        row has one scale) and which layers stayed.

    Raises:
        ValueError: quantized already, or no layer is ternary; adapters; or a path to something else than a causal LM.
    """
    refuse_adapters(model_or_path)
    if isinstance(model_or_path, PreTrainedModel):
        refuse_quantized(model_or_path)
        model = sharing_copy(model_or_path)
    else:
        refuse_quantized(causal_lm_config(model_or_path))
        model = AutoModelForCausalLM.from_pretrained(model_or_path)
    linears = convertible_linears(model, BitCPM4Config(-1, modules_to_not_convert))
    sizes = {name: detect_group_size(linear.weight) for name, linear in linears.items()}
    ternary = {name: size for name, size in sizes.items() if size is not None}
    if not ternary:
        raise ValueError(
            f"none of {len(sizes)} linear layers is ternary: these are no fake-quantized weights. Latents are packed "
            "with freeze, dense weights rounded with BitCPM4Quantizer."
        )
    whole_rows = all(size == linears[name].in_features for name, size in ternary.items())
    group_size = -1 if whole_rows else math.gcd(*ternary.values())
    parts = {name: fused_codes_and_scales(linears[name].weight, group_size) for name in ternary}
    exact_half = all(scales.dtype == torch.float16 for _, scales in parts.values())
    scale_dtype = torch.float16 if exact_half else torch.float32
    kept = [name for name, size in sizes.items() if size is None]
    if kept:
        logger.warning(f"{len(kept)} of {len(sizes)} linear layers are not ternary and stay dense: {', '.join(kept)}")
    for name in ternary:
        codes, scales = parts.pop(name)
        _replace(model, name, linears.pop(name), codes, scales.to(scale_dtype), group_size)
    config = BitCPM4Config(
        group_size,
        [*(modules_to_not_convert or []), *kept] or None,
        weight_format="packed",
        scale_dtype=str(scale_dtype).removeprefix("torch."),
    )
    mark_quantized(model, config)
    return model


def save_packed(
    model: PreTrainedModel,
    save_dir: str | Path,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    base_model: str | None = None,
) -> Path:
    """
    Write a packed model, its tokenizer and a card into a folder that appears whole or not at all.

    Args:
        model: with packed layers.
        save_dir: new or empty folder.
        tokenizer: whose files to add, or `None`.
        max_shard_size: of the safetensors files.
        base_model: Hub id for the card.

    Raises:
        FileExistsError: the folder has something in it.
        ValueError: the model is not packed, or has adapters.
    """
    refuse_adapters(model)
    if not any(isinstance(module, TernaryLinear) for module in model.modules()):
        raise ValueError(f"this {type(model).__name__} has no packed layer; call freeze first.")
    save_dir = Path(save_dir)
    with new_folder(save_dir) as work:
        model.save_pretrained(work, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        _write_card(work, model, save_dir.name, base_model)
    return save_dir


class PackedWeights(Mapping):
    """
    The ternary layers of a packed model as codes of 2 bits with zero point 2, for the writers in `export`: by module
    name, each unpacked when asked for.

        weights = PackedWeights(model)
        save_gptq("my-model-gptq", model, weights, state_dict=weights.rest)

    Args:
        model: with packed layers.

    Attributes:
        rest: the model's state dict without the packed layers' codes and scales.

    Raises:
        ValueError: the model has adapters.
    """

    def __init__(self, model: PreTrainedModel):
        refuse_adapters(model)
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TernaryLinear)}
        inside = {f"{name}.{part}" for name in self.layers for part in ("weight", "weight_scale")}
        self.rest = {name: tensor for name, tensor in model.state_dict().items() if name not in inside}

    def __getitem__(self, name: str) -> QuantizedWeight:
        layer = self.layers[name]
        codes = unpack_ternary(layer.weight.data, layer.in_features)
        return ternary_weight(codes, layer.weight_scale, layer.group_size, layer.bias)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def packed_sizes(model: PreTrainedModel) -> dict[str, int]:
    """
    Bytes: `ternary` of the packed layers with their scales, `ternary_bfloat16` of the same dense in bfloat16, `rest`
    of everything else as it is.
    """
    packed = [module for module in model.modules() if isinstance(module, TernaryLinear)]
    inside = {id(tensor) for layer in packed for tensor in (layer.weight, layer.weight_scale)}
    tensors = {id(t): t for t in (*model.parameters(), *(layer.weight_scale for layer in packed))}.values()
    size = {True: 0, False: 0}
    for tensor in tensors:
        size[id(tensor) in inside] += tensor.numel() * tensor.element_size()
    dense = sum(2 * layer.in_features * layer.out_features for layer in packed)
    return {"ternary": size[True], "ternary_bfloat16": dense, "rest": size[False]}


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in new modules that hold the very same tensors: replacing modules leaves `model` as it is."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors)


def cast_rest(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """
    Cast what is not ternary in a packed model, in place: new parameters stand where the floating-point ones were,
    which another model may hold too. Ties stay, scales too.

    Raises:
        ValueError: `dtype` has no number for a value; names the tensor, and nothing is cast.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.equal(parameter.to(dtype).isfinite(), parameter.isfinite()):
            raise ValueError(
                f"{name} has values up to {parameter.detach().abs().max():.3g}, beyond the range of {dtype}, where "
                "they would be infinite. Take dtype=torch.bfloat16, or None to leave them as they are."
            )
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_floating_point():
                cast = new.setdefault(id(parameter), nn.Parameter(parameter.detach().to(dtype)))
                setattr(module, name, cast)


def causal_lm_config(path: str | Path) -> PreTrainedConfig:
    """
    The configuration of a folder or Hub id that is about to be loaded as a causal LM.

    Raises:
        ValueError: it was saved as something else, whose head would be lost.
    """
    config = AutoConfig.from_pretrained(path)
    loaded = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    for saved in config.architectures or ():
        if not saved.endswith(("ForCausalLM", "LMHeadModel")) and saved != loaded:
            raise ValueError(
                f"{path} holds a {saved}, and a path is loaded as a causal LM here, without that one's head. Load it "
                "by its own class, and pack the model in memory: save_packed(freeze(model), folder)."
            )
    return config


def round_layer(
    weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `ternary_codes_and_scales` of a dense weight `[O, I]`, checked.

    Raises:
        ValueError: NaN or infinite weights, or weights that are ternary already; names the layer.
    """
    _check_dense(weight, name)
    return ternary_codes_and_scales(weight, group_size, scale_dtype)


def _check_dense(weight: torch.Tensor, name: str) -> None:
    _check_finite(weight, name)
    refuse_ternary(weight, name)


def _check_finite(weight: torch.Tensor, name: str) -> None:
    # Beyond float16 a scale would be infinite.
    if not bool((weight.abs() <= torch.finfo(torch.float16).max).all()):
        raise ValueError(
            f"{name} has weights that are NaN, infinite or above {torch.finfo(torch.float16).max:.0f}: nothing was "
            "packed. Go back to a checkpoint from before training diverged."
        )


def _refuse_all_but_latents(quantization: object) -> None:
    method, form = quantization_of(quantization)
    if method != QUANT_METHOD:
        raise ValueError(
            f"this checkpoint is quantized with {method} already; ternary weights are made from unquantized ones. "
            "Take the original checkpoint."
        )
    if form == "packed":
        raise ValueError(
            "this checkpoint is packed ternary already; there is nothing to quantize. Load it with from_pretrained."
        )


def _packed(config: BitCPM4Config) -> BitCPM4Config:
    return BitCPM4Config(**{**config.to_dict(), "weight_format": "packed", "rounding": True})


def _replace(
    model: PreTrainedModel, name: str, linear: nn.Linear, codes: torch.Tensor, scales: torch.Tensor, group_size: int
) -> None:
    packed = TernaryLinear.from_codes(codes, scales, group_size, linear.bias)
    model.set_submodule(name, packed.train(linear.training))


def _warn_rounding() -> None:
    logger.warning(
        "Rounding dense weights to ternary without training ruins a model that was not trained for it: train latents "
        "first (quantization_config=BitCPM4Config())."
    )


def _write_card(folder: Path, model: PreTrainedModel, name: str, base_model: str | None) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    config = model.config.quantization_config
    sizes = packed_sizes(model)
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    known = getattr(model.config, "_name_or_path", "")
    base_model = base_model or (known if known.count("/") == 1 and not Path(known).exists() else None)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["bitcpm4", "ternary", "2-bit"],
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
    )
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    packed = sum(isinstance(module, TernaryLinear) for module in linears)
    card = ModelCard.from_template(
        data,
        template_path=str(CARD),
        name=name,
        base=base_model,
        group_size=config.group_size,
        scale_dtype=config.scale_dtype,
        packed=packed,
        dense=len(linears) - packed,
        kept=config.modules_to_not_convert,
        ternary_mb=f"{sizes['ternary'] / 1e6:,.1f}",
        bfloat16_mb=f"{sizes['ternary_bfloat16'] / 1e6:,.1f}",
        ratio=f"{sizes['ternary'] / sizes['ternary_bfloat16']:.3f}",
        files_mb=f"{files / 1e6:,.1f}",
        rest_mb=f"{sizes['rest'] / 1e6:,.1f}",
    )
    card.save(folder / "README.md")
