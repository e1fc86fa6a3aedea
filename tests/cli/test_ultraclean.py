"""`minicpm4 ultraclean` from pools to a dataset with its card, and its refusals."""

import json
import random

import pytest
from datasets import load_dataset

from transformers_minicpm4.cli import ultraclean


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
    scored = folder / "scored again"
    for name, inputs in (("files", sorted(scored.glob("part-*"))), ("folder", [scored])):
        kept = folder / "kept again" / name
        result = run_cli("ultraclean", "filter", *inputs, "-o", kept, "--threshold", "0.5")
        assert "read 111, kept 60" in result.out, result.err
    assert "rejected" not in result.out  # neither the manifest nor the rejects of the first run are rows
    # A folder says what made its scores; files alone do not, and nor does their card.
    cards = {}
    for name in ("files", "folder"):
        assert run_cli("ultraclean", "report", folder / "kept again" / name).code == 0
        cards[name] = (folder / "kept again" / name / "README.md").read_text()
    assert "words by: unknown" in cards["files"]
    assert "classifier: `unknown`, SHA-256 `unknown`" in cards["files"]
    digest = json.loads((scored / "ultraclean.json").read_text())["digest"]
    assert "words by: white space" in cards["folder"]
    assert f"classifier: `quality.bin`, SHA-256 `{digest}`" in cards["folder"]


def test_the_model_is_taken_over_only_where_all_inputs_were_scored_by_it(folder, corpus, model, run_cli):
    for name, path in zip("ab", corpus):
        run_cli("ultraclean", "score", path, "--model", model, "-o", folder / f"scored {name}")
    facts = json.loads((folder / "scored b" / "ultraclean.json").read_text())

    def noted(name, *inputs):
        result = run_cli("ultraclean", "filter", *inputs, "-o", folder / name)
        assert result.code == 0, result.err
        return json.loads((folder / name / "ultraclean.json").read_text())

    a, b = folder / "scored a", folder / "scored b"
    both = noted("kept of both", a, b)
    assert {name: both[name] for name in ("model", "digest", "tokenizer")} == {
        name: facts[name] for name in ("model", "digest", "tokenizer")
    }
    # A folder that was filtered says it too.
    assert noted("kept of kept", folder / "kept of both")["digest"] == facts["digest"]
    for name, other in (("digest", "0" * 64), ("tokenizer", "some/tokenizer"), ("model", "other.bin")):
        (b / "ultraclean.json").write_text(json.dumps({**facts, name: other}))
        assert "model" not in noted(f"kept with other {name}", a, b)
    (b / "ultraclean.json").unlink()
    assert "model" not in noted("kept without settings", a, b)
    assert "model" not in noted("kept with a file", a, *b.glob("part-*"))


@pytest.mark.parametrize(
    "damage",
    [
        {"threshold": "x"},
        {"threshold": None},
        {"threshold": True},
        {"action": "sort"},
        {"action": []},
        {"model": 1},
        {"digest": None},
        {"tokenizer": {}},
    ],
)
def test_damaged_settings_are_named(damage, folder, corpus, model, run_cli):
    kept = folder / "kept for damage"
    run_cli("ultraclean", "filter", *corpus, "--model", model, "-o", kept)
    facts = json.loads((kept / "ultraclean.json").read_text())
    (kept / "ultraclean.json").write_text(json.dumps({**facts, **damage}))
    for command in (("report", kept), ("filter", kept, "-o", folder / "of damaged")):
        result = run_cli("ultraclean", *command)
        assert result.code == 2
        assert f"{kept}/ultraclean.json is damaged" in result.sentence


def test_a_manifest_damaged_inside_is_named(folder, corpus, model, run_cli):
    kept = folder / "kept for shards"
    run_cli("ultraclean", "filter", *corpus, "--model", model, "-o", kept)
    manifest = json.loads((kept / "manifest.json").read_text())
    (kept / "manifest.json").write_text(json.dumps({**manifest, "shards": [{}]}))
    for command in (
        ("report", kept),
        ("filter", kept, "-o", folder / "of damaged shards"),
        ("train", "--pos", kept, "--neg", corpus[1], "-o", folder / "of damaged.bin"),
    ):
        result = run_cli("ultraclean", *command)
        assert result.code == 2
        assert "manifest.json is damaged" in result.sentence


