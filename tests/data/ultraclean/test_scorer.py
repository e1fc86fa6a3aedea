"""Scores and the filter: the same under every way of running, nothing lost, nothing scored that is no text."""

import pickle
import random
import shutil
from collections import Counter

import datasets
import pandas
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets.fingerprint import Hasher


fasttext = pytest.importorskip("fasttext")

from transformers_minicpm4.data.ultraclean.fasttext_model import ModelFileError, load_model  # noqa: E402
from transformers_minicpm4.data.ultraclean.normalize import to_words  # noqa: E402
from transformers_minicpm4.data.ultraclean.scorer import ColumnError, QualityFilter, QualityScorer  # noqa: E402


BAD = {
    None: "missing",
    "": "empty",
    " \n\t\u3000\0": "only whitespace",
    "\ud800 text": "lone surrogate",
    "\u0301\u0302": "no words",
    "\u0301\0\u0302": "no words",
    "</s>": "no words",
    " </s>\v</s> ": "no words",
    "__label__pos": "no words",
    "__LABEL__neg \0__label__\f</s>": "no words",
    3: "not a string",
    b"bytes": "not a string",
}


def train(path, swap=False):
    """Words that begin with g are good, words with b bad."""
    randomness = random.Random(0)
    lines = []
    for _ in range(150):
        for letter, label in zip("bg" if swap else "gb", ("pos", "neg")):
            lines.append(f"__label__{label} " + " ".join(f"{letter}{randomness.randrange(50)}" for _ in range(8)))
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    settings = {"dim": 4, "lr": 1.0, "epoch": 10, "minCount": 1, "bucket": 100, "thread": 1, "verbose": 0}
    fasttext.train_supervised(str(path.with_suffix(".txt")), **settings).save_model(str(path))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train(tmp_path_factory.mktemp("scorer") / "model.bin")


@pytest.fixture
def rows():
    """240 documents; the first 40 have no text, so a whole batch of 40 has no score."""
    randomness = random.Random(1)
    texts = [None, "", " \n "] * 13 + [None]
    for number in range(200):
        words = [f"{randomness.choice('gb')}{randomness.randrange(50)}" for _ in range(5)]
        texts.append("" if number % 50 == 7 else " ".join(words) + "\n\n\nÄnd")
    return Dataset.from_dict(
        {"id": list(range(240)), "text": texts, "kind": [0, 1] * 120},
        features=Features(id=Value("int32"), text=Value("large_string"), kind=ClassLabel(names=["x", "y"])),
    )


def scored_rows(dataset):
    columns = ["id", "text", "kind", "quality_score", "quality_label", "quality_reason"]
    return [{name: row[name] for name in columns} for row in dataset]


def test_score_is_the_probability_of_the_words(model):
    scorer, loaded = QualityScorer(model), fasttext.load_model(str(model))
    texts = ["g1 g2\n\n\n\ng3", "B1 b2\tb3", "g1 b1", "全角，ＡＢＣ unseen", "nul\0g1 g2"]
    batch = scorer({"text": texts})
    for text, score, label in zip(texts, batch["quality_score"], batch["quality_label"]):
        (top,), (probability,) = loaded.predict(to_words(text))
        expected = probability if top == "__label__pos" else 1 - probability
        assert score == pytest.approx(expected, abs=1e-6)
        assert "__label__" + label == top
    assert batch["quality_reason"] == [None] * len(texts)
    assert batch["quality_score"][0] > 0.9 > 0.1 > batch["quality_score"][1]


def test_raw_text_is_scored_as_it_is(model):
    texts = ["G1 G2\ng1 g2", "G1 G2 g1 g2"]
    first, second = QualityScorer(model, normalize=False)({"text": texts})["quality_score"]
    assert first == second
    assert first == pytest.approx(fasttext.load_model(str(model)).predict(texts[1])[1][0], abs=1e-6)
    with pytest.raises(ValueError, match="tokenizer"):
        QualityScorer(model, tokenizer="some/name", normalize=False)


@pytest.mark.parametrize("normalize", [True, False])
def test_what_is_no_text_scores_null_with_a_reason_and_shifts_nobody(model, normalize):
    scorer = QualityScorer(model, normalize=normalize)
    good = scorer({"text": ["g1 g2 g3"]})["quality_score"]
    for text, reason in BAD.items():
        if reason == "no words" and not normalize and not ("label" in text or "</s>" in text):
            continue
        text = text.lower() if isinstance(text, str) and not normalize else text
        batch = scorer({"text": ["g1 g2 g3", text, "g1 g2 g3"]})
        assert batch["quality_score"] == [*good, None, *good]
        assert batch["quality_label"] == ["pos", None, "pos"]
        assert batch["quality_reason"] == [None, reason, None]
    nothing = scorer({"text": []})
    assert nothing == {"quality_score": [], "quality_label": [], "quality_reason": []}


