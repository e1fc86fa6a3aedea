"""fastText classifiers: found by file or Hub id, checked before they are opened, loaded once per process.

Any module that installs as `fasttext` and has its compiled interface (`load_model(...).f`) will do; several builds
share that name and replace each other. The native reader trusts the file: of a truncated one it crashes the process,
asks for all memory, or takes random numbers for weights. So `check_file` walks the file's structure first.

A supervised model is linear up to its softmax: the logits are the mean of the embeddings of a line's words and
n-grams, times the output matrix. `_write_folded` multiplies the matrices once, which leaves one number per label for
each embedding: the 2 GB of the paper's settings become 16 MB, and reading them, most of the work, all but vanishes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


POSITIVE, NEGATIVE = "__label__pos", "__label__neg"

# Written by fastText since 2017 (version 12) and before (11).
MAGIC, VERSIONS = 793712314, (11, 12)
SUPERVISED, SOFTMAX = 3, 3
SUFFIXES = (".bin", ".ftz")


class ModelFileError(ValueError):
    """A file that is no usable quality classifier: foreign, truncated, not supervised, or with other labels."""


def import_fasttext():
    """The installed module of fastText's interface.

    Raises:
        `ImportError`: none is installed; says what to install.
    """
    try:
        import fasttext
    except ImportError as error:
        raise ImportError(
            "a quality classifier needs fastText, and no module `fasttext` is installed; "
            "`pip install transformers_minicpm4[data]` brings one"
        ) from error
    return fasttext


class _Reader:
    """Little-endian values of a mapped file; running over its end is a truncated model."""

    def __init__(self, data, name: str):
        self.data, self.name, self.at = data, name, 0

    def skip(self, count: int) -> None:
        if count < 0:
            raise ModelFileError(
                f"{self.name} is damaged: it declares a part of {count} bytes; fetch or save it again"
            )
        self.at += count
        if self.at > len(self.data):
            raise ModelFileError(
                f"{self.name} is truncated: {len(self.data):,} bytes, at least {self.at:,} expected; "
                "fetch or save it again"
            )

    def read(self, form: str) -> tuple:
        start = self.at
        self.skip(struct.calcsize("<" + form))
        return struct.unpack_from("<" + form, self.data, start)

    def word(self) -> bytes:
        start, end = self.at, self.data.find(b"\0", self.at)
        if end < 0:
            raise ModelFileError(f"{self.name} is truncated inside its dictionary; fetch or save it again")
        self.at = end + 1
        return self.data[start:end]

    def matrix(self) -> None:
        rows, columns = self.read("qq")
        self.skip(-1 if min(rows, columns) < 0 else rows * columns * 4)

    def quantized_matrix(self) -> None:
        normed, rows, _, codes = self.read("?qqi")
        self.skip(codes)
        self.quantizer()
        if normed:
            self.skip(rows)
            self.quantizer()

    def quantizer(self) -> None:
        dim, _, _, _ = self.read("iiii")
        self.skip(dim * 256 * 4)  # 256 centroids: one byte a code


class Layout(NamedTuple):
    """What a model file holds, and where."""

    labels: list[str]
    softmax: bool
    quantized: bool
    input_at: int  # offset of the input matrix: rows and columns (int64), then float32
    output_at: int


def check_file(path) -> Layout:
    """
    Walks the structure of a fastText model file without loading it.

    Args:
        path (`str` or `os.PathLike`): A `.bin` or quantized `.ftz` file.

    Returns:
        `Layout`: its labels, and the places of its matrices.

    Raises:
        `ModelFileError`: no fastText file, shorter or longer than its own header says, or not a supervised model.
    """
    name = str(path)
    if os.path.getsize(path) == 0:
        raise ModelFileError(f"{name} is empty; a fastText model file (.bin or .ftz) is expected")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data, name)
        foreign = f"{name} is not a fastText model file (.bin or .ftz): it begins with {bytes(data[:8])!r}"
        if len(data) < 8:
            raise ModelFileError(foreign)
        magic, version = reader.read("ii")
        if magic != MAGIC or version not in VERSIONS:
            raise ModelFileError(foreign)
        _, _, _, _, _, _, loss, kind, *_ = reader.read("12id")
        if kind != SUPERVISED:
            raise ModelFileError(
                f"{name} holds fastText word vectors, not a classifier; give a model trained with `train_supervised`"
            )
        entries, _, _, _, pruned = reader.read("iiiqq")
        labels = []
        for _ in range(entries):
            word = reader.word()
            # A count (8 bytes), then 0 for a word and 1 for a label.
            reader.skip(9)
            if data[reader.at - 1] == 1:
                labels.append(word.decode("utf-8", "replace"))
        reader.skip(max(pruned, 0) * 8)
        (quantized,) = reader.read("?")
        input_at = reader.at
        reader.quantized_matrix() if quantized else reader.matrix()
        (quantized_output,) = reader.read("?")
        output_at = reader.at
        reader.quantized_matrix() if quantized and quantized_output else reader.matrix()
        if reader.at != len(data):
            raise ModelFileError(
                f"{name} is damaged: {len(data):,} bytes where its header says {reader.at:,}; fetch or save it again"
            )
    return Layout(labels, loss == SOFTMAX, quantized, input_at, output_at)


def resolve(name) -> Path:
    """
    The local file of a classifier; a Hub id is downloaded, or found in the Hub's cache when offline.

    Args:
        name (`str` or `os.PathLike`):
            A file, or `"owner/repository"`, or `"owner/repository:file"`. The part after the colon is the file's path
            in the repository or an ending of it, suffix left out or not: `"openbmb/Ultra-FineWeb-classifier:zh"`. A
            repository with more than one model file needs it.

    Returns:
        `Path`: an existing file.

    Raises:
        `FileNotFoundError`: neither a file nor a Hub id.
        `ValueError`: the repository has no such model file, or several.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    repository, _, wanted = str(name).partition(":")
    if path.is_dir() or repository.count("/") != 1 or repository.startswith(("/", ".", "~")):
        raise FileNotFoundError(
            f"no fastText model at {str(name)!r}; give a .bin or .ftz file, or a Hub id such as "
            "'openbmb/Ultra-FineWeb-classifier:en'"
        )
    if repository.endswith(SUFFIXES):
        raise FileNotFoundError(f"no fastText model at {str(name)!r}; is the path right?")
    return _from_hub(str(name), repository, wanted)


