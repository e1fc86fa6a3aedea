"""
Where drafted tokens come from: the text itself, or a smaller model. `eagle.py` has the trained heads.

A draft is asked for a tree once a pass. It sees the text so far, and of tokens that have become certain also the
target's hidden states where it asks for them (`hidden_layers`). Shape letters: S new tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from .draft_tree import MAX_NODES, NO_TREE, DraftTree, grow_tree


class Draft:
    """
    A source of drafted tokens. Subclasses write `propose`; the rest is optional.

    `proposed` and `accepted` count drafted nodes and those the target agreed to, since the last `begin`; `passes`
    counts the target's passes, so that `accepted / passes + 1` tokens come out of one.
    """

    # Nodes of the largest tree it proposes.
    size: int = MAX_NODES
    # Indices into the target's `hidden_states` that `observe` is given, the last one is the final norm's output.
    hidden_layers: tuple[int, ...] = ()
    proposed = accepted = passes = 0

    def begin(self, target: PreTrainedModel) -> None:
        """
        A new text begins.

        Raises:
            ValueError: the target does not fit this draft.
        """
        self.proposed = self.accepted = self.passes = 0

    def observe(self, token_ids: list[int], hidden_states: list[torch.Tensor]) -> None:
        """`token_ids` became certain; `hidden_states`, one `[S, hidden]` for each of `hidden_layers`, are theirs."""

    def propose(self, token_ids: list[int], limit: int) -> DraftTree:
        """
        What may follow `token_ids` (the whole text), at most `limit` levels deep. An empty tree is an honest answer.
        """
        raise NotImplementedError


class PromptLookupDraft(Draft):
    """
    Copies what followed the same few tokens earlier in the text (Saxena 2023). Costs nothing and wins where the answer
    quotes: summaries, edits, code.

    Args:
        ngram: longest run of last tokens that is looked up, shorter ones down to 1 if it is not found.
        length: tokens copied.
        branches: earlier places that are tried at once, the latest first.

    Raises:
        ValueError: an argument below 1, or more than 64 nodes.
    """

    def __init__(self, ngram: int = 3, length: int = 10, branches: int = 1):
        whole = all(type(number) is int for number in (ngram, length, branches))
        if not whole or min(ngram, length, branches) < 1 or length * branches > MAX_NODES:
            raise ValueError(
                "PromptLookupDraft: ngram, length and branches are whole numbers of 1 or more, and length * branches "
                f"at most {MAX_NODES}; got ngram={ngram}, length={length}, branches={branches}."
            )
        self.ngram, self.length, self.branches = ngram, length, branches
        self.size = length * branches

    def begin(self, target: PreTrainedModel) -> None:
        super().begin(target)
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._indexed = 0

    def propose(self, token_ids: list[int], limit: int) -> DraftTree:
        # An n-gram is known by where it ends; the one at the end of the text is what is looked for.
        for end in range(max(self._indexed, 1), len(token_ids)):
            for size in range(1, min(self.ngram, end) + 1):
                self._places.setdefault(tuple(token_ids[end - size : end]), []).append(end)
        self._indexed = len(token_ids)
        for size in range(min(self.ngram, len(token_ids)), 0, -1):
            places = self._places.get(tuple(token_ids[-size:]))
            if places:
                length = min(self.length, limit)
                return DraftTree.from_chains(
                    [token_ids[place : place + length] for place in reversed(places[-self.branches :])]
                )
        return NO_TREE


class ModelDraft(Draft):
    """
    A smaller model with the target's vocabulary drafts a tree.

    Args:
        model: any dense causal LM of Transformers.
        depth, topk, size: levels of the tree, children a node, nodes in all (`draft_tree.grow_tree`); `topk=1` is a
            chain.

    Raises:
        ValueError: another vocabulary than the target's (in `begin`), sparse attention, or a tree above 64 nodes.
    """

    def __init__(self, model: PreTrainedModel, depth: int = 4, topk: int = 1, size: int | None = None):
        self.size = depth * topk if size is None else size
        grow_tree(lambda nodes: None, torch.zeros(1), 1, 1, self.size)  # the sizes' own check
        if min(depth, topk) < 1:
            raise ValueError(f"ModelDraft: depth and topk are 1 or more, got {depth} and {topk}.")
        if model.config._attn_implementation == "infllm_v2":
            raise ValueError(
                "ModelDraft needs a dense draft, and this model has attn_implementation='infllm_v2'; load it with "
                "attn_implementation='sdpa'."
            )
        self.model, self.depth, self.topk = model, depth, topk

    def begin(self, target: PreTrainedModel) -> None:
        super().begin(target)
        own, other = self.model.config.vocab_size, target.config.vocab_size
        if own != other:
            raise ValueError(
                f"the draft model has a vocabulary of {own} tokens and the target one of {other}: a draft needs the "
                "target's own tokenizer."
            )
        self._cache = DynamicCache(config=self.model.config)
        self._rows = TreeRows()

    @torch.no_grad()
    def propose(self, token_ids: list[int], limit: int) -> DraftTree:
        known = self._cache.get_seq_length()
        device = self.model.device
        ids = torch.tensor([token_ids[known:]], device=device)
        logits = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        past = len(token_ids)
        self._rows = TreeRows()

        def expand(nodes: list[tuple[int, int]]) -> torch.Tensor:
            tokens = torch.tensor([[token for _, token in nodes]], device=device)
            mask, depth = self._rows.append([row for row, _ in nodes], past, self.model.dtype, device)
            output = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=torch.full_like(tokens, past + depth),
                past_key_values=self._cache,
                use_cache=True,
            )
            return output.logits[0].float().log_softmax(-1)

        tree = grow_tree(expand, logits[0, -1].float().log_softmax(-1), min(self.depth, limit), self.topk, self.size)
        drafted = self._cache.get_seq_length() - past
        if drafted:
            self._cache.crop(-drafted)
        return tree


class TreeRows:
    """The rows a draft has put behind its cache level by level, and who descends from whom."""

    def __init__(self):
        self.levels = 0
        self._ancestors: list[list[int]] = []
        self._last: list[int] = []

    def append(self, parents: list[int], past: int, dtype, device) -> tuple[torch.Tensor, int]:
        """
        A level whose nodes descend from rows `parents` of the level before (of the root, for the first).

        Returns the additive mask `[1, 1, nodes, past + rows]` and the level's distance from the root, less one.
        """
        begin = len(self._ancestors)
        rows = range(begin, begin + len(parents))
        for row, parent in zip(rows, parents):
            above = self._ancestors[self._last[parent]] if self._last else []
            self._ancestors.append([*above, row])
        seen = torch.zeros(len(parents), past + begin + len(parents), dtype=torch.bool)
        seen[:, :past] = True
        for place, row in enumerate(rows):
            seen[place, [past + other for other in self._ancestors[row]]] = True
        self._last = list(rows)
        self.levels += 1
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return mask[None, None].to(device), self.levels - 1
