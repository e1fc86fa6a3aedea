"""Reading a corpus: what a folder holds, and records that cannot be read, each with its place."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transformers_minicpm4.data.ultraclean.records import read_rows
from transformers_minicpm4.data.ultraclean.shards import process_shards


def run(inputs, folder, function=lambda batch: {"seen": [True] * len(batch["text"])}, **options):
    return process_shards(inputs, folder, function, progress=False, **options)


def odd(batch):
    return [n % 2 == 1 for n in batch["n"]]


def write(path, numbers, *lines):
    rows = [json.dumps({"text": f"text {n}", "n": n}) for n in numbers]
    path.write_text("\n".join([*rows, *lines]) + "\n")
    return path


def stored(folder, kind="part"):
    return [row for path in sorted(folder.glob(f"{kind}-*")) for row in read_rows(path)]


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_a_folder_we_wrote_is_read_as_the_rows_it_kept(tmp_path, output_format):
    corpus = write(tmp_path / "a.jsonl", range(10), "not json")
    run(corpus, tmp_path / "first", odd, output_format=output_format, rows_per_shard=4)
    for name in ("dropped-00000." + output_format, "rejects-00002.jsonl"):
        assert (tmp_path / "first" / name).exists()
    (tmp_path / "first" / "ultraclean.json").write_text('{"action": "filter"}')
    write(tmp_path / "first" / "part-99999.jsonl", [77])  # of no run: the manifest does not list it
    kept = [{"text": f"text {n}", "n": n} for n in range(1, 10, 2)]
    # by its own name, and found inside another folder beside files of its own
    manifest = run(tmp_path / "first", tmp_path / "second", output_format="jsonl")
    assert manifest["counts"]["read"] == manifest["counts"]["kept"] == 5
    assert stored(tmp_path / "second") == [{**row, "seen": True} for row in kept]
    (tmp_path / "all").mkdir()
    (tmp_path / "first").rename(tmp_path / "all" / "first")
    write(tmp_path / "all" / "b.jsonl", [20])
    run(tmp_path / "all", tmp_path / "third", output_format="jsonl")
    assert sorted(row["n"] for row in stored(tmp_path / "third")) == [1, 3, 5, 7, 9, 20]


def test_an_output_folder_inside_the_input_is_not_input(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "a.jsonl", range(3))
    write(tmp_path / "deep" / "b.jsonl", range(3, 6))
    first = run(tmp_path, tmp_path / "out")
    assert first["counts"]["read"] == 6
    assert run(tmp_path, tmp_path / "out") == first  # the same inputs: a resumed run
    with pytest.raises(ValueError, match="both input and output_dir"):
        run(tmp_path / "out", tmp_path / "out")


def test_runs_that_cannot_be_read_are_named(tmp_path):
    corpus = write(tmp_path / "a.jsonl", range(3), '{"text": "x", "n": "many"}')
    with pytest.raises(TypeError):
        run(corpus, tmp_path / "half", odd, rows_per_shard=2)
    with pytest.raises(ValueError, match=r"half holds a run that is not finished: give its command again"):
        run(tmp_path / "half", tmp_path / "x")
    run(write(tmp_path / "b.jsonl", [2, 4]), tmp_path / "none", odd)
    with pytest.raises(FileNotFoundError, match=r"none holds a run of process_shards that kept no row"):
        run(tmp_path / "none", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def damages(manifest):
    """A good manifest, damaged in one place each."""
    yield ""
    yield "[1]"
    yield json.dumps(manifest)[:-20]
    for key in manifest:
        yield json.dumps({name: value for name, value in manifest.items() if name != key})
        yield json.dumps({**manifest, key: "x"})
    for key in manifest["counts"]:
        yield json.dumps({**manifest, "counts": {**manifest["counts"], key: "x"}})
    for key in ("output_format", "text_column"):
        yield json.dumps({**manifest, "settings": {**manifest["settings"], key: 3}})
    first, *others = manifest["shards"]
    part = first["files"]["part"]
    files = [{"part": {**part, key: value}} for key, value in (("name", 1), ("name", "../a.jsonl"), ("bytes", "x"))]
    for shard in ({}, 1, {**first, "position": [0]}, *({**first, "files": each} for each in ({"part": {}}, *files))):
        yield json.dumps({**manifest, "shards": [shard, *others]})


def test_a_run_with_a_damaged_manifest_is_refused_by_name(tmp_path):
    corpus = write(tmp_path / "a.jsonl", range(10), "not json")
    manifest = run(corpus, tmp_path / "corpus" / "first", odd, rows_per_shard=4)
    for damaged in damages(manifest):
        (tmp_path / "corpus" / "first" / "manifest.json").write_text(damaged)
        for place in (tmp_path / "corpus", tmp_path / "corpus" / "first"):
            with pytest.raises(ValueError, match=r"corpus/first holds files of a run .* manifest.json is damaged"):
                run(place, tmp_path / "out")
        with pytest.raises(ValueError, match=r"manifest.json is not, or no longer, the manifest of a run"):
            run(corpus, tmp_path / "corpus" / "first", odd, rows_per_shard=4)
    assert not (tmp_path / "out").exists()


def test_notes_of_a_run_are_no_rows_of_a_plain_folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.jsonl", range(2))
    (folder / "manifest.json").write_text('{"of": "another program"}')
    (folder / "ultraclean.json").write_text('{"action": "score"}')
    assert run(folder, tmp_path / "out", output_format="jsonl")["counts"]["read"] == 2
    (folder / "manifest.json").unlink()
    (folder / "rejects-00000.jsonl").write_text('{"file": "a", "line": 1, "reason": "x", "content": "y"}\n')
    assert run(folder, tmp_path / "again", output_format="jsonl")["counts"]["read"] == 2


def not_utf8(*texts):
    offsets, data = pa.array([len(b"".join(texts[:i])) for i in range(len(texts) + 1)], pa.int32()), b"".join(texts)
    return pa.StringArray.from_buffers(len(texts), offsets.buffers()[1], pa.py_buffer(data))


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_parquet_values_that_cannot_be_read_are_rejected_with_their_row(tmp_path, output_format):
    tags = pa.ListArray.from_arrays([0, 1, 2, 3, 4], not_utf8(b"a", b"b", b"\xfe", b"d"))
    days = pa.array([0, 0, 0, 10**15], pa.timestamp("s"))  # the year 31 million
    table = pa.table({"text": not_utf8(b"one", b"\xff\xff", b"three", b"four"), "tags": tags, "day": days})
    pq.write_table(table, tmp_path / "a.parquet")
    out = tmp_path / "out"
    manifest = run(tmp_path / "a.parquet", out, lambda batch: {"day": ["day"] * len(batch["text"])},
                   output_format=output_format, column_types={"day": pa.string()})  # fmt: skip
    assert [row["text"] for row in stored(out)] == ["one"]
    assert [(row["line"], row["reason"]) for row in stored(out, "rejects")] == [
        (2, "column 'text' is not UTF-8"),
        (3, "column 'tags' is not UTF-8"),
        (4, "column 'day' holds a value that Python cannot hold"),
    ]
    assert json.loads(stored(out, "rejects")[1]["content"])["text"] == "three"
    assert (manifest["counts"]["read"], manifest["counts"]["kept"]) == (4, 1)


def test_a_damaged_page_names_its_file(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [str(n * n * 7919 % 101 % 3) for n in range(3000)]  # three words: two bits each, of which 11 means nothing
    pq.write_table(pa.table({"text": texts}), path, compression="none", use_dictionary=["text"])
    whole, column = path.read_bytes(), pq.ParquetFile(path).metadata.row_group(0).column(0)
    end = column.dictionary_page_offset + column.total_compressed_size
    path.write_bytes(whole[: end - 300] + b"\xff" * 100 + whole[end - 200 :])
    with pytest.raises(ValueError, match=r"a.parquet is damaged after record \d+: "):
        run(path, tmp_path / "out")


def test_a_lone_surrogate_in_an_array_is_rejected_as_in_lines(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "b", "title": "\\ud800"}, {"text": "\\ud83d\\ude00"}]')
    run(tmp_path / "a.json", tmp_path / "out", output_format="jsonl")
    assert [row["text"] for row in stored(tmp_path / "out")] == ["a", "\U0001f600"]
    assert [(row["line"], row["reason"]) for row in stored(tmp_path / "out", "rejects")] == [(2, "lone surrogate")]


def test_strict_reading_names_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl", range(2), "", "{", "[]")
    with pytest.raises(ValueError, match=r"a.jsonl, line 4: broken JSON"):
        list(read_rows(path))
    path = write(tmp_path / "b.jsonl", range(2), "[]")
    with pytest.raises(ValueError, match=r"b.jsonl, line 3: list instead of an object"):
        list(read_rows(path))
