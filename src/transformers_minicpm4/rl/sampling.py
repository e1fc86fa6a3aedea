"""
Sampling a chunk: a random stream for each rollout, log-probabilities noted as tokens are drawn, and lengths by row.

Shape letters: B rows, V vocabulary, S tokens so far (prompt, earlier chunks and this one, padded on the left).
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


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
        cumulative = self.warpers(input_ids, logits).softmax(-1, dtype=torch.float64).cumsum(-1)
        target = torch.from_numpy(uniforms(self.seed, self.numbers, self.samples, place)).to(scores.device)
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


class Budgets(StoppingCriteria):
    """Ends each row at its own number of new tokens."""

    def __init__(self, budgets: list[int], width: int, device: torch.device):
        """`budgets` [B] in tokens; `width` in tokens, of the padded input."""
        self.ends = torch.tensor(budgets, device=device) + width

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends
