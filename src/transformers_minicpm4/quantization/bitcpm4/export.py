"""Packed ternary checkpoints in forms that other engines read, all exact: GPTQ of 2 bits, and GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from ..adapters import refuse_adapters
from ..export.checkpoint_files import own_tokenizer
from ..export.gptq import save_gptq
from .quantizer import PackedWeights


def export_ternary(
    model_or_path: PreTrainedModel | str | Path,
    path: str | Path,
    to: str = "gptq",
    tokenizer: Any = None,
    **options: Any,
) -> None:
    """
    Write a packed model for readers that know nothing of ours.

    Args:
        model_or_path: packed, in memory or where it is (the tokenizer is then taken from there).
        path: a new folder (`to="gptq"`) or file (`to="gguf"`).
        to: "gptq", 2-bit codes 1, 2, 3 with zero point 2; or "gguf", by the type that is exact for the groups.
        options: of `save_gptq` or `save_gguf`.

    Raises:
        ValueError: not packed, adapters that are not merged, or a form that would change a weight.
    """
    refuse_adapters(model_or_path)
    if isinstance(model_or_path, PreTrainedModel):
        model = model_or_path
    else:
        model = AutoModelForCausalLM.from_pretrained(model_or_path)
        tokenizer = tokenizer or own_tokenizer(model_or_path)  # the writers say where they need one
    weights = PackedWeights(model)
    if not weights:
        raise ValueError(f"this {type(model).__name__} has no packed ternary layer; load a packed checkpoint")
    if to == "gptq":
        save_gptq(path, model, weights, tokenizer=tokenizer, meta={"method": "BitCPM4 ternary"}, **options)
    elif to == "gguf":
        from ..export.gguf import save_gguf

        save_gguf(path, model, weights, tokenizer=tokenizer, **options)
    else:
        raise ValueError(f"to={to!r} was given; it is 'gptq' or 'gguf'")
