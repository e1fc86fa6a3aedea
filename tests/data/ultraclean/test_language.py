"""Language tags on text whose language is known."""

import gzip
import json
import pickle
import re
import time

import pytest
from datasets import Dataset

from transformers_minicpm4.data.ultraclean.language import LanguageTagger


pytest.importorskip("py3langid")


def test_prose_of_known_language(shared_data):
    """Two in five documents of the Chinese manuals were never translated: the script tells which."""
    with gzip.open(shared_data / "debian-docs-quality" / "zh.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [row["text"][:1500] for row in map(json.loads, lines) if row["pool"] == "prose"][:300]
    han = [len(re.findall(r"[\u4e00-\u9fff]", text)) / len(text) for text in texts]
    tags = LanguageTagger(languages=("en", "zh"))({"text": texts})
    assert all(0.5 <= c <= 1 for c in tags["language_confidence"])
    sure = [(tag, share > 0.2) for tag, share in zip(tags["language"], han) if not 0.02 < share < 0.2]
    assert len(sure) > 150
    assert 50 < sum(chinese for _, chinese in sure) < len(sure) - 50
    assert sum((tag == "zh") == chinese for tag, chinese in sure) >= 0.97 * len(sure)
    # Among all languages a few go to neighbours (Wu, Nigerian Pidgin).
    tags = LanguageTagger()({"text": texts})["language"]
    assert sum((tag == "zh") == (share > 0.1) for tag, share in zip(tags, han)) >= 0.9 * len(texts)


def test_divides():
    texts = ["The house is small and the garden is large.", "Das Haus ist klein und der Garten ist groß.", None] * 9
    data, tagger = Dataset.from_dict({"text": texts}), pickle.loads(pickle.dumps(LanguageTagger()))
    expected = data.map(tagger, batched=True, batch_size=5).to_list()
    assert [row["language"] for row in expected[:3]] == ["en", "de", None]
    assert data.map(tagger, batched=True, num_proc=2).to_list() == expected
    assert list(data.to_iterable_dataset(2).map(tagger, batched=True)) == expected


def test_null_where_nothing_can_be_said():
    texts = ["", None, " \n", "123 %", "\x00", "a", "q", "\ud800", "The file is here, \x00 and it is \ud800 large."]
    tags = LanguageTagger()({"text": texts})
    assert tags["language"] == [None] * 8 + ["en"]
    assert tags["language_confidence"][:8] == [None] * 8


def test_a_long_run_of_marks_takes_time_in_proportion():
    from transformers_minicpm4.data.ultrachat.constraints import check_constraints

    text = "The file is here, and it is large. a" + "\u0345\u0301\u0327" * 40_000
    LanguageTagger()({"text": ["a b"]})  # loads the model
    start = time.process_time()
    LanguageTagger()({"text": [text]})
    check_constraints(text, [{"type": "language", "language": "en"}])
    assert time.process_time() - start < 5  # the quadratic way: over 10


def test_a_single_row_is_refused():
    rows = Dataset.from_dict({"text": ["The house is small.", None]})
    for dataset in (rows, rows.to_iterable_dataset(), rows.with_format("numpy")):
        with pytest.raises(TypeError, match="pass batched=True"):
            list(dataset.map(LanguageTagger()))


def test_choice_of_languages():
    tagger = LanguageTagger(languages=("en", "fr"), column="lang")
    tags = tagger({"text": ["Das Haus ist klein."]})
    assert tags["lang"][0] in ("en", "fr")
    assert set(tags) == set(tagger.added_columns) == {"lang", "lang_confidence"}
    with pytest.raises(ValueError, match="known are"):
        LanguageTagger(languages=("en", "xx-none"))({"text": ["a"]})
    with pytest.raises(TypeError, match="tuple of codes"):
        LanguageTagger(languages="en")
    with pytest.raises(ValueError, match="at least two"):
        LanguageTagger(languages=("en",))
