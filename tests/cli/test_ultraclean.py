"""`minicpm4 ultraclean` from pools to a dataset with its card, and its refusals."""

import json
import random

import pytest
from datasets import load_dataset


GOOD = [
    "the",
    "quick",
    "explanation",
    "of",
    "how",
    "a",
    "careful",
    "method",
    "works",
    "and",
    "why",
    "each",
    "step",
    "follows",
]
BAD = [
    "click",
    "here",
    "buy",
    "now",
    "cheap",
    "offer",
    "login",
    "cart",
    "cookie",
    "banner",
    "404",
    "index",
    "next",
    "menu",
]


def write(path, count, words, source, seed=0):
    generator = random.Random(seed)
    lines = [json.dumps({"text": " ".join(generator.choices(words, k=30)), "source": source}) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ultraclean")


@pytest.fixture
def corpus(folder):
    good = write(folder / "manual.jsonl", 60, GOOD, "manual", seed=1)
    bad = write(folder / "shop.jsonl", 50, BAD, "shop", seed=2)
    with open(bad, "a") as file:
        file.write(json.dumps({"text": "", "source": "shop"}) + "\nnot json\n")
    return [good, bad]


@pytest.fixture
def model(folder, run_cli):
    path = folder / "quality.bin"
    if not path.exists():
        pools = [
            "--pos",
            write(folder / "books.jsonl", 80, GOOD, "books"),
            "--neg",
            write(folder / "ads.jsonl", 80, BAD, "ads"),
        ]
        settings = ["--bucket", "1000", "--dim", "8", "--epochs", "20"]
        result = run_cli("ultraclean", "train", *pools, "-o", str(path), *settings)
        assert result.code == 0
        assert "books" in result.out
        assert "model: " in result.out
    return str(path)


def test_score_keeps_every_row_and_says_what_it_could_not_read(folder, corpus, model, run_cli):
    result = run_cli(
        "ultraclean", "score", *corpus, "--model", model, "-o", str(folder / "scored"), "--format", "jsonl"
    )
    assert result.code == 0, result.err
    rows = load_dataset("json", data_files=str(folder / "scored" / "part-*.jsonl"), split="train").to_list()
    assert len(rows) == 111
    assert "read 112, kept 111" in result.out
    assert "rejected 1: " in result.out
    assert [row["quality_reason"] for row in rows if row["quality_score"] is None] == ["empty"]
    means = {
        name: sum(row["quality_score"] for row in rows if row["source"] == name and row["quality_score"] is not None)
        for name in ("manual", "shop")
    }
    assert means["manual"] / 60 > 0.9 > 0.1 > means["shop"] / 50


def test_filter_then_report(folder, corpus, model, run_cli):
    command = ("ultraclean", "filter", *corpus, "--model", model, "-o", str(folder / "kept"), "--rows-per-shard", "40")
    first = run_cli(*command)
    assert first.code == 0, first.err
    assert "kept 60" in first.out
    assert "dropped 50: score below 0.5" in first.out
    assert "dropped 1: empty" in first.out
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "kept").glob("part-*")}
    assert run_cli(*command).out == first.out
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "kept").glob("part-*")} == before

    report = run_cli("ultraclean", "report", str(folder / "kept"), "--license", "cc0-1.0")
    assert report.code == 0, report.err
    assert "| shop | 51 | 0 | 50 | 1 |" in report.out
    kept = load_dataset(str(folder / "kept"), split="train")
    assert set(kept["source"]) == {"manual"}
    assert len(kept) == 60
    counts = json.loads(run_cli("ultraclean", "report", str(folder / "kept"), "--json").out)
    assert counts["total"]["rows"] == 111
    assert counts["total"]["kept"] == 60


def test_a_scored_folder_is_filtered_without_the_model(folder, corpus, model, run_cli):
    run_cli("ultraclean", "score", *corpus, "--model", model, "-o", str(folder / "scored again"))
    scored = sorted(str(path) for path in (folder / "scored again").glob("part-*"))
    result = run_cli("ultraclean", "filter", *scored, "-o", str(folder / "kept again"), "--threshold", "0.5")
    assert "kept 60" in result.out, result.err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("score", "{corpus}", "--model", "{folder}/none.bin", "-o", "{folder}/x"), "none.bin"),
        (("score", "{folder}/none.jsonl", "--model", "{model}", "-o", "{folder}/x"), "no such file or folder"),
        (("score", "{corpus}", "--model", "{model}", "-o", "{folder}/x", "--text-column", "body"), "body"),
        (("filter", "{corpus}", "-o", "{folder}/x"), "quality_score"),
        (("filter", "{corpus}", "--model", "{model}", "-o", "{folder}/x", "--threshold", "2"), "threshold=2"),
        (("report", "{folder}"), "no manifest.json"),
        (("train", "--pos", "{corpus}", "--neg", "{corpus}", "-o", "{folder}/y.bin"), "two pools are named"),
        (("train", "--pos", "a={corpus}", "--neg", "b={corpus}", "-o", "{model}"), "exists"),
    ],
)
def test_refusals_are_one_sentence(arguments, words, folder, corpus, model, run_cli):
    places = {"corpus": corpus[0], "folder": folder, "model": model}
    result = run_cli("ultraclean", *(argument.format(**places) for argument in arguments))
    assert result.code == 2
    assert words in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("action", ["train", "score", "filter", "report", "verify"])
def test_help_teaches(action, run_cli):
    result = run_cli("ultraclean", action, "--help")
    assert result.code == 0
    assert "usage: minicpm4 ultraclean" in result.out
