"""The classifier: balanced, deterministic training; figures by source; what is wrong is named."""

import gzip
import hashlib
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, IterableDataset, Value, disable_progress_bars

from transformers_minicpm4.data.ultraclean.classifier import (
    leave_one_source_out,
    roc_auc,
    train_classifier,
)
from transformers_minicpm4.data.ultraclean.fasttext_model import load_model
from transformers_minicpm4.data.ultraclean.normalize import to_words_batch
from transformers_minicpm4.data.ultraclean.seeds import prepare, quotas, sample, split


pytest.importorskip("fasttext")
disable_progress_bars()

TINY = {"dim": 8, "bucket": 5000, "min_count": 1}
WORDS = {
    "pos": ["theorem", "proof", "lemma", "explains", "because", "therefore"],
    "neg": ["click", "buy", "login", "menu", "ok", "cancel"],
}


def made(count=40, sources=("book", "paper", "shop", "forum"), seed=0, noise=()):
    """Documents of two vocabularies that share the words in `noise`; two sources a label, five documents a file."""
    random = np.random.default_rng(seed)
    rows = {"text": [], "label": [], "source": [], "file": []}
    for place, source in enumerate(sources):
        label = "pos" if place < len(sources) / 2 else "neg"
        for index in range(count):
            rows["text"].append(" ".join(random.choice([*WORDS[label], *noise, source], 12)) + f" {source}{index}")
            rows["label"].append(label)
            rows["source"].append(source)
            rows["file"].append(f"{source}/{index // 5}")
    return Dataset.from_dict(rows)


@pytest.fixture
def corpus(shared_data):
    """Every sixth English document of the test bed, with its kind as source and its file as group."""
    with gzip.open(shared_data / "debian-docs-quality" / "en.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in list(file)[::6]]
    return Dataset.from_dict(
        {
            "text": [row["text"] for row in rows],
            "label": [row["pool"] == "prose" for row in rows],
            "source": [row["source_set"] for row in rows],
            "file": [row["source"] for row in rows],
        }
    )


# ---- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_the_share_of_pairs_in_the_right_order(ties):
    random = np.random.default_rng(1)
    positive, negative = random.normal(0.3, 1, 70), random.normal(0, 1, 45)
    if ties:
        positive, negative = positive.round(), negative.round()
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert roc_auc(positive, negative) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert roc_auc(positive, negative) + roc_auc(negative, positive) == pytest.approx(1)
    assert roc_auc(positive, negative[:0]) is None


def test_report_equals_a_count_by_hand(tmp_path):
    held_out = made(9, seed=7, noise=["and", "of"])
    report = train_classifier(made(noise=["and", "of"]), tmp_path / "m.bin", held_out=held_out, threshold=0.55, **TINY)
    model = load_model(tmp_path / "m.bin")
    score = {}
    for text, label, source in zip(held_out["text"], held_out["label"], held_out["source"]):
        # fastText by itself, not through predict_positive
        found = {name: p for p, name in model.f.predict(to_words_batch([text])[0] + "\n", 2, 0.0, "strict")}
        score.setdefault((label, source), []).append(found["__label__pos"])
    assert len(report["held_out"]["sources"]) == 4
    for row in report["held_out"]["sources"]:
        own = np.array(score[row["label"], row["source"]])
        other = np.concatenate([values for (label, _), values in score.items() if label != row["label"]])
        right = own[:, None] > other if row["label"] == "pos" else own[:, None] < other
        assert row["documents"] == len(own) == 9
        assert row["auc"] == pytest.approx(right.mean(), abs=1e-6)
        assert row["tpr" if row["label"] == "pos" else "fpr"] == np.mean(own >= 0.55)
        # fastText adds 1e-5 to each of the two probabilities; ours is one of them, or one minus the other.
        assert row["mean_score"] == pytest.approx(own.mean(), abs=3e-5)
    total = report["held_out"]["overall"]
    assert (total["documents"], total["positives"], total["negatives"]) == (36, 18, 18)
    assert total["mean_source_auc"] == pytest.approx(np.mean([r["auc"] for r in report["held_out"]["sources"]]))


def test_report_beside_the_model_is_the_one_returned(tmp_path):
    report = train_classifier(made(), tmp_path / "m.bin", **TINY)
    assert json.loads((tmp_path / "m.json").read_text()) == report
    assert report["model"]["sha256"] == hashlib.sha256((tmp_path / "m.bin").read_bytes()).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "m.json"]


# ---- split and sample -----------------------------------------------------------------------------------------------


