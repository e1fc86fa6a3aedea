"""The reference: the model itself, in PyTorch, over slots (`edge.runner`). Offers every call."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from ...generation.draft_tree import MAX_NODES, DraftTree
from ..runner import SlotRunner
from ..trace import Trace
from .protocol import CALLS, Executor, Scores


CHUNK_TOKENS = 512


class TorchExecutor(Executor):
    """
    Args:
        model: a causal language model.
        context: tokens that a text may have; their keys and values are taken at once.
        name: shown in reports.
        trace: where calls are written down.

    Raises:
        ValueError: a model that slots do not hold (`edge.runner.check_model`).
    """

    calls = frozenset(CALLS)

    def __init__(self, model: PreTrainedModel, context: int = 2048, name: str = "torch", trace: Trace | None = None):
        self.model = model.eval()
        self.name, self.context, self.trace = name, context, trace
        self.vocab_size = model.config.get_text_config().vocab_size
        # A tree is written behind the text before it is known what of it stays.
        self.runner = SlotRunner(model, context + MAX_NODES, tree=MAX_NODES)

    @classmethod
    def open(cls, folder: str | os.PathLike, context: int = 2048, name: str | None = None, **options) -> TorchExecutor:
        """From a checkpoint. `options` of `from_pretrained`, such as `attn_implementation`, and `trace`."""
        trace = options.pop("trace", None)
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        return cls(model, context, name or "torch", trace)

    def close(self) -> None:
        super().close()
        self.runner = None

    def _held(self) -> int:
        return self.runner.lengths[0]

    @torch.no_grad()
    def _score(self, token_ids: list[int], top: int) -> Scores:
        # Apart from the slots, in the form of attention that the model was loaded with.
        cache, parts = DynamicCache(config=self.model.config), []
        for start in range(0, len(token_ids) - 1, CHUNK_TOKENS):
            following = token_ids[start + 1 : start + CHUNK_TOKENS + 1]
            piece = torch.tensor([token_ids[start : start + len(following)]], device=self.runner.device)
            logits = self.model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0]
            parts.append(Scores.of_logits(logits, following, top))
        return Scores.joined(parts)

    def _prefill(self, token_ids: list[int]) -> torch.Tensor:
        held = self._held()
        if len(token_ids) > 1:
            # `prefill` wants the whole text and reads what is new of it.
            self.runner.prefill([0] * held + token_ids[:-1], CHUNK_TOKENS, begin=held)
        return self._decode(token_ids[-1])

    def _decode(self, token: int) -> torch.Tensor:
        return self.runner.decode(torch.tensor([token], device=self.runner.device))[0]

    def _verify(self, root: int, tree: DraftTree) -> torch.Tensor:
        return self.runner.verify(root, tree)

    def _keep(self, rows: Sequence[int]) -> None:
        self.runner.keep(list(rows))

    def _reset(self) -> None:
        self.runner.lengths[0] = 0


__all__ = ["TorchExecutor"]
