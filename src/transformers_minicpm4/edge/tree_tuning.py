"""
How many nodes a draft's tree should have on this machine: what `generation.tree_size` decides from, measured with the
engine's own steps.

Quantized weights move the answer: they make a plain step cheaper than a pass over a tree, which computes more for each
byte it reads, so that smaller trees win (the lesson of SpecMQuant, which CPM.cu's defaults follow).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..generation.tree_size import (
    TreeSizeChoice,
    acceptance_by_size,
    binary_tree,
    choose_tree_size,
    draft_cost,
    verify_costs,
    wait_for,
)
from .engine import EdgeEngine
from .runner import SlotRunner


SIZES = (2, 4, 8, 16)
CONTEXT = 512


def tune_tree(
    engine: EdgeEngine,
    prompts: Sequence,
    sizes: Sequence[int] = SIZES,
    max_new_tokens: int = 64,
    context: int = CONTEXT,
    repeats: int = 9,
) -> TreeSizeChoice:
    """
    Measure and choose. The draft must propose trees of `max(sizes)` nodes; afterwards make draft and engine with the
    size that was chosen (`tree_size`), or without a draft where nothing gains.

    Args:
        engine: with a draft.
        prompts: of the kind that will come, in any form that `engine.encode` takes.
        sizes: nodes to choose among.
        max_new_tokens: decoded for each prompt, one by one: a minute or two on a small machine.
        context: cached tokens behind which a pass is timed.
        repeats: timed passes for each size, of which the median counts.

    Returns:
        the choice; printed, it is a table.

    Raises:
        ValueError: an engine without a draft, or no prompts.
        RuntimeError: a request of the engine is not finished.
    """
    if engine.draft is None:
        raise ValueError("tune_tree was given an engine without a draft; give the engine one.")
    if not prompts:
        raise ValueError("tune_tree needs prompts of the kind that will come; give one or more.")
    model, draft = engine.model, engine.draft
    ids = [torch.tensor([engine.encode(prompt)], device=model.device) for prompt in prompts]
    with engine.claim():
        acceptance = acceptance_by_size(model, draft, ids, max_new_tokens, sizes)
        seconds = verify_costs(_passes(engine, [0, *sizes], context), [0, *sizes], repeats)
        drafting = draft_cost(model, draft, ids[0], min(max_new_tokens, 16))
    return choose_tree_size(acceptance.tokens_per_pass, seconds, drafting)


def _passes(engine: EdgeEngine, sizes: Sequence[int], context: int):
    """A pass over a tree of each size, with programs of their own where steps are compiled."""
    model = engine.model
    runners = {
        size: SlotRunner(model, context + size + 2, tree=size, compile=engine.compiles, capture=engine.captures)
        for size in sizes
    }
    ids = torch.randint(model.config.get_text_config().vocab_size, (context,), generator=torch.Generator()).tolist()
    for runner in runners.values():
        runner.prefill(ids, 512)

    def verify(size: int) -> None:
        runner = runners[size]
        # With full attention the form of the tree does not change the cost.
        runner.verify(ids[0], binary_tree(size))
        runner.lengths[0] = context
        wait_for(runner.device)

    return verify