@pytest.mark.parametrize("normalize", [True, False])
def test_words_that_fasttext_takes_for_something_else_change_no_score(model, normalize):
    """A label scores as if it were not there, as in fastText; and `</s>` hides nothing of what follows it."""
    scorer = QualityScorer(model, normalize=normalize)
    pairs = {
        "g1 </s> b1 b2 b3": "g1 b1 b2 b3",
        "</s> g1 g2": "g1 g2",
        "g1 __label__neg b2": "g1 b2",
        "__label__neg b1 b2 </s>\0__label__": "b1 b2",
    }
    marked, plain = (scorer({"text": list(texts)})["quality_score"] for texts in (pairs, pairs.values()))
    assert marked == plain
    assert marked[0] < 0.5 < marked[1]


@pytest.mark.parametrize("name", [None, "numpy"])
def test_a_single_row_is_refused_by_scorer_and_filter(model, rows, name):
    """Without batched=True each letter of the text would be a row, and any list of decisions be true."""
    scorer = QualityScorer(model)
    scored = rows.map(scorer, batched=True).with_format(name)
    for dataset in (rows.with_format(name), rows.with_format(name).to_iterable_dataset()):
        with pytest.raises(TypeError, match="column 'text' .* pass batched=True"):
            list(dataset.map(scorer))
    for dataset in (scored, scored.to_iterable_dataset()):
        with pytest.raises(TypeError, match="column 'quality_score' .* pass batched=True"):
            list(dataset.filter(QualityFilter()))
    with pytest.raises(TypeError, match="pass batched=True"):
        scorer({"id": 1, "text": None})


def test_every_way_of_running_gives_the_same_rows(model, rows):
    scorer = QualityScorer(model)
    plain = rows.map(scorer, batched=True, batch_size=40, writer_batch_size=40)
    assert plain.features == Features(
        {
            **rows.features,
            "quality_score": Value("float64"),
            "quality_label": Value("string"),
            "quality_reason": Value("string"),
        }
    )
    expected = scored_rows(plain)
    assert [row["text"] for row in expected] == rows["text"][:]
    assert [row["quality_score"] is None for row in expected] == [not (text or "").strip() for text in rows["text"]]
    for num_proc in (1, 2):
        again = rows.map(scorer, batched=True, batch_size=7, num_proc=num_proc, load_from_cache_file=False)
        assert scored_rows(again) == expected
    for name, features in (("numpy", scorer.features(rows.features)), ("pandas", None), ("arrow", None)):
        formatted = rows.with_format(name)
        again = formatted.map(scorer, batched=True, batch_size=40, writer_batch_size=40, features=features)
        assert [again.features[added] for added in scorer.added_columns] == [Value("float64"), *[Value("string")] * 2]
        # A frame has lost the names of classes, which is between pandas and datasets.
        assert name == "pandas" or again.features == plain.features
        assert scored_rows(again.with_format(None)) == expected
    stream = rows.to_iterable_dataset(num_shards=3)
    assert scored_rows(stream.map(scorer, batched=True, batch_size=11)) == expected
    arrow = stream.with_format("arrow").map(scorer, batched=True, batch_size=11)
    assert scored_rows(pa.concat_tables(arrow.iter(100)).to_pylist()) == expected
    frame = scorer(rows.to_pandas())
    assert isinstance(frame, pandas.DataFrame)
    assert pa.Table.from_pandas(frame).column("quality_score").to_pylist() == [
        row["quality_score"] for row in expected
    ]


def test_a_column_of_another_type_is_all_null(model):
    scored = Dataset.from_dict({"text": [1, 2]}).map(QualityScorer(model), batched=True)
    assert scored["quality_reason"][:] == ["not a string"] * 2
    assert scored["quality_score"][:] == [None, None]


def test_fingerprint_is_the_models_content(model, tmp_path, rows):
    path = tmp_path / "model.bin"
    shutil.copy(model, path)
    scorer = QualityScorer(path)
    before = Hasher.hash(scorer)
    first = rows.map(scorer, batched=True)
    assert (
        Hasher.hash(scorer)
        == before
        == Hasher.hash(QualityScorer(str(path)))
        == Hasher.hash(pickle.loads(pickle.dumps(scorer)))
    )
    assert rows.map(QualityScorer(path), batched=True)._fingerprint == first._fingerprint
    train(tmp_path / "other.bin", swap=True).replace(path)
    assert Hasher.hash(QualityScorer(path)) != before
    second = rows.map(QualityScorer(path), batched=True)
    pairs = [(a, b) for a, b in zip(first["quality_score"], second["quality_score"]) if a is not None]
    assert any(a > 0.9 and b < 0.1 for a, b in pairs)
    with pytest.raises(ModelFileError, match="not the model this scorer was made with"):
        scorer({"text": ["g1"]})


