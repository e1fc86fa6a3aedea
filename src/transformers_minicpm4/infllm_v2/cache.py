"""
The cache layer of InfLLM v2: keys, values, and beside them the compressed keys, so that a decode step never rereads
the whole past.

The compressed keys are a function of the keys alone, whatever mix of updates, crops and batch operations led there.
Each row's windows are counted from its first token, so padding changes nothing.

Shape letters: `B` batch, `N` cached tokens, `G` key/value heads, `D` head size, `K` compressed keys.
"""

from __future__ import annotations

import functools

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .configuration import InfLLMv2Config
from .reference import compress_keys


class _Growing:
    """A `[B, G, n, D]` tensor that grows along `n` in place, with room to spare."""

    def __init__(self):
        self.buffer: torch.Tensor | None = None
        self.length = 0

    @property
    def tensor(self) -> torch.Tensor | None:
        return None if self.buffer is None else self.buffer[:, :, : self.length]

    @tensor.setter
    def tensor(self, tensor: torch.Tensor | None) -> None:
        self.buffer, self.length = tensor, 0 if tensor is None else tensor.shape[2]

    def append(self, new: torch.Tensor) -> None:
        if torch.is_grad_enabled() and (new.requires_grad or (self.buffer is not None and self.buffer.requires_grad)):
            # Backward still needs the earlier state: never write into it.
            self.tensor = new if self.length == 0 else torch.cat([self.tensor, new], dim=2)
            return
        needed = self.length + new.shape[2]
        self.reserve(new, needed)
        self.buffer[:, :, self.length : needed] = new
        self.length = needed

    def reserve(self, like: torch.Tensor, needed: int) -> None:
        """Make the buffer writable and at least `needed` long."""
        kept = self.buffer
        frozen = kept is not None and (
            kept.requires_grad or (kept.is_inference() and not torch.is_inference_mode_enabled())
        )
        if kept is not None and kept.shape[2] >= needed and not frozen:
            return
        shape = (like.shape[0], like.shape[1], needed + needed // 8 + 64, like.shape[3])
        self.buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
        if self.length:
            self.buffer[:, :, : self.length] = kept[:, :, : self.length].detach()

    def map(self, function) -> None:
        if self.buffer is not None:
            self.buffer = function(self.buffer)


class InfLLMv2CacheLayer(DynamicLayer):
    """
    A `DynamicLayer` that also keeps the compressed keys, and the un-rotated keys where `config.use_nope`.

    `update` takes what the attention layer knows: `selection_key` (`[B, G, S, D]`, with `use_nope`) and `row_starts`
    (first token of each row; `None` for a dense call, which leaves compression to the next sparse one).
    """

    def __init__(self, config: InfLLMv2Config):
        self._stored = {name: _Growing() for name in ("keys", "values", "selection_keys", "fine", "coarse")}
        super().__init__()
        self.config = config
        self.row_starts: list[int] | None = None
        self._compressed_length = 0  # tokens that the compressed keys account for
        # Keys, values and un-rotated keys of drafted rows that are not decided yet (`tree.tree_attention`).
        self.drafted: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None

    @property
    def keys(self) -> torch.Tensor | None:
        return self._stored["keys"].tensor

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._stored["keys"].tensor = tensor

    @property
    def values(self) -> torch.Tensor | None:
        return self._stored["values"].tensor

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._stored["values"].tensor = tensor

    @property
    def compressed_keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fine and coarse compressed keys, `[B, G, K, D]` each; rows that start later have spare entries."""
        return self._stored["fine"].tensor, self._stored["coarse"].tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        selection_key: torch.Tensor | None = None,
        row_starts: list[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._stored["keys"].append(key_states)
        self._stored["values"].append(value_states)
        if selection_key is not None:
            self._stored["selection_keys"].append(selection_key.detach())
        if row_starts is not None:
            self._compress(row_starts)
        return self.keys, self.values

    @torch.no_grad()
    def _compress(self, row_starts: list[int]) -> None:
        """Add the compressed keys of the windows completed since the last call."""
        source = self._stored["selection_keys" if self.config.use_nope else "keys"]
        length = self.get_seq_length()
        if source.length != length:
            raise ValueError(
                f"This cache holds {length} keys but {source.length} un-rotated ones: part of it was filled by a "
                "dense pass, and use_nope cannot select from that. Start from an empty cache."
            )
        if row_starts != self.row_starts:
            self._compressed_length = 0
            self.row_starts = list(row_starts)
        keys = source.tensor.detach()
        same = len(set(row_starts)) == 1
        rows = [(slice(None), row_starts[0])] if same else [(slice(i, i + 1), s) for i, s in enumerate(row_starts)]
        for name, coarse in (("fine", False), ("coarse", True)):
            size, stride = self.config.windows(coarse)
            stored = self._stored[name]
            counts = [
                [max((upto - start - size) // stride + 1, 0) for upto in (self._compressed_length, length)]
                for _, start in rows
            ]
            longest = max(count for _, count in counts)
            stored.length = min(stored.length, longest)
            stored.reserve(keys, longest)
            stored.length = longest
            for (row, start), (done, count) in zip(rows, counts):
                if count > done:
                    tokens = keys[row, :, start + done * stride : start + (count - 1) * stride + size]
                    stored.buffer[row, :, done:count] = compress_keys(tokens, size, stride)
        self._compressed_length = length

    def keep_drafted(self, rows: list[int]) -> None:
        """Append the accepted ones of the rows that the last `tree_attention` left here, in order."""
        chosen = torch.tensor(rows, device=self.device)
        key, value, selection_key = (
            None if tensor is None else tensor.index_select(2, chosen) for tensor in self.drafted
        )
        self.drafted = None
        self.update(key, value, selection_key, self.row_starts)

    def reset(self) -> None:
        self.drafted = None
        for stored in self._stored.values():
            stored.tensor = None
        self.row_starts, self._compressed_length = None, 0
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (a negative count, as in `DynamicLayer`)."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number of tokens to remove, or 0; got {tokens_to_remove}. To keep n tokens, "
                "pass n - get_seq_length()."
            )
        if not self.is_initialized:
            return
        for name in ("keys", "values", "selection_keys"):
            stored = self._stored[name]
            stored.length = max(stored.length + tokens_to_remove, 0)
        # Windows that reach into the cropped part are overwritten when they are complete again.
        self._compressed_length = min(self._compressed_length, self.get_seq_length())

    def _map_rows(self, function, starts) -> None:
        for stored in self._stored.values():
            stored.map(function)
        if self.row_starts is not None:
            self.row_starts = starts(self.row_starts)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        chosen = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
        self._map_rows(
            lambda tensor: tensor.index_select(0, chosen.to(tensor.device)),
            lambda starts: [starts[i] for i in chosen.tolist()],
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(
            lambda tensor: tensor.repeat_interleave(repeats, dim=0),
            lambda starts: [start for start in starts for _ in range(repeats)],
        )

    # The compressed keys stay on the device: they are a few percent of the cache and read by every step.
    def offload(self) -> None:
        for name in ("keys", "values", "selection_keys"):
            self._stored[name].map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        for name in ("keys", "values", "selection_keys"):
            self._stored[name].map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def adopt_memory(self, memory: dict[str, torch.Tensor], length: int) -> None:
        """
        Work in memory that is there already, of which the first `length` tokens are filled and compressed: `keys`,
        `values`, `fine`, `coarse` and, with `use_nope`, `selection_keys`, each with room for all that will come.
        """
        for name, tensor in memory.items():
            stored = self._stored[name]
            stored.buffer, stored.length = tensor, length
        for name, coarse in (("fine", False), ("coarse", True)):
            size, stride = self.config.windows(coarse)
            self._stored[name].length = max((length - size) // stride + 1, 0)
        self.row_starts, self._compressed_length = [0], length

    @classmethod
    def adopt(cls, layer: DynamicLayer, config: InfLLMv2Config) -> InfLLMv2CacheLayer:
        """A sparse layer with the content of another one."""
        new = cls(config)
        if layer.get_seq_length() == 0:
            return new
        new.lazy_initialization(layer.keys, layer.values)
        new.keys, new.values = layer.keys, layer.values
        if isinstance(layer, cls):
            new._stored["selection_keys"] = layer._stored["selection_keys"]
        return new


def make_sparse(cache: Cache, config: InfLLMv2Config) -> None:
    """
    Give `cache` the layers that sparse attention needs, in place; whatever it holds is kept.

    Raises:
        ValueError: a cache whose layers cannot keep compressed keys (static, quantized, sliding).
    """
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = functools.partial(InfLLMv2CacheLayer, config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is InfLLMv2CacheLayer and layer.config == config:
            continue
        if type(layer) not in (DynamicLayer, InfLLMv2CacheLayer):
            raise ValueError(
                f"InfLLM v2 needs a dynamic cache, got a layer of type {type(layer).__name__}. Use DynamicCache (the "
                'default, cache_implementation="dynamic" or "offloaded"), or attn_implementation="sdpa".'
            )
        cache.layers[index] = InfLLMv2CacheLayer.adopt(layer, config)
