"""Shards: nothing lost, nothing repeated, also when the run is killed; bad records are kept apart with their place."""

import gzip
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset

from transformers_minicpm4.data.ultraclean import shards
from transformers_minicpm4.data.ultraclean.shards import process_shards


@dataclass(frozen=True)
class Length:
    """Map callable with a column that is null for most rows, as a scorer's reason is."""

    unit: int = 1

    def __call__(self, batch):
        texts = batch["text"]
        return {
            "length": [None if not t else len(t) // self.unit for t in texts],
            "reason": ["empty" if not t else None for t in texts],
        }


@dataclass(frozen=True)
class Longer:
    least: int

    def __call__(self, batch):
        return [reason is None for reason in self.reasons(batch)]

    def reasons(self, batch):
        return [r or ("short" if n < self.least else None) for n, r in zip(batch["length"], batch["reason"])]


STEPS = [Length(), Longer(600)]
CALLS_LEFT = [0]


@dataclass(frozen=True)
class Stop:
    """Changes nothing, until it is called once too often."""

    def __call__(self, batch):
        CALLS_LEFT[0] -= 1
        if CALLS_LEFT[0] < 0:
            raise KeyboardInterrupt
        return {}


def run(inputs, folder, function=STEPS, **options):
    return process_shards(inputs, folder, function, progress=False, **options)


def write_jsonl(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def read(folder, kind):
    rows = []
    for path in sorted(folder.glob(f"{kind}-*")):
        rows += pq.read_table(path).to_pylist() if path.suffix == ".parquet" else read_lines(path)
    return rows


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def documents(shared_data):
    with gzip.open(shared_data / "debian-docs-quality" / "zh.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [row for row, _ in zip(map(json.loads, lines), range(230))]
    rows[70]["text"], rows[140]["text"] = None, ""
    return rows


@pytest.fixture
def files(documents, tmp_path):
    """The same documents in four kinds of file."""
    a = write_jsonl(tmp_path / "a.jsonl", documents[:80])
    b = write_jsonl(tmp_path / "b.jsonl.gz", documents[80:110])
    c = tmp_path / "c.json"
    c.write_text(json.dumps(documents[110:160], indent=1), encoding="utf-8")
    d = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist(documents[160:]), d, row_group_size=13)
    return [a, b, c, d]


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_every_row_comes_out_once(documents, files, tmp_path, output_format):
    manifest = run(files, tmp_path / "out", output_format=output_format, rows_per_shard=70, batch_size=16)
    expected = Dataset.from_list(documents).map(Length(), batched=True).to_list()
    kept = [row for row in expected if row["length"] and row["length"] >= 600]
    assert read(tmp_path / "out", "part") == kept
    dropped = read(tmp_path / "out", "dropped")
    assert [{k: v for k, v in row.items() if k != "dropped_reason"} for row in dropped] == [
        row for row in expected if row not in kept
    ]
    assert manifest["counts"] == {
        "read": 230,
        "kept": len(kept),
        "dropped": dict(sorted(Counter(row["dropped_reason"] for row in dropped).items())),
        "rejected": {},
        "blank_lines": 0,
    }
    assert manifest["counts"]["dropped"]["empty"] == 2
    assert [shard["read"] for shard in manifest["shards"]] == [70, 70, 70, 20]
    assert manifest["finished"]
    # Others can load it as one dataset.
    data = load_dataset(
        output_format.replace("jsonl", "json"),
        data_files=str(tmp_path / "out" / "part-*"),
        split="train",
        cache_dir=tmp_path / "cache",
    )
    assert data.to_list() == kept


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resuming_anywhere_equals_one_run(files, tmp_path, stop_after):
    """Stopped by an error in the middle of a shard, at a place that falls into each kind of file."""

    options = {"rows_per_shard": 45, "batch_size": 30}  # two calls a shard
    steps = [*STEPS, Stop()]
    CALLS_LEFT[0] = 10**9
    run(files, tmp_path / "whole", steps, **options)
    CALLS_LEFT[0] = 2 * stop_after + 1
    with pytest.raises(KeyboardInterrupt):
        run(files, tmp_path / "resumed", steps, **options)
    done = json.loads((tmp_path / "resumed" / "manifest.json").read_text())
    assert len(done["shards"]) == stop_after
    assert not done["finished"]
    CALLS_LEFT[0] = 10**9
    run(files, tmp_path / "resumed", steps, **options)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


# The folder is made a package of its own: importing ours would import torch, twice.
SLOW = """
    import sys, time, types
    from dataclasses import dataclass

    sys.modules["room"] = types.ModuleType("room")
    sys.modules["room"].__path__ = [sys.argv[1]]
    from room import shards

    @dataclass(frozen=True)
    class Slow:
        def __call__(self, batch):
            time.sleep(float(sys.argv[2]))
            return {"length": [len(t or "") for t in batch["text"]]}

    for folder in sys.argv[4:]:
        shards.process_shards(sys.argv[3].split(","), folder, Slow(), rows_per_shard=20, batch_size=7, progress=False)
"""


def test_a_killed_process_loses_and_repeats_nothing(files, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(textwrap.dedent(SLOW))

    def command(seconds, *folders):
        folders = [str(tmp_path / folder) for folder in folders]
        return [
            sys.executable,
            str(script),
            os.path.dirname(shards.__file__),
            seconds,
            ",".join(map(str, files)),
            *folders,
        ]

    process = subprocess.Popen(command("0.05", "killed"))
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "part-00002.parquet").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "killed" / ".part-00003.parquet.tmp").write_bytes(b"half a file")
    before = json.loads((tmp_path / "killed" / "manifest.json").read_text())
    assert not before["finished"]
    assert 2 <= len(before["shards"]) < 12
    subprocess.run(command("0", "killed", "whole"), check=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(read(tmp_path / "killed", "part")) == 230


def test_bad_records_are_rejected_with_their_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    good = {"text": "ein Text", "n": 1}
    lines = [
        b"\xef\xbb\xbf" + json.dumps(good).encode(),
        b'{"text": "cut',
        b"",
        b'{"text": 5}',
        b"[1, 2]",
        b'{"txt": "other"}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": "a\\u0000b", "extra": "\\ud83d\\ude00"}',
        b'{"text": null}',
        json.dumps({"text": "x" * 3_000_000}).encode(),
        b"  ",
    ]
    path.write_bytes(b"\n".join(lines))
    for output_format in ("jsonl", "parquet"):
        out = tmp_path / output_format
        manifest = run(path, out, Length(), output_format=output_format, rows_per_shard=20, batch_size=3)
        rejects = read(out, "rejects")
        assert [(row["line"], row["reason"]) for row in rejects] == [
            (2, "broken JSON"),
            (4, "column 'text' holds int, not a string"),
            (5, "list instead of an object"),
            (6, "no column 'text'"),
            (7, "not UTF-8"),
            (8, "lone surrogate"),
        ]
        assert [row["content"] for row in rejects] == [
            lines[row["line"] - 1].decode("utf-8", "backslashreplace") for row in rejects
        ]
        assert {row["file"] for row in rejects} == {str(path)}
        assert [row["text"] for row in read(out, "part")] == ["ein Text", "a\x00b", None, "x" * 3_000_000]
        counts = manifest["counts"]
        assert (counts["read"], counts["kept"], counts["blank_lines"]) == (10, 4, 2)
        assert sum(counts["rejected"].values()) == 6
    rows = read(tmp_path / "jsonl", "part")
    assert rows[0] == {**good, "length": 8, "reason": None}  # no key that the line did not have
    assert rows[1]["extra"] == "\U0001f600"


def test_other_settings_or_inputs_refuse_to_resume(files, tmp_path):
    run(files, tmp_path / "out", rows_per_shard=50)
    assert run(files, tmp_path / "out", rows_per_shard=50)["finished"]  # nothing left to do
    for changes, message in (
        ({"rows_per_shard": 51}, "other settings: rows_per_shard was 50, is 51"),
        ({"function": [Length(), Longer(601)]}, "other settings: functions was"),
        ({"inputs": files[:3]}, "other inputs: .*d.parquet was .* is gone"),
        ({"inputs": files[::-1]}, "another order"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**{"inputs": files, "folder": tmp_path / "out", "rows_per_shard": 50, **changes})
    write_jsonl(files[0], [{"text": "new"}])
    with pytest.raises(ValueError, match=r"other inputs: .*a.jsonl was"):
        run(files, tmp_path / "out", rows_per_shard=50)


def test_a_lost_shard_is_noticed(files, tmp_path):
    run(files, tmp_path / "out", rows_per_shard=50)
    (tmp_path / "out" / "part-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"part-00001.parquet is gone"):
        run(files, tmp_path / "out", rows_per_shard=50)


def test_foreign_folder_is_left_alone(files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part-00000.parquet").write_bytes(b"precious")
    with pytest.raises(ValueError, match="choose an empty folder"):
        run(files, tmp_path / "out")
    assert (tmp_path / "out" / "part-00000.parquet").read_bytes() == b"precious"


@pytest.mark.parametrize("content", ["{", "null", "[]", '{"files": ["a"]}'])
def test_foreign_or_broken_manifest_is_left_alone(files, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"manifest.json is not, or no longer, the manifest of a run .*another folder"
    ):
        run(files, tmp_path / "out")
    assert contents(tmp_path / "out") == {"manifest.json": content.encode()}


@pytest.mark.parametrize("value", ['"many"', str(2**70), str(10**400), '{"a": 1}', "[1]"])
def test_values_of_two_types_are_refused_by_parquet_and_kept_by_jsonl(tmp_path, value):
    """Nothing is left half-written: the same folder takes the run in the other format."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "x": 1}\n{"text": "b", "x": ' + value + "}\n")
    for rows_per_shard in (1, 2):
        out = tmp_path / f"out{rows_per_shard}"
        with pytest.raises(ValueError, match=r"('x' holds values|shard 1 does not fit).*column_types.*--format jsonl"):
            run(path, out, Length(), rows_per_shard=rows_per_shard)
        assert sorted(p.name for p in out.glob(".*")) == []
    assert [p.name for p in out.iterdir()] == ["manifest.json"]
    run(path, out, Length(), output_format="jsonl")
    assert [row["x"] for row in read(out, "part")] == [1, json.loads(value)]


def test_a_callable_that_cannot_use_the_values_says_which_it_got(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "length": 700, "reason": None}])
    with pytest.raises(TypeError, match=r"Longer cannot use the values .*length: int, str; reason: NoneType"):
        run([path, write_jsonl(tmp_path / "b.jsonl", [{"text": "b", "length": "700"}])], tmp_path / "out", Longer(600))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_missing_column_names_what_is_there_and_can_be_put_right(files, tmp_path):
    for inputs in (files, files[3]):
        with pytest.raises(ValueError, match=r"no column 'content'; the columns are \['id', .*'text'\]"):
            run(inputs, tmp_path / "out", text_column="content")
    assert run(files, tmp_path / "out")["counts"]["read"] == 230


def test_datasets_and_iterables(documents, tmp_path):
    data = Dataset.from_list(documents)
    for name, inputs in (("map", data), ("stream", data.to_iterable_dataset(3)), ("rows", iter(documents))):
        assert run(inputs, tmp_path / name, rows_per_shard=100)["counts"]["read"] == 230
        assert read(tmp_path / name, "part") == read(tmp_path / "map", "part")
    other = data.select(range(100))
    with pytest.raises(ValueError, match="other inputs"):
        run(other, tmp_path / "map", rows_per_shard=100)


def test_types_of_parquet_stay_and_later_shards_must_agree(tmp_path):
    table = pa.table(
        {"text": ["a", "b"], "n": pa.array([1, 2], pa.int8()), "at": pa.array([0, 1], pa.timestamp("ms"))}
    )
    pq.write_table(table, tmp_path / "typed.parquet")
    run(tmp_path / "typed.parquet", tmp_path / "typed", Length())
    schema = pq.read_schema(tmp_path / "typed" / "part-00000.parquet")
    assert [schema.field(name).type for name in ("text", "n", "at")] == table.schema.types
    assert schema.field("reason").type == pa.string()

    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "x": None}, {"text": "b", "x": 1.5}])
    with pytest.raises(ValueError, match="column_types"):
        run(rows, tmp_path / "late", Length(), rows_per_shard=1, column_types={"x": pa.int64()})
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b", "x": 1.5}])
    with pytest.raises(ValueError, match=r"shard 1 has columns .*\['x'\]"):
        run(rows, tmp_path / "late2", Length(), rows_per_shard=1)


def test_errors(files, tmp_path):
    def call(match, error=ValueError, inputs=files, function=STEPS, **options):
        with pytest.raises(error, match=match):
            run(inputs, tmp_path / "out", function, **options)

    call("'parquet' or 'jsonl'", output_format="csv")
    call("rows_per_shard=0", rows_per_shard=0)
    call("does not exist", FileNotFoundError, inputs=tmp_path / "none.jsonl")
    (tmp_path / "x.txt").touch()
    call(r"does not end in one of \.jsonl", inputs=tmp_path / "x.txt")
    (tmp_path / "empty").mkdir()
    call("holds no file", FileNotFoundError, inputs=tmp_path / "empty")
    call("given twice", inputs=[files[0], files[0]])
    call("paths, a dataset", TypeError, inputs=7)
    call("gave 1 values in column 'y' for 230 rows", TypeError, function=lambda batch: {"y": [1]})
    call("gave NoneType for a batch of 230 rows", TypeError, function=lambda batch: None)
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    call(r"b.jsonl.gz is damaged after record", inputs=files[1])
    files[3].write_bytes(files[3].read_bytes()[:-20])
    call(r"d.parquet is not a whole parquet file", inputs=files[3])
    (tmp_path / "c.json").write_text('[{"text": "a"},')
    call(r"c.json is not one JSON array", inputs=files[2])


def test_progress_counts_all_bytes(files, tmp_path, capsys):
    process_shards(files, tmp_path / "out", STEPS, rows_per_shard=50)
    shown = capsys.readouterr().err
    assert "process shards: 100%" in shown
    assert "kept=" in shown