def test_the_report_of_a_scored_folder_does_not_call_it_filtered(folder, corpus, model, run_cli):
    scored = folder / "scored for the card"
    run_cli("ultraclean", "score", *corpus, "--model", model, "-o", scored)
    report = run_cli("ultraclean", "report", scored, "--threshold", "0.7")
    assert "| source | rows | at or above 0.7 | below |" in report.out, report.err
    card = (scored / "README.md").read_text()
    assert "every document is still here" in card
    assert "ilter" not in card
    assert "words by: white space" in card
    assert "classifier: `quality.bin`" in card  # the folders of this machine are not for the Hub
    assert len(load_dataset(str(scored), split="train")) == 111


def test_the_report_of_a_filtered_folder_keeps_its_threshold(folder, corpus, model, run_cli):
    kept = folder / "kept at 0.6"
    run_cli("ultraclean", "filter", *corpus, "--model", model, "-o", kept, "--threshold", "0.6")
    refused = run_cli("ultraclean", "report", kept, "--threshold", "0.5")
    assert refused.code == 2
    assert "was filtered with the threshold 0.6; a card with 0.5 would not be true" in refused.sentence
    assert not (kept / "README.md").exists()
    assert run_cli("ultraclean", "report", kept, "--threshold", "0.6").code == 0


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_the_report_reads_the_column_and_the_types_that_were_scored(folder, model, run_cli, output_format):
    path = folder / f"body-{output_format}.jsonl"
    rows = [{"body": "how a method works", "id": 1}, {"body": "buy now", "id": 2}]
    if output_format == "jsonl":
        rows[1]["id"] = "two"  # what --format jsonl is for
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / f"scored-body-{output_format}"
    options = ("--text-column", "body", "--format", output_format)
    assert run_cli("ultraclean", "score", path, "--model", model, "-o", out, *options).code == 0
    report = run_cli("ultraclean", "report", out, "--json")
    assert json.loads(report.out)["total"]["characters"] == len("how a method works") + len("buy now")


@pytest.mark.parametrize(
    "name, shown",
    [
        ("openbmb/Ultra-FineWeb-classifier:en", "openbmb/Ultra-FineWeb-classifier:en"),
        ("owner/name-v1.0", "owner/name-v1.0"),
        ("/home/me/models/quality.bin", "quality.bin"),
        ("models/quality.bin", "quality.bin"),
        ("~/quality.ftz", "quality.ftz"),
        ("unknown", "unknown"),
        (None, None),
    ],
)
def test_a_card_names_hub_ids_in_full_and_files_without_folders(name, shown):
    assert ultraclean._shown(name) == shown


def test_a_path_with_an_equals_sign_is_a_path(tmp_path, monkeypatch, run_cli):
    monkeypatch.chdir(tmp_path)
    for name, words in (("date=2024", GOOD), ("date=2025", BAD)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"{name[-2:]}.jsonl", 40, words, "x")
    settings = ["--bucket", "1000", "--dim", "4", "--held-out", "0.2"]
    pools = ["--pos", "date=2024/24.jsonl", "--neg", "ads=date=2025/25.jsonl"]
    result = run_cli("ultraclean", "train", *pools, "-o", tmp_path / "q.bin", *settings)
    assert result.code == 0, result.err
    assert [line.split()[0] for line in result.out.splitlines()[1:3]] == ["24", "ads"]


@pytest.mark.parametrize("action", ["score", "train"])
def test_a_hub_id_may_have_a_dot(action, folder, corpus, model, run_cli):
    name = "owner/corpus-v1.0"
    if action == "score":
        result = run_cli("ultraclean", "score", name, "--model", model, "-o", folder / "dotted")
    else:
        result = run_cli("ultraclean", "train", "--pos", name, "--neg", corpus[0], "-o", folder / "dotted.bin")
    assert result.code == 2
    # The tests are offline: that the Hub was asked is all that can be seen.
    assert f"{name} is no file or folder here, nor could it be loaded from the Hub" in result.sentence