def test_the_scorer_carries_no_model(model):
    scorer = QualityScorer(model)
    scorer({"text": ["g1"]})
    assert len(pickle.dumps(scorer)) < 2000
    assert load_model(model) is load_model(model)
    with pytest.raises(AttributeError):
        scorer.model = "another"


def test_columns_missing_or_in_the_way_are_named(model, rows):
    with pytest.raises(ColumnError, match="no column 'content'; the columns are 'id', 'text', 'kind'"):
        rows.map(QualityScorer(model, text_column="content"), batched=True)
    scored = rows.map(QualityScorer(model), batched=True)
    with pytest.raises(ColumnError, match="'quality_score' exists already"):
        scored.map(QualityScorer(model), batched=True)
    names = {"score_column": "second", "label_column": "second_label", "reason_column": "second_reason"}
    twice = scored.map(QualityScorer(model, **names), batched=True)
    assert twice["second"][:] == scored["quality_score"][:]
    with pytest.raises(ValueError, match="four names"):
        QualityScorer(model, score_column="text")
    with pytest.raises(ColumnError, match="score with QualityScorer first"):
        QualityFilter().split(rows)
    with pytest.raises(ColumnError, match="no column 'quality_score'"):
        rows.filter(QualityFilter(), batched=True)


@pytest.mark.parametrize("threshold", [0, 0.3, 0.5, 1])
def test_split_loses_and_repeats_nothing(model, rows, threshold):
    scored = rows.map(QualityScorer(model), batched=True)
    chosen = QualityFilter(threshold)
    kept, diverted, counts = chosen.split(scored, batch_size=7)
    should = [score is not None and score >= threshold for score in scored["quality_score"]]
    assert kept["id"][:] == [i for i, keep in enumerate(should) if keep]
    assert diverted["id"][:] == [i for i, keep in enumerate(should) if not keep]
    reasons = Counter(reason for reason in diverted["quality_reason"] if reason is not None)
    low = sum(score is not None and score < threshold for score in scored["quality_score"])
    assert counts == {"kept": len(kept), **reasons, **({f"score below {threshold:g}": low} if low else {})}
    assert sum(counts.values()) == len(rows)
    stream = scored.to_iterable_dataset(num_shards=2)
    assert chosen.count(stream) == chosen.count(scored) == counts
    for dataset in (
        scored,
        stream,
        scored.with_format("numpy"),
        scored.with_format("arrow"),
        scored.with_format("pandas"),
    ):
        filtered = dataset.filter(chosen, batched=True, batch_size=7).with_format(None)
        assert [row["id"] for row in filtered] == kept["id"][:]
    with pytest.raises(TypeError, match=r"count\(stream\)"):
        chosen.split(stream)


def test_filter_takes_any_null(model):
    frame = pandas.DataFrame({"quality_score": pandas.array([0.9, None, 0.1], dtype="Float64")})
    assert QualityFilter().reasons(frame) == [None, "no score", "score below 0.5"]
    assert QualityFilter(0).reasons({"quality_score": [float("nan"), None, 0.0]}) == ["no score", "no score", None]
    with pytest.raises(ValueError, match=r"threshold=1\.5"):
        QualityFilter(1.5)


def test_a_tokenizer_object_is_used_and_hashes_the_same_before_and_after(model):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"g1": 0, "g2": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    scorer = QualityScorer(model, tokenizer=tokenizer)
    before = Hasher.hash(scorer)
    rows = Dataset.from_dict({"text": ["g1 g2 zz", "", "g2"]})
    scores = rows.map(scorer, batched=True)["quality_score"][:]
    assert scores == [*QualityScorer(model)({"text": ["g1 g2 ?", "", "g2"]})["quality_score"]]
    assert Hasher.hash(scorer) == before


@pytest.mark.parametrize("language", ["en", "zh"])
def test_corpus_scores_equal_the_scripts_one_by_one(shared_data, model, language):
    path = str(shared_data / "debian-docs-quality" / f"{language}.jsonl.gz")
    stream = datasets.load_dataset("json", data_files=path, split="train", streaming=True).take(500)
    loaded, count = fasttext.load_model(str(model)), 0
    for row in stream.map(QualityScorer(model), batched=True, batch_size=64):
        (top,), (probability,) = loaded.predict(to_words(row["text"]))
        probability = min(probability, 1.0)
        assert row["quality_score"] == pytest.approx(
            probability if top == "__label__pos" else 1 - probability, abs=1e-5
        )
        count += 1
    assert count == 500