@lru_cache(maxsize=32)
def _from_hub(name: str, repository: str, wanted: str) -> Path:
    """Asked for once per process: a scorer resolves its model for every batch."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        if constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(repository, local_files_only=True))
            files = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
        else:
            files = HfApi().list_repo_files(repository)
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is no file here, and the Hub's cache does not hold {repository} (HF_HUB_OFFLINE is set); "
            "give a file, or download the repository once while online"
        ) from error
    models = sorted(file for file in files if file.endswith(SUFFIXES))
    chosen = [file for file in models if _ends_with(file, wanted)]
    if len(chosen) != 1:
        raise ValueError(
            f"{name!r} fits {len(chosen)} of the model files of {repository}: {', '.join(models) or 'none'}; "
            f"name one, as in '{repository}:FILE'"
        )
    return Path(hf_hub_download(repository, chosen[0]))


def _ends_with(file: str, wanted: str) -> bool:
    return any(form.endswith(wanted) for form in (file, file.rsplit(".", 1)[0]))


def _version(path: Path) -> tuple:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino


def digest(path) -> str:
    """
    SHA-256 of a file's content, in hex; a file that was not written to since is read once per process.

    Args:
        path (`str` or `os.PathLike`): A local file; a Hub id goes through `resolve` first.
    """
    return _digest(_version(Path(path)))


@lru_cache(maxsize=32)
def _digest(version: tuple) -> str:
    with open(version[0], "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(path):
    """
    A quality classifier, loaded once per process: later calls return the same object until the file is rewritten.

    Args:
        path (`str` or `os.PathLike`): A file, or a Hub id (see `resolve`).

    Returns:
        a model object of the installed module, with labels `__label__pos` and `__label__neg`. Its matrices are folded
        (see the top of this file) where they are plain: for predictions, not for vectors or further training.

    Raises:
        `ModelFileError`: the file is no complete supervised fastText model, or has other labels.
        `ImportError`: no fastText is installed.
    """
    return _load(_version(resolve(path)))


@lru_cache(maxsize=4)
def _load(version: tuple):
    path = version[0]
    layout = check_file(path)
    labels = layout.labels
    if sorted(labels) != [NEGATIVE, POSITIVE]:
        shown = ", ".join(labels[:6]) + (", ..." if len(labels) > 6 else "")
        raise ModelFileError(
            f"{path} has the labels {shown}; a quality classifier has exactly {POSITIVE} and {NEGATIVE}"
        )
    fasttext = import_fasttext()
    # The warning that version 0.9.2 prints through this hook is meant for its authors' old API.
    if hasattr(getattr(fasttext, "FastText", None), "eprint"):
        fasttext.FastText.eprint = lambda *args, **kwargs: None
    if layout.quantized or not layout.softmax:
        return fasttext.load_model(path)
    with tempfile.TemporaryDirectory(prefix="fasttext-") as folder:
        folded = os.path.join(folder, "folded.bin")
        _write_folded(path, layout, folded)
        return fasttext.load_model(folded)


def _write_folded(path: str, layout: Layout, target: str) -> None:
    """
    The same classifier with as many dimensions as labels: input times output transposed, and the identity for output.

    Probabilities stay up to rounding: products are added up in float64, where fastText has float32.
    """
    import numpy as np

    def matrix(at):
        rows, columns = struct.unpack_from("<qq", data, at)
        return np.frombuffer(data, "<f4", rows * columns, at + 16).reshape(rows, columns)

    labels = len(layout.labels)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        output = matrix(layout.output_at).astype("f8").T
        embeddings = matrix(layout.input_at)
        with open(target, "wb") as folded:
            # `dim` is the first setting after magic number and version.
            folded.write(data[:8] + struct.pack("<i", labels) + data[12 : layout.input_at])
            folded.write(struct.pack("<qq", len(embeddings), labels))
            for start in range(0, len(embeddings), 8192):
                folded.write((embeddings[start : start + 8192] @ output).astype("<f4").tobytes())
            folded.write(struct.pack("<?qq", False, labels, labels) + np.eye(labels, dtype="<f4").tobytes())
        del embeddings  # a mapped file cannot be closed under an array


def predict_positive(model, lines) -> list[float]:
    """
    P(positive) of each line, in [0, 1].

    As the released inference script has it: the top label's probability cut at 1 (fastText's softmax can give
    1.00001), and one minus it where the top label is `__label__neg`.

    Args:
        model: What `load_model` returns.
        lines (iterable of `str`): Words separated by spaces; no `"\\n"`, which ends a line for fastText.

    Raises:
        `ValueError`: a line holds `"\\n"` or a lone surrogate.
    """
    # The compiled `predict` answers with plain pairs; the module's own wrapper builds NumPy arrays, which old builds
    # cannot do under NumPy 2.
    predict = model.f.predict
    scores = []
    for line in lines:
        if "\n" in line:
            raise ValueError(f"a line to classify holds a newline: {line[:60]!r}; use `to_words`, or replace it")
        try:
            probability, label = predict(line + "\n", 1, 0.0, "strict")[0]
        except TypeError as error:
            raise ValueError(f"fastText takes no text that UTF-8 cannot write: {line[:60]!r}") from error
        probability = min(probability, 1.0)
        scores.append(probability if label == POSITIVE else 1.0 - probability)
    return scores
