"""
What lies between two blocks while a model is quantized: the hidden states of the calibration rows, and of the constant
prefix in full precision.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache

from ...model.prefix_cache import PrefixCache
from .blocks import Blocks, run


# Of the rows kept between blocks at most this many bytes stay in memory; the rest lies in a file that is mapped.
IN_MEMORY = 4 * 2**30


class PrefixStream:
    """The constant prefix on its way through the blocks in full precision."""

    def __init__(self, blocks: Blocks, prefix_ids: list[int]):
        ids = torch.tensor([prefix_ids])
        self.past = DynamicCache()
        self.hidden, self.kwargs = blocks.first_inputs(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, self.past
        )

    def into(self, hidden: list[torch.Tensor]) -> None:
        """Rows see the prefix as full precision has it, as they will from the stored keys and values."""
        for part in hidden:
            part[:, : self.hidden.shape[1]] = self.hidden

    def step(self, block: nn.Module, index: int) -> None:
        further = {**self.kwargs[index], "past_key_values": self.past, "use_cache": True}
        self.hidden = run(block, self.hidden, further)

    def cache(self, token_ids: list[int], dtype: torch.dtype | None) -> PrefixCache:
        return PrefixCache(
            list(token_ids),
            [layer.keys.to("cpu", dtype) for layer in self.past.layers],
            [layer.values.to("cpu", dtype) for layer in self.past.layers],
        )


class Spread:
    """Keeps the rows between blocks: the first `IN_MEMORY` bytes in memory, the rest in files that are mapped."""

    def __init__(self, folder: str | Path | None):
        self.folder, self.kept = folder, 0

    def keep(self, part: torch.Tensor) -> torch.Tensor:
        self.kept += part.nbytes
        if self.kept <= IN_MEMORY or part.device.type != "cpu":
            return part.clone()
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".rows-") as file:
            # A disk that is full must say so now, not by a signal when a page is written.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, part.nbytes)
            mapped = torch.from_file(file.name, shared=True, size=part.numel(), dtype=part.dtype)
        return mapped.view(part.shape).copy_(part)
