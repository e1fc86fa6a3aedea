"""n-gram overlap with evaluation sets, against a brute-force search."""

import gzip
import json
import logging
import pickle
import random
import re

import pytest
from datasets import Dataset

from transformers_minicpm4.data.ultraclean.decontaminate import ContaminationFilter, NgramDecontaminator


def corpus(shared_data, language, size):
    with gzip.open(shared_data / "debian-docs-quality" / f"{language}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [row["text"][:1200] for row, _ in zip(map(json.loads, lines), range(size))]


def naive_tokens(text, chinese):
    text = text.lower()
    return re.findall(r"[\u4e00-\u9fff]", text) if chinese else re.findall(r"\w+", text)


def brute_force(text, sets, n, chinese):
    """First n-gram in the order of the text, and all sets that hold it."""
    tokens = naive_tokens(text, chinese)
    others = {name: [f" {' '.join(naive_tokens(t, chinese))} " for t in texts] for name, texts in sets.items()}
    for i in range(len(tokens) - n + 1):
        gram = " ".join(tokens[i : i + n])
        names = [name for name, texts in others.items() if any(f" {gram} " in t for t in texts)]
        if names:
            return gram, ", ".join(names)
    return "", ""


@pytest.mark.parametrize("chinese, n", [(False, 13), (True, 13), (False, 4)])
def test_equals_brute_force(shared_data, chinese, n):
    generator = random.Random(n)
    texts = corpus(shared_data, "zh" if chinese else "en", 400)
    # The naive tokens know one script; keep what both read alike.
    texts = ["".join(re.findall(r"[\u4e00-\u9fff]" if chinese else r"[A-Za-z0-9\s.,]", t)) for t in texts]
    texts = [t for t in texts if len(naive_tokens(t, chinese)) > 40][:60]
    evaluation = {"quiz": texts[40:50], "exam": texts[48:]}  # two texts are in both
    documents = texts[:40]
    for i in range(0, 20, 2):  # passages of up to 20 tokens, some shorter than n, planted in other text
        passage = naive_tokens(texts[40 + i], chinese)[5 : 5 + generator.randint(n - 2, n + 3)]
        documents[i] += "。" + ("" if chinese else ", ").join(passage).upper() + "。 " + documents[i + 1]
    found = NgramDecontaminator.from_texts(evaluation, n)({"text": documents})
    expected = [brute_force(text, evaluation, n, chinese) for text in documents]
    assert list(zip(found["contaminated_ngram"], found["contaminated_by"])) == expected
    assert found["contaminated"] == [bool(gram) for gram, _ in expected]
    assert sum(found["contaminated"]) > 0
    if n == 13:
        assert sum(found["contaminated"]) < 40


def test_divides_and_filters(shared_data):
    texts = corpus(shared_data, "en", 60)
    decontaminator = NgramDecontaminator.from_texts({"docs": texts[50:], "more": ["a b c d e f g h i j k l m"]})
    data = Dataset.from_dict({"text": [*texts[:30], None, "", texts[55] + " end", "x A b, C d e f g h i j k l m."]})
    expected = data.map(decontaminator, batched=True, batch_size=7).to_list()
    assert data.map(pickle.loads(pickle.dumps(decontaminator)), batched=True, num_proc=2).to_list() == expected
    assert list(data.to_iterable_dataset(2).map(decontaminator, batched=True)) == expected
    assert [row["contaminated_by"] for row in expected[-4:]] == ["", "", "docs", "more"]
    marked = Dataset.from_list(expected)
    kept = marked.filter(ContaminationFilter(), batched=True)
    assert len(kept) == sum(not row["contaminated"] for row in expected)
    assert ContaminationFilter().reasons(marked[-2:]) == ["contaminated by docs", "contaminated by more"]


def test_a_passage_at_the_end_and_one_word_short():
    d = NgramDecontaminator.from_texts({"x": ["one two three four"]}, n=4)
    assert d({"text": ["zero ONE-two; three four", "one two three", "one two three four five"]})["contaminated"] == [
        True,
        False,
        True,
    ]


def test_short_evaluation_texts_are_counted(caplog):
    with caplog.at_level(logging.WARNING):
        d = NgramDecontaminator.from_texts({"quiz": ["too short", "one two three four five"]}, n=5)
    assert d.too_short == {"quiz": 1}
    assert "1 texts of evaluation set 'quiz' have fewer than 5 tokens" in caplog.text


def test_a_single_row_is_refused():
    decontaminator = NgramDecontaminator.from_texts({"x": ["one two three"]}, n=3)
    rows = Dataset.from_dict({"text": ["one two three", "four"]})
    marked = rows.map(decontaminator, batched=True)
    for change in (lambda dataset: dataset, Dataset.to_iterable_dataset):
        with pytest.raises(TypeError, match="column 'text' .* pass batched=True"):
            list(change(rows).map(decontaminator))
        with pytest.raises(TypeError, match="column 'contaminated' .* pass batched=True"):
            list(change(marked).filter(ContaminationFilter()))


def test_errors():
    with pytest.raises(TypeError, match="one string"):
        NgramDecontaminator.from_texts({"quiz": "a text"})
    with pytest.raises(TypeError, match="NoneType"):
        NgramDecontaminator.from_texts({"quiz": [None]})
    with pytest.raises(ValueError, match="no evaluation text has 13 tokens"):
        NgramDecontaminator.from_texts({"quiz": ["short"]})
    with pytest.raises(ValueError, match="n=0"):
        NgramDecontaminator.from_texts({"quiz": ["short"]}, n=0)
    with pytest.raises(KeyError, match="map an NgramDecontaminator first"):
        ContaminationFilter()({"text": ["a"]})
