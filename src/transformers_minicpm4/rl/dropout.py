"""Dropout of a model, of its adapters too: where it is, and how to be without it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def dropout_places(model: nn.Module) -> Iterator[tuple[dict, str, float]]:
    """
    Every probability above 0 with which `model` drops something in training: the dictionary that holds it, its key
    there, and the probability. Modules such as `nn.Dropout` and PEFT's have a `p`; attention layers pass a number of
    theirs (`attention_dropout`) on to the kernel; PEFT's LoHa and LoKr keep a dictionary of adapters.
    """
    for module in model.modules():
        attributes = vars(module)
        for name, value in list(attributes.items()):
            here = "dropout" in name or name.endswith(("pdrop", "layerdrop"))
            if not here and not (name == "p" and "Dropout" in type(module).__name__):
                continue
            held = value if isinstance(value, dict) else {name: value}
            for key, probability in held.items():
                if isinstance(probability, int | float) and not isinstance(probability, bool) and probability > 0:
                    yield (value if held is value else attributes), key, probability


def switch_off_dropout(model: nn.Module) -> None:
    """Set them all to 0. The configurations of model and adapter, which are saved, keep their numbers."""
    for holder, key, _ in list(dropout_places(model)):
        holder[key] = 0.0
