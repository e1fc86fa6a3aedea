"""Mining rounds: what is added, when they stop, and that a killed run loses and repeats nothing."""

import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest
from datasets import Dataset, disable_progress_bars

from transformers_minicpm4.data.ultraclean import mining
from transformers_minicpm4.data.ultraclean.mining import mine


pytest.importorskip("fasttext")
disable_progress_bars()

SETTINGS = {"dim": 8, "bucket": 5000, "min_count": 1, "epochs": 15, "lr": 0.5}
SURE = {"positive_threshold": 0.7, "negative_threshold": 0.3}
KNOWN = {"pos": ["theorem", "proof", "lemma"], "neg": ["click", "buy", "login"]}
# Words that only the pool shows beside the known ones: what mining can teach.
NEW = {"pos": ["corollary", "axiom", "converse"], "neg": ["basket", "voucher", "signup"]}


def made(count, sources, words, seed):
    random = np.random.default_rng(seed)
    rows = {"text": [], "label": [], "source": []}
    for source in sources:
        for index in range(count):
            label = "pos" if index % 2 else "neg"
            choice = [word for vocabulary in words for word in vocabulary[label]]
            rows["text"].append(" ".join(random.choice([*choice, "the", "of"], 10)) + f" {source}{index}")
            rows["label"].append(label)
            rows["source"].append(source)
    return Dataset.from_dict(rows)


SEEDS = made(40, ["s1", "s2"], [KNOWN], 1)
POOL = made(60, ["p1", "p2", "p3"], [KNOWN, NEW], 2).remove_columns("label")
HELD_OUT = made(60, ["h1", "h2"], [NEW], 3)


def test_mining_teaches_words_that_no_seed_has(tmp_path):
    result = mine(SEEDS, POOL, tmp_path, held_out=HELD_OUT, **SURE, **SETTINGS)
    first, second = result["rounds"][0]["overall"], result["rounds"][1]["overall"]
    assert first["mean_source_auc"] < 0.75
    assert second["mean_source_auc"] > 0.95
    assert result["best"]["round"] >= 1
    assert "does not improve" in result["stopped"] or "all 3 rounds" in result["stopped"]


def test_what_is_mined_is_sure_capped_and_counted(tmp_path):
    result = mine(SEEDS, POOL, tmp_path, held_out=HELD_OUT, rounds=1, max_per_source=7, **SURE, **SETTINGS)
    assert result["stopped"] == "all 1 rounds done"
    table = pyarrow.parquet.read_table(tmp_path / "round_1.parquet").to_pylist()
    for row in table:
        assert row["score"] >= 0.7 if row["label"] == "pos" else row["score"] <= 0.3
    used = [row for row in table if row["used"]]
    entry = result["rounds"][1]
    assert {(row["source"], row["label"]): row["documents"] for row in entry["mined"]} == {
        (source, label): 7 for source in ("p1", "p2", "p3") for label in ("pos", "neg")
    }
    assert len(used) == 42
    assert sum(entry["sure"].values()) == len(table) > 42
    # the training set is the seeds and the mined documents, no more
    report = json.loads((tmp_path / "round_1.json").read_text())
    assert sum(row["documents"] for row in report["train"]) == len(SEEDS) + 42


def test_known_and_repeated_texts_are_not_mined(tmp_path):
    texts = [*POOL["text"], POOL["text"][0], SEEDS["text"][0], HELD_OUT["text"][0], None]
    pool = Dataset.from_dict({"text": texts, "source": [*POOL["source"], "p9", "p9", "p9", "p9"]})
    result = mine(SEEDS, pool, tmp_path / "a", held_out=HELD_OUT, rounds=1, **SURE, **SETTINGS)
    assert result["pool"] == {
        "documents": len(POOL),
        "dropped": {
            "text missing": 1,
            "same text as a held-out document": 1,
            "same text as a seed": 1,
            "same text twice in the pool": 1,
        },
    }
    plain = mine(SEEDS, POOL, tmp_path / "b", held_out=HELD_OUT, rounds=1, **SURE, **SETTINGS)
    assert plain["rounds"] == result["rounds"]


class Killed(BaseException):
    pass


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".parquet"}


