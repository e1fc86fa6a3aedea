"""Records of a corpus, one by one with their place: files, folders of them, datasets and other iterables of rows."""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path


SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".ndjson", ".parquet")
MANIFEST = "manifest.json"
SETTINGS = "ultraclean.json"  # the command's own, beside the manifest
_OF_A_RUN = re.compile(r"(?:part|dropped|rejects)-\d{5,}\.(?:parquet|jsonl)")
_NO_ROWS = re.compile(rf"{re.escape(MANIFEST)}|{re.escape(SETTINGS)}|rejects-\d{{5,}}\.jsonl")


def arrow():
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError("corpora on disk need pyarrow: pip install transformers_minicpm4[data]") from error
    return pyarrow


def encodable(text):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_manifest(path: Path) -> dict | None:
    """The manifest that `process_shards` wrote; None if the file is something else."""
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return manifest if _is_manifest(manifest) else None


def _is_manifest(manifest) -> bool:
    """Whether every entry that is read later is there, and of its type."""
    kinds = {"finished": bool, "settings": dict, "inputs": dict, "counts": dict, "shards": list}
    counts = {"read": int, "kept": int, "dropped": dict, "rejected": dict, "blank_lines": int}
    settings = {"output_format": str, "text_column": (str, type(None))}
    if not (_holds(manifest, kinds) and _holds(manifest["counts"], counts)):
        return False
    reasons = [*manifest["counts"]["dropped"].values(), *manifest["counts"]["rejected"].values()]
    return (
        _holds(manifest["settings"], settings)
        and all(isinstance(count, int) for count in reasons)
        and all(map(_is_shard, manifest["shards"]))
    )


def _is_shard(shard) -> bool:
    if not _holds(shard, {"read": int, "files": dict, "position": list}):
        return False
    position = shard["position"]
    return (
        len(position) == 2
        and all(isinstance(number, int) for number in position)
        and all(
            _holds(file, {"name": str, "rows": int, "bytes": int}) and _OF_A_RUN.fullmatch(file["name"])
            for file in shard["files"].values()
        )
    )


def _holds(value, kinds: dict) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key, ...), kind) for key, kind in kinds.items())


def read_rows(paths) -> Iterator[dict]:
    """Rows of files.

    Raises:
        ValueError: a record that cannot be read; names the file and the line.
    """
    source = Files(paths)
    with source.progress_bar(False) as bar:
        for record in source.records((0, 0), bar):
            reason = record.reason or not_a_row(record.row)
            if reason:
                raise ValueError(f"{record.file}, line {record.line}: {reason}")
            yield record.row


def not_a_row(value) -> str | None:
    """Why a value is no row, if it is none."""
    return None if isinstance(value, dict) else f"{type(value).__name__} instead of an object"


class Record:
    """One input record: a row, or the reason why there is none; `line` counts lines or rows of the file from 1."""

    __slots__ = ("file", "line", "row", "reason", "raw")

    def __init__(self, file, line, row, reason=None, raw=None):
        self.file, self.line, self.row, self.reason, self.raw = file, line, row, reason, raw

    def rejected(self, reason):
        """Line of the file of rejects."""
        if self.raw is None:
            content = json.dumps(self.row, default=str)
        else:
            content = self.raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
        return {"file": self.file and str(self.file), "line": self.line, "reason": reason, "content": content}


def names_files(inputs):
    if isinstance(inputs, (str, os.PathLike)):
        return True
    return (
        isinstance(inputs, (list, tuple)) and bool(inputs) and all(isinstance(i, (str, os.PathLike)) for i in inputs)
    )


class Files:
    """Records of files. `position` is (file number, records or lines of it consumed)."""

    def __init__(self, inputs, output_dir=None):
        self.paths = []
        for path in [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs:
            self.paths += self._expand(Path(path), output_dir)
        self.sizes = [path.stat().st_size for path in self.paths]
        self.identity = {str(p): [p.stat().st_size, p.stat().st_mtime_ns] for p in self.paths}
        if len(self.identity) != len(self.paths):
            raise ValueError("an input is given twice: its rows would be written twice; name each file once")
        self.position, self.blank_lines, self.columns = (0, 0), 0, None

    @staticmethod
    def _expand(path, output_dir):
        if path.is_dir():
            output_dir = output_dir and Path(output_dir).resolve()
            if path.resolve() == output_dir:
                raise ValueError(f"{path} is both input and output_dir: choose another folder to write into")
            files, runs = [], []
            for folder, folders, names in os.walk(path):
                folder = Path(folder)
                # What is written into an input folder is not input of the same run when it is resumed.
                folders[:] = [name for name in folders if (folder / name).resolve() != output_dir]
                found = _kept_files(folder, names) if MANIFEST in names else None
                if found is None:
                    names = [name for name in names if name.endswith(SUFFIXES) and not _NO_ROWS.fullmatch(name)]
                    files += (p for name in names if (p := folder / name).is_file())
                else:
                    runs.append(folder)
                    files += found
                    folders.clear()
            if not files and runs:
                raise FileNotFoundError(f"{runs[0]} holds a run of process_shards that kept no row: nothing to read")
            if not files:
                raise FileNotFoundError(f"{path} holds no file that ends in one of {', '.join(SUFFIXES)}")
            return sorted(files)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"{path} does not end in one of {', '.join(SUFFIXES)}")
        return [path]

    def arrow_types(self):
        """Types of the columns of parquet inputs; also finds the columns, where files have a schema."""
        types = {}
        for path in (p for p in self.paths if p.name.endswith(".parquet")):
            schema = self._parquet(path).schema_arrow
            if self.columns is None:
                self.columns = set(schema.names)
            self.columns &= set(schema.names)  # a column must be in every file
            for field in schema:
                if types.setdefault(field.name, field.type) != field.type:
                    raise ValueError(
                        f"column {field.name!r} is {field.type} in {path} and {types[field.name]} in a file before "
                        f"it: process them into folders of their own"
                    )
        return types

    def progress_bar(self, shown):
        from tqdm.auto import tqdm

        return tqdm(total=sum(self.sizes), unit="B", unit_scale=True, disable=not shown, desc="process shards")

    def take_blank_lines(self):
        """Blank lines since the last call."""
        taken, self.blank_lines = self.blank_lines, 0
        return taken

    def records(self, position, bar):
        first, skip = self.position = position
        bar.update(sum(self.sizes[:first]))
        for number in range(first, len(self.paths)):
            path, size = self.paths[number], self.sizes[number]
            read = self._parquet_rows if path.name.endswith(".parquet") else self._json_rows
            seen = 0
            try:
                for consumed, at, record in read(path, skip if number == first else 0):
                    bar.update(at - seen)
                    seen = at
                    self.position = (number, consumed)
                    if record is None:
                        self.blank_lines += 1
                    else:
                        yield record
            except (EOFError, OSError, zlib.error, arrow().ArrowException) as error:
                raise ValueError(f"{path} is damaged after record {self.position[1]}: {error}") from error
            bar.update(size - seen)

    def _json_rows(self, path, skip):
        with open(path, "rb") as raw, gzip.open(raw) if path.name.endswith(".gz") else raw as stream:
            if ".json" in path.suffixes[-2:] and stream.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                yield from self._json_array(path, stream, skip)
                return
            for number, line in enumerate(stream, 1):
                if number > skip:
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    yield number, raw.tell(), _parse(path, number, line) if line.strip() else None

    @staticmethod
    def _json_array(path, stream, skip):
        try:
            content = stream.read()
            rows = json.loads(content.removeprefix(b"\xef\xbb\xbf"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is not one JSON array ({error}): repair it, or store one object a line"
            ) from error
        size, escapes = path.stat().st_size, b"\\ud" in content or b"\\uD" in content
        for number, row in enumerate(rows[skip:], skip + 1):
            reason = "lone surrogate" if escapes and _has_lone_surrogate(row) else None
            yield number, size * number // len(rows), Record(path, number, row, reason)

    def _parquet(self, path):
        pa = arrow()
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(path)
        except pa.ArrowException as error:
            raise ValueError(f"{path} is not a whole parquet file ({error}): fetch or write it again") from error

    def _parquet_rows(self, path, skip):
        with self._parquet(path) as file:
            total, size = file.metadata.num_rows, path.stat().st_size
            start, groups = 0, []
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if start + rows > skip or groups:
                    groups.append(group)
                else:
                    start += rows
            number = start
            for batch in file.iter_batches(batch_size=1000, row_groups=groups):
                for row, reason in _unpack(batch):
                    number += 1
                    if number > skip:
                        yield number, size * number // total, Record(path, number, row, reason)


def _kept_files(folder, names):
    """Files of rows kept by a run of `process_shards`, without its rejects and its own notes; None if it is no run."""
    manifest = read_manifest(folder / MANIFEST)
    if manifest is None:
        # Without it nobody can tell the rows of a finished run from those of one that was stopped or replaced.
        if any(map(_OF_A_RUN.fullmatch, names)):
            raise ValueError(
                f"{folder} holds files of a run of process_shards, but its {MANIFEST} is damaged: put that file back, "
                f"run again into another folder, or name the part files that you want"
            )
        return None
    if not manifest["finished"]:
        raise ValueError(
            f"{folder} holds a run that is not finished: give its command again, and read the folder then"
        )
    return [folder / shard["files"]["part"]["name"] for shard in manifest["shards"] if "part" in shard["files"]]


def _unpack(batch):
    """Rows of an Arrow batch, each with the reason why it cannot be read, if it cannot."""
    try:
        return [(row, None) for row in batch.to_pylist()]
    except (ValueError, OverflowError):  # bytes that are not UTF-8, a date that Python does not have
        return [_unpack_one(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _unpack_one(batch):
    row, reason = {}, None
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            row[name] = column.to_pylist()[0]
        except UnicodeDecodeError:
            row[name], reason = str(column), f"column {name!r} is not UTF-8"
        except (ValueError, OverflowError):
            row[name], reason = str(column), f"column {name!r} holds a value that Python cannot hold"
    return row, reason


def _parse(path, number, line):
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return Record(path, number, None, "not UTF-8", line)
    except (ValueError, RecursionError):
        return Record(path, number, None, "broken JSON", line)
    # Only an escape can bring a lone surrogate into valid UTF-8, and no format can store it.
    if (b"\\ud" in line or b"\\uD" in line) and _has_lone_surrogate(row):
        return Record(path, number, None, "lone surrogate", line)
    return Record(path, number, row, None, line)


def _has_lone_surrogate(row):
    return not encodable(json.dumps(row, ensure_ascii=False))


class Rows:
    """Records of an iterable. `position` is (0, rows consumed)."""

    def __init__(self, rows, name):
        if not isinstance(rows, Iterable):
            raise TypeError(f"inputs={rows!r}: paths, a dataset or an iterable of rows (dicts) are needed")
        self.rows = rows
        fingerprint = getattr(rows, "_fingerprint", None) if type(rows).__name__ == "Dataset" else None
        self.identity = {"iterable": name or fingerprint or type(rows).__name__}
        self.position = (0, 0)
        features = getattr(rows, "features", None)
        self.schema = features.arrow_schema if features else None
        self.columns = set(self.schema.names) if features else None

    def arrow_types(self):
        return {field.name: field.type for field in self.schema} if self.schema else {}

    def progress_bar(self, shown):
        from tqdm.auto import tqdm

        total = len(self.rows) if hasattr(self.rows, "__len__") else None
        return tqdm(total=total, unit="row", disable=not shown, desc="process shards")

    def take_blank_lines(self):
        return 0

    def records(self, position, bar):
        self.position, (_, skip) = position, position
        bar.update(skip)
        # Datasets skip without reading; other iterables have to be read again.
        rows = iter(self.rows.skip(skip)) if hasattr(self.rows, "skip") else islice(self.rows, skip, None)
        for number, row in enumerate(rows, skip + 1):
            self.position = (0, number)
            bar.update(1)
            yield Record(None, number, dict(row) if isinstance(row, dict) else row)
