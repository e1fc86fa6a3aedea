"""What a checkpoint of `ChunkwiseGRPOTrainer` has beside Trainer's files, and whether a run can go on from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers.trainer import TRAINER_STATE_NAME


STORE = "rollout_store.safetensors"
REFERENCE = "reference_model.safetensors"


def damage_of(folder: Path) -> str | None:
    """Why a run cannot go on from a checkpoint, in a sentence, or None."""
    if not folder.is_dir():
        return "there is no such folder."
    if not (folder / STORE).is_file():
        return (
            f"it has no {STORE}: it was written by another trainer, or its saving was cut off. To go on from its "
            f"weights with an empty store, start ChunkwiseGRPOTrainer(model={str(folder)!r}, ...)."
        )
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"its {TRAINER_STATE_NAME} is missing or cut off: the process was stopped while it saved."
    return None


def digest_of(dataset: Dataset) -> str | None:
    """
    A fingerprint of the prompts, in their order, as they are stored. None where a transform makes them: it may draw
    at random.
    """
    if "prompt" not in dataset.column_names:
        return None
    prompts = dataset.with_format(None).select_columns("prompt")
    digest = hashlib.sha256()
    for start in range(0, len(prompts), 1000):
        digest.update(json.dumps(prompts[start : start + 1000]["prompt"], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def packed(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        f"{place}.{name}": tensor.detach().cpu().contiguous().clone()
        for place, batch in enumerate(batches)
        for name, tensor in batch.items()
        if isinstance(tensor, torch.Tensor)
    }


def unpacked(tensors: dict[str, torch.Tensor], size: int, device) -> list[dict[str, torch.Tensor]]:
    batches = [{} for _ in range(size)]
    for key, tensor in tensors.items():
        place, name = key.split(".", 1)
        batches[int(place)][name] = tensor.to(device)
    return batches