def test_no_document_disappears_and_no_file_is_on_both_sides():
    documents = prepare(made(37), group_column="file")
    mask = split(documents, 0.3, seed=0)
    assert 0 < mask.sum() < len(documents) == 4 * 37
    assert not set(documents.group[mask]) & set(documents.group[~mask])
    for source in set(documents.source):
        own = mask[documents.source == source]
        assert 0.3 * 37 <= own.sum() < 0.3 * 37 + 5
    assert (split(documents, 0.3, seed=1) != mask).any()


@pytest.mark.parametrize(
    "sizes, total", [({"a": 3, "b": 50, "c": 20}, 30), ({"a": 1, "b": 1}, 9), ({"a": 7, "b": 7}, 5)]
)
def test_quotas_are_even_and_sum_up(sizes, total):
    given = quotas(sizes, total)
    assert sum(given.values()) == min(total, sum(sizes.values()))
    assert all(0 <= given[name] <= sizes[name] for name in sizes)
    partial = [given[name] for name in sizes if given[name] < sizes[name]]
    assert all(value <= min(partial, default=value) + 1 for value in given.values())


@pytest.mark.parametrize("ratio", [1.0, 2.0, 0.5])
def test_balance_keeps_the_ratio(ratio):
    documents = prepare(
        {"book": made(60, ["book", "-"]).select(range(60)), "shop": made(20, ["-", "shop"]).select(range(20, 40))}
    )
    for balance in ("oversample", "undersample"):
        order = sample(documents, balance=balance, ratio=ratio, seed=0)
        positives = documents.positive[order].sum()
        assert len(order) - positives == pytest.approx(ratio * positives, abs=1)
        # mixed: stochastic gradient descent must not see one label after the other
        half = len(order) // 2
        assert abs(documents.positive[order[:half]].mean() - documents.positive[order[half:]].mean()) < 0.35
        uses = np.bincount(order, minlength=len(documents))
        if balance == "undersample":
            assert uses.max() == 1
        else:
            assert uses.min() >= 1  # every document is used,
            for side in (True, False):  # and those of a label equally often
                assert np.ptp(uses[documents.positive == side]) <= 1
    assert sorted(sample(documents, balance=None, ratio=ratio, seed=0)) == list(range(80))


# ---- determinism ----------------------------------------------------------------------------------------------------

ELSEWHERE = """
import sys
from datasets import Dataset, disable_progress_bars
from transformers_minicpm4.data.ultraclean.classifier import train_classifier
disable_progress_bars()
train_classifier(Dataset.from_json(sys.argv[1], cache_dir=sys.argv[3]), sys.argv[2], dim=8, bucket=5000, min_count=1)
"""


def test_same_model_byte_for_byte_in_any_row_order_and_process(tmp_path):
    seeds = made()
    first = train_classifier(seeds, tmp_path / "a.bin", **TINY)
    train_classifier(seeds.shuffle(seed=3), tmp_path / "b.bin", num_proc=2, **TINY)
    seeds.to_json(tmp_path / "seeds.jsonl")
    arguments = [str(tmp_path / name) for name in ("seeds.jsonl", "c.bin", "cache")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], check=True, capture_output=True)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes() == (tmp_path / "c.bin").read_bytes()
    other = train_classifier(seeds, tmp_path / "d.bin", seed=1, **TINY)
    assert other["model"]["sha256"] != first["model"]["sha256"]


def test_pools_by_name_equal_one_dataset(tmp_path):
    seeds = made()
    pools = {
        name: seeds.filter(lambda row, name=name: row["source"] == name) for name in ("shop", "book", "forum", "paper")
    }
    pools = {name: pool.remove_columns("source") for name, pool in pools.items()}
    by_name = train_classifier(pools, tmp_path / "a.bin", **TINY)
    assert by_name == {**train_classifier(seeds, tmp_path / "b.bin", **TINY), "model": by_name["model"]}
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_labels_as_words_booleans_and_class_labels_are_one():
    seeds = made()
    flags = seeds.remove_columns("label").add_column("label", [label == "pos" for label in seeds["label"]])
    names = seeds.cast_column("label", ClassLabel(names=["neg", "pos"]))
    expected = prepare(seeds).positive
    assert expected.sum() == 80
    assert (prepare(flags).positive == expected).all()
    assert (prepare(names).positive == expected).all()


# ---- cautions -------------------------------------------------------------------------------------------------------


def warnings_of(caplog, tmp_path, seeds, **changes):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        report = train_classifier(seeds, tmp_path / "m.bin", overwrite=True, **{**TINY, **changes})
    logged = [record.getMessage() for record in caplog.records if "ultraclean" in record.name]
    assert logged == report["warnings"]
    return " | ".join(logged)