def test_a_broken_line_of_a_pool_is_named(folder, corpus, run_cli):
    result = run_cli("ultraclean", "train", "--pos", corpus[0], "--neg", corpus[1], "-o", folder / "broken.bin")
    assert result.code == 2
    assert f"{corpus[1]}, line 52: broken JSON" in result.sentence


def test_the_notes_of_a_run_are_no_pool(folder, corpus, model, run_cli):
    run_cli("ultraclean", "filter", corpus[1], "--model", model, "-o", folder / "all dropped", "--threshold", "1")
    options = ("--neg", corpus[0], "-o", folder / "notes.bin", "--text-column", "text")
    result = run_cli("ultraclean", "train", "--pos", folder / "all dropped", *options)
    assert result.code == 2
    assert "kept no row" in result.sentence


def test_if_nothing_can_be_read_the_exit_code_says_so(folder, model, run_cli):
    path = folder / "no.jsonl"
    path.write_text("not json\n[]\n")
    result = run_cli("ultraclean", "score", path, "--model", model, "-o", folder / "nothing")
    assert result.code == 1
    assert f"none of the 2 records could be read; {folder}/nothing/rejects-* say why" in result.sentence
    assert run_cli("ultraclean", "report", folder / "nothing").code == 0


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_an_input_without_records_is_warned_of(content, tmp_path, model, run_cli):
    path = tmp_path / "empty.json"
    path.write_text(content)
    result = run_cli("ultraclean", "score", path, "--model", model, "-o", tmp_path / "out")
    assert result.code == 0
    assert f"no records in {path}" in result.err
    assert "read 0, kept 0" in result.out


def test_a_pool_without_the_text_column_is_named(folder, corpus, run_cli):
    path = folder / "bodies.jsonl"
    path.write_text(json.dumps({"body": "how a method works", "id": 1}) + "\n")
    result = run_cli("ultraclean", "train", "--pos", corpus[0], "--neg", f"b={path}", "-o", folder / "no text.bin")
    assert result.code == 2
    assert f"{path} has no column 'text'; its columns are body, id: set --text-column" in result.sentence


def test_scores_that_are_no_numbers_and_foreign_folders_are_named(folder, run_cli):
    path = folder / "strings.jsonl"
    path.write_text(json.dumps({"text": "a", "quality_score": "0.7"}) + "\n")
    result = run_cli("ultraclean", "filter", path, "-o", folder / "strings")
    assert result.code == 2
    assert "quality_score" in result.sentence
    assert sorted(file.name for file in (folder / "strings").iterdir()) == ["manifest.json"]
    (folder / "foreign").mkdir()
    (folder / "foreign" / "manifest.json").write_text("[1]")
    for command in (("filter", path, "-o", folder / "foreign"), ("report", folder / "foreign")):
        result = run_cli("ultraclean", *command)
        assert result.code == 2
        assert "manifest.json is" in result.sentence


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("score", "{corpus}", "--model", "{folder}/none.bin", "-o", "{folder}/x"), "none.bin"),
        (("score", "{folder}/none.jsonl", "--model", "{model}", "-o", "{folder}/x"), "no such file or folder"),
        (("score", "{corpus}", "--model", "{model}", "-o", "{folder}/x", "--text-column", "body"), "body"),
        (("filter", "{corpus}", "-o", "{folder}/x"), "quality_score"),
        (("filter", "{corpus}", "--model", "{model}", "-o", "{folder}/x", "--threshold", "2"), "threshold=2"),
        (("filter", "{corpus}", "-o", "{folder}/x", "--tokenizer", "some/tokenizer"), "--tokenizer without --model"),
        (("score", "data/none.parquet", "--model", "{model}", "-o", "{folder}/x"), "no such file or folder"),
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
