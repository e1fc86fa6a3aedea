"""Classifier files: found, checked before the native reader sees them, and scored as the script scores."""

import os
import pickle
import random
import shutil
import struct
import subprocess
import sys

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
    words_read,
)


SETTINGS = {"dim": 4, "minCount": 1, "wordNgrams": 2, "bucket": 300, "thread": 1, "verbose": 0, "lr": 1.0}


# Loads and scores each file given; prints its name first, so that the last line names what crashed the process.
READ_ALL = """
import sys
from transformers_minicpm4.data.ultraclean.fasttext_model import ModelFileError, load_model, predict_positive
for path in sys.argv[1:]:
    print(path, flush=True)
    try:
        predict_positive(load_model(path), ["w01 w02 w03", "unknown", " ".join(f"w0{i} w1{i}" for i in range(60))])
        print("scored")
    except ModelFileError:
        print("refused")
"""

# Offsets of numbers in a model file's header.
DIM, NGRAMS, LOSS, BUCKET, LONGEST, ENTRIES, WORDS, LABELS, PRUNED = 8, 28, 32, 40, 48, 64, 68, 72, 84


def train(folder, labels=("__label__pos", "__label__neg"), name="model.bin", **settings):
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
    model = fasttext.train_supervised(str(lines), epoch=8, **{**SETTINGS, **settings})
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


def first_kept(data):
    """Offset of the first row number of a pruned model's n-grams, which end where the input matrix begins."""
    (pruned,) = struct.unpack_from("<q", data, PRUNED)
    at = PRUNED + 8
    for _ in range(struct.unpack_from("<i", data, ENTRIES)[0]):
        at = data.index(b"\0", at) + 10
    return at + 4, at + 8 * pruned


def test_numbers_of_the_header_that_contradict_each_other_are_refused(path, tmp_path):
    damaged = tmp_path / "damaged.bin"
    whole = path.read_bytes()
    (words,) = struct.unpack_from("<i", whole, WORDS)
    input_at = check_file(path).input_at
    first_type = whole.index(b"\0", PRUNED + 8) + 9
    for at, form, value, named in [
        (DIM, "i", 0, "dimension 0"),
        (DIM, "i", 5, r"matrix of shape \(\d+, 4\) where .* need \(\d+, 5\)"),
        (NGRAMS, "i", -1, "words"),
        (LOSS, "i", 0, "loss 0"),
        (LOSS, "i", 5, "loss 5"),
        (BUCKET, "i", 0, "0 buckets"),
        (BUCKET, "i", 301, "matrix of shape"),
        (LONGEST, "i", -1, "characters"),
        (ENTRIES, "i", -1, "-1 entries"),
        (WORDS, "i", words + 1, f"{words + 1} words, 2 labels"),
        (LABELS, "i", 0, "0 labels"),
        (PRUNED, "q", -2, "-2 n-grams"),
        (PRUNED, "q", 0, "not quantized"),
        (first_type, "b", 1, "entry 0 of its dictionary has type 1"),
        (first_type, "b", 2, "entry 0 of its dictionary has type 2"),
        (first_type - 8, "q", -1, "count -1"),
        (input_at - 1, "B", 1, "damaged"),
        (input_at - 1, "B", 2, "flag of 2"),
        (input_at, "q", words, "matrix of shape"),
        (check_file(path).output_at, "q", 3, r"matrix of shape \(3, 4\) where .* need \(2, 4\)"),
    ]:
        data = bytearray(whole)
        struct.pack_into(f"<{form}", data, at, value)
        damaged.write_bytes(data)
        with pytest.raises(ModelFileError, match=f"damaged.*{named}" if named != "damaged" else named):
            load_model(damaged)
    assert check_file(path).labels  # undamaged, all of them agree


