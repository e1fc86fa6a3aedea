"""`BitCPM4Config`: the `quantization_config` of a checkpoint with ternary weights."""

from __future__ import annotations

import re
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin


QUANT_METHOD = "bitcpm4"
WEIGHT_FORMATS = ("latent", "packed")
SCALE_DTYPES = ("float16", "float32")


class BitCPM4Config(QuantizationConfigMixin):
    """
    Ternary weights as in BitCPM4 (MiniCPM4, arXiv 2506.07900, section 4.2): linear layers alone, weights alone, one
    scale a group of inputs.

    Args:
        group_size (`int`, *optional*, defaults to 64):
            Consecutive inputs that share a scale; a divisor of every converted layer's inputs. -1: one scale an
            output row. A layer whose inputs it does not divide is refused by name: no group is ever shorter.
        modules_to_not_convert (`list[str]`, *optional*):
            Linear layers that stay as they are, beside the output head, which always stays (so do embeddings): how
            their names end (`"down_proj"`) or begin (`"model.layers.0"`, or a regular expression such as
            `"model.layers.*.mlp"`), as elsewhere in Transformers.
        weight_format (`str`, *optional*, defaults to `"latent"`):
            `"latent"`: trainable floating-point weights, rounded to ternary in each forward pass. `"packed"`: 2 bits a
            weight and the scales, made while the weights are read if the checkpoint is a dense one. A checkpoint that
            has been saved in one of the forms is loaded in that form.
        scale_dtype (`str`, *optional*, defaults to `"float16"`):
            `"float16"`: scales are rounded to it in training already, so that packing changes nothing. `"float32"`:
            only imported weights whose scales float16 cannot hold need it.
        rounding (`bool`, *optional*, defaults to `True`):
            `False`: latents compute in full precision, as before QAT begins. `set_qat` and `QATStartCallback` keep it
            as the layers are, so that a checkpoint from before QAT says so; such latents are not packed.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value that is not allowed, or there is no such field.
    """

    def __init__(
        self,
        group_size: int = 64,
        modules_to_not_convert: list[str] | None = None,
        weight_format: str = "latent",
        scale_dtype: str = "float16",
        rounding: bool = True,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ):
        if unknown:
            raise ValueError(
                f"BitCPM4Config: unknown field(s) {', '.join(sorted(unknown))}; allowed are group_size, "
                "modules_to_not_convert, weight_format, scale_dtype and rounding."
            )
        if quant_method != QUANT_METHOD:
            raise ValueError(f"BitCPM4Config: quant_method must be {QUANT_METHOD!r}, got {quant_method!r}.")
        if isinstance(group_size, bool) or not isinstance(group_size, int):
            raise TypeError(
                f"BitCPM4Config: group_size must be int, got {group_size!r} ({type(group_size).__name__})."
            )
        if group_size != -1 and group_size < 1:
            raise ValueError(
                f"BitCPM4Config: group_size must be 1 or more, or -1 for one scale an output row; got {group_size}."
            )
        names = modules_to_not_convert
        if names is not None and (
            not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names)
        ):
            raise TypeError(
                f"BitCPM4Config: modules_to_not_convert must be a list of layer names or None, got {names!r}."
            )
        for name in names or ():
            try:
                re.compile(name)
            except re.error as error:
                raise ValueError(
                    f"BitCPM4Config: modules_to_not_convert has {name!r}, which is no regular expression ({error}), "
                    "and names are read as such. Give how names end, such as 'mlp.up_proj', or begin, such as "
                    "'model.layers.*.mlp'."
                ) from error
        if weight_format not in WEIGHT_FORMATS:
            raise ValueError(
                f"BitCPM4Config: weight_format must be 'latent' (train) or 'packed' (2 bits), got {weight_format!r}."
            )
        if scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"BitCPM4Config: scale_dtype must be 'float16' or 'float32', got {scale_dtype!r}.")
        if not isinstance(rounding, bool):
            raise TypeError(f"BitCPM4Config: rounding must be bool, got {rounding!r} ({type(rounding).__name__}).")
        if not rounding and weight_format == "packed":
            raise ValueError("BitCPM4Config: rounding=False is for latents; packed weights are rounded.")
        self.quant_method = QUANT_METHOD
        self.group_size = group_size
        self.modules_to_not_convert = None if names is None else list(names)
        self.weight_format = weight_format
        self.scale_dtype = scale_dtype
        self.rounding = rounding
