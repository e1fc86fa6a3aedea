"""
How many nodes a draft tree should have: the number at which measured tokens a second are highest.

A larger tree gives more tokens a pass of the target and makes the pass dearer. How much dearer depends on the machine
and on the weights: with 4 bits a pass over one row is cheap, so 60 more rows weigh more than with 16, and trees that
pay for 16 bits may lose there (SpecMQuant, arXiv 2505.22179). So both sides are measured, tokens by
`acceptance_by_size`, seconds by `verify_costs` and `draft_cost`, and `choose_tree_size` weighs them.
Shape letters: T drafted nodes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from .draft_tree import MAX_NODES, NO_TREE, ROOT, DraftTree
from .drafts import Draft
from .speculative import _Target, speculative_decode


# --- Tokens a pass ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Acceptance:
    """
    Args:
        tokens: decoded in all.
        passes: size of the tree to passes of the target that decoding took with it.
    """

    tokens: int
    passes: dict[int, int]

    @property
    def tokens_per_pass(self) -> dict[int, float]:
        return {size: self.tokens / passes for size, passes in self.passes.items()}


def acceptance_by_size(
    model: PreTrainedModel,
    draft: Draft,
    prompts: Iterable[torch.Tensor],
    max_new_tokens: int,
    sizes: Sequence[int],
    **generate_options,
) -> Acceptance:
    """
    Passes that decoding takes with trees of each of `sizes` nodes, from one run over the prompts.

    The run is plain decoding, one token a pass, in which `draft` proposes its largest tree before *every* token. A
    tree of `s` nodes is taken to be the `s` likeliest of it (`DraftTree.likeliest`). With the text and the tree at
    each of its places known, decoding with every size is replayed: start at the prompt's end, walk the tree there
    along the text, go on behind the first token that was not in it. Counting the accepted nodes of one run with large
    trees instead would look at other places than a run with small trees stops at.

    The replay is what running with each size gives, pass by pass, under greedy decoding, if what the draft proposes
    depends on the text alone and its own tree of `s` nodes is the `s` likeliest nodes of its larger one: `ModelDraft`
    and heads with `grow_tree` (depth and topk fixed) up to rounding in a pass over several rows. Under sampling,
    replay and run have the same distribution, because the target's tokens do not depend on the tree.

    Args:
        draft: set to the largest tree of interest.
        prompts: token ids `[1, S]` each.
        sizes: nodes, 0 for none.
        generate_options: of `model.generate`; greedy unless `do_sample=True`.

    Returns:
        Tokens and passes, summed over the prompts.

    Raises:
        ValueError: no prompts or sizes, a size outside 0 to 64, or a draft whose trees have no worths.
    """
    sizes = _checked(sizes)
    tokens, passes = 0, dict.fromkeys(sizes, 0)
    for prompt in prompts:
        watched = _EveryPlace(draft)
        text = model.generate(
            prompt, custom_generate=speculative_decode, draft=watched, max_new_tokens=max_new_tokens,
            **{"do_sample": False, "return_dict_in_generate": False, **generate_options},
        )[0].tolist()  # fmt: skip
        tokens += len(text) - prompt.shape[1]
        for size in sizes:
            passes[size] += replay(text, prompt.shape[1], watched.trees, size)
    if not tokens:
        raise ValueError("no token was decoded: give at least one prompt, and max_new_tokens of 1 or more.")
    return Acceptance(tokens, passes)


def replay(text: Sequence[int], begin: int, trees: Mapping[int, DraftTree], size: int) -> int:
    """
    Passes that decoding `text[begin:]` takes, where before the token at place `p` the `size` likeliest nodes of
    `trees[p]` are drafted (none where there is no tree).
    """
    passes, place = 0, begin
    while place < len(text):
        tree = trees[place].likeliest(size) if place in trees else NO_TREE
        node = ROOT
        while place < len(text):
            node = tree.children(node).get(text[place])
            place += 1
            if node is None:
                break
        passes += 1
    return passes


class _Around(Draft):
    """A draft around another one."""

    def __init__(self, draft: Draft):
        self.draft, self.hidden_layers = draft, draft.hidden_layers

    def begin(self, target: PreTrainedModel) -> None:
        super().begin(target)
        self.draft.begin(target)

    def observe(self, token_ids: list[int], hidden_states: list[torch.Tensor]) -> None:
        self.draft.observe(token_ids, hidden_states)


class _EveryPlace(_Around):
    """Keeps the draft's tree of each place and shows the target none of it, so that every token is a place."""

    def __init__(self, draft: Draft):
        super().__init__(draft)
        self.trees: dict[int, DraftTree] = {}

    def propose(self, token_ids: list[int], limit: int) -> DraftTree:
        self.trees[len(token_ids)] = self.draft.propose(token_ids, limit)
        return NO_TREE