def test_cautions_are_given_where_due_and_only_there(caplog, tmp_path):
    seeds = made()
    both = seeds.remove_columns("source").add_column("source", ["mixed"] * len(seeds))
    unseen = made(5, ["one", "two", "three", "four"], seed=3)
    assert "4 of 4 sources have one label only" in warnings_of(caplog, tmp_path, seeds)
    assert "one label only" not in warnings_of(caplog, tmp_path, both)
    assert "4 sources are in training and held out" in warnings_of(caplog, tmp_path, seeds)
    assert "held out" not in warnings_of(caplog, tmp_path, both, held_out=unseen)
    assert "under-train" in warnings_of(caplog, tmp_path, seeds)
    uneven = seeds.select(range(100))
    assert "72 positives and 18 negatives" in warnings_of(caplog, tmp_path, uneven)
    assert "Unbalanced" not in warnings_of(caplog, tmp_path, seeds)
    assert "1 training documents had the text of a held-out one" in warnings_of(
        caplog, tmp_path, seeds, held_out=seeds.select([3])
    )


# ---- leave one source out -------------------------------------------------------------------------------------------


def test_an_unseen_source_is_worse_where_the_source_is_all_there_is_to_learn():
    """`odd` has the words of negatives, more densely, and a word of its own: only having seen that one helps."""
    seeds = made(40, noise=["and", "of", "the"])
    random = np.random.default_rng(9)
    odd = made(40, ["odd", "-"]).select(range(40)).to_dict()
    odd["text"] = [" ".join([*random.choice(WORDS["neg"], 24), "odd", "odd"]) for _ in range(40)]
    rows = {name: [*seeds[name], *odd[name]] for name in odd}
    table = leave_one_source_out(Dataset.from_dict(rows), **{**TINY, "epochs": 20, "lr": 0.5})
    by_name = {row["source"]: row for row in table["sources"]}
    assert by_name["odd"]["in_source_auc"] > 0.95
    assert by_name["odd"]["auc"] < 0.6
    assert by_name["book"]["auc"] > 0.95
    positive = [by_name[name]["auc"] for name in ("book", "odd", "paper")]
    assert table["mean"]["auc_positive_sources"] == pytest.approx(np.mean(positive))
    # the same documents stand behind both figures of a row
    assert {row["documents"] for row in table["sources"]} == {12}


def test_a_fold_equals_training_by_hand_without_the_source(tmp_path):
    seeds = made(30, noise=["and", "of", "the"])
    table = leave_one_source_out(seeds, **TINY)
    documents = prepare(seeds)
    mask = split(documents, 0.3, seed=0)
    rows = documents.row
    keep = [int(row) for row, held, source in zip(rows, mask, documents.source) if not held and source != "book"]
    test = [int(row) for row, held in zip(rows, mask) if held]
    report = train_classifier(seeds.select(keep), tmp_path / "m.bin", held_out=seeds.select(test), **TINY)
    by_hand = next(row for row in report["held_out"]["sources"] if row["source"] == "book")
    fold = next(row for row in table["sources"] if row["source"] == "book")
    assert (fold["auc"], fold["tpr"]) == (by_hand["auc"], by_hand["tpr"])
    assert fold["train_documents"] == len(keep)


def test_the_only_source_of_a_label_is_skipped_by_name():
    table = leave_one_source_out(made(20, ["book", "paper", "shop", "shop"]), **TINY)
    shop = next(row for row in table["sources"] if row["source"] == "shop")
    assert shop["skipped"] == "the only source with label 'neg'"
    assert shop["auc"] is None
    assert shop["in_source_auc"] is not None
    assert table["mean"]["auc_negative_sources"] is None


def test_real_text_unseen_manuals_score_above_raw_pages(corpus):
    kinds = ("en.pos.gimp", "en.pos.python", "en.neg.genindex", "en.neg.uistrings")
    some = corpus.filter(lambda row: row["source"] in kinds)
    table = leave_one_source_out(some, group_column="file", dim=16, bucket=20_000, epochs=10, lr=0.5)
    assert [row["label"] for row in table["sources"]] == ["pos", "pos", "neg", "neg"]
    assert table["mean"]["in_source_auc"] > 0.95
    assert table["mean"]["auc_positive_sources"] > 0.8


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_unusable_rows_are_counted_by_reason(tmp_path):
    good = made()
    bad = {"text": [None, "", " \n\t", "__label__neg __label__pos", "same", "same"], "label": ["pos"] * 5 + ["neg"]}
    bad |= {"source": ["book"] * 6, "file": ["x"] * 6}
    rows = {name: [*good[name], *bad[name]] for name in bad}
    report = train_classifier(Dataset.from_dict(rows), tmp_path / "m.bin", held_out=0, **TINY)
    assert report["dropped"] == {
        "text missing": 1,
        "text blank": 2,
        "no words after preprocessing": 1,
        "same text under both labels": 2,
    }
    assert sum(row["documents"] for row in report["train"]) == len(good)
    # nothing of the bad rows was trained on
    train_classifier(good, tmp_path / "n.bin", held_out=0, **TINY)
    assert (tmp_path / "m.bin").read_bytes() == (tmp_path / "n.bin").read_bytes()


