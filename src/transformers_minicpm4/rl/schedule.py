"""
What a chunk length costs, before it is tried: the schedule of chunk-wise rollouts played through with lengths alone.

The real `RolloutStore` decides what is admitted, continued and trained; only the tokens are missing, and the clock is
a handful of costs (`StepCosts`). What is played does not depend on the costs, so one play can be priced many times.
Chunk-wise rollouts are those of MiniCPM4 (arXiv 2506.07900, 3.2.3 and Algorithm 1). Shape letters: I iterations,
P processes, R rows (completions) of a process.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import numpy as np

from .rollout_store import RolloutStore


@dataclass(frozen=True)
class StepCosts:
    """
    Seconds of one process. Processes work side by side, and each part of a step lasts as long as its slowest process.

    Args:
        decode_step: of one decode step, whatever the number of rows.
        decode_row: more for each row of a decode step.
        decode_context: more for each row and each token that it looks back on.
        prefill_token: of reading a token of prompt or earlier chunks again, at the start of a chunk.
        logprob_token: of the pass that recomputes log-probabilities; 0 with `behavior_logprobs="generation"`.
        train_step: of a training step, whatever its tokens.
        train_token: more for each token trained on.
        padded: `True`: every row of a process costs as much as its longest, as in `ChunkwiseGRPOTrainer`. `False`:
            rows leave when they end and nothing is padded, as in serving engines.
    """

    decode_step: float = 0.0
    decode_row: float = 0.0
    decode_context: float = 0.0
    prefill_token: float = 0.0
    logprob_token: float = 0.0
    train_step: float = 0.0
    train_token: float = 0.0
    padded: bool = True

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "padded" and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of seconds, 0 or more; got {value}.")


@dataclass(frozen=True)
class SimulatedStep:
    """One training step, in the words of the trainer's metrics (`rollout/...`)."""

    iterations: int
    # Left unfinished, and finished but not taken, when the batch is full.
    live_rows: int
    waiting_rows: int
    tokens_generated: int
    slots: int
    groups_dropped: int
    # Tokens of the batch by the number of batches trained since they were sampled.
    ages: dict[int, int]

    @property
    def trained(self) -> int:
        """Tokens of the batch."""
        return sum(self.ages.values())

    @property
    def slot_utilization(self) -> float:
        return self.tokens_generated / self.slots if self.slots else math.nan


@dataclass(frozen=True)
class Prediction:
    """Means over the simulated steps after the warm-up. Staleness in batches, of trained tokens."""

    chunk_length: int
    sampling_seconds: float
    logprob_seconds: float
    training_seconds: float
    slot_utilization: float
    iterations: float
    staleness_mean: float
    staleness_max: int
    # Rows that get a chunk in an iteration, over all processes.
    live_rows_mean: float
    live_rows_peak: int
    # Tokens of the largest call, padding included where there is some: what one process's KV cache must hold.
    context_tokens_peak: int
    tokens_generated_per_trained: float
    # All steps, those of the warm-up too.
    steps: tuple[SimulatedStep, ...]

    @property
    def step_seconds(self) -> float:
        return self.sampling_seconds + self.logprob_seconds + self.training_seconds


class _Counted:
    """Stands in for a rollout's tokens, of which only the number matters here: 32,768 of them for nothing."""

    def __init__(self):
        self.tokens = 0

    def __len__(self) -> int:
        return self.tokens

    def extend(self, more: Sequence) -> None:
        self.tokens += len(more)


