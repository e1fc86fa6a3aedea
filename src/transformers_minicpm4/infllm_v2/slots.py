r"""
Attention over a cache of fixed size, in which nothing depends on a length that the host knows: what a compiled or
captured decode step needs.

Every row of the batch begins at slot 0 and its position `p` lies in slot `p`; drafted tokens lie behind the certain
ones, in the order of their pass. A step is told by tensors where its tokens go (`SlotStep`). The rule is that of
`reference`, for a few query tokens: dense, or InfLLM v2 with the compressed keys kept beside the keys.

Prefill does not come here: `SlotCache.row` gives ordinary cache layers over the same memory.

Shape letters: `B` batch, `T` tokens of a step, `N` slots that the step may read, `H` query heads, `G` key/value heads,
`R` query heads a group, `D` head size, `M` blocks, `K` compressed keys, `E` compressed keys that a step may complete.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from .blockwise import best_blocks, pool_windows
from .cache import InfLLMv2CacheLayer
from .configuration import InfLLMv2Config
from .reference import visible_windows


SLOT_ATTENTION = "slots"
# A step's slots come in multiples of this, or of the block size if that is more.
SLOT_MULTIPLE = 64
# Gathering blocks reads and writes them before they are read once more: it pays from that many times fewer on.
GATHER_GAIN = 3


class SlotLayer(CacheLayerMixin):
    """
    The memory of one layer.

    Attributes:
        keys, values: `[B, G, N, D]`.
        selection_keys: the un-rotated keys, `[B, G, N, D]`, with `use_nope`.
        fine, coarse: compressed keys, `[B, G, K, D]`, in sparse mode. Entries of windows that are not complete hold
            anything.
    """

    is_compileable = True
    is_sliding = False

    def __init__(
        self,
        batch: int,
        groups: int,
        slots: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: InfLLMv2Config | None = None,
    ):
        super().__init__()

        def empty(length):
            # Zeros: memory that is there from the beginning, and finite wherever a mask hides it.
            return torch.zeros(batch, groups, length, size, dtype=dtype, device=device)

        self.keys, self.values = empty(slots), empty(slots)
        self.settings, self.slots = settings, slots
        self.selection_keys = empty(slots) if settings is not None and settings.use_nope else None
        if settings is not None:
            self.fine, self.coarse = (
                empty(slots // settings.windows(coarse)[1] + spare_windows(settings, coarse))
                for coarse in (False, True)
            )
        self.is_initialized = True

    @property
    def source(self) -> torch.Tensor:
        """The keys that are compressed and selected by."""
        return self.keys if self.selection_keys is None else self.selection_keys

    def tensors(self) -> list[torch.Tensor]:
        named = (getattr(self, name, None) for name in ("keys", "values", "selection_keys", "fine", "coarse"))
        return [tensor for tensor in named if tensor is not None]

    def update(self, key_states, value_states, *args, **kwargs):
        return key_states, value_states

    def lazy_initialization(self, key_states, value_states) -> None: ...

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots, 0


def spare_windows(settings: InfLLMv2Config, coarse: bool) -> int:
    """Entries behind the last window, written by steps near the end and never read."""
    return 64 // settings.windows(coarse)[1] + 2


class SlotCache(Cache):
    """All layers; `settings` is `None` for dense attention."""

    def __init__(self, config, batch: int, slots: int, dtype, device, settings: InfLLMv2Config | None = None):
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        super().__init__(
            layers=[
                SlotLayer(batch, groups, slots, size, dtype, device, settings) for _ in range(config.num_hidden_layers)
            ]
        )
        self.settings, self.slots = settings, slots

    def update(self, key_states, value_states, layer_idx=None, *args, **kwargs):
        # `SlotStep.attend` writes: it alone knows where.
        return key_states, value_states

    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors())

    def row(self, row: int, length: int) -> DynamicCache:
        """
        An ordinary cache over the memory of one row, which holds `length` tokens: for prefill. It never grows past the
        slots, and what it writes lies in this cache.
        """
        cache = DynamicCache()
        cache.layers = [_row_layer(layer, row, length) for layer in self.layers]
        return cache

    @torch.no_grad()
    def move(self, row: int, sources: torch.Tensor, begin: torch.Tensor) -> None:
        """Bring the slots `sources` (`[n]`) of a row to the slots from `begin` on, in that order."""
        targets = begin + torch.arange(len(sources), device=sources.device)
        for layer in self.layers:
            for tensor in (layer.keys, layer.values, layer.selection_keys):
                if tensor is not None:
                    tensor[row].index_copy_(1, targets, tensor[row].index_select(1, sources))

    @torch.no_grad()
    def compress(self, begin: torch.Tensor, tokens: int) -> None:
        """Write the compressed keys of the windows that `tokens` tokens behind `begin` (`[B]`) may have completed."""
        if self.settings is None:
            return
        for layer in self.layers:
            for coarse in (False, True):
                _compress(layer, begin, tokens, coarse)


class _ReservedLayer(DynamicLayer):
    """A dense layer that writes into memory that is there already."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int):
        super().__init__()
        self._memory = (keys, values)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._narrow(length)

    def _narrow(self, length: int) -> None:
        self.keys, self.values = (tensor[:, :, :length] for tensor in self._memory)

    def update(self, key_states, value_states, *args, **kwargs):
        begin = self.keys.shape[2]
        self._narrow(begin + key_states.shape[2])
        self.keys[:, :, begin:] = key_states
        self.values[:, :, begin:] = value_states
        return self.keys, self.values


