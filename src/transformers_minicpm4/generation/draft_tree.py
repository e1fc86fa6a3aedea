"""
Trees of drafted tokens: what one pass of the target verifies.

A tree's nodes are numbered with parents before children. The pass's input is the last token that is certain, the root,
followed by the nodes, so that node `i` stands at row `i + 1`. Shape letters: T nodes, N cached tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch


# As in CPM.cu, whose kernel keeps a node's ancestors in 64 bits: trees of ours run there too.
MAX_NODES = 64
ROOT = -1


@dataclass(frozen=True)
class DraftTree:
    """
    Args:
        tokens: token id of each node.
        parents: number of each node's parent, `ROOT` for the children of the last certain token.
        worths: how likely the draft takes each node to be, in nats or any other measure that grows with it; no
            node's is above its parent's.

    Raises:
        ValueError: more than 64 nodes, lists of different length, a parent that does not come before its child, or a
            node worth more than its parent.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    worths: tuple[float, ...] | None = field(default=None, compare=False)

    def __post_init__(self):
        if len(self.tokens) != len(self.parents):
            raise ValueError(f"{len(self.tokens)} tokens and {len(self.parents)} parents: one parent a token.")
        if len(self.tokens) > MAX_NODES:
            raise ValueError(f"the tree has {len(self.tokens)} nodes, at most {MAX_NODES} are allowed; draft fewer.")
        for node, parent in enumerate(self.parents):
            if not ROOT <= parent < node:
                raise ValueError(f"node {node} has parent {parent}; a parent has a smaller number, or is {ROOT}.")
        if self.worths is not None:
            if len(self.worths) != len(self.tokens):
                raise ValueError(f"{len(self.worths)} worths and {len(self.tokens)} tokens: one worth a token.")
            for node, parent in enumerate(self.parents):
                if parent != ROOT and self.worths[node] > self.worths[parent]:
                    raise ValueError(
                        f"node {node} is worth {self.worths[node]} and its parent {self.worths[parent]}; a path is at "
                        "most as likely as its beginning."
                    )

    @classmethod
    def from_chains(cls, chains: Sequence[Sequence[int]], size: int = MAX_NODES) -> DraftTree:
        """Several continuations, the best first, with their common beginnings shared; at most `size` nodes."""
        tokens, parents, known = [], [], {}
        for chain in chains:
            parent = ROOT
            for token in chain:
                if (parent, token) not in known:
                    if len(tokens) == size:
                        break
                    known[parent, token] = len(tokens)
                    tokens.append(int(token))
                    parents.append(parent)
                parent = known[parent, token]
        return cls(tuple(tokens), tuple(parents), tuple(-float(node) for node in range(len(tokens))))

    def __len__(self) -> int:
        return len(self.tokens)

    def likeliest(self, size: int) -> DraftTree:
        """
        The tree of the `size` likeliest nodes; of equal worths the lower number, so a parent is never left out.

        Raises:
            ValueError: nodes have to go and there are no worths.
        """
        if size >= len(self):
            return self
        if size and self.worths is None:
            raise ValueError(
                f"a tree of {len(self)} nodes without worths was given: which {size} are the likeliest is not known; "
                "draft with worths, as grow_tree and from_chains do."
            )
        ranked = sorted(range(len(self)), key=lambda node: (-self.worths[node], node)) if size else []
        kept = sorted(ranked[:size])
        number = {node: new for new, node in enumerate(kept)}
        return DraftTree(
            tuple(self.tokens[node] for node in kept),
            tuple(number.get(self.parents[node], ROOT) for node in kept),
            None if self.worths is None else tuple(self.worths[node] for node in kept),
        )

    def depths(self) -> list[int]:
        """Of each row of the pass: 0 for the root, 1 for its children, ..."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent + 1] + 1)
        return depths

    def path(self, node: int) -> list[int]:
        """Rows of the pass from the root to `node`."""
        rows = []
        while node != ROOT:
            rows.append(node + 1)
            node = self.parents[node]
        return [0, *reversed(rows)]

    def paths(self) -> list[list[int]]:
        """Rows from the root to each leaf."""
        inner = set(self.parents)
        return [self.path(node) for node in range(len(self)) if node not in inner] or [[0]]

    def children(self, node: int) -> dict[int, int]:
        """Token to node, of the children of `node`. Of two children with one token the first counts."""
        found = {}
        for child, parent in enumerate(self.parents):
            if parent == node:
                found.setdefault(self.tokens[child], child)
        return found

    def mask(self, past: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """
        Additive attention mask `[1, 1, T + 1, N + T + 1]`: every row sees the cache and its own ancestors.
        """
        rows = len(self) + 1
        seen = torch.zeros(rows, past + rows, dtype=torch.bool)
        seen[:, :past] = True
        for node in range(ROOT, len(self)):
            seen[node + 1, [past + row for row in self.path(node)]] = True
        mask = torch.zeros(rows, past + rows, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return mask[None, None].to(device)


NO_TREE = DraftTree((), ())


def grow_tree(
    expand: Callable[[list[tuple[int, int]]], torch.Tensor], first: torch.Tensor, depth: int, topk: int, size: int
) -> DraftTree:
    """
    EAGLE-2's dynamic tree (arXiv 2406.16858): at each level the `topk` likeliest nodes grow `topk` children each, and
    of all nodes the `size` likeliest are kept. A node's worth is the product of the draft's probabilities on its path.

    Args:
        expand: takes a level's nodes as (row of the level before, token) and returns the draft's log-probabilities of
            what follows each, `[nodes, V]`. Row 0 of the level before is the root.
        first: the draft's log-probabilities after the root, `[V]`.
        depth: levels.

    Raises:
        ValueError: an argument below 1, or `size` above 64.
    """
    if min(depth, topk, size) < 1 or size > MAX_NODES:
        raise ValueError(
            f"a draft tree needs depth, topk and size of 1 or more and at most {MAX_NODES} nodes; got depth={depth}, "
            f"topk={topk}, size={size}."
        )
    # (worth, token, index of the parent among the candidates)
    candidates: list[tuple[float, int, int]] = []
    parents, worths, logprobs = [ROOT], [0.0], first[None]
    for level in range(depth):
        values, tokens = logprobs.topk(min(topk, logprobs.shape[-1]), dim=-1)
        begin = len(candidates)
        for parent, worth, row_values, row_tokens in zip(parents, worths, values.tolist(), tokens.tolist()):
            candidates += [(worth + value, token, parent) for value, token in zip(row_values, row_tokens)]
        if level == depth - 1:
            break
        # Ties go to the earlier candidate, so that a parent never ranks behind its own child.
        frontier = sorted(range(begin, len(candidates)), key=lambda i: (-candidates[i][0], i))[:topk]
        rows = {parent: row for row, parent in enumerate(parents)}
        logprobs = expand([(rows[candidates[i][2]], candidates[i][1]) for i in frontier])
        parents, worths = frontier, [candidates[i][0] for i in frontier]
    kept = sorted(sorted(range(len(candidates)), key=lambda i: (-candidates[i][0], i))[:size])
    number = {candidate: node for node, candidate in enumerate(kept)}
    return DraftTree(
        tuple(candidates[i][1] for i in kept),
        tuple(number.get(candidates[i][2], ROOT) for i in kept),
        tuple(candidates[i][0] for i in kept),
    )