class _Groups:
    """Lengths of each group's completions, and whether it will be dropped; the same for every chunk length."""

    def __init__(self, lengths, num_generations: int, longest: int, dropped: float | Collection[int], seed: int):
        self.lengths = np.asarray(lengths)
        if self.lengths.size == 0 or self.lengths.ndim not in (1, 2):
            raise ValueError("lengths must be a list of lengths in tokens, or one list for each group, not empty.")
        if not np.issubdtype(self.lengths.dtype, np.integer) or self.lengths.min() < 1 or self.lengths.max() > longest:
            raise ValueError(
                f"lengths must be whole numbers of tokens from 1 to max_completion_length={longest}; got values from "
                f"{self.lengths.min()} to {self.lengths.max()}."
            )
        if self.lengths.ndim == 2 and self.lengths.shape[1] != num_generations:
            raise ValueError(
                f"lengths has {self.lengths.shape[1]} completions in a group, num_generations is {num_generations}."
            )
        self.num_generations, self.dropped = num_generations, dropped
        self.random = np.random.default_rng(seed)

    def next(self, number: int) -> tuple[list[int], bool]:
        if self.lengths.ndim == 2:
            if number >= len(self.lengths):
                raise ValueError(f"lengths has {len(self.lengths)} groups, and the schedule asks for one more.")
            lengths = self.lengths[number]
        else:
            lengths = self.lengths[self.random.integers(len(self.lengths), size=self.num_generations)]
        if isinstance(self.dropped, float | int):
            return lengths.tolist(), bool(self.random.random() < self.dropped)
        return lengths.tolist(), number in self.dropped


@dataclass(frozen=True)
class _Played:
    """Loads [I, P] of the iterations after the warm-up, `train` [steps, P], and what was counted."""

    chunk_length: int
    steps: tuple[SimulatedStep, ...]
    warmup_steps: int
    decode_steps: np.ndarray
    decode_rows: np.ndarray
    decode_context: np.ndarray
    prefill: np.ndarray
    logprob: np.ndarray
    train: np.ndarray
    # [I]: tokens of the largest call, and rows that get a chunk.
    largest: np.ndarray
    live_rows: np.ndarray

    def priced(self, costs: StepCosts) -> Prediction:
        steps = self.steps[self.warmup_steps :]
        sampling = (
            costs.decode_step * self.decode_steps
            + costs.decode_row * self.decode_rows
            + costs.decode_context * self.decode_context
            + costs.prefill_token * self.prefill
        )
        ages = [(age, tokens) for step in steps for age, tokens in step.ages.items()]
        trained = sum(step.trained for step in steps)
        generated, slots = sum(step.tokens_generated for step in steps), sum(step.slots for step in steps)
        return Prediction(
            chunk_length=self.chunk_length,
            sampling_seconds=float(sampling.max(1).sum()) / len(steps),
            logprob_seconds=float(costs.logprob_token * self.logprob.max(1).sum()) / len(steps),
            training_seconds=float(costs.train_step + costs.train_token * self.train.max(1).mean()),
            slot_utilization=generated / slots if slots else math.nan,
            iterations=sum(step.iterations for step in steps) / len(steps),
            staleness_mean=sum(age * tokens for age, tokens in ages) / trained,
            staleness_max=max(age for age, _ in ages),
            live_rows_mean=float(self.live_rows.mean()),
            live_rows_peak=int(self.live_rows.max()),
            context_tokens_peak=int(self.largest.max()),
            tokens_generated_per_trained=generated / trained,
            steps=self.steps,
        )


