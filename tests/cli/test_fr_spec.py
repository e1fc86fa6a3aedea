"""`minicpm4 fr-spec` writes the library's lists, measures what the library measures, and refuses in one sentence."""

import gzip
import json
import re

import pytest
import torch
from datasets import Dataset

from transformers_minicpm4.generation.fr_spec import FrequencyVocabulary, build_frequency_vocabulary


LINES = ["the user asks and the assistant answers\n", "three rivers and two lakes\n", "\n", "the end\n"]
OTHER = ["two users ask\n", "the lakes\n"]


@pytest.fixture
def corpus(tmp_path):
    """One text in every form."""
    files = {name: tmp_path / name for name in ("a.txt", "b.txt.gz", "c.jsonl", "d.parquet", "e.jsonl.gz")}
    rows = [{"text": line, "id": number} for number, line in enumerate(LINES)]
    files["a.txt"].write_text("".join(LINES), encoding="utf-8")
    files["b.txt.gz"].write_bytes(gzip.compress("".join(LINES).encode()))
    files["c.jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files["e.jsonl.gz"].write_bytes(gzip.compress(files["c.jsonl"].read_bytes()))
    Dataset.from_list(rows).to_parquet(files["d.parquet"])
    return files


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("".join(OTHER), encoding="utf-8")
    return path


def build(run_cli, checkpoint, *arguments):
    result = run_cli("fr-spec", "build", checkpoint, *arguments)
    assert result.code == 0, result.err
    return result


def test_the_list_is_the_librarys(run_cli, checkpoint, tokenizer, corpus, other, tmp_path):
    """Whatever form the text comes in, standard input too; end-of-text ids of the configuration are kept."""
    expected = build_frequency_vocabulary(["".join(LINES)], tokenizer, 20, eos_token_id=[2, 299], corpus="x")
    shares = expected.coverage({"held": OTHER}, tokenizer)
    assert 0 < shares["held"].share < 1
    for number, file in enumerate([*corpus.values(), "-"]):
        out = tmp_path / f"out{number}"
        stdin = "".join(LINES).encode() if file == "-" else None
        result = run_cli(
            "fr-spec", "build", checkpoint, "--text", file, "--size", 20, "--eos", 299, "--held-out", f"held={other}",
            "-o", out, stdin=stdin,
        )  # fmt: skip
        assert result.code == 0, result.err
        found = FrequencyVocabulary.load(out / "freq_20.pt")
        assert found.ids == expected.ids
        assert found.facts["kept"] == [0, 1, 2, 3, 4, 299]
        assert found.facts["coverage"]["held"]["share"] == shares["held"].share
        row = re.search(r"^held +(\d+) +([\d.]+)$", result.out, re.M)
        assert (int(row[1]), row[2]) == (shares["held"].tokens, f"{shares['held'].share:.4f}")
        assert f"list: {out / 'freq_20.pt'}" in result.out


def test_several_sizes_and_json(run_cli, checkpoint, corpus, other, tmp_path):
    arguments = ("--text", corpus["c.jsonl"], "--size", 300, 10, 20, "--held-out", other, "-o", tmp_path / "out")
    found = json.loads(build(run_cli, checkpoint, *arguments, "--json").out)
    assert [one["size"] for one in found] == [10, 20, 300]
    shares = [one["coverage"]["other"]["share"] for one in found]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert all(len(torch.load(one["file"], weights_only=True)) == one["size"] for one in found)
    assert found[-1]["filled"] > 200
    table = build(run_cli, checkpoint, *arguments, "--overwrite").out
    assert [f"{share:.4f}" for share in shares] == re.search(r"^other +\d+ +(.*)$", table, re.M)[1].split()
    assert re.search(r"^300: 2\d\d of the tokens did not occur", table, re.M)


def test_coverage_of_a_list_that_is_there(run_cli, checkpoint, tokenizer, corpus, other, tmp_path):
    ids = [0, 1, 2, 3, 4, *range(100, 130)]
    torch.save(ids, tmp_path / "freq_35.pt")  # as CPM.cu writes it
    result = run_cli("fr-spec", "coverage", tmp_path / "freq_35.pt", checkpoint, corpus["d.parquet"], other, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    expected = FrequencyVocabulary(tuple(ids), 300).coverage({"d": LINES, "other": OTHER}, tokenizer)
    assert {name: one["share"] for name, one in found["coverage"].items()} == {
        name: one.share for name, one in expected.items()
    }
    text = run_cli("fr-spec", "coverage", tmp_path / "freq_35.pt", checkpoint, other).out
    assert f"{expected['other'].share:.4f}" in text


def test_a_tokenizer_alone(run_cli, tokenizer, corpus, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    result = build(run_cli, tmp_path / "tokenizer", "--text", corpus["a.txt"], "--size", 20, "-o", tmp_path / "one.pt")
    assert FrequencyVocabulary.load(tmp_path / "one.pt").vocab_size == len(tokenizer)
    assert f"taken to be the tokenizer's {len(tokenizer)} tokens" in result.err


def test_the_generation_configuration_names_ends_too(run_cli, make_checkpoint, corpus, tmp_path):
    folder = make_checkpoint()
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [2, 290, 291]}))
    build(run_cli, folder, "--text", corpus["a.txt"], "--size", 12, "-o", tmp_path / "one.pt")
    assert {2, 4, 290, 291} <= set(FrequencyVocabulary.load(tmp_path / "one.pt").ids)
    torch.save([0, 1, 2, 3, 4, 290], tmp_path / "lacks.pt")
    result = run_cli("fr-spec", "coverage", tmp_path / "lacks.pt", folder, corpus["a.txt"])
    assert result.code == 2
    assert "lacks the end-of-text id 291" in result.sentence