def _row_layer(layer: SlotLayer, row: int, length: int) -> DynamicLayer:
    own = slice(row, row + 1)
    if layer.settings is None:
        return _ReservedLayer(layer.keys[own], layer.values[own], length)
    new = InfLLMv2CacheLayer(layer.settings)
    new.lazy_initialization(layer.keys, layer.values)
    stored = {"keys": layer.keys, "values": layer.values, "fine": layer.fine, "coarse": layer.coarse}
    if layer.selection_keys is not None:
        stored["selection_keys"] = layer.selection_keys
    new.adopt_memory({name: tensor[own] for name, tensor in stored.items()}, length)
    return new


class SlotStep:
    """
    Where the tokens of one step go and what they see. Handed to the model as `slot_step`, with
    `attn_implementation="slots"`.

    Args:
        cache: the memory.
        past: certain tokens of each row, `[B]`: of all rows of the cache, or of its first.
        depths: distance of each token from the first of the step, `[T]`: its position is `past` plus that.
        ancestors: `[T, T]`, the step's rows on the path to each token: column `d` of row `t` is the row at depth `d`,
            for `d` up to the token's own depth (itself); what stands behind that is not read.
        reach: a tensor of `N` elements; only its length counts, in slots.
        form: `"dense"`, `"masked"` or `"gathered"` (all tokens sparse).
    """

    def __init__(self, cache: SlotCache, past, depths, ancestors, reach, form: str):
        self.cache, self.past, self.ancestors, self.form = cache, past, ancestors, form
        self.rows = len(past)
        self.tokens = len(depths)
        device = past.device
        self.positions = past[:, None] + depths  # [B, T]
        self.slots = past[:, None] + torch.arange(self.tokens, device=device)
        slot = torch.arange(reach.shape[0], device=device)
        self._dense_mask = None
        if self.tokens == 1:
            self.visible = (slot <= past[:, None])[:, None]  # [B, 1, N]
        else:
            on_path = torch.zeros(self.tokens, self.tokens, dtype=torch.bool, device=device)
            own = torch.arange(self.tokens, device=device)
            on_path = on_path.scatter(1, torch.where(own <= depths[:, None], ancestors, own[:, None]), True)
            row = (slot - past[:, None]).clamp(0, self.tokens - 1)  # [B, N]
            behind = (slot >= past[:, None]) & (slot < past[:, None] + self.tokens)
            drafted = on_path[:, row].transpose(0, 1) & behind[:, None]
            self.visible = (slot < past[:, None])[:, None] | drafted

    @property
    def reach(self) -> int:
        # Of a tensor, so that a compiled step knows it as a variable.
        return self.visible.shape[-1]

    def attend(self, index: int, query, key, value, scaling, selection_query=None, selection_key=None):
        """
        Write the step's keys and values and attend.

        Args:
            index: of the layer.
            query (`[B, H, T, D]`), key and value (`[B, G, T, D]`), selection_query and selection_key: un-rotated.

        Returns:
            `[B, T, H, D]`.
        """
        layer = self.cache.layers[index]
        batch, heads, tokens, size = query.shape
        groups = key.shape[1]
        self._write(layer.keys, key)
        self._write(layer.values, value)
        if layer.selection_keys is not None:
            self._write(layer.selection_keys, selection_key)
        folded = query.reshape(batch, groups, heads // groups, tokens, size)
        if layer.settings is not None and tokens == 1:
            # Also before the switch to sparse: the compressed keys must be there when it comes.
            for coarse in (False, True):
                _compress(layer, self.past, 1, coarse)
        if self.form == "dense":
            if self._dense_mask is None:  # one for all layers
                self._dense_mask = _for_group(self.visible[:, None], heads // groups)
            mask = self._dense_mask
        else:
            chosen = self._select(
                layer, folded if selection_query is None else selection_query.view_as(folded), scaling
            )
            if self.form == "gathered":
                return self._gathered(layer, folded, chosen, scaling)
            blocks = torch.arange(self.reach, device=query.device) // layer.settings.block_size
            # A drafted token lies in a slot that is not its position: its block is that of its position.
            allowed = self.visible[:, None] & self._by_slot(chosen, blocks, layer.settings)
            mask = _for_group(allowed, heads // groups)
        keys, values = (memory[:batch, :, : self.reach] for memory in (layer.keys, layer.values))
        # Heads of a group as further queries: each key is read once.
        output = scaled_dot_product_attention(folded.flatten(2, 3), keys, values, attn_mask=mask, scale=scaling)
        return output.view(batch, heads, tokens, size).transpose(1, 2)

    def _write(self, memory: torch.Tensor, new: torch.Tensor) -> None:
        if len(new) == 1:
            memory[:1].index_copy_(2, self.slots[0], new)
        else:
            rows = torch.arange(len(new), device=new.device)[:, None]
            memory[rows, :, self.slots] = new.transpose(1, 2)

    def _by_slot(self, chosen, blocks, settings):
        """`chosen` (`[B, G, T, M]`) by slot, `[B, G, T, N]`."""
        by_position = chosen[..., blocks]
        if self.tokens == 1:
            return by_position
        # Drafted rows: the block of their position.
        places = (self.positions // settings.block_size).clamp_max(chosen.shape[-1] - 1)  # [B, T]
        drafted = chosen.gather(3, places[:, None, None].expand(*chosen.shape[:3], -1))  # [B, G, T, T]
        index = self.slots.clamp_max(self.reach - 1)[:, None, None].expand_as(drafted)
        return by_position.scatter(3, index, drafted)

    def _slot_of(self, position: torch.Tensor) -> torch.Tensor:
        """The slots of the tokens at `position` (`[B, ..., T, n]`) on the path of each token."""
        if self.tokens == 1:
            return position
        shape = (-1, *[1] * (position.ndim - 1))
        past = self.past.view(shape)
        depth = (position - past).clamp(0, self.tokens - 1)
        row = self.ancestors.expand(*depth.shape[:-1], -1).gather(-1, depth)
        return torch.where(position < past, position, past + row)

    def _select(self, layer: SlotLayer, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Blocks that each token reads, bool `[B, G, T, M]`; query `[B, G, R, T, D]`."""
        settings = layer.settings
        dtype = torch.promote_types(query.dtype, torch.float32)
        query = query.to(dtype) * scaling
        weight = self._window_logits(layer, query, coarse=True)
        normaliser = weight.logsumexp(-1, keepdim=True)
        sees_any = normaliser > -torch.inf
        weight = self._window_logits(layer, query, coarse=False)
        weight = torch.where(sees_any, (weight - normaliser.nan_to_num(0, 0, 0)).exp(), 0).sum(2)  # [B, G, T, K]

        blocks = self.reach // settings.block_size
        scores = pool_windows(weight, blocks, settings)
        block = torch.arange(blocks, device=query.device)
        own = (self.positions // settings.block_size)[:, None, :, None]  # [B, 1, T, 1]
        forced = (block < settings.init_blocks) | (block >= own - settings.window_blocks)
        future = block > own
        scores = scores.clamp_max(torch.finfo(dtype).max)
        scores = scores.masked_fill(forced, torch.inf).masked_fill(future, -torch.inf)
        chosen = best_blocks(scores, settings.selected_blocks) & ~future
        if self.form == "gathered":
            return chosen
        # Tokens before the switch read everything they see.
        dense = self.positions < settings.first_sparse_position(0)
        return chosen | (dense[:, None, :, None] & ~future)

    def _window_logits(self, layer: SlotLayer, query: torch.Tensor, coarse: bool) -> torch.Tensor:
        """Logits against the compressed keys that each token sees, -inf where it sees none: `[B, G, R, T, K]`."""
        settings = layer.settings
        size, stride = settings.windows(coarse)
        count = self.reach // stride
        stored = (layer.coarse if coarse else layer.fine)[: self.rows, :, :count].to(query.dtype)
        batch, groups, heads, tokens, features = query.shape
        logits = (query.flatten(2, 3) @ stored.mT).unflatten(2, (heads, tokens))
        seen = visible_windows(self.positions, size, stride)  # [B, T]
        window = torch.arange(count, device=query.device)
        if tokens > 1:
            # Windows that reach into the drafted part differ from path to path and are not stored.
            first = visible_windows(self.past - 1, size, stride)
            new = first[:, None] + torch.arange(_completable(tokens, stride), device=query.device)  # [B, E]
            position = new[..., None] * stride + torch.arange(size, device=query.device)  # [B, E, size]
            slots = self._slot_of(position.flatten(1)[:, None].expand(-1, tokens, -1))  # [B, T, E * size]
            keys = _rows(layer.source, slots[:, None].expand(-1, groups, -1, -1))  # [B, G, T, E * size, D]
            fresh = keys.unflatten(3, (-1, size)).mean(4).to(query.dtype)
            own = torch.einsum("bgrtd,bgted->bgrte", query, fresh)
            spare = pad(logits, (0, new.shape[1]))  # for windows that end behind the step's slots
            logits = spare.scatter(-1, new[:, None, None, None].expand_as(own), own)[..., :count]
        return logits.masked_fill(window >= seen[:, None, None, :, None], -torch.inf)

    def _gathered(self, layer: SlotLayer, query: torch.Tensor, chosen: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention over the chosen blocks alone, as many for every token; query `[B, G, R, T, D]`."""
        settings = layer.settings
        batch, groups, heads, tokens, size = query.shape
        count, block = settings.selected_blocks, settings.block_size
        place = torch.where(chosen, chosen.cumsum(-1) - 1, count)
        number = torch.arange(chosen.shape[-1], device=query.device).expand_as(chosen)
        picked = number.new_zeros(*chosen.shape[:-1], count + 1).scatter(-1, place, number)[..., :count]
        position = (picked[..., None] * block + torch.arange(block, device=query.device)).flatten(3)  # [B, G, T, n]
        hidden = position > self.positions[:, None, :, None]
        slots = self._slot_of(position)
        keys, values = (_rows(memory, slots) for memory in (layer.keys, layer.values))  # [B, G, T, n, D]
        mask = ~hidden[:, :, :, None]  # [B, G, T, 1, n]
        output = scaled_dot_product_attention(
            query.transpose(2, 3).flatten(1, 2),
            keys.flatten(1, 2),
            values.flatten(1, 2),
            attn_mask=mask.expand(-1, -1, -1, heads, -1).flatten(1, 2),
            scale=scaling,
        )  # [B, G * T, R, D]
        return output.view(batch, groups, tokens, heads, size).permute(0, 2, 1, 3, 4).flatten(2, 3)


def _for_group(mask: torch.Tensor, heads: int) -> torch.Tensor:
    """A mask `[B, G or 1, T, N]` for the queries of all heads of a group: `[B, G or 1, R * T, N]`."""
    return mask[:, :, None].expand(-1, -1, heads, -1, -1).flatten(2, 3)


def slot_multiple(settings: InfLLMv2Config | None) -> int:
    """Slots come in whole multiples of this: whole blocks, in sparse mode."""
    return SLOT_MULTIPLE if settings is None else math.lcm(SLOT_MULTIPLE, settings.block_size)


def gather_pays(settings: InfLLMv2Config, tokens: int, reach: int) -> bool:
    """Whether a step of `tokens` tokens over `reach` slots should pick its blocks rather than mask the others."""
    return reach > GATHER_GAIN * tokens * settings.selected_blocks * settings.block_size


def _completable(tokens: int, stride: int) -> int:
    """The most windows that `tokens` more tokens can complete."""
    return (tokens - 1) // stride + 1


def _compress(layer: SlotLayer, begin: torch.Tensor, tokens: int, coarse: bool) -> None:
    # Also windows that are not complete yet are written: nobody reads them, and they are written again.
    size, stride = layer.settings.windows(coarse)
    memory = layer.coarse if coarse else layer.fine
    first = visible_windows(begin - 1, size, stride)
    window = first[:, None] + torch.arange(_completable(tokens, stride), device=begin.device)  # [B, E]
    slots = (window[..., None] * stride + torch.arange(size, device=begin.device)).flatten(1)
    slots = slots.clamp_max(layer.slots - 1)[:, None].expand(-1, memory.shape[1], -1)
    mean = _rows(layer.source, slots).unflatten(2, (-1, size)).mean(3)  # [B, G, E, D]
    if len(mean) == 1:
        memory[:1].index_copy_(2, window[0], mean)
    else:
        memory[torch.arange(len(mean), device=begin.device)[:, None], :, window] = mean.transpose(1, 2)


def _rows(memory: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """`memory` (`[B, G, N, D]`, also of more rows) at `slots` (`[B, G, ...]`): `[B, G, ..., D]`."""
    batch, (_, groups, length, size) = len(slots), memory.shape
    pair = torch.arange(batch * groups, device=slots.device).view(batch, groups, *[1] * (slots.ndim - 2))
    index = (pair * length + slots).flatten()
    return memory.view(-1, size).index_select(0, index).view(*slots.shape, size)


def slot_attention_forward(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """
    What Transformers calls for `attn_implementation="slots"`.

    Raises:
        ValueError: a model that does not hand the step to its attention, or whose attention knows more than a softmax.
    """
    step = kwargs.get("slot_step")
    if step is None:
        raise ValueError(
            f"{type(module).__name__} does not hand keyword arguments to its attention function, which a cache of "
            "fixed size needs; use model.generate without the engine."
        )
    unknown = [name for name in ("softcap", "s_aux", "sliding_window") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} attends with {', '.join(unknown)}, which a cache of fixed size does not know; "
            "use model.generate without the engine."
        )
    output = step.attend(
        module.layer_idx,
        query,
        key,
        value,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        kwargs.get("selection_query"),
        kwargs.get("selection_key"),
    )
    return output, None
