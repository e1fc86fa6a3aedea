"""
Solved blocks, packed: in memory, or in a folder from which a killed run goes on.

Each block is one safetensors file, written to another name and renamed, so a block is there whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from ..export.checkpoint_files import new_file
from ..packing import pack_codes, unpack_codes
from ..quantized_weight import QuantizedWeight


STATE = "state.json"


class Store(Mapping):
    """
    A mapping from a linear layer's full name to its `QuantizedWeight`, block by block; each access unpacks anew. The
    block of the last access stays open, so layers in order read each file once.

    Args:
        folder: where the files are; `None` keeps all in memory.
        identity: what a resumed run must have in common with the one that it goes on with.

    Raises:
        ValueError: the folder holds another run.
    """

    def __init__(self, folder: str | Path | None, identity: dict[str, Any]):
        self.folder = None if folder is None else Path(folder)
        self._memory: dict[int, bytes] = {}
        self._homes: dict[str, int] = {}
        self._opened: tuple[int, Mapping[str, torch.Tensor]] | None = None
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self.folder / STATE
        if state.is_file():
            try:
                found = json.loads(state.read_text(encoding="utf-8"))
            except ValueError:
                found = None
            if found != identity:
                differing = [key for key in identity if not isinstance(found, dict) or found.get(key) != identity[key]]
                raise ValueError(
                    f"{self.folder} holds another unfinished run (it differs in {', '.join(differing)}); finish that "
                    "one with its own settings, or delete the folder"
                )
        elif any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and holds no unfinished run; name another folder")
        else:
            self._write(state, json.dumps(identity, indent=2).encode())
        for index in self.finished():
            try:
                self._remember(index, self._open(index))
            except (SafetensorError, KeyError, ValueError):
                self._opened = None
                self._path(index).unlink()  # cut short by a power failure: solved again, as are those after it
                break

    def finished(self) -> list[int]:
        """The blocks that are there, from the first one on without a gap."""
        index = 0
        while index in self._memory or (self.folder is not None and self._path(index).is_file()):
            index += 1
        return list(range(index))

    def put(
        self, index: int, weights: dict[str, QuantizedWeight], rest: dict[str, torch.Tensor], report: list[dict]
    ) -> None:
        """Keep a block: quantized weights and all other parameters by full name, and its rows of the report."""
        tensors, facts = {f"rest:{name}": tensor.contiguous().cpu() for name, tensor in rest.items()}, {}
        for name, weight in weights.items():
            tensors[f"codes:{name}"] = pack_codes(weight.codes.cpu(), weight.bits, dim=1)
            tensors[f"scales:{name}"] = weight.scales.cpu()
            tensors[f"zeros:{name}"] = weight.zeros.cpu()
            if weight.bias is not None:
                tensors[f"bias:{name}"] = weight.bias.cpu()
            facts[name] = [weight.bits, weight.group_size, weight.symmetric]
        # Facts and report ride along as one tensor of bytes: one file, one rename.
        notes = json.dumps({"weights": facts, "report": report}).encode()
        tensors["notes"] = torch.frombuffer(bytearray(notes), dtype=torch.uint8)
        data, self._opened = save(tensors), None
        if self.folder is None:
            self._memory[index] = data
        else:
            self._write(self._path(index), data)
        self._remember(index, tensors)

    def rest(self, index: int) -> dict[str, torch.Tensor]:
        """The parameters of a block that are not quantized, by full name."""
        tensors = self._open(index)
        # Copies: a model takes them over, and what it does to them must not be seen at the next access.
        return {name[5:]: tensors[name].clone() for name in tensors if name.startswith("rest:")}

    def report(self) -> list[dict]:
        rows = []
        for index in self.finished():
            rows += self._notes(self._open(index))["report"]
        return rows

    def __contains__(self, name: object) -> bool:
        return name in self._homes  # Mapping's would read and unpack the weight

    def __getitem__(self, name: str) -> QuantizedWeight:
        tensors = self._open(self._homes[name])
        return self._weight(tensors, name, *self._notes(tensors)["weights"][name])

    def block(self, index: int) -> dict[str, QuantizedWeight]:
        """All quantized weights of a block."""
        tensors = self._open(index)
        return {name: self._weight(tensors, name, *facts) for name, facts in self._notes(tensors)["weights"].items()}

    @staticmethod
    def _weight(
        tensors: Mapping[str, torch.Tensor], name: str, bits: int, group_size: int, symmetric: bool
    ) -> QuantizedWeight:
        bias = tensors.get(f"bias:{name}")
        return QuantizedWeight(
            codes=unpack_codes(tensors[f"codes:{name}"], bits, dim=1),
            scales=tensors[f"scales:{name}"].clone(),
            zeros=tensors[f"zeros:{name}"].clone(),
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            bias=None if bias is None else bias.clone(),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05}.safetensors"

    def _remember(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        self._homes.update(dict.fromkeys(self._notes(tensors)["weights"], index))

    def _open(self, index: int) -> Mapping[str, torch.Tensor]:
        """The tensors of a block, not to be changed."""
        if self._opened is None or self._opened[0] != index:
            self._opened = None
            found = load(self._memory[index]) if self.folder is None else _BlockFile(self._path(index))
            self._opened = index, found
        return self._opened[1]

    @staticmethod
    def _notes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return json.loads(bytes(tensors["notes"].tolist()))

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        with new_file(path) as partial, partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


class _BlockFile(Mapping):
    """The tensors of a safetensors file, each read when asked for."""

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        self._names = set(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