def simulate(
    lengths,
    chunk_length: int,
    max_completion_length: int,
    num_generations: int,
    groups_per_batch: int,
    costs: StepCosts,
    steps: int = 50,
    warmup_steps: int | None = None,
    seed: int = 0,
    max_live_rows: int | None = None,
    max_staleness: int | None = None,
    processes: int = 1,
    prompt_tokens: int = 0,
    rollout_batch_size: int | None = None,
    dropped: float | Collection[int] = 0.0,
    sharing: str = "dealt",
) -> Prediction:
    """
    Play the schedule of `steps` training steps after `warmup_steps`, and price it.

    Args:
        lengths: completion lengths in tokens. A list: each completion draws one of them. Two-dimensional, [groups,
            num_generations]: what the groups have, in the order in which they are admitted.
        chunk_length: in tokens; `max_completion_length` or more is ordinary GRPO.
        groups_per_batch: prompts of a batch.
        warmup_steps: at first only short completions are done; `None` is twice as many as the longest takes.
        max_live_rows, max_staleness: as in [`ChunkwiseGRPOConfig`].
        processes: what the rows are shared out to.
        prompt_tokens: length of every prompt, in tokens.
        rollout_batch_size: rows of one call of a process; `None` for all.
        dropped: share of groups that `dynamic_sampling` drops, or the numbers of those it dropped.
        sharing: `"dealt"`: for sampling, rows in the order of their lengths so far, dealt out like cards; the batch in
            its own order, a stretch for each process, as `ChunkwiseGRPOTrainer` does. `"balanced"`: passes over tokens
            shared out evenly besides.

    Raises:
        ValueError: a length or setting that is not allowed.
    """
    played = _play(
        lengths, chunk_length, max_completion_length, num_generations, groups_per_batch, steps, warmup_steps, seed,
        max_live_rows, max_staleness, processes, prompt_tokens, rollout_batch_size, dropped, sharing, costs.padded,
    )  # fmt: skip
    return played.priced(costs)