def test_rows_that_are_no_strings_are_counted():
    numbers = Dataset.from_dict({"text": [1, 2, None], "label": ["pos", "neg", "neg"], "source": ["a", "b", "b"]})
    documents = prepare(numbers)
    assert len(documents) == 0
    assert documents.dropped == {"text is int, not a string": 2, "text missing": 1}


@pytest.mark.parametrize("blank", [" ", "\0", "\v", " \n "])
def test_a_label_word_in_a_text_is_no_label(tmp_path, blank):
    """fastText takes `__label__neg` for a label wherever it stands in a line; here it reads our lines itself."""
    train_classifier(made(), tmp_path / "m.bin", **TINY)
    model = load_model(tmp_path / "m.bin")
    marked = made().map(lambda row: {"text": f"__label__neg{blank}{row['text']}{blank}__label__neg more"})
    documents = prepare(marked)
    assert len(documents) == len(marked)
    for line in documents.lines():
        words, labels = model.get_line(line)
        assert labels == []
        assert "more" in words
        assert len(words) >= 15


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": ["good"] * 160}, r"Label 'good' is not one of 'pos', 'neg'"),
        ({"label": ["pos"] * 159 + [None]}, r"Label None is not one of"),
        ({"label": ["pos"] * 160}, r"documents of both labels; there are 144 'pos' and 0 'neg'"),
        ({"label": [1] * 80 + [0] * 80}, r"Label 1 is not one of"),
        ({"text": [" "] * 160}, r"there are 0 'pos' and 0 'neg' .*\. Dropped: \{'text blank': 160\}"),
    ],
)
def test_wrong_labels_and_single_classes_are_named(tmp_path, change, message):
    rows = {**made().to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        train_classifier(Dataset.from_dict(rows), tmp_path / "m.bin", **TINY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text_column": "content"}, "The dataset has no column 'content', only text, label, source, file"),
        ({"dim": 0}, "dim is 0; a whole number of at least 1"),
        ({"lr": -1.0}, "lr is -1.0; a number above 0"),
        ({"held_out": 1.5}, r"held_out is 1.5; a share of the documents in \[0, 1\)"),
        ({"balance": "both"}, "balance is 'both'; 'oversample', 'undersample' or None"),
        ({"threshold": 2}, r"threshold is 2; scores lie in \[0, 1\]"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_classifier(made(), tmp_path / "m.bin", **{**TINY, **changes})


def test_wrong_datasets_are_named(tmp_path):
    seeds = made()
    with pytest.raises(ValueError, match="Pool 'none' is empty"):
        train_classifier({"book": seeds, "none": seeds.select([])}, tmp_path / "m.bin", **TINY)
    with pytest.raises(ValueError, match="There are no pools"):
        train_classifier({}, tmp_path / "m.bin", **TINY)
    streamed = IterableDataset.from_generator(lambda: iter(seeds))
    with pytest.raises(TypeError, match=r"is a IterableDataset; a datasets.Dataset is needed"):
        train_classifier(streamed, tmp_path / "m.bin", **TINY)
    with pytest.raises(ValueError, match="at least three sources .* there are 2: book, shop"):
        leave_one_source_out(made(10, ["book", "shop"]), **TINY)
    assert Value("string") == seeds.features["text"]


def test_an_existing_model_is_not_replaced_unasked(tmp_path):
    (tmp_path / "m.bin").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        train_classifier(made(), tmp_path / "m.bin", **TINY)
    assert (tmp_path / "m.bin").read_bytes() == b"precious"
    train_classifier(made(), tmp_path / "m.bin", overwrite=True, **TINY)
    assert (tmp_path / "m.bin").read_bytes() != b"precious"


def test_a_missing_or_untrainable_fasttext_is_named(tmp_path, monkeypatch):
    for module in (None, type(sys)("fasttext")):
        monkeypatch.setitem(sys.modules, "fasttext", module)
        with pytest.raises(ImportError, match=r"pip install transformers_minicpm4\[data\]"):
            train_classifier(made(), tmp_path / "m.bin", **TINY)
    assert not list(tmp_path.iterdir())
