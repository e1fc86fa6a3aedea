"""fastText classifiers: found by file or Hub id, checked before they are opened, loaded once per process.

Any module that installs as `fasttext` and has its compiled interface (`load_model(...).f`) will do; several builds
share that name and replace each other. The native reader trusts the file: of a truncated or damaged one it crashes the
process, asks for all memory, or takes random numbers for weights. So `check_file` walks the file's structure first.

A supervised model is linear up to its softmax: the logits are the mean of the embeddings of a line's words and
n-grams, times the output matrix. `_write_folded` multiplies the matrices once, which leaves one number per label for
each embedding: the 2 GB of the paper's settings become 16 MB, and reading them, most of the work, all but vanishes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import struct
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


LABEL_PREFIX = "__label__"
POSITIVE, NEGATIVE = LABEL_PREFIX + "pos", LABEL_PREFIX + "neg"

# What ends a word for fastText, and its own word for the end of a line.
SPACE, END_OF_LINE = " \n\r\t\v\f\0", "</s>"
_UNREAD = re.compile(rf"(?<![^{SPACE}])(?:{LABEL_PREFIX}[^{SPACE}]*|{END_OF_LINE}(?![^{SPACE}]))")

# Written by fastText since 2017 (version 12) and before (11).
MAGIC, VERSIONS = 793712314, (11, 12)
SUPERVISED, SOFTMAX = 3, 3
LOSSES = (1, 2, 3, 4)  # hierarchical softmax, negative sampling, softmax, one against all
# The hierarchical softmax takes this count for infinite; a larger one sends it out of its tree.
MAX_COUNT = 10**15
SUFFIXES = (".bin", ".ftz")


class ModelFileError(ValueError):
    """A file that is no usable quality classifier: foreign, truncated, damaged, not supervised, or of other labels."""


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


def words_read(line: str) -> str:
    """
    The line without the words that mean something else to fastText than text.

    In prediction it passes over labels (`__label__...`), so leaving them out changes no score; but of a line of
    nothing else it scores the end of the line. In training it takes them for labels. At a word `</s>` it stops
    reading, and would score or train on what stands before it alone.

    Args:
        line (`str`): Words.
    """
    return _UNREAD.sub("", line) if LABEL_PREFIX in line or END_OF_LINE in line else line


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

    def expect(self, holds: bool, found: str) -> None:
        if not holds:
            raise ModelFileError(f"{self.name} is damaged: {found}; fetch or save it again")

    def flag(self) -> bool:
        (value,) = self.read("B")
        self.expect(value < 2, f"a flag of {value} where only 0 and 1 are known")
        return value == 1

    def matrix(self, shape: tuple[int, int], quantized: bool) -> None:
        normed = self.flag() if quantized else False
        found = self.read("qq")
        self.expect(found == shape, f"a matrix of shape {found} where its settings and dictionary need {shape}")
        rows, columns = shape
        if not quantized:
            self.skip(rows * columns * 4)
            return
        (codes,) = self.read("i")
        self.skip(codes)
        parts = self.quantizer(columns)
        self.expect(codes == rows * parts, f"{codes} codes for {rows} rows of {parts}")
        if normed:
            self.skip(rows)
            self.quantizer(1)

    def quantizer(self, columns: int) -> int:
        """Into how many parts of `size` numbers each row of a quantized matrix is cut; the last may be shorter."""
        dim, parts, size, last = found = self.read("iiii")
        whole = dim == columns and size > 0 and parts == -(-dim // size) and last == dim - (parts - 1) * size
        self.expect(whole, f"a quantizer of {found} (dimension, parts, size, last size) for {columns} columns")
        self.skip(dim * 256 * 4)  # 256 centroids: one byte a code
        return parts


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
        `ModelFileError`: no fastText file, shorter or longer than its own header says, not a supervised model, or with
            numbers in its header that contradict each other or that fastText does not know.
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
        dim, _, _, _, _, ngrams, loss, kind, bucket, shortest, longest, _, _ = reader.read("12id")
        if kind != SUPERVISED:
            raise ModelFileError(
                f"{name} holds fastText word vectors, not a classifier; give a model trained with `train_supervised`"
            )
        reader.expect(dim > 0, f"dimension {dim}")
        reader.expect(loss in LOSSES, f"loss {loss} where {LOSSES} are known")
        # Version 11 has no classifiers with n-grams of characters, and fastText reads none there.
        hashed = ngrams > 1 or (longest > 0 and version > 11)
        reader.expect(
            min(ngrams, shortest, longest) >= 0 and bucket >= hashed,
            f"{bucket} buckets for n-grams of up to {ngrams} words and of {shortest} to {longest} characters",
        )
        entries, words, label_count, _, pruned = reader.read("iiiqq")
        reader.expect(
            words >= 0 and label_count > 0 and words + label_count == entries and pruned >= -1,
            f"a dictionary of {entries} entries, {words} words, {label_count} labels, {pruned} n-grams kept",
        )
        labels = []
        for entry in range(entries):
            word = reader.word()
            count, is_label = reader.read("qb")
            if is_label != (entry >= words) or not 0 <= count < MAX_COUNT:
                reader.expect(False, f"entry {entry} of its dictionary has type {is_label} and count {count}")
            if is_label:
                labels.append(word.decode("utf-8", "replace"))
        if pruned > 0:
            start = reader.at
            reader.skip(pruned * 8)
            # Pairs of an n-gram's hash and its row after the words.
            kept = struct.unpack_from(f"<{pruned * 2}i", data, start)[1::2]
            reader.expect(min(kept) >= 0 and max(kept) < pruned, "rows of n-grams outside its matrix")
        quantized = reader.flag()
        reader.expect(quantized or pruned < 0, "n-grams left out of a matrix that is not quantized")
        input_at = reader.at
        reader.matrix((words + (bucket if pruned < 0 else pruned), dim), quantized)
        quantized_output = reader.flag()
        output_at = reader.at
        reader.matrix((label_count, dim), quantized and quantized_output)
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
    try:
        if layout.quantized or not layout.softmax:
            return fasttext.load_model(path)
        with tempfile.TemporaryDirectory(prefix="fasttext-") as folder:
            folded = os.path.join(folder, "folded.bin")
            _write_folded(path, layout, folded)
            return fasttext.load_model(folded)
    except ModelFileError:
        raise
    except (ValueError, IndexError, RuntimeError) as error:  # as exceptions of C++ arrive here
        raise ModelFileError(f"fastText cannot read {path} ({error}); fetch or save it again") from error


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
                with np.errstate(all="ignore"):  # said below
                    rows = (embeddings[start : start + 8192] @ output).astype("<f4")
                if not np.isfinite(rows).all():
                    del embeddings
                    raise ModelFileError(f"{path} has weights that are not finite; fetch it again, or train it anew")
                folded.write(rows.tobytes())
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
        `ModelFileError`: fastText has no answer, for weights that are no numbers or an incomplete dictionary.
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
        except (IndexError, RuntimeError) as error:
            # IndexError: no answer, where the dictionary has not even the end of a line.
            raise ModelFileError(
                f"the model gives no score for {line[:60]!r} ({error}); its file is damaged, fetch or save it again"
            ) from error
        probability = min(probability, 1.0)
        scores.append(probability if label == POSITIVE else 1.0 - probability)
    return scores
