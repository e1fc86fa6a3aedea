"""
EAGLE draft heads: one decoder layer that guesses the target's next hidden states, and from them the next tokens.

`EagleDraft` is the EAGLE-2 head of MiniCPM4 (arXiv 2401.15077, 2406.16858, 2506.07900), `Eagle3Draft` the EAGLE-3 head
of MiniCPM4.1 (arXiv 2503.01840). Both serve any Llama-like target, dense or sparse; the head itself is dense.

A head's row at position t pairs the target's hidden state of token t with the embedding of token t + 1, and says what
token t + 2 may be. Its keys and values depend on that pair alone, so of the certain text only they are computed, and
the rest of the layer runs for the last row and for drafted ones. Shape letters: S rows, N cached rows, C hidden size,
G key/value heads, D head size, V ids that the head scores, L layers of the target.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from .draft_tree import MAX_NODES, NO_TREE, DraftTree, grow_tree
from .drafts import Draft, TreeRows
from .eagle_head import (
    Eagle3Head,
    EagleConfig,
    EagleHead,
    check_ids,
    check_target,
    read_head,
    read_ids,
    save_head,
    write_file,
)


class _Rows:
    """Keys, values and positions of the head's layer; drafted rows are written behind the certain ones."""

    def __init__(self):
        self.length, self._tensors = 0, None

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        new = (keys[0].transpose(0, 1), values[0].transpose(0, 1), positions)
        end = self.length + len(positions)
        if self._tensors is None or len(self._tensors[0]) < end:
            old, size = self._tensors, end + end // 4 + 4 * MAX_NODES
            self._tensors = [tensor.new_empty(size, *tensor.shape[1:]) for tensor in new]
            for tensor, before in zip(self._tensors, old or ()):
                tensor[: self.length] = before[: self.length]
        for tensor, rows in zip(self._tensors, new):
            tensor[self.length : end] = rows
        self.length = end

    def view(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[1, G, N, D]` twice, and `[N]`."""
        keys, values, positions = (tensor[: self.length] for tensor in self._tensors)
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None], positions

    def keep_window(self, window: int) -> None:
        """Only the first row and the last `window`."""
        if self.length > window + 1:
            for tensor in self._tensors:
                tensor[1 : window + 1] = tensor[self.length - window : self.length].clone()
            self.length = window + 1


class _TrainedDraft(Draft):
    """What both heads share; `head` has `fuse`, `layer` and `finish`."""

    def __init__(self, head: nn.Module, depth: int, topk: int, size: int | None, window: int | None):
        self.size = min(depth * topk, MAX_NODES) if size is None else size
        grow_tree(lambda nodes: None, torch.zeros(1), 1, 1, self.size)  # the sizes' own check
        if min(depth, topk) < 1 or topk > MAX_NODES or (window is not None and window < 1):
            raise ValueError(
                f"{type(self).__name__}: depth, topk and window are 1 or more and topk at most {MAX_NODES}, got "
                f"depth={depth}, topk={topk}, window={window}."
            )
        self.head, self.depth, self.topk, self.window = head.eval(), depth, topk, window

    def begin(self, target: PreTrainedModel) -> None:
        super().begin(target)
        check_target(self.head.config, target)
        self.head.to(target.device)
        self._embed, self._rotary = target.get_input_embeddings(), target.model.rotary_emb
        self._rows = _Rows()
        self._text: list[int] = []  # tokens whose hidden states are here
        self._hidden: list[torch.Tensor] = []  # of the last of them, those that wait for their next token
        self._pairs = 0

    @torch.no_grad()
    def observe(self, token_ids: list[int], hidden_states: list[torch.Tensor]) -> None:
        self._text += token_ids
        self._hidden.append(torch.cat(hidden_states, dim=-1))
        if len(self._text) - self._pairs > MAX_NODES + 1:  # a chunk of the prompt need not lie about
            self._read(self._text)

    @torch.no_grad()
    def propose(self, token_ids: list[int], limit: int) -> DraftTree:
        if len(self._text) != len(token_ids) - 1:
            raise ValueError(
                f"the draft has observed {len(self._text)} tokens and is asked what follows {len(token_ids)}: it must "
                "have observed all but the last one; call `begin` for a new text."
            )
        if not self._text:
            return NO_TREE
        self._read(token_ids)
        certain = self._rows.length
        keys, values, _ = self._rows.view()
        hidden = self.head.finish(*self._last, keys, values)
        state, tree = {"hidden": hidden}, TreeRows()

        def expand(nodes: list[tuple[int, int]]) -> torch.Tensor:
            rows = [row for row, _ in nodes]
            ids = self._absolute(torch.tensor([[token for _, token in nodes]]))
            seen, depth = tree.append(rows, certain, torch.float32, "cpu")
            position = self._pairs + depth
            stream, read, rotation = self._fuse(
                ids.to(hidden.device), state["hidden"][:, rows], torch.full((len(nodes),), position)
            )
            self._rows.append(
                *self.head.layer.self_attn.keys_values(read, rotation),
                torch.full((len(nodes),), position, device=hidden.device),
            )
            keys, values, positions = self._rows.view()
            mask = (seen[0, 0] == 0).to(hidden.device)
            if self.window is not None:
                mask &= (positions == 0) | (positions > position - self.window)
            state["hidden"] = self.head.finish(stream, read, rotation, keys, values, mask)
            return self._logprobs(state["hidden"])

        try:
            tree_of_ids = grow_tree(expand, self._logprobs(hidden)[0], min(self.depth, limit), self.topk, self.size)
        finally:
            self._rows.length = certain
        tokens = self._absolute(torch.tensor(tree_of_ids.tokens)).tolist()
        return DraftTree(tuple(tokens), tree_of_ids.parents, tree_of_ids.worths)

    def _read(self, text: list[int]) -> None:
        """Writes keys and values of the pairs that `text` completes, and keeps the last pair for `propose`."""
        end = min(len(self._text), len(text) - 1)
        if end == self._pairs:
            return
        hidden = torch.cat(self._hidden) if len(self._hidden) > 1 else self._hidden[0]
        first = self._pairs
        self._hidden = [hidden[end - first :].clone()] if end < len(self._text) else []
        chosen = torch.arange(first, end)
        if self.window is not None:
            # What the window would drop at once is not computed.
            chosen = chosen[(chosen == 0) | (chosen >= end - self.window)]
        ids = torch.tensor(text[first + 1 : end + 1])[chosen - first][None].to(hidden.device)
        chosen = chosen.to(hidden.device)
        stream, read, rotation = self._fuse(ids, hidden[chosen - first][None], chosen)
        self._rows.append(*self.head.layer.self_attn.keys_values(read, rotation), chosen)
        if self.window is not None:
            self._rows.keep_window(self.window)
        self._last = (stream[:, -1:], read[:, -1:], tuple(table[:, -1:] for table in rotation))
        self._pairs = end

    def _fuse(self, ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor):
        dtype = self.head.fc.weight.dtype
        stream, read = self.head.fuse(self._embed(ids).to(dtype), hidden.to(dtype))
        return stream, read, self._rotary(stream, positions[None].to(stream.device))

    def _absolute(self, ids: torch.Tensor) -> torch.Tensor:
        """The target's ids of the head's, on the CPU."""
        raise NotImplementedError

    def _logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._logits(hidden[0])
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


class EagleDraft(_TrainedDraft):
    """
    Drafts with an EAGLE-2 head.

    Args:
        head: the trained head; `EagleDraft.from_pretrained` reads one, `train_eagle` makes one.
        depth, topk, size: levels of the tree, children a node, nodes in all (`draft_tree.grow_tree`); `topk=1` is a
            chain. `size=None`: `depth * topk`, at most 64. CPM.cu serves 2, 10 and 11 (its 12 count the root).
        window: the head's cache keeps the first token and the last `window`; as in CPM.cu. `None`: all.
        vocabulary_ids: FR-Spec (arXiv 2502.14856): integers `[V]`, the only ids that are scored, in any order. `None`:
            all. Their rows of the target's head are copied once.

    Raises:
        ValueError: an argument out of range, a tree above 64 nodes; in `begin`, a target that does not fit the head.
    """

    hidden_layers = (-1,)

    def __init__(
        self,
        head: EagleHead,
        depth: int = 3,
        topk: int = 4,
        size: int | None = None,
        window: int | None = 1024,
        vocabulary_ids: torch.Tensor | None = None,
    ):
        super().__init__(head, depth, topk, size, window)
        if vocabulary_ids is not None:
            vocabulary_ids = check_ids(vocabulary_ids, head.config.vocab_size)
        self.vocabulary_ids = vocabulary_ids
        self._gathered_from = None

    def begin(self, target: PreTrainedModel) -> None:
        super().begin(target)
        self._scaling = getattr(target.config, "logits_scaling", 1.0)
        self._score = target.get_output_embeddings()
        if self.vocabulary_ids is not None:
            weight = getattr(self._score, "weight", None)
            if not isinstance(weight, torch.Tensor) or weight.shape[0] != self.head.config.vocab_size:
                raise ValueError(
                    f"vocabulary_ids needs the rows of the target's output head, and {type(self._score).__name__} has "
                    "none (quantized?); leave vocabulary_ids at None."
                )
            if self._gathered_from is not weight:
                ids, bias = self.vocabulary_ids.to(weight.device), getattr(self._score, "bias", None)
                self._gathered = (weight.detach()[ids], None if bias is None else bias.detach()[ids])
                self._gathered_from = weight
            rows, bias = self._gathered
            self._score = lambda x: nn.functional.linear(x.to(rows.dtype), rows, bias)

    def _absolute(self, ids: torch.Tensor) -> torch.Tensor:
        return ids if self.vocabulary_ids is None else self.vocabulary_ids[ids]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = getattr(self._score, "weight", None)
        hidden = hidden if weight is None else hidden.to(weight.dtype)
        # With few ids too: CPM.cu leaves the division out there, which sharpens the worths of its trees 16-fold.
        return self._score(hidden / self._scaling)

    @classmethod
    def from_pretrained(cls, folder, target: PreTrainedModel, vocabulary_ids="folder", **options) -> EagleDraft:
        """
        Read a head in the form of CPM.cu, Hugging Face or vLLM: `config.json` beside `*.safetensors` or `*.bin`.

        Args:
            vocabulary_ids: `"folder"` takes the list of ids in `freq_*.pt` if there is one; otherwise as above.
            options: `depth`, `topk`, `size`, `window`.

        Raises:
            ValueError: tensors that are missing, unknown or of another shape, another vocabulary, several lists of
                ids.
            FileNotFoundError: no such folder, or nothing to read in it.
        """
        head = read_head(EagleHead, Path(folder), target)
        if isinstance(vocabulary_ids, str):
            if vocabulary_ids != "folder":
                raise ValueError(f'vocabulary_ids is a tensor, None or "folder", got {vocabulary_ids!r}.')
            vocabulary_ids = read_ids(Path(folder))
        return cls(head, vocabulary_ids=vocabulary_ids, **options)

    def save_pretrained(self, folder) -> None:
        """Write `config.json`, `model.safetensors` and, with `vocabulary_ids`, `freq_V.pt`."""
        save_head(self.head, Path(folder), "EagleMiniCPMForCausalLM")
        if self.vocabulary_ids is not None:
            ids = self.vocabulary_ids.tolist()
            write_file(Path(folder) / f"freq_{len(ids)}.pt", lambda path: torch.save(ids, path))


class Eagle3Draft(_TrainedDraft):
    """
    Drafts with an EAGLE-3 head.

    Args:
        head: the trained head; `Eagle3Draft.from_pretrained` reads one.
        hidden_layers: three indices of the target's layers, whose *inputs* are fused. `from_pretrained` takes
            `2, L // 2, L - 3`.
        depth, topk, size, window: as of `EagleDraft`.

    Raises:
        ValueError: as `EagleDraft`; `d2t` that leads out of the vocabulary.
    """

    def __init__(
        self,
        head: Eagle3Head,
        hidden_layers: tuple[int, int, int],
        depth: int = 3,
        topk: int = 4,
        size: int | None = None,
        window: int | None = 1024,
    ):
        super().__init__(head, depth, topk, size, window)
        if len(hidden_layers) != 3:
            raise ValueError(f"Eagle3Draft: hidden_layers are three indices, got {hidden_layers}.")
        self.hidden_layers = tuple(hidden_layers)
        offsets = head.d2t.cpu()
        self._ids = check_ids(torch.arange(len(offsets)) + offsets, head.config.vocab_size)

    def begin(self, target: PreTrainedModel) -> None:
        count = target.config.num_hidden_layers
        if not all(0 <= layer <= count for layer in self.hidden_layers):
            raise ValueError(
                f"the head reads what enters layers {self.hidden_layers}, and the target has {count} layers; an "
                "EAGLE-3 head fits the model it was trained for."
            )
        super().begin(target)

    def _absolute(self, ids: torch.Tensor) -> torch.Tensor:
        return self._ids[ids]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head.lm_head(self.head.norm(hidden))

    @classmethod
    def from_pretrained(cls, folder, target: PreTrainedModel, **options) -> Eagle3Draft:
        """As of `EagleDraft`, without FR-Spec: the head has a vocabulary of its own."""
        count = target.config.num_hidden_layers
        options.setdefault("hidden_layers", (2, count // 2, count - 3))
        return cls(read_head(Eagle3Head, Path(folder), target), **options)

    def save_pretrained(self, folder) -> None:
        """Write `config.json` and `model.safetensors`."""
        save_head(self.head, Path(folder), "LlamaForCausalLMEagle3")


__all__ = ["Eagle3Draft", "Eagle3Head", "EagleConfig", "EagleDraft", "EagleHead"]