# --- Seconds ---------------------------------------------------------------------------------------------------------


def verify_costs(verify: Callable[[int], object], sizes: Sequence[int], repeats: int = 9) -> dict[int, float]:
    """
    Median seconds of `verify(s)`, one pass of the target over the last certain token and `s` drafted ones.

    The sizes take turns, each first as often as any other, so that a machine that warms up or is busy for a while
    bends all of them alike. A round before the first is not counted.

    Args:
        verify: must return when the work is done, not when it is queued; `verify_pass` makes one.
        sizes: nodes, 0 for a plain decoding step.
        repeats: rounds.

    Raises:
        ValueError: no sizes, a size outside 0 to 64, or `repeats` below 1.
    """
    sizes = _checked(sizes)
    if repeats < 1:
        raise ValueError(f"repeats={repeats} was given; 1 or more are needed for a median.")
    for size in sizes:
        verify(size)
    seconds = {size: [] for size in sizes}
    for round_ in range(repeats):
        first = round_ % len(sizes)
        for size in [*sizes[first:], *sizes[:first]]:
            begin = time.perf_counter()
            verify(size)
            seconds[size].append(time.perf_counter() - begin)
    return {size: statistics.median(found) for size, found in seconds.items()}


def binary_tree(size: int) -> DraftTree:
    """A tree to time passes with, in which every node has two children; its first nodes are its likeliest."""
    nodes = range(size)
    return DraftTree((0,) * size, tuple(node // 2 - 1 for node in nodes), tuple(-node for node in nodes))


@torch.no_grad()
def verify_pass(model: PreTrainedModel, context: int, tree: DraftTree | None = None) -> Callable[[int], None]:
    """
    What `verify_costs` times, for a model of Transformers: a pass over the `s` likeliest nodes of `tree` behind a
    `DynamicCache` that holds `context` random tokens, and is as long as before afterwards.

    Args:
        context: in tokens.
        tree: default: 64 nodes in which every node has two children. With full attention its form does not change the
            cost; with block-sparse attention it does, so give one that the draft has proposed.

    Raises:
        ValueError: `context` below 1.
    """
    if context < 1:
        raise ValueError(f"context={context} was given; the cache must hold 1 token or more.")
    if tree is None:
        tree = binary_tree(MAX_NODES)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (context + 1,), generator=generator).tolist()
    target = _Target(model, DynamicCache(config=model.config), ())
    target.prefill(ids, 2048, Draft())

    @torch.no_grad()
    def verify(size: int) -> None:
        if size > len(tree):
            raise ValueError(
                f"a pass over {size} nodes was asked for and the tree has {len(tree)}; give a larger one."
            )
        target.verify(ids[-1], tree.likeliest(size))
        target.keep([0])
        target.cache.crop(-1)
        wait_for(model.device)

    return verify


def draft_cost(model: PreTrainedModel, draft: Draft, prompt: torch.Tensor, max_new_tokens: int) -> float:
    """
    Median seconds that `draft` takes for one pass of the target, what it reads of accepted tokens included, over a
    greedy run. Its tree's number of nodes hardly matters here: what costs are its levels and children a node.

    Args:
        prompt: token ids `[1, S]`.

    Raises:
        ValueError: the run ended before the draft was asked.
    """
    timed = _Timed(draft)
    model.generate(
        prompt, custom_generate=speculative_decode, draft=timed, max_new_tokens=max_new_tokens, do_sample=False
    )
    if not timed.seconds:
        raise ValueError(f"the draft was never asked within max_new_tokens={max_new_tokens}; give 2 or more.")
    return statistics.median(timed.seconds)


class _Timed(_Around):
    """Measures a pass's share of the draft: its tree, and reading what was accepted of it."""

    def __init__(self, draft: Draft):
        super().__init__(draft)
        self.seconds: list[float] = []

    def begin(self, target: PreTrainedModel) -> None:
        super().begin(target)
        self._device = target.device

    def propose(self, token_ids: list[int], limit: int) -> DraftTree:
        tree, seconds = self._time(self.draft.propose, token_ids, limit)
        self.seconds.append(seconds)
        return tree

    def observe(self, token_ids: list[int], hidden_states: list[torch.Tensor]) -> None:
        _, seconds = self._time(self.draft.observe, token_ids, hidden_states)
        if self.seconds:  # before the first tree it is the prompt that is read
            self.seconds[-1] += seconds

    def _time(self, function: Callable, *arguments):
        wait_for(self._device)
        begin = time.perf_counter()
        result = function(*arguments)
        wait_for(self._device)
        return result, time.perf_counter() - begin


def wait_for(device: torch.device) -> None:
    """Kernels that were queued end before a clock is read."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


# --- The choice ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TreeSizeChoice:
    """
    `str()` of it is a table.

    Args:
        size: nodes of the tree; 0: do not draft.
        tokens_per_pass, verify_seconds: what was weighed, by size.
        draft_seconds: of the draft, a pass.
        tokens_per_second: by size, 0 for decoding without a draft.
    """

    size: int
    tokens_per_pass: dict[int, float]
    verify_seconds: dict[int, float]
    draft_seconds: float
    tokens_per_second: dict[int, float]

    @property
    def speed_up(self) -> float:
        """Predicted, over decoding without a draft; 1.0 where not drafting is best."""
        return self.tokens_per_second[self.size] / self.tokens_per_second[0]

    def __str__(self) -> str:
        lines = [
            f"{'nodes':>5}  {'tokens a pass':>13}  {'verify ms':>9}  {'draft ms':>8}  {'tokens/s':>8}  {'speed':>6}"
        ]
        for size, rate in self.tokens_per_second.items():
            tokens = self.tokens_per_pass[size] if size else 1.0
            draft = 1000 * self.draft_seconds if size else 0.0
            lines.append(
                f"{size:>5}  {tokens:>13.2f}  {1000 * self.verify_seconds[size]:>9.2f}  {draft:>8.2f}  {rate:>8.1f}  "
                f"{rate / self.tokens_per_second[0]:>5.2f}x{'  <-' if size == self.size else ''}"
            )
        if self.size:
            lines.append(f"best: {self.size} nodes, {self.speed_up:.2f} times as fast as without a draft")
        else:
            lines.append("best: no draft; every tree that was weighed makes decoding slower, or no faster")
        return "\n".join(lines)


def choose_tree_size(
    tokens_per_pass: Mapping[int, float], verify_seconds: Mapping[int, float], draft_seconds: float
) -> TreeSizeChoice:
    """
    The size with the most tokens a second, `tokens_per_pass[s] / (draft_seconds + verify_seconds[s])`, against
    `1 / verify_seconds[0]` without a draft. Of equals the smallest. Nothing is assumed of how costs grow.

    Args:
        tokens_per_pass: by size, as from `acceptance_by_size`.
        verify_seconds: by size, as from `verify_costs`; 0 must be among them.
        draft_seconds: of the draft, a pass; as from `draft_cost`.

    Raises:
        ValueError: sizes that only one side has, no size 0 in `verify_seconds`, or figures that cannot be.
    """
    sizes = sorted(set(tokens_per_pass) - {0})
    absent = sorted({0, *sizes} - set(verify_seconds))
    if absent:
        raise ValueError(
            f"verify_seconds lacks the sizes {', '.join(map(str, absent))}; it needs 0, decoding without a draft, and "
            "every size of tokens_per_pass."
        )
    for size in sizes:
        if size < 0 or not 1 <= tokens_per_pass[size] <= size + 1:
            raise ValueError(
                f"{tokens_per_pass[size]} tokens a pass with {size} nodes: a pass gives 1 to {size + 1} tokens."
            )
    for what, seconds in [*((f"a pass over {size} nodes", verify_seconds[size]) for size in (0, *sizes))]:
        if not 0 < seconds < math.inf:
            raise ValueError(f"{what} took {seconds} seconds; a number above 0 is needed.")
    if not 0 <= draft_seconds < math.inf:
        raise ValueError(f"draft_seconds={draft_seconds} was given; 0 or more is needed.")
    rates = {0: 1 / verify_seconds[0]}
    rates |= {size: tokens_per_pass[size] / (draft_seconds + verify_seconds[size]) for size in sizes}
    best = max(rates, key=lambda size: (rates[size], -size))
    return TreeSizeChoice(best, dict(tokens_per_pass), dict(verify_seconds), draft_seconds, rates)


def _checked(sizes: Sequence[int]) -> list[int]:
    found = sorted(set(sizes))
    if not found or not 0 <= found[0] <= found[-1] <= MAX_NODES:
        raise ValueError(f"sizes={list(sizes)} were given; one or more numbers of nodes from 0 to {MAX_NODES}.")
    return found