def _play(
    lengths, chunk_length, max_completion_length, num_generations, groups_per_batch, steps, warmup_steps, seed,
    max_live_rows, max_staleness, processes, prompt_tokens, rollout_batch_size, dropped, sharing, padded,
) -> _Played:  # fmt: skip
    for name, value, least in (
        ("chunk_length", chunk_length, 1),
        ("max_completion_length", max_completion_length, 1),
        ("num_generations", num_generations, 1),
        ("groups_per_batch", groups_per_batch, 1),
        ("steps", steps, 1),
        ("processes", processes, 1),
        ("prompt_tokens", prompt_tokens, 0),
        ("rollout_batch_size", rollout_batch_size, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}.")
    if groups_per_batch * num_generations % processes:
        raise ValueError(
            f"{groups_per_batch} groups of {num_generations} completions cannot be shared evenly by {processes} "
            "processes; choose a number that divides them."
        )
    if isinstance(dropped, float | int) and not 0 <= dropped < 1:
        raise ValueError(f"dropped must be a share from 0 to below 1, got {dropped}.")
    if sharing not in ("dealt", "balanced"):
        raise ValueError(f"sharing must be 'dealt' or 'balanced', got {sharing!r}.")
    if warmup_steps is None:
        warmup_steps = 2 * -(-max_completion_length // chunk_length)
    source = _Groups(lengths, num_generations, max_completion_length, dropped, seed)
    store = RolloutStore(num_generations, max_completion_length, groups_per_batch, max_live_rows, max_staleness)
    wanted, unwanted = {}, set()
    done, iterations, trained = [], [], []
    while len(done) < warmup_steps + steps:
        counted = dict.fromkeys(("iterations", "tokens", "slots", "dropped"), 0)
        batch = None
        while batch is None:
            counted["iterations"] += 1
            for _ in range(store.admission()):
                group = store.admit(0, [])
                wanted[group.number], drop = source.next(group.number)
                if drop:
                    unwanted.add(group.number)
                for row in group.trajectories:
                    row.token_ids, row.logprobs = _Counted(), _Counted()
            live = store.unfinished()
            before = np.array([len(row.token_ids) for _, row in live], dtype=np.int64) + prompt_tokens
            gained = np.zeros(len(live), dtype=np.int64)
            for place, (group, row) in enumerate(live):
                left = wanted[group.number][row.sample] - len(row.token_ids)
                chunk = range(min(left, store.budget(row, chunk_length)))
                store.extend(row, chunk, chunk, store.batches, len(chunk) == left)
                gained[place] = len(chunk)
            for group in store.waiting():
                if group.number in unwanted:
                    store.drop(group)
                    counted["dropped"] += 1
                for row in group.trajectories:
                    row.rewards = [0.0]
            if live:
                order = np.argsort(before, kind="stable")
                load, slots = _sampling_load(
                    before[order], gained[order], processes, sharing, padded, rollout_batch_size
                )
                counted["slots"] += slots
                counted["tokens"] += int(gained.sum())
            else:
                # Enough groups wait already.
                load = (*[np.zeros(processes, dtype=np.int64)] * 5, 0)
            if len(done) >= warmup_steps:
                iterations.append((len(live), *load))
            batch = store.take()
        rows = [row for group in batch for row in group.trajectories]
        ages = {}
        for row in rows:
            for made, tokens in row.chunks:
                # The batch was counted when it was taken.
                age = store.batches - 1 - made
                ages[age] = ages.get(age, 0) + tokens
        for group in batch:
            del wanted[group.number]
        if len(done) >= warmup_steps:
            size = np.array([len(row.token_ids) for row in rows], dtype=np.int64) + prompt_tokens
            share = _shares(np.sort(size) if sharing == "balanced" else size, processes, padded, sharing == "balanced")
            load = share.max(1) * share.shape[1] if padded else share.sum(1)
            trained.append(_evened(load) if sharing == "balanced" else load)
        done.append(
            SimulatedStep(
                counted["iterations"],
                len(store.unfinished()),
                len(store.waiting()) * num_generations,
                counted["tokens"],
                counted["slots"],
                counted["dropped"],
                ages,
            )
        )
    live_rows, *loads, largest = (np.array(values) for values in zip(*iterations, strict=True))
    return _Played(chunk_length, tuple(done), warmup_steps, *loads, np.array(trained), largest, live_rows)


@dataclass(frozen=True)
class Plan:
    """Predictions by chunk length, longest first; the first is ordinary GRPO."""

    predictions: tuple[Prediction, ...]
    recommended: int


def plan(
    lengths,
    max_completion_length: int,
    num_generations: int,
    groups_per_batch: int,
    costs: StepCosts | None = None,
    chunk_lengths: Sequence[int] | None = None,
    **settings,
) -> Plan:
    """
    Predict a step for each chunk length, and choose one.

    Args:
        costs: `None` for the paper's ([`PAPER_COSTS`], with padding).
        chunk_lengths: in tokens; `None` for a half, a quarter, an eighth and a sixteenth of `max_completion_length`.
        settings: more arguments of [`simulate`].

    Returns:
        `recommended` is the longest chunk whose step is at most 3 % longer than the shortest step: longer chunks are
        less stale and need less memory.
    """
    if costs is None:
        costs = replace(PAPER_COSTS, padded=True)
    if chunk_lengths is None:
        chunk_lengths = [-(-max_completion_length // parts) for parts in (2, 4, 8, 16)]
    shorter = {length for length in chunk_lengths if length < max_completion_length}
    predictions = tuple(
        simulate(lengths, length, max_completion_length, num_generations, groups_per_batch, costs, **settings)
        for length in (max_completion_length, *sorted(shorter, reverse=True))
    )
    shortest = min(prediction.step_seconds for prediction in predictions)
    good = (prediction for prediction in predictions if prediction.step_seconds <= 1.03 * shortest)
    return Plan(predictions, next(good).chunk_length)


# --- Costs from what was measured ------------------------------------------------------------------------------------


def log_normal(median: float, sigma: float, longest: int, count: int = 4096) -> np.ndarray:
    """Lengths in tokens at evenly spaced quantiles of a log-normal distribution, cut at `longest`."""
    places = (np.arange(count) + 0.5) / count
    normal = np.array([NormalDist().inv_cdf(place) for place in places])
    return np.exp(math.log(median) + sigma * normal).round().clip(1, longest).astype(np.int64)


@dataclass(frozen=True)
class Setting:
    """How runs with a known table of seconds were made. Rows leave when they end, and work is shared out evenly."""

    max_completion_length: int
    num_generations: int
    groups_per_batch: int
    processes: int
    steps: int = 16

    def play(self, median: float, sigma: float, chunk_length: int) -> _Played:
        return _play_once(self, median, sigma, chunk_length)


@dataclass(frozen=True)
class Fit:
    """
    What [`fit`] found: `median` (tokens), and in `costs` the seconds of a decode step, of a row in it, and of a pass
    over a token. `error` is the root mean square of relative errors of the numbers fitted.
    """

    median: float
    sigma: float
    costs: StepCosts
    error: float
    setting: Setting

    def predict(self, chunk_length: int) -> Prediction:
        return self.setting.play(self.median, self.sigma, chunk_length).priced(self.costs)


@lru_cache(maxsize=256)
def _play_once(setting: Setting, median: float, sigma: float, chunk_length: int) -> _Played:
    lengths = log_normal(median, sigma, setting.max_completion_length)
    # A play makes thousands of small objects and no cycles; looking for some would take half of its time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _play(
            lengths, chunk_length, setting.max_completion_length, setting.num_generations, setting.groups_per_batch,
            setting.steps, None, 0, None, None, setting.processes, 0, None, 0.0, "balanced", False,
        )  # fmt: skip
    finally:
        if collecting:
            gc.enable()


def fit(measured: Mapping[int, tuple[float, float]], setting: Setting, sigma: float = 1.0) -> Fit:
    """
    Find the costs behind a table of seconds whose lengths are not known.

    Four parameters: the median of the lengths (log-normal, `sigma` given), a decode step, a row of it, a token's
    forward pass. That pass is also the prefill and the log-prob pass, and training is three of them (forward, and
    backward at twice its price).

    Args:
        measured: chunk length in tokens: (seconds of a step, seconds of its sampling). Two numbers each, to be fitted
            with equal relative weight; two chunk lengths or more.
    """
    if len(measured) < 2:
        raise ValueError(f"measured has {len(measured)} chunk length(s), and four parameters need two or more.")
    median, width = setting.max_completion_length / 8, 4.0
    tried = {}
    # A coarse search over the median, refined around its best place; the costs follow by least squares.
    while width > 1.1:
        for factor in (1 / width, 1.0, width):
            place = round(min(max(median * factor, 1), setting.max_completion_length))
            if place not in tried:
                tried[place] = _fitted_costs(measured, setting, place, sigma)
        median = min(tried, key=lambda place: tried[place][1])
        width = math.sqrt(width)
    costs, error = tried[median]
    return Fit(median, sigma, costs, error, setting)


def _fitted_costs(measured, setting: Setting, median: float, sigma: float) -> tuple[StepCosts, float]:
    played = {length: setting.play(median, sigma, length) for length in measured}
    costs = StepCosts(1.0, 1.0)
    for _ in range(5):
        # Which process is the slowest depends on the costs, and a few rounds settle it.
        rows, targets = [], []
        for length, (step, sampling) in measured.items():
            load = played[length]
            each = costs.decode_step * load.decode_steps + costs.decode_row * load.decode_rows
            slowest = (each + costs.prefill_token * load.prefill).argmax(1)[:, None]
            parts = (load.decode_steps, load.decode_rows, load.prefill)
            rows.append([np.take_along_axis(part, slowest, 1).sum() / setting.steps for part in parts])
            passes = load.logprob.max(1).sum() / setting.steps + 3 * load.train.max(1).mean()
            rows.append([0.0, 0.0, passes])
            targets += [sampling, step - sampling]
        matrix = np.array(rows) / np.array(targets)[:, None]
        found = _least_squares(matrix, np.ones(len(targets)))
        step, row, token = found.tolist()
        costs = StepCosts(step, row, 0.0, token, token, 0.0, 3 * token, padded=False)
    return costs, float(np.sqrt(np.mean((matrix @ found - 1) ** 2)))


def _least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The non-negative solution of a few unknowns: of all choices of those that are not zero, the best one."""
    best, least = np.zeros(matrix.shape[1]), float(target @ target)
    for chosen in range(1, 2 ** matrix.shape[1]):
        columns = [column for column in range(matrix.shape[1]) if chosen >> column & 1]
        solution = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
        rest = matrix[:, columns] @ solution - target
        if (solution >= 0).all() and rest @ rest < least:
            best, least = np.zeros(matrix.shape[1]), float(rest @ rest)
            best[columns] = solution
    return best


def costs_from_logs(
    logs: Mapping[str | Path, int],
    lengths,
    max_completion_length: int,
    num_generations: int,
    groups_per_batch: int,
    processes: int = 1,
    prompt_tokens: int = 0,
    rollout_batch_size: int | None = None,
) -> StepCosts:
    """
    Costs of `ChunkwiseGRPOTrainer` on a machine, from the metrics of runs there.

    The schedule of each run is played with `lengths`; the pass over a token that recomputes log-probabilities and the
    training of a token follow from `time/logprobs` and `time/train`, the prefill is taken to cost what that pass does,
    and a decode step and its rows are told apart by least squares over the logged steps. One run with few distinct
    steps tells them apart badly; runs of two chunk lengths do it well.

    Args:
        logs: `trainer_state.json` of a checkpoint: `chunk_length` of its run, in tokens.
        lengths, max_completion_length, num_generations, groups_per_batch, processes, prompt_tokens,
            rollout_batch_size: of these runs, as in [`simulate`].

    Raises:
        ValueError: a file that is no trainer state, or has no metrics of `ChunkwiseGRPOTrainer`.
    """
    passes, trained, rows, targets = [], [], [], []
    for path, chunk_length in logs.items():
        chunk_length = min(chunk_length, max_completion_length)
        entries = _logged(path)
        gone = sum(entry["rollout/groups_dropped"] for entry in entries)
        dropped = gone / (gone + len(entries) * groups_per_batch)
        played = _play(
            lengths, chunk_length, max_completion_length, num_generations, groups_per_batch, len(entries), 0, 0,
            None, None, processes, prompt_tokens, rollout_batch_size, dropped, "dealt", True,
        )  # fmt: skip
        mean = {
            name: sum(entry[f"time/{name}"] for entry in entries) / len(entries)
            for name in ("sampling", "logprobs", "train")
        }
        # Of the first process, whose clock is logged.
        passes.append((played.logprob[:, 0].sum() / len(entries), mean["logprobs"]))
        trained.append((played.train[:, 0].mean(), mean["train"]))
        prefill = played.prefill[:, 0].sum() / len(entries)
        for entry in entries:
            steps = entry["rollout/iterations"] * chunk_length
            if chunk_length == max_completion_length and entry["rollout/iterations"] == 1:
                steps = entry.get("completions/max_length", steps)
            slots = entry["rollout/tokens_generated"] / entry["rollout/slot_utilization"] / processes
            rows.append([steps, slots, prefill])
            targets.append(entry["time/sampling"])
    logprob_token = float(sum(seconds for _, seconds in passes) / sum(tokens for tokens, _ in passes))
    train_token = float(sum(seconds for _, seconds in trained) / sum(tokens for tokens, _ in trained))
    rows, targets = np.array(rows), np.array(targets)
    decode = _least_squares(rows[:, :2], targets - logprob_token * rows[:, 2])
    step, row = decode.tolist()
    return StepCosts(step, row, 0.0, logprob_token, logprob_token, 0.0, train_token, padded=True)


def _logged(path: str | Path) -> list[dict]:
    wanted = ("time/sampling", "time/logprobs", "time/train", "rollout/iterations", "rollout/slot_utilization")
    try:
        history = json.loads(Path(path).read_text(encoding="utf-8"))["log_history"]
        entries = [entry for entry in history if all(name in entry for name in wanted)]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise ValueError(f"{path} is no trainer_state.json as Trainer saves it in a checkpoint's folder.") from None
    if not entries:
        raise ValueError(
            f"{path} has no step with {', '.join(wanted)}: it is not of a run of ChunkwiseGRPOTrainer, or nothing was "
            "logged yet (logging_steps)."
        )
    return entries


# MiniCPM4 (arXiv 2506.07900, 3.2.4): seconds of a step and of its sampling, by chunk length. 64 A800, 64 prompts with
# 8 completions, DAPO data, DeepSeek-R1-Distill-Qwen-1.5B. The maximum length is not stated; 16k being a chunk, and the
# first row no chunks, it is taken to be 32,768.
PAPER_SECONDS = {32768: (488.57, 392.61), 16384: (360.79, 250.88), 8192: (286.31, 173.97), 4096: (281.27, 148.14)}
PAPER_SETTING = Setting(max_completion_length=32768, num_generations=8, groups_per_batch=64, processes=64)
# What `fit(PAPER_SECONDS, PAPER_SETTING)` finds: the lengths' median, and the seconds of one A800 of those runs.
PAPER_MEDIAN = 3444
PAPER_COSTS = StepCosts(0.00819, 0.00136, 0.0, 0.000568, 0.000568, 0.0, 0.0017, padded=False)


def paper_hold_outs(ordinary: bool = True) -> dict[int, Fit]:
    """
    For each chunk length of the paper a fit that has not seen it, made on the other two, and on ordinary GRPO as well
    if `ordinary`.
    """
    chunks = [length for length in PAPER_SECONDS if length < PAPER_SETTING.max_completion_length]
    return {
        left_out: fit(
            {
                length: seconds
                for length, seconds in PAPER_SECONDS.items()
                if length != left_out and (ordinary or length in chunks)
            },
            PAPER_SETTING,
        )
        for left_out in chunks
    }


def _shares(values: np.ndarray, processes: int, filled: bool, dealt: bool = True) -> np.ndarray:
    """
    Each process's rows [P, R], dealt out like cards or in stretches. `filled`: the last row again where there are too
    few, for all take part in calls.
    """
    width = -(-len(values) // processes)
    values = np.pad(values, (0, width * processes - len(values)), mode="edge" if filled else "constant")
    return values.reshape(width, processes).T if dealt else values.reshape(processes, width)


def _evened(load: np.ndarray) -> np.ndarray:
    return np.full(load.shape, load.mean())


def _sampling_load(before, gained, processes: int, sharing: str, padded: bool, call: int | None):
    """
    What live rows ask of each process that have `before` tokens and gain `gained` [rows]: decode steps, rows and
    context of them, tokens of the prefill and of the log-prob pass, each [P]; and the slots, rows times decode steps.
    """
    there = _shares(np.ones_like(before), processes, padded)
    before = _shares(before, processes, padded)
    gained = _shares(gained, processes, padded)
    loads, slots = [], 0
    for start in range(0, before.shape[1], call or before.shape[1]):
        part = slice(start, start + (call or before.shape[1]))
        old, new = before[:, part], gained[:, part]
        steps = new.max(1)
        slots += int((steps * there[:, part].sum(1)).sum())
        if padded:
            old = np.broadcast_to(old.max(1, keepdims=True), old.shape)
            new = np.broadcast_to(steps[:, None], new.shape)
        context = old * new + new * (new - 1) // 2
        loads.append((steps, new.sum(1), context.sum(1), old.sum(1), (old + new).sum(1)))
    *load, forward = (sum(parts) for parts in zip(*loads, strict=True))
    largest = int(max(parts[-1].max() for parts in loads))
    return (*load, _evened(forward) if sharing == "balanced" else forward, largest), slots
