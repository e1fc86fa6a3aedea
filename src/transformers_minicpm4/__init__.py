"""
MiniCPM4 for the Hugging Face ecosystem.

Importing this package registers the model, its tokenizer and `attn_implementation="infllm_v2"` with Transformers, so
that the Auto classes load MiniCPM4 checkpoints without `trust_remote_code`. Where Transformers is not imported yet,
that happens when it is: the data functions and the command line's help need neither it nor torch, and start at once.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .infllm_v2 import InfLLMv2Config, infllm_v2_attention
    from .model.configuration_minicpm4 import MiniCPM4Config
    from .model.conversion import extend_context, llama_to_minicpm4, minicpm4_to_llama
    from .model.modeling_minicpm4 import (
        MiniCPM4ForCausalLM,
        MiniCPM4ForSequenceClassification,
        MiniCPM4Model,
        MiniCPM4PreTrainedModel,
    )


__version__ = "0.1.0"

__all__ = [
    "InfLLMv2Config",
    "MiniCPM4Config",
    "MiniCPM4ForCausalLM",
    "MiniCPM4ForSequenceClassification",
    "MiniCPM4Model",
    "MiniCPM4PreTrainedModel",
    "extend_context",
    "infllm_v2_attention",
    "llama_to_minicpm4",
    "minicpm4_to_llama",
]

# Which module has each public name.
_HOMES = {
    "infllm_v2": ("InfLLMv2Config", "infllm_v2_attention"),
    "model.configuration_minicpm4": ("MiniCPM4Config",),
    "model.conversion": ("extend_context", "llama_to_minicpm4", "minicpm4_to_llama"),
    "model.modeling_minicpm4": (
        "MiniCPM4ForCausalLM",
        "MiniCPM4ForSequenceClassification",
        "MiniCPM4Model",
        "MiniCPM4PreTrainedModel",
    ),
}
# Rooms that need Transformers from their first line.
_ROOMS = tuple(f"{__name__}.{room}" for room in ("infllm_v2", "model", "generation", "registration"))


class _Registrar:
    """
    An import hook that works once: it registers right after `transformers` was loaded, or right before a room of ours
    that imports it is (registering halfway through the import of that room would meet half a module).
    """

    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            sys.meta_path.insert(0, self)  # asking whether it is there is not importing it
            if spec is not None:
                self._register_after(spec.loader)
            return spec
        if name in _ROOMS:
            _register()
            loaded = sys.modules.get(name)
            return None if loaded is None else importlib.util.spec_from_loader(name, _Loaded(loaded))
        return None

    @staticmethod
    def _register_after(loader) -> None:
        load = loader.exec_module

        def exec_module(module):
            del loader.exec_module
            load(module)
            _register()

        loader.exec_module = exec_module


class _Loaded:
    """Gives the import system a module that was loaded meanwhile, as it is."""

    def __init__(self, module):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec):
        return self.module

    def exec_module(self, module):
        module.__spec__ = self.spec


def _register() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Registrar)]
    import_module(".registration", __name__).register()


def __getattr__(name: str):
    for home, names in _HOMES.items():
        if name in names:
            _register()
            value = getattr(import_module(f".{home}", __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _Registrar())
