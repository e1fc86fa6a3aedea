"""
The rollouts that are under way: what was sampled, by which policy, and what is trained next.

The store knows token ids and numbers, no model: the trainer drives it with real samples, `schedule.py` with lengths
alone. It follows Algorithm 1 of MiniCPM4 (arXiv 2506.07900, 3.2.3): in each iteration fresh prompts join the
unfinished rollouts and every one of them gets one chunk; groups whose rollouts are all finished wait, oldest first,
until a batch is full.
"""

from __future__ import annotations

import json
import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


FORMAT = 2


def save_atomically(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class Trajectory:
    """One completion in the making. Written once: what a chunk's policy said of its tokens is never changed."""

    sample: int
    # Arrays of 4-byte numbers: every process holds them all.
    token_ids: array = field(default_factory=lambda: array("i"))
    # Of each token, in nats, under the policy that sampled it (pi of theta_c(t) in the paper's equation 8).
    logprobs: array = field(default_factory=lambda: array("f"))
    # (policy version, tokens) of each chunk; a version is the number of optimizer steps before it.
    chunks: list[tuple[int, int]] = field(default_factory=list)
    # Ended by an end-of-sequence token; a rollout that is finished without one reached the length limit.
    ended: bool = False
    finished: bool = False
    # Of each reward function; NaN where it gave none. None until the group is scored.
    rewards: list[float] | None = None
    garbled: str | None = None
    # What reward functions logged for this row (`log_extra`).
    extra: dict = field(default_factory=dict)


@dataclass
class Group:
    """The completions of one prompt. `number` counts prompts as they are admitted, `row` is the dataset's index."""

    number: int
    row: int
    prompt_ids: list[int]
    # Batches that had been taken when the group was admitted.
    admitted: int
    trajectories: list[Trajectory]

    @property
    def finished(self) -> bool:
        return all(trajectory.finished for trajectory in self.trajectories)

    @property
    def scored(self) -> bool:
        return all(trajectory.rewards is not None for trajectory in self.trajectories)


class RolloutStore:
    """
    Groups between their admission and the batch that trains on them.

    Args:
        num_generations: completions of a prompt.
        max_completion_length: tokens a completion may have.
        groups_per_batch: groups a batch trains on, and at most so many are admitted in an iteration.
        max_live_rows: completions that may be unfinished at once; None for no limit.
        max_staleness: batches that may be taken between a group's admission and its own; None for no limit. Kept by
            admitting less and by sampling on before training, never by dropping a group.

    Every group that was admitted is trained, dropped, or still here: `admitted == trained + dropped + len(groups)`.
    """

    def __init__(
        self,
        num_generations: int,
        max_completion_length: int,
        groups_per_batch: int,
        max_live_rows: int | None = None,
        max_staleness: int | None = None,
    ):
        if max_live_rows is not None and max_live_rows < num_generations:
            raise ValueError(
                f"max_live_rows={max_live_rows} has no room for one group of {num_generations} completions; allowed "
                f"is {num_generations} or more, or None."
            )
        if max_staleness is not None and max_staleness < 0:
            raise ValueError(f"max_staleness must be 0 or more batches, or None for no limit; got {max_staleness}.")
        self.num_generations = num_generations
        self.max_completion_length = max_completion_length
        self.groups_per_batch = groups_per_batch
        self.max_live_rows = max_live_rows
        self.max_staleness = max_staleness
        self.groups: list[Group] = []
        self.admitted = self.trained = self.dropped = self.batches = 0

    def unfinished(self) -> list[tuple[Group, Trajectory]]:
        """Rollouts that get a chunk in this iteration, oldest group first."""
        return [(group, row) for group in self.groups for row in group.trajectories if not row.finished]

    def waiting(self) -> list[Group]:
        """Finished groups that no batch has taken, oldest first."""
        return [group for group in self.groups if group.finished]

    def admission(self) -> int:
        """
        Groups to admit now: a batch's worth, as Algorithm 1 has it, less what the caps forbid, and less what already
        waits beyond one batch, for a store that is ahead of training would only grow stale.
        """
        allowed = min(self.groups_per_batch, 2 * self.groups_per_batch - len(self.waiting()))
        if self.max_live_rows is not None:
            allowed = min(allowed, (self.max_live_rows - len(self.unfinished())) // self.num_generations)
        if self.max_staleness is not None:
            # Trained in order of admission, the last of so many groups is still in time.
            allowed = min(allowed, (self.max_staleness + 1) * self.groups_per_batch - len(self.groups))
        return max(allowed, 0)

    def admit(self, row: int, prompt_ids: list[int]) -> Group:
        rows = [Trajectory(sample) for sample in range(self.num_generations)]
        group = Group(self.admitted, row, list(prompt_ids), self.batches, rows)
        self.groups.append(group)
        self.admitted += 1
        return group

    def budget(self, trajectory: Trajectory, chunk_length: int) -> int:
        """Tokens the next chunk may have: a chunk, and never past `max_completion_length`."""
        return min(chunk_length, self.max_completion_length - len(trajectory.token_ids))

    def extend(
        self, trajectory: Trajectory, token_ids: list[int], logprobs: list[float], version: int, ended: bool
    ) -> None:
        """
        Append a chunk that policy `version` sampled, with its log-probabilities in nats.

        Raises:
            ValueError: the rollout is finished, the chunk is empty or too long, or a log-probability is missing.
        """
        room = self.max_completion_length - len(trajectory.token_ids)
        if trajectory.finished or not 0 < len(token_ids) <= room or len(logprobs) != len(token_ids):
            raise ValueError(
                f"cannot append {len(token_ids)} tokens with {len(logprobs)} log-probabilities to a rollout "
                f"{'that is finished' if trajectory.finished else f'with room for {room}'}."
            )
        trajectory.token_ids.extend(token_ids)
        trajectory.logprobs.extend(logprobs)
        trajectory.chunks.append((version, len(token_ids)))
        trajectory.ended = ended
        trajectory.finished = ended or len(token_ids) == room

    def drop(self, group: Group) -> None:
        self.groups.remove(group)
        self.dropped += 1

    def take(self) -> list[Group] | None:
        """
        The oldest finished and scored groups that fill a batch, or None where there are too few, or where training on
        them would leave an older group no batch in time (`max_staleness`): then sample on.
        """
        ready = [group for group in self.groups if group.finished and group.scored][: self.groups_per_batch]
        if len(ready) < self.groups_per_batch:
            return None
        chosen = {group.number for group in ready}
        rest = [group for group in self.groups if group.number not in chosen]
        late = self.max_staleness is not None and any(
            self.batches + 1 + place // self.groups_per_batch > group.admitted + self.max_staleness
            for place, group in enumerate(rest)
        )
        # Where all are finished the oldest are chosen already: resumed with a smaller cap or batch, some come late.
        if late and self.unfinished():
            return None
        self.groups = rest
        self.trained += len(ready)
        self.batches += 1
        return ready

    def save(self, path: Path, **facts) -> None:
        """
        Write everything into one safetensors file, under a temporary name until it is complete. `facts` (JSON values)
        come back from `load`.
        """
        rows = [row for group in self.groups for row in group.trajectories]
        tensors = {
            "prompt_ids": _flat([array("i", group.prompt_ids) for group in self.groups], torch.int32),
            "prompt_lengths": torch.tensor([len(group.prompt_ids) for group in self.groups], dtype=torch.int64),
            "token_ids": _flat([row.token_ids for row in rows], torch.int32),
            "logprobs": _flat([row.logprobs for row in rows], torch.float32),
            "lengths": torch.tensor([len(row.token_ids) for row in rows], dtype=torch.int64),
        }
        described = {
            "format": FORMAT,
            "num_generations": self.num_generations,
            "max_completion_length": self.max_completion_length,
            "admitted": self.admitted,
            "trained": self.trained,
            "dropped": self.dropped,
            "batches": self.batches,
            "groups": [[group.number, group.row, group.admitted] for group in self.groups],
            "rows": [
                [row.sample, row.chunks, row.ended, row.finished, row.rewards, row.garbled, row.extra] for row in rows
            ],
            "facts": facts,
        }
        save_atomically(tensors, path, {"rollout_store": json.dumps(described, default=str)})

    def load(self, path: Path) -> dict:
        """
        Take over what `save` wrote; returns its `facts`.

        Raises:
            ValueError: the file is damaged, or was written with other `num_generations` or a longer
                `max_completion_length`.
        """
        try:
            with safe_open(path, framework="pt") as file:
                described = json.loads(file.metadata()["rollout_store"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(f"{path} is no complete rollout store ({type(error).__name__}: {error}).") from None
        if described["format"] != FORMAT:
            raise ValueError(
                f"{path} has format {described['format']}, this version reads {FORMAT}: another version wrote it. "
                "Resume with that one, or start a new run, in another output_dir, from the checkpoint's weights: "
                f"ChunkwiseGRPOTrainer(model={str(path.parent)!r}, ...)."
            )
        for name in ("num_generations", "max_completion_length"):
            if described[name] != getattr(self, name):
                raise ValueError(
                    f"{path} was written with {name}={described[name]}, the configuration now has "
                    f"{getattr(self, name)}; resume with the value it was written with."
                )
        prompts = _pieces(tensors["prompt_ids"], tensors["prompt_lengths"])
        ids = _pieces(tensors["token_ids"], tensors["lengths"])
        logprobs = _pieces(tensors["logprobs"], tensors["lengths"])
        rows = [
            Trajectory(sample, array("i", token_ids), array("f", values), [tuple(chunk) for chunk in chunks], *rest)
            for (sample, chunks, *rest), token_ids, values in zip(described["rows"], ids, logprobs, strict=True)
        ]
        size = self.num_generations
        self.groups = [
            Group(number, row, prompt, admitted, rows[place * size : (place + 1) * size])
            for place, ((number, row, admitted), prompt) in enumerate(zip(described["groups"], prompts, strict=True))
        ]
        for name in ("admitted", "trained", "dropped", "batches"):
            setattr(self, name, described[name])
        return described["facts"]


def _flat(arrays: list[array], dtype: torch.dtype) -> torch.Tensor:
    filled = [torch.frombuffer(values, dtype=dtype) for values in arrays if values]
    return torch.cat([torch.empty(0, dtype=dtype), *filled])


def _pieces(flat: torch.Tensor, lengths: torch.Tensor) -> list[list]:
    return [piece.tolist() for piece in flat.split(lengths.tolist())]