def test_numbers_of_a_quantized_file_that_contradict_each_other_are_refused(path, tmp_path):
    model, damaged = fasttext.load_model(str(path)), tmp_path / "damaged.ftz"
    model.quantize(
        input=str(path.parent / "train.txt"), cutoff=300, retrain=True, qnorm=True, epoch=1, thread=1, verbose=0
    )
    model.save_model(str(damaged))
    whole = damaged.read_bytes()
    row_at, flag_at = first_kept(whole)
    (rows,) = struct.unpack_from("<q", whole, flag_at + 2)
    # After the flags: rows, columns, codes, then the quantizer of dim, parts, part size, last part size.
    (codes,) = struct.unpack_from("<i", whole, flag_at + 18)
    quantizer_at = flag_at + 22 + codes
    for at, form, value, named in [
        (row_at, "i", rows, "rows of n-grams outside"),
        (row_at, "i", -1, "rows of n-grams outside"),
        (flag_at, "B", 3, "flag of 3"),
        (flag_at + 1, "B", 255, "flag of 255"),
        (flag_at + 2, "q", rows + 1, "matrix of shape"),
        (flag_at + 18, "i", -1, "damaged"),
        (quantizer_at, "i", 5, r"quantizer of \(5, 2, 2, 2\)"),
        (quantizer_at + 4, "i", 3, r"quantizer of \(4, 3, 2, 2\)"),
        (quantizer_at + 8, "i", 0, r"quantizer of \(4, 2, 0, 2\)"),
        (quantizer_at + 12, "i", 1, r"quantizer of \(4, 2, 2, 1\)"),
    ]:
        data = bytearray(whole)
        struct.pack_into(f"<{form}", data, at, value)
        damaged.write_bytes(data)
        with pytest.raises(ModelFileError, match=named):
            load_model(damaged)


def test_no_flipped_byte_of_a_header_crashes_the_process(path, tmp_path):
    """A sample; of what lies in the dictionary only a part."""
    files, randomness = [], random.Random(0)
    train(tmp_path, name="plain.bin", wordNgrams=1, bucket=0)
    train(tmp_path, name="tree.bin", loss="hs", minn=2, maxn=3)
    model = fasttext.load_model(str(path))
    model.quantize(input=str(path.parent / "train.txt"), cutoff=300, retrain=True, qnorm=True, epoch=1, thread=1)
    model.save_model(str(tmp_path / "cut.ftz"))
    for source in ("plain.bin", "tree.bin", "cut.ftz"):
        whole = (tmp_path / source).read_bytes()
        layout = check_file(tmp_path / source)
        dictionary = range(PRUNED + 8, layout.input_at - 1)
        matrices = [*range(layout.input_at - 1, layout.input_at + 25), *range(layout.output_at - 20, layout.output_at)]
        for at in [*range(PRUNED + 8), *randomness.sample(dictionary, 60), *matrices]:
            data = bytearray(whole)
            data[at] ^= randomness.choice([1, 0x80, 0xFF])
            files.append(tmp_path / f"{at}.{source}")
            files[-1].write_bytes(data)
    result = subprocess.run([sys.executable, "-c", READ_ALL, *files], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, (result.stdout.splitlines()[-1:], result.stderr[-2000:])
    lines = result.stdout.splitlines()
    assert lines[::2] == [str(file) for file in files]
    assert lines.count("refused") > 100


def test_weights_that_are_no_numbers_are_refused(path, tmp_path):
    damaged = tmp_path / "damaged.bin"
    for value in (float("nan"), float("inf")):
        data = bytearray(path.read_bytes())
        struct.pack_into("<f", data, check_file(path).input_at + 16, value)
        damaged.write_bytes(data)
        with pytest.raises(ModelFileError, match="not finite"):
            load_model(damaged)
    # What is not folded shows it when it scores.
    data = bytearray(train(tmp_path, loss="ova").read_bytes())
    layout = check_file(tmp_path / "model.bin")
    struct.pack_into("<f", data, layout.output_at + 16, float("nan"))
    damaged.write_bytes(data)
    with pytest.raises(ModelFileError, match="gives no score"):
        predict_positive(load_model(damaged), ["w01 w02"])


def test_a_dictionary_without_the_end_of_a_line_is_named(tmp_path):
    damaged = tmp_path / "damaged.bin"
    whole = train(tmp_path, wordNgrams=1, bucket=0).read_bytes()
    damaged.write_bytes(whole.replace(b"</s>\0", b"</t>\0"))
    assert predict_positive(load_model(damaged), ["w01 w02"])[0] > 0.5
    with pytest.raises(ModelFileError, match="gives no score for 'unknown'"):
        predict_positive(load_model(damaged), ["unknown"])


def test_words_that_fasttext_takes_for_something_else_are_left_out(path):
    line = "__label__a w01 __label__pos w02\t</s>\v__label__ </s> x__label__neg x</s> </s>x __label__\0</s>"
    assert words_read(line).translate(str.maketrans("\t\v\0", "   ")).split() == [
        "w01",
        "w02",
        "x__label__neg",
        "x</s>",
        "</s>x",
    ]
    assert words_read("w01 w02") == "w01 w02"
    # fastText itself, as it stands: labels do not count, and nothing after `</s>` does.
    predict = fasttext.load_model(str(path)).predict
    assert predict("w01 __label__neg w12") == predict("w01 w12")
    assert predict("w01 </s> w11 w12 w13") == predict("w01") != predict("w01 w11 w12 w13")


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
