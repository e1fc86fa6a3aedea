"""
Prompts to a better checkpoint: chunk-wise rollout RL as a TRL trainer, with its rewards.

`ChunkwiseGRPOTrainer` and `ChunkwiseGRPOConfig` need `transformers_minicpm4[rl]`; they are imported when asked for.
"""

from __future__ import annotations

from importlib import import_module


__all__ = ["ChunkwiseGRPOConfig", "ChunkwiseGRPOTrainer"]

_MODULES = {"ChunkwiseGRPOConfig": "chunkwise_grpo_config", "ChunkwiseGRPOTrainer": "chunkwise_grpo_trainer"}


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