@pytest.mark.parametrize("after", ["scoring", "training"])
def test_a_killed_run_ends_with_the_same_files(tmp_path, monkeypatch, after):
    expected = mine(SEEDS, POOL, tmp_path / "whole", held_out=HELD_OUT, rounds=2, **SURE, **SETTINGS)
    assert len(expected["rounds"]) == 3
    train, score = mining.train_prepared, mining.scores
    trained, scored = [], []

    def dying(documents, test, output, settings):
        if after == "scoring" and output.name == "round_2.bin":
            raise Killed
        report = train(documents, test, output, settings)
        if output.name == "round_2.bin":
            raise Killed
        return report

    monkeypatch.setattr(mining, "train_prepared", dying)
    with pytest.raises(Killed):
        mine(SEEDS, POOL, tmp_path / "parts", held_out=HELD_OUT, rounds=2, **SURE, **SETTINGS)
    assert len(json.loads((tmp_path / "parts" / "state.json").read_text())["rounds"]) == 2
    monkeypatch.setattr(mining, "train_prepared", lambda *a: trained.append(a[2].name) or train(*a))
    monkeypatch.setattr(mining, "scores", lambda *a: scored.append(1) or score(*a))
    # rows in another order are the same data
    again = mine(
        SEEDS.shuffle(seed=6),
        POOL.shuffle(seed=5),
        tmp_path / "parts",
        held_out=HELD_OUT,
        rounds=2,
        **SURE,
        **SETTINGS,
    )
    assert (trained, scored) == (["round_2.bin"], [])  # finished rounds and finished scoring are not repeated
    assert again["rounds"] == expected["rounds"]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    # a finished folder answers without training
    trained.clear()
    assert (
        mine(SEEDS, POOL, tmp_path / "parts", held_out=HELD_OUT, rounds=2, **SURE, **SETTINGS)["rounds"]
        == again["rounds"]
    )
    assert trained == []


def test_it_stops_when_the_report_no_longer_improves(tmp_path):
    same = made(30, ["h1", "h2"], [KNOWN], 4)  # perfect from the start
    result = mine(SEEDS, POOL, tmp_path, held_out=same, rounds=5, **SURE, **SETTINGS)
    assert len(result["rounds"]) == 2
    assert result["best"]["round"] == 0
    assert "does not improve on 1.0000" in result["stopped"]


def test_nothing_sure_ends_it(tmp_path):
    result = mine(SEEDS, POOL, tmp_path, held_out=0.2, positive_threshold=1.0, negative_threshold=0.0, **SETTINGS)
    assert len(result["rounds"]) == 1
    assert result["stopped"] == "round 1: the classifier is sure of no document of the pool"


def test_rounds_without_their_state_are_not_taken_up(tmp_path):
    mine(SEEDS, POOL, tmp_path, held_out=HELD_OUT, rounds=1, **SURE, **SETTINGS)
    state = tmp_path / "state.json"
    for content in ("", "[]", '{"rounds": []}', state.read_text()[:-20]):
        state.write_text(content)
        with pytest.raises(ValueError, match=r"state.json is damaged or not the state of a mining: put it back"):
            mine(SEEDS, POOL, tmp_path, held_out=HELD_OUT, rounds=1, **SURE, **SETTINGS)
    state.unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = POOL.select(range(100))
    with pytest.raises(ValueError, match=r"has no state.json but holds round_0.bin, .* give another folder"):
        mine(SEEDS, other, tmp_path, held_out=HELD_OUT, rounds=1, **SURE, **SETTINGS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_wrong_folders_and_arguments_are_named(tmp_path):
    mine(SEEDS, POOL, tmp_path / "a", held_out=0.2, rounds=1, **SURE, **SETTINGS)
    with pytest.raises(ValueError, match="holds mining rounds with other settings, pool"):
        mine(SEEDS, POOL.select(range(50)), tmp_path / "a", held_out=0.2, **SURE, **{**SETTINGS, "dim": 9})
    with pytest.raises(ValueError, match="the negative one below"):
        mine(SEEDS, POOL, tmp_path / "b", positive_threshold=0.4, negative_threshold=0.6, **SETTINGS)
    with pytest.raises(ValueError, match="rounds is 0"):
        mine(SEEDS, POOL, tmp_path / "b", rounds=0, **SETTINGS)
    with pytest.raises(ValueError, match="held_out is 0"):
        mine(SEEDS, POOL, tmp_path / "b", held_out=0, **SETTINGS)
    with pytest.raises(ValueError, match="The held-out set of a mining needs documents of both labels; .* 0 'neg'"):
        mine(SEEDS, POOL, tmp_path / "b", held_out=SEEDS.filter(lambda row: row["label"] == "pos"), **SETTINGS)
    with pytest.raises(TypeError, match="minn"):
        mine(SEEDS, POOL, tmp_path / "b", minn=3)
    with pytest.raises(ValueError, match="is empty"):
        mine(SEEDS, POOL.select([]), tmp_path / "b", **SETTINGS)
    assert not (tmp_path / "b").exists()
    shutil.rmtree(tmp_path / "a")
