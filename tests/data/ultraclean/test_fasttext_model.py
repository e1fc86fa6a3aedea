"""Classifier files: found, checked before the native reader sees them, and scored as the script scores."""

import os
import pickle
import random
import shutil

import pytest
from huggingface_hub import constants


fasttext = pytest.importorskip("fasttext")

from transformers_minicpm4.data.ultraclean.fasttext_model import (  # noqa: E402
    ModelFileError,
    check_file,
    digest,
    load_model,
    predict_positive,
    resolve,
)


SETTINGS = {"dim": 4, "minCount": 1, "wordNgrams": 2, "bucket": 300, "thread": 1, "verbose": 0, "lr": 1.0}


def train(folder, labels=("__label__pos", "__label__neg"), name="model.bin"):
    randomness = random.Random(0)
    words = [[f"w{topic}{i}" for i in range(200)] for topic in range(len(labels))]
    lines = folder / "train.txt"
    lines.write_text(
        "\n".join(
            f"{label} {' '.join(randomness.choices(pool, k=6))}"
            for label, pool in zip(labels, words)
            for _ in range(80)
        )
    )
    model = fasttext.train_supervised(str(lines), epoch=8, **SETTINGS)
    model.save_model(str(folder / name))
    return folder / name


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return train(tmp_path_factory.mktemp("fasttext"))


def test_a_whole_file_passes_quantized_or_not(path, tmp_path):
    assert sorted(check_file(path).labels) == ["__label__neg", "__label__pos"]
    for name, settings in {
        "plain": {},
        "normed": {"qnorm": True},
        "cut": {"cutoff": 300, "retrain": True, "qnorm": True, "epoch": 1, "thread": 1},
    }.items():
        model = fasttext.load_model(str(path))
        model.quantize(input=str(path.parent / "train.txt"), **settings)
        model.save_model(str(tmp_path / f"{name}.ftz"))
        assert sorted(check_file(tmp_path / f"{name}.ftz").labels) == ["__label__neg", "__label__pos"]
        assert predict_positive(load_model(tmp_path / f"{name}.ftz"), ["w01 w02 w03"])[0] > 0.5


def test_a_file_cut_anywhere_is_refused(path, tmp_path):
    whole, cut = path.read_bytes(), tmp_path / "cut.bin"
    lengths = {0, 1, 7, 8, 63, 64, 90, len(whole) - 1} | set(range(100, len(whole), 997))
    for length in sorted(lengths):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match="truncated|empty|not a fastText"):
            load_model(cut)
    cut.write_bytes(whole + b"x")
    with pytest.raises(ModelFileError, match="damaged"):
        load_model(cut)


def test_foreign_files_are_named(path, tmp_path):
    foreign = tmp_path / "foreign.bin"
    foreign.write_bytes(b"GGUF" + bytes(500))
    with pytest.raises(ModelFileError, match="not a fastText model"):
        load_model(foreign)
    vectors = fasttext.train_unsupervised(str(path.parent / "train.txt"), epoch=1, maxn=0, **{**SETTINGS, "lr": 0.05})
    vectors.save_model(str(foreign))
    with pytest.raises(ModelFileError, match="word vectors"):
        load_model(foreign)


@pytest.mark.parametrize(
    "labels", [("__label__hq", "__label__cc"), ("__label__pos", "__label__neg", "__label__other")]
)
def test_wrong_labels_are_named(labels, tmp_path):
    with pytest.raises(ModelFileError, match=labels[-1]):
        load_model(train(tmp_path, labels))


def test_scores_are_those_of_the_scripts_rule(path):
    model, module = load_model(path), fasttext.load_model(str(path))
    lines = ["w01 w02", "w11 w12 w13", "w01 w12", "unknown words only", "nul\0w01", "中文 w11"]
    scores = predict_positive(model, lines)
    for line, score in zip(lines, scores):
        (label,), (probability,) = module.predict(line)
        probability = min(float(probability), 1.0)
        assert score == pytest.approx(probability if label == "__label__pos" else 1 - probability, abs=1e-6)
        assert 0 <= score <= 1
    assert scores[0] > 0.75 > 0.25 > scores[1]
    assert predict_positive(model, []) == []


@pytest.mark.parametrize("line, named", [("a\nb", "newline"), ("a \ud800", "UTF-8")])
def test_lines_that_fasttext_cannot_take(path, line, named):
    with pytest.raises(ValueError, match=named):
        predict_positive(load_model(path), [line])


def test_loaded_once_until_the_file_is_rewritten(path, tmp_path):
    copy = tmp_path / "copy.bin"
    shutil.copy(path, copy)
    first, before = load_model(copy), digest(copy)
    assert load_model(str(copy)) is first
    assert digest(copy) == before == digest(path)
    with pytest.raises((TypeError, pickle.PicklingError)):
        pickle.dumps(first)
    other = train(tmp_path, ("__label__neg", "__label__pos"), "other.bin")
    os.replace(other, copy)
    assert load_model(copy) is not first
    assert digest(copy) != before
    assert predict_positive(load_model(copy), ["w01 w02"])[0] < 0.5 < predict_positive(first, ["w01 w02"])[0]


def test_what_is_no_file_and_no_hub_id_is_named(tmp_path):
    for name in (tmp_path / "absent.bin", "absent.bin", "./a/b.bin", "folder/absent.bin", tmp_path, "nobody/nothing"):
        with pytest.raises(FileNotFoundError, match="give a|path right|HF_HUB_OFFLINE"):
            resolve(name)


def hub_cache(folder, path, names):
    """A repository as `huggingface_hub` keeps it after a download."""
    repository = folder / "hub" / "models--someone--classifiers"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for name in names:
        file = repository / "snapshots" / ("0" * 40) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, file)
    return repository / "snapshots" / ("0" * 40)


def test_hub_ids_are_found_in_the_cache(path, tmp_path, monkeypatch):
    snapshot = hub_cache(tmp_path, path, ["classifiers/quality_en.bin", "classifiers/quality_zh.bin", "README.md"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for part in ("en", "quality_en.bin", "classifiers/quality_en"):
        assert resolve(f"someone/classifiers:{part}") == snapshot / "classifiers" / "quality_en.bin"
    assert predict_positive(load_model("someone/classifiers:zh"), ["w01 w02 w03"])[0] > 0.5
    with pytest.raises(ValueError, match="fits 2 of .*quality_zh.bin"):
        resolve("someone/classifiers")
    with pytest.raises(ValueError, match="fits 0 of"):
        resolve("someone/classifiers:de")
