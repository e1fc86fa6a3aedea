"""
Sampling a chunk: a random stream for each rollout, log-probabilities noted as tokens are drawn, and lengths by row.

Shape letters: B rows, V vocabulary, S tokens so far (prompt, earlier chunks and this one, padded on the left).
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer


# Rows down to this share of the longest are prefilled with it.
LIKE_LENGTH = 0.6


def uniforms(seed: int, numbers: np.ndarray, samples: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """
    A number in [0, 1) for each token, float64 [B], that depends on nothing but its place: seed, prompt, completion of
    the prompt, token of the completion.

    The place is folded into 64 bits by SplitMix64's finalizer (Steele, Lea and Flood 2014), once for each coordinate.
    """
    state = np.zeros(len(numbers), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for coordinate in (np.full(len(numbers), seed), numbers, samples, positions):
            state = _mixed(state + coordinate.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return (state >> np.uint64(11)) * 2.0**-53


def _mixed(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class TrajectorySampler(LogitsProcessor):
    """
    Draws each row's token from its own stream, by inverting the cumulative distribution at one uniform number.

    To be used with `do_sample=False`: the drawn token is the only one left. Afterwards `logprobs` [B, T] holds, in
    nats, what the temperature-scaled model said of each token drawn, before top-k, top-p and min-p, as training sees
    it.
    """

    def __init__(self, seed: int, numbers, samples, starts, temperature: float, top_k: int, top_p: float, min_p):
        """`numbers`, `samples` [B]: prompt and completion of each row; `starts` [B]: tokens it has already."""
        self.seed, self.numbers, self.samples = seed, np.asarray(numbers), np.asarray(samples)
        self.starts = np.asarray(starts)
        self.temperature = TemperatureLogitsWarper(float(temperature))
        self.warpers = LogitsProcessorList(
            [
                *([TopKLogitsWarper(top_k)] if top_k else []),
                *([TopPLogitsWarper(top_p)] if top_p < 1.0 else []),
                *([MinPLogitsWarper(min_p)] if min_p else []),
            ]
        )
        self.drawn: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = self.temperature(input_ids, scores.float())
        place = self.starts + len(self.drawn)
        dtype = torch.float32 if scores.device.type == "mps" else torch.float64  # which Macs' GPUs lack
        cumulative = self.warpers(input_ids, logits).softmax(-1, dtype=dtype).cumsum(-1)
        target = torch.from_numpy(uniforms(self.seed, self.numbers, self.samples, place)).to(scores.device, dtype)
        # `right`: a token of probability 0 is stepped over even where the target meets its edge.
        token = torch.searchsorted(cumulative, target[:, None] * cumulative[:, -1:], right=True)
        token = token.clamp(max=scores.shape[-1] - 1)
        self.drawn.append(logits.log_softmax(-1).gather(-1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)

    def logprobs(self, sequences: torch.Tensor) -> torch.Tensor:
        """Of the tokens drawn [B, T]; `sequences` is there for the sake of `LogprobRecorder`'s shape."""
        return torch.stack(self.drawn, dim=1)


class LogprobRecorder(LogitsProcessor):
    """Notes log-probabilities while `generate` samples by itself. Keeps one step of [B, V], not all of them."""

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.waiting: torch.Tensor | None = None
        self.noted: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._note(input_ids)
        self.waiting = (scores.float() / self.temperature).log_softmax(-1)
        return scores

    def _note(self, sequences: torch.Tensor) -> None:
        if self.waiting is not None:
            self.noted.append(self.waiting.gather(-1, sequences[:, -1:])[:, 0])

    def logprobs(self, sequences: torch.Tensor) -> torch.Tensor:
        """Of the tokens sampled [B, T]; `sequences` [B, S] is what `generate` returned."""
        self._note(sequences)
        return torch.stack(self.noted, dim=1)


class ReservedLayer(DynamicLayer):
    """A cache layer whose room was reserved: appending a token copies that token, not the whole past."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int):
        """`keys`, `values` `[B, heads, room, head size]`, filled up to `length`."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self.buffers = (keys, values)
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        begin = self.keys.shape[2]
        end = begin + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


@torch.no_grad()
def prefill(model, input_ids: torch.Tensor, attention_mask: torch.Tensor, room: int) -> DynamicCache | None:
    """
    The cache of all tokens but the last, computed a few rows of like length at a time: fresh prompts are not padded to
    the longest rollout, and all rows still decode in one loop.

    Args:
        input_ids, attention_mask `[B, S]`: padded on the left.
        room: tokens that will follow.

    Returns:
        What `generate` takes as `past_key_values`, or `None` where that would not be the same: a row has but one
        token, the model keeps something else than all keys and values (sliding windows, compressed keys, states), or
        its rotations depend on the longest row (LongRoPE, dynamic NTK).
    """
    lengths = attention_mask.sum(1).tolist()
    width = input_ids.shape[1]
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if min(lengths) < 2 or kinds != {DynamicLayer} or model.config._attn_implementation == "infllm_v2":
        return None
    if _rotations_depend_on_length(model.config, width + room):
        return None
    rest = sorted(range(len(lengths)), key=lengths.__getitem__)
    whole: list[tuple[torch.Tensor, torch.Tensor]] = []
    while rest:
        least = LIKE_LENGTH * lengths[rest[-1]]
        rows = [row for row in rest if lengths[row] > least]
        rest = [row for row in rest if lengths[row] <= least]
        begin = width - lengths[rows[-1]]
        mask = attention_mask[rows, begin:-1]
        part = DynamicCache(config=model.config)
        model(
            input_ids=input_ids[rows, begin:-1],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=part,
            use_cache=True,
            logits_to_keep=1,
        )
        if any(layer.keys is None or layer.keys.shape[2] != mask.shape[1] for layer in part.layers):
            return None
        for index, layer in enumerate(part.layers):
            if len(whole) == index:
                whole.append(
                    tuple(
                        tensor.new_zeros(len(lengths), tensor.shape[1], width - 1 + room, tensor.shape[3])
                        for tensor in (layer.keys, layer.values)
                    )
                )
            keys, values = whole[index]
            keys[rows, :, begin : width - 1], values[rows, :, begin : width - 1] = layer.keys, layer.values
    cache = DynamicCache(config=model.config)
    cache.layers = [ReservedLayer(keys, values, width - 1) for keys, values in whole]
    return cache


def _rotations_depend_on_length(config, length: int) -> bool:
    parameters = getattr(config, "rope_parameters", None) or {}
    original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    return parameters.get("rope_type") in ("dynamic", "longrope") and length > original


class Budgets(StoppingCriteria):
    """Ends each row at its own number of new tokens."""

    def __init__(self, budgets: list[int], width: int, device: torch.device):
        """`budgets` [B] in tokens; `width` in tokens, of the padded input."""
        self.ends = torch.tensor(budgets, device=device) + width

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends
