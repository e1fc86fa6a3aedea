"""Batched callables over a corpus on disk, shard by shard: a run that is killed goes on where it stopped.

Shard k holds what became of input records k * rows_per_shard and following, so a shard depends on nothing but the
input and the settings. Its files are written under temporary names, renamed, and only then entered in `manifest.json`,
which also says where in the input the next shard begins. A resumed run therefore repeats at most the shard that was
cut off, and its files are those of a run that was never stopped, byte for byte.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from .files import rename, write_json, write_text
from .records import MANIFEST, Files, Rows, arrow, encodable, names_files, not_a_row, read_manifest


AS_JSONL = "choose output_format='jsonl' (--format jsonl), where each row has its own types"
AS_PARQUET = "choose output_format='parquet' (--format parquet)"


def process_shards(
    inputs,
    output_dir,
    function: Callable | Sequence[Callable],
    *,
    output_format: str = "parquet",
    rows_per_shard: int = 20_000,
    batch_size: int = 1000,
    text_column: str | None = "text",
    column_types: dict | None = None,
    input_name: str | None = None,
    progress: bool = True,
) -> dict:
    """Applies batched callables to a corpus and writes it as shards; run again, it resumes.

    Of each shard up to three files are written: `part-00000.parquet` (rows kept), `dropped-00000.parquet` (rows that a
    filter dropped, with `dropped_reason`) and `rejects-00000.jsonl` (records that could not be read: file, line,
    reason, content). Memory is one shard, whatever the corpus.

    Args:
        inputs (path, list of paths, or iterable of dict): jsonl, jsonl.gz, json (an array, or lines) and parquet
            files, folders of them (sorted by name, without `output_dir`; of a folder that this function wrote, the
            rows kept), or a `datasets.Dataset`, `IterableDataset` or other iterable of rows.
        output_dir (path): made if missing; holds one run.
        function (callable, or several applied in turn): from `dict[str, list]` to a `dict[str, list]` of the same
            length, whose columns are added or replaced; or to a `list[bool]`, a filter: False drops the row, for the
            reason that the callable's `reasons(batch)` gives, else for its class name.
        output_format (`str`, *optional*, defaults to `"parquet"`): or `"jsonl"`.
        rows_per_shard (`int`, *optional*, defaults to 20,000): input records per shard.
        batch_size (`int`, *optional*, defaults to 1000): rows per call.
        text_column (`str`, *optional*, defaults to `"text"`): records whose value there is neither a string nor None
            are rejected; None checks nothing.
        column_types (`dict[str, pyarrow.DataType]`, *optional*): types of parquet columns. Without it they are
            those of the input and of the callables' `added_columns`, else those of the first shard's values (strings
            where all are null).
        input_name (`str`, *optional*): name by which a resumed run knows an iterable again; a `Dataset` is
            known by its fingerprint, files by name, size and time.
        progress (`bool`, *optional*, defaults to True): progress bar, over bytes of files or rows of an iterable.

    Returns:
        `dict`: the manifest: `finished`, `settings`, `inputs`, `counts` (`read`, `kept`, `dropped` and `rejected` by
        reason, `blank_lines`) and `shards`. read = kept + dropped + rejected.

    Raises:
        ValueError: bad settings; a missing column; another run in `output_dir`; damaged files; shards whose columns
            disagree; an input folder whose own run is not finished.
        FileNotFoundError: no such input.
        TypeError: a callable that gives back something else than its contract says.
    """
    functions = [function] if callable(function) else list(function)
    if output_format not in ("parquet", "jsonl"):
        raise ValueError(f"output_format={output_format!r}: 'parquet' or 'jsonl'")
    if rows_per_shard < 1 or batch_size < 1:
        raise ValueError(f"rows_per_shard={rows_per_shard}, batch_size={batch_size}: both must be at least 1")
    if not functions or not all(callable(f) for f in functions):
        raise TypeError(f"function={function!r}: one callable or several are needed")

    source = Files(inputs, output_dir) if names_files(inputs) else Rows(inputs, input_name)
    settings = {
        "functions": [_fingerprint(f) for f in functions],
        "output_format": output_format,
        "rows_per_shard": rows_per_shard,
        "batch_size": batch_size,
        "text_column": text_column,
        "column_types": {name: str(kind) for name, kind in sorted((column_types or {}).items())},
    }
    folder = Path(output_dir)
    manifest = _open_run(folder, settings, source.identity)
    if manifest["finished"]:
        return manifest
    known = source.arrow_types()
    for f in functions:
        known.update(getattr(f, "added_columns", None) or {})
    known.update(column_types or {})
    if text_column is not None and source.columns is not None and text_column not in source.columns:
        raise ValueError(_no_column(text_column, source.columns))
    writers = {name: _Writer(folder, name, output_format, known) for name in ("part", "dropped")}
    for name, writer in writers.items():
        writer.take_schema([shard["files"].get(name) for shard in manifest["shards"]])

    position = tuple(manifest["shards"][-1]["position"]) if manifest["shards"] else (0, 0)
    with source.progress_bar(progress) as bar:
        records = source.records(position, bar)
        while True:
            shard = _Shard(len(manifest["shards"]), functions, text_column, first=not manifest["counts"]["read"])
            while shard.counts["read"] < rows_per_shard:
                batch = list(islice(records, min(batch_size, rows_per_shard - shard.counts["read"])))
                if not batch:
                    break
                shard.add(batch)
                for name, rows in (("part", shard.kept), ("dropped", shard.dropped)):
                    writers[name].add(rows)
                bar.set_postfix(kept=manifest["counts"]["kept"] + shard.counts["kept"], refresh=False)
            # Blank lines after the last record belong to the last shard, which may hold nothing else.
            blank_lines = source.take_blank_lines()
            if not shard.counts["read"] and not blank_lines:
                break
            _commit(folder, manifest, shard, writers, source.position, blank_lines)
            if shard.counts["read"] < rows_per_shard:
                break
    manifest["finished"] = True
    write_json(folder / MANIFEST, manifest)
    return manifest


def apply(function: Callable, batch: dict[str, list]) -> tuple[dict[str, list] | None, list[str | None] | None]:
    """Calls one batched callable and checks what it gives back.

    Returns:
        `(columns, None)` of a map; `(None, reasons)` of a filter: None for each row to keep, else why it goes.
    """
    rows = len(next(iter(batch.values())))
    name = type(function).__name__ if type(function).__name__ != "function" else function.__name__
    try:
        result = function(batch)
    except TypeError as error:
        kinds = {column: sorted({type(value).__name__ for value in values}) for column, values in batch.items()}
        held = "; ".join(f"{column}: {', '.join(names)}" for column, names in kinds.items())
        raise TypeError(f"{name} cannot use the values of a batch ({error}); its columns hold {held}") from error
    if isinstance(result, dict):
        for column, values in result.items():
            if len(values) != rows:
                raise TypeError(f"{name} gave {len(values)} values in column {column!r} for {rows} rows")
        return result, None
    if not isinstance(result, list) or len(result) != rows:
        raise TypeError(
            f"{name} gave {type(result).__name__} for a batch of {rows} rows: a dict of lists of this length (map) or "
            f"a list of as many booleans (filter) is needed"
        )
    reasons = function.reasons(batch) if hasattr(function, "reasons") else [name] * rows
    return None, [None if keep else reason or name for keep, reason in zip(result, reasons)]


class _Shard:
    """What becomes of the records of one shard."""

    def __init__(self, number, functions, text_column, first):
        self.number, self.functions, self.text_column, self.first = number, functions, text_column, first
        self.counts = Counter(read=0, kept=0)
        self.dropped_reasons, self.rejected_reasons = Counter(), Counter()
        self.rejects, self.kept, self.dropped = [], [], []

    def add(self, records):
        """Runs a batch; leaves its rows in `kept` and `dropped`."""
        rows, self.dropped = [], []
        for record in records:
            reason = record.reason or self._unusable(record.row)
            if reason is None:
                rows.append(record.row)
            else:
                self.rejected_reasons[reason] += 1
                self.rejects.append(record.rejected(reason))
        for function in self.functions:
            if not rows:
                break
            batch = {column: [row.get(column) for row in rows] for column in dict.fromkeys(c for r in rows for c in r)}
            columns, reasons = apply(function, batch)
            if columns is not None:
                for i, row in enumerate(rows):
                    row.update((column, values[i]) for column, values in columns.items())
            else:
                self.dropped += [{**row, "dropped_reason": why} for row, why in zip(rows, reasons) if why is not None]
                self.dropped_reasons.update(why for why in reasons if why is not None)
                rows = [row for row, why in zip(rows, reasons) if why is None]
        self.kept = rows
        self.counts["read"] += len(records)
        self.counts["kept"] += len(rows)

    def _unusable(self, row):
        if reason := not_a_row(row):
            return reason
        if self.text_column is None:
            return None
        # In the first row of a run a missing column is a wrong setting rather than a bad record.
        first, self.first = self.first, False
        if self.text_column not in row:
            if first:
                raise ValueError(_no_column(self.text_column, row))
            return f"no column {self.text_column!r}"
        text = row[self.text_column]
        if text is not None and not isinstance(text, str):
            return f"column {self.text_column!r} holds {type(text).__name__}, not a string"
        return None if encodable(text or "") else "lone surrogate"


def _no_column(column, columns):
    return f"no column {column!r}; the columns are {sorted(columns)}: set text_column to one of them"


# ---- output


class _Writer:
    """One kind of output file; all its shards share one schema."""

    def __init__(self, folder, name, output_format, known):
        self.folder, self.name, self.output_format = folder, name, output_format
        self.known = {**known, "dropped_reason": arrow().string()}
        self.schema, self.chunks = None, []

    def take_schema(self, files):
        written = next((f for f in files if f), None)
        if written and self.output_format == "parquet":
            import pyarrow.parquet as pq

            self.schema = pq.read_schema(self.folder / written["name"])

    def add(self, rows):
        """Packs rows, so that a shard in memory is Arrow or text, not Python objects."""
        if rows:
            self.chunks.append(self._table(rows) if self.output_format == "parquet" else self._lines(rows))

    def write(self, number):
        """Writes the shard under its name; None if it has no rows."""
        if not self.chunks:
            return None
        chunks, self.chunks = self.chunks, []
        name = f"{self.name}-{number:05d}.{self.output_format}"
        target, temporary = self.folder / name, self.folder / f".{name}.tmp"
        if self.output_format == "parquet":
            import pyarrow.parquet as pq

            table = self._join(chunks, number)
            pq.write_table(table, temporary, compression="zstd")
            rows = table.num_rows
        else:
            with open(temporary, "wb") as stream:
                stream.writelines(lines for lines, _ in chunks)
            rows = sum(count for _, count in chunks)
        rename(temporary, target)
        return {"name": name, "rows": rows, "bytes": target.stat().st_size}

    def _lines(self, rows):
        try:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return text.encode("utf-8"), len(rows)
        except TypeError as error:
            raise ValueError(f"a row cannot be written as JSON ({error}): {AS_PARQUET}") from error
        except UnicodeEncodeError as error:
            raise ValueError(f"a row holds text that is not Unicode ({error}): replace it before") from error

    def _table(self, rows):
        pa = arrow()
        arrays = {}
        for column in dict.fromkeys(c for row in rows for c in row):
            values, kind = [row.get(column) for row in rows], self.known.get(column)
            try:
                if kind is not None and pa.types.is_integer(kind):
                    # A cast refuses 1.5; pa.array(values, int64) would cut it to 1 without a word.
                    arrays[column] = pa.array(values).cast(kind)
                else:
                    arrays[column] = pa.array(values, kind)
            except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
                raise ValueError(
                    f"column {column!r} holds values that do not fit one type ({error}): give it in column_types, or "
                    f"{AS_JSONL}"
                ) from error
        return pa.table(arrays)

    def _join(self, tables, number):
        pa = arrow()
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
            if self.schema is None:
                fields = [field.with_type(_no_nulls(field.type)) for field in table.schema]
                self.schema = pa.schema(fields)
            new = set(table.column_names) - set(self.schema.names)
            if new:
                raise ValueError(
                    f"shard {number} has columns that shard files before it lack: {sorted(new)}. Name them in "
                    f"column_types from the start, or {AS_JSONL}"
                )
            for name in self.schema.names:
                if name not in table.column_names:
                    table = table.append_column(name, pa.nulls(table.num_rows, self.schema.field(name).type))
            return table.select(self.schema.names).cast(self.schema)
        except pa.ArrowException as error:
            raise ValueError(
                f"shard {number} does not fit the types of the shards before it ({error}): give the column's type in "
                f"column_types from the start, or {AS_JSONL}"
            ) from error


def _no_nulls(kind):
    """A type for a column of which only nulls were seen: most often these are reasons, which are strings."""
    pa = arrow()
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_list(kind) and pa.types.is_null(kind.value_type):
        return pa.list_(pa.string())
    return kind


def _commit(folder, manifest, shard, writers, position, blank_lines):
    files = {name: entry for name, writer in writers.items() if (entry := writer.write(shard.number))}
    if shard.rejects:
        name = f"rejects-{shard.number:05d}.jsonl"
        # ASCII escapes: what was rejected may not be encodable.
        text = "".join(json.dumps(row) + "\n" for row in shard.rejects)
        write_text(folder / name, text)
        files["rejects"] = {"name": name, "rows": len(shard.rejects), "bytes": len(text)}
    counts = manifest["counts"]
    counts["read"] += shard.counts["read"]
    counts["kept"] += shard.counts["kept"]
    counts["blank_lines"] += blank_lines
    for key, reasons in (("dropped", shard.dropped_reasons), ("rejected", shard.rejected_reasons)):
        counts[key] = dict(sorted((Counter(counts[key]) + reasons).items()))
    manifest["shards"].append({"read": shard.counts["read"], "files": files, "position": list(position)})
    write_json(folder / MANIFEST, manifest)


def _open_run(folder, settings, inputs):
    """The manifest of a run to resume, or a new one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if not path.exists():
        others = sorted(p.name for p in folder.iterdir() if not (p.name.startswith(".") and p.name.endswith(".tmp")))
        if others:
            raise ValueError(
                f"{folder} has no {MANIFEST} but holds {others[:3]}: choose an empty folder, so that nothing "
                f"is overwritten"
            )
        counts = {"read": 0, "kept": 0, "dropped": {}, "rejected": {}, "blank_lines": 0}
        manifest = {"finished": False, "settings": settings, "inputs": inputs, "counts": counts, "shards": []}
        write_json(path, manifest)
    manifest = read_manifest(path)
    if manifest is None:
        raise ValueError(
            f"{path} is not, or no longer, the manifest of a run of process_shards: choose another folder, or "
            f"delete this one if nothing in it is needed"
        )
    if not manifest["shards"] and not manifest["finished"]:
        # Nothing was written yet: the last call may have stopped at a setting that is put right now.
        manifest.update(settings=settings, inputs=inputs)
        write_json(path, manifest)
    for name, now in (("settings", settings), ("inputs", inputs)):
        before = manifest[name]
        if list(before.items()) != list(now.items()):
            changes = [
                f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in now if before.get(key) != now[key]
            ]
            changes += [f"{key} was {before[key]!r}, is gone" for key in before if key not in now]
            changes = changes or ["they come in another order"]
            raise ValueError(
                f"{folder} holds a run with other {name}: {'; '.join(changes[:3])}. Resume with the same {name}, "
                f"choose another folder, or delete this one"
            )
    for shard in manifest["shards"]:
        for entry in shard["files"].values():
            file = folder / entry["name"]
            if not file.exists() or file.stat().st_size != entry["bytes"]:
                raise ValueError(
                    f"{file} is {'changed' if file.exists() else 'gone'} since this run wrote it: put it back, or "
                    f"delete {folder} and run again"
                )
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    return manifest


def _fingerprint(function):
    from datasets.fingerprint import Hasher

    name = getattr(function, "__name__", type(function).__name__)
    return f"{name} {Hasher.hash(function)}"