def test_nothing_is_replaced_unasked_and_nothing_half_written(run_cli, checkpoint, corpus, tmp_path):
    out = tmp_path / "out"
    build(run_cli, checkpoint, "--text", corpus["a.txt"], "--size", 20, "-o", out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    result = run_cli("fr-spec", "build", checkpoint, "--text", corpus["c.jsonl"], "--size", 20, "-o", out)
    assert result.code == 2
    assert "give --overwrite" in result.sentence
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "the"}\n{"text": 3}\n')
    result = run_cli("fr-spec", "build", checkpoint, "--text", broken, "--size", 20, "-o", out, "--overwrite")
    assert result.code == 2
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"--size": 4}, "--size 4: a list of this model has 5 (its end-of-text, special and added tokens) to 300"),
        ({"--size": 301}, "--size 301: a list of this model has 5"),
        ({"--eos": 300}, "token id 300 must be kept but is outside"),
        ({"--text": "absent.txt"}, "no such file or folder: absent.txt"),
        ({"--text": "empty.txt"}, "the corpus holds no token"),
        ({"--text": "latin.txt"}, "is not text in UTF-8"),
        ({"--text": "cut.txt.gz"}, "is damaged"),
        ({"--text": "picture.png"}, "does not end in one of .jsonl"),
        ({"--text": "broken.jsonl"}, "broken.jsonl, line 2: broken JSON"),
        ({"--text": "c.jsonl", "--text-column": "id"}, "row 1: no text in column 'id'; its columns are text, id"),
        ({"--held-out": "empty.txt"}, "holds no text to measure coverage on"),
        ({"-o": "a.txt"}, "is a file that is no .pt"),
    ],
)
def test_bad_input_is_one_sentence(run_cli, checkpoint, corpus, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    (tmp_path / "cut.txt.gz").write_bytes(corpus["b.txt.gz"].read_bytes()[:30])
    (tmp_path / "picture.png").write_bytes(b"png")
    (tmp_path / "broken.jsonl").write_text('{"text": "the"}\n{"text\n')
    options = {"--text": "a.txt", "--size": 20, "-o": "out", **changes}
    result = run_cli("fr-spec", "build", checkpoint, *[word for pair in options.items() for word in pair])
    assert result.code == 2
    assert words in result.sentence
    assert not (tmp_path / "out").exists()


def test_names_that_clash(run_cli, checkpoint, corpus, tmp_path):
    text = corpus["a.txt"]
    result = run_cli("fr-spec", "build", checkpoint, "--text", text, text, "--size", 20, "-o", tmp_path / "out")
    assert "two sources are named 'a'; tell them apart as NAME=FILE" in result.sentence
    result = run_cli("fr-spec", "build", checkpoint, "--text", "-", "--held-out", "x=-", "-o", tmp_path / "out")
    assert "standard input (-) is named twice" in result.sentence
    result = run_cli(
        "fr-spec", "build", checkpoint, "--text", text, "--size", 20, 30, "-o", tmp_path / "one.pt"
    )  # fmt: skip
    assert "one file for 2 sizes" in result.sentence
    result = run_cli("fr-spec", "build", tmp_path / "nowhere", "--text", text, "-o", tmp_path / "out")
    assert "There is no folder" in result.sentence
    result = run_cli("fr-spec", "coverage", tmp_path / "absent.pt", checkpoint, text)
    assert "there is no file" in result.sentence
