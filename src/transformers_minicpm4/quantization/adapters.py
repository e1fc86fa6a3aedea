"""Where a model is wanted without adapters (PEFT)."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def refuse_adapters(model: object) -> None:
    """
    Raises:
        ValueError: a model of PEFT, or one that adapters were put into (`get_base_model()`, `model.add_adapter`).
    """
    if not isinstance(model, nn.Module):
        return
    wrapped = not isinstance(model, PreTrainedModel) and hasattr(model, "peft_config")
    # What PEFT puts in a layer's place: beside it (base_layer), or a copy of it (modules_to_save, trainable tokens).
    inside = any(
        isinstance(getattr(module, name, None), nn.Module)
        for module in model.modules()
        for name in ("base_layer", "original_module")
    )
    if wrapped or inside:
        raise ValueError(
            f"this {type(model).__name__} has adapters that are not merged: they would be lost here, or taken for "
            "layers. Call model = model.merge_and_unload() first. Beside packed ternary weights they stay adapters: "
            "save them alone with save_pretrained, and pass the packed model without them (model.unload(), or load it "
            "anew)."
        )
