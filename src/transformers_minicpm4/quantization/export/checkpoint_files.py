"""Folders and files that are there whole or not at all, and safetensors checkpoints read one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """
    A temporary folder beside `folder` that takes its name when the block ends, and vanishes if it raises.

    Raises:
        FileExistsError: `folder` is a file, or has something in it.
    """
    folder = Path(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        pass
    elif folder.exists():
        what = "is a folder with files in it" if folder.is_dir() else "is a file"
        raise FileExistsError(f"{folder} {what}; give the name of a new or empty folder, or remove it first.")
    work = _beside(folder)
    shutil.rmtree(work, ignore_errors=True)  # a killed process with this one's number left it
    work.mkdir(parents=True)
    try:
        yield work
        if folder.is_dir():
            folder.rmdir()  # a folder is renamed onto an empty one on POSIX systems only
        os.replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """The same for one file, which may replace an older one."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = _beside(path)
    try:
        yield work
        os.replace(work, path)
    except BaseException:
        work.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    return path.absolute().parent / f".{path.name}.{os.getpid()}.unfinished"


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """
    Raises:
        ValueError: the file holds something else; names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: a JSON object is expected, it holds a {type(content).__name__}.")
    return content


def quantized_by(config) -> str | None:
    """The name of a checkpoint's quantization, by its configuration; `None` for plain weights."""
    found = getattr(config, "quantization_config", None) or {}
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return getattr(method, "value", method)


def own_tokenizer(source: str | os.PathLike):
    """The tokenizer beside a checkpoint's weights; `None` where there is none, for which Transformers invents one."""
    folder = Path(source)
    files = (
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
        "tekken.json", "vocab.json", "vocab.txt",
    )  # fmt: skip
    if folder.is_dir() and not any((folder / name).is_file() for name in files):
        return None
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        return None


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """
    Raises:
        OSError: as for any file; safetensors has an error of its own for a full disk.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_size: int | str) -> None:
    """
    Writes `model.safetensors`, or numbered shards and their index, from tensors that come one at a time: at most one
    shard is in memory.

    Args:
        max_shard_size: in bytes, or as "5GB", "300MB". One tensor above it gets a shard of its own.
    """
    limit = _bytes(max_shard_size)
    shards: list[list[str]] = []
    sizes: list[int] = []
    pending: dict[str, torch.Tensor] = {}

    def flush():
        write_tensors(folder / f"shard-{len(shards)}", pending)
        shards.append(list(pending))
        pending.clear()

    waiting = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and waiting + size > limit:
            flush()
            waiting = 0
        # Contiguous and of its own: views into larger storages cannot be saved.
        pending[name] = tensor.detach().cpu().contiguous().clone()
        waiting += size
        sizes.append(size)
    flush()
    if len(shards) == 1:
        os.replace(folder / "shard-0", folder / SINGLE)
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for number, name in enumerate(names):
        os.replace(folder / f"shard-{number}", folder / name)
    weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
    write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _bytes(size: int | str) -> int:
    from accelerate.utils.modeling import convert_file_size_to_int

    try:
        found = convert_file_size_to_int(size)
    except ValueError:
        found = 0
    if found <= 0:
        raise ValueError(f"max_shard_size is a number of bytes or a text such as '5GB' or '300MB', got {size!r}.")
    return found


class CheckpointTensors(Mapping):
    """
    The tensors of a safetensors checkpoint by name, one file or sharded, read when asked for.

    Raises:
        FileNotFoundError: no checkpoint there, or a shard that the index names is missing.
        ValueError: a damaged file; names it, and the tensor where it is one.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.files: dict[str, str] = {}
        self._opened: dict[str, safe_open] = {}
        index = self.folder / INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index} is damaged: it has no weight_map.")
            self.files = dict(weight_map)
            for file in sorted(set(self.files.values())):
                if not isinstance(file, str) or Path(file).name != file:
                    raise ValueError(f"{index} is damaged: {file!r} is not the name of a file beside it.")
                found = set(self._open(file).keys())
                lost = sorted(name for name, place in self.files.items() if place == file and name not in found)
                if lost:
                    raise ValueError(f"{self.folder / file} is damaged: the index promises tensor {lost[0]!r} in it.")
        else:
            self.files = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)

    def _open(self, file: str):
        path = self.folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; the folder must hold a whole safetensors checkpoint.")
        try:
            if file not in self._opened:  # reading the header again for each tensor takes longer than the tensor
                self._opened[file] = safe_open(path, framework="pt")
            return self._opened[file]
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); copy it again.") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self.files[name]
        try:
            return self._open(file).get_tensor(name)
        except SafetensorError as error:
            raise ValueError(
                f"{self.folder / file} is damaged at tensor {name!r} ({error}); copy it again."
            ) from error

    def __iter__(self):
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        return self.folder / self.files[name]
