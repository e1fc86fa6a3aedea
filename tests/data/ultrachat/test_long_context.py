"""Packing: the document stands where the row says, draws are even and follow seed and id; BM25 by its formula."""

import gzip
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from transformers_minicpm4.data.ultrachat.long_context import LongContextPacker
from transformers_minicpm4.data.ultrachat.retrieval import BM25Index, containment, word_runs, words_of
from transformers_minicpm4.data.ultrachat.text_counts import count_words


def make_corpus(size=60, seed=0):
    draw = random.Random(seed)
    words = [f"w{n}" for n in range(120)]
    return [" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(size)]


@pytest.fixture(scope="module")
def corpus():
    return make_corpus()


def bm25_by_formula(texts, query, k1=1.2, b=0.75):
    bags = [Counter(words_of(text)) for text in texts]
    mean = sum(sum(bag.values()) for bag in bags) / len(bags)
    scores = []
    for bag in bags:
        score = 0.0
        for word in set(words_of(query)):
            holding = sum(word in other for other in bags)
            idf = math.log(1 + (len(bags) - holding + 0.5) / (holding + 0.5))
            times = bag[word]
            score += idf * times * (k1 + 1) / (times + k1 * (1 - b + b * sum(bag.values()) / mean)) if times else 0
        scores.append(score)
    return scores


def test_bm25_equals_its_formula(corpus):
    texts = [*corpus, "", "我爱北京天安门", "北京 is a city"]
    index = BM25Index(texts)
    for query in (*corpus[:5], "北京", "nothing known", ""):
        expected = bm25_by_formula(texts, query)
        np.testing.assert_allclose(index.scores(query), expected, rtol=1e-12, atol=1e-12)
        ranked = index.rank(query)
        assert sorted(ranked) == [place for place, score in enumerate(expected) if score > 0]
        assert [expected[place] for place in ranked] == pytest.approx(sorted((s for s in expected if s), reverse=True))


def test_few_query_terms_are_the_rarest():
    index = BM25Index(["common rare", "common", "common other"])
    assert index.rank("common rare", max_terms=1) == [0]


def test_containment_sees_excerpts():
    text = " ".join(map(str, range(50)))
    assert containment(word_runs(text), word_runs(" ".join(map(str, range(10, 30))))) == 1.0
    assert containment(word_runs(text), word_runs("something else entirely, no run shared")) == 0.0
    assert containment(word_runs(text), word_runs("")) == 0.0
    assert containment(word_runs("two words"), word_runs("Two words")) == 1.0


@pytest.fixture(scope="module")
def packer(corpus):
    ids = [f"d{n}" for n in range(len(corpus))]
    return LongContextPacker(BM25Index(corpus, ids), count_words, min_tokens=100, max_tokens=800)


def test_the_document_stands_where_the_row_says(packer, corpus):
    for number, text in enumerate(corpus):
        row = packer({"id": f"d{number}", "text": text})
        assert row["packed_reason"] == "ok"
        parts = row["packed_text"].split("\n\n")
        ids = json.loads(row["distractor_ids"])
        assert len(parts) == len(ids) + 1 == row["distractor_count"] + 1
        assert parts.pop(row["document_position"] - 1) == text
        assert row["packed_text"][row["document_start"] :].startswith(text)
        assert row["packed_tokens"] == count_words(row["packed_text"]) == row["target_tokens"]
        assert 100 <= row["target_tokens"] <= 800
        # The best by BM25 in order, whole but for the last; never the document itself.
        ranked = [place for place in packer.index.rank(text, 64) if place != number]
        assert ids == [f"d{place}" for place in ranked[: len(ids)]]
        assert parts[:-1] == [corpus[place] for place in ranked[: len(parts) - 1]]
        assert corpus[ranked[len(parts) - 1]].startswith(parts[-1])


def test_draws_are_even(corpus):
    """Place among k + 1 and length over the range: Kolmogorov distance of 600 draws below its 0.1 % limit."""
    packer = LongContextPacker(BM25Index(corpus), count_words, min_tokens=100, max_tokens=400)
    rows = [packer({"id": f"row {n}", "text": corpus[n % 60]}) for n in range(600)]
    # A place is a step: spread evenly over its width, even places give even numbers from 0 to 1.
    draw = random.Random(0)
    places = [(row["document_position"] - draw.random()) / (row["distractor_count"] + 1) for row in rows]
    lengths = [(row["target_tokens"] - 99.5) / 301 for row in rows]
    for name, values in (("place", places), ("length", lengths)):
        distance = np.abs(np.sort(values) - (np.arange(600) + 0.5) / 600).max()
        assert distance < 1.95 / math.sqrt(600), name
    # Both ends are reached: m is 1 to k + 1.
    assert {row["document_position"] for row in rows if row["distractor_count"] == 4} == {1, 2, 3, 4, 5}


def test_seed_and_id_alone_decide(packer, corpus):
    rows = [{"id": f"d{n}", "text": text} for n, text in enumerate(corpus)]
    dataset = Dataset.from_list(rows)
    one = dataset.map(packer, load_from_cache_file=False)
    two = dataset.map(packer, num_proc=2, load_from_cache_file=False)
    turned = dataset.select(range(59, -1, -1)).map(packer, load_from_cache_file=False)
    stream = list(dataset.to_iterable_dataset(num_shards=3).map(packer))
    assert one.to_dict() == two.to_dict()
    assert turned.to_list()[::-1] == one.to_list() == stream
    other = LongContextPacker(packer.index, count_words, min_tokens=100, max_tokens=800, seed=1)
    assert [other(row)["target_tokens"] for row in rows] != one["target_tokens"][:]


def test_near_duplicates_are_no_distractors(corpus):
    text = corpus[0]
    words = text.split()
    twins = [text.upper(), text + " and a little more", " ".join(words[2:])]
    index = BM25Index([*twins, *corpus], [f"twin {n}" for n in range(3)] + list(range(60)))
    row = LongContextPacker(index, count_words, min_tokens=300, max_tokens=300)({"id": "asked", "text": text})
    ids = json.loads(row["distractor_ids"])
    assert ids
    assert not {0, "twin 0", "twin 1", "twin 2"} & set(ids)


def test_what_cannot_be_packed_says_why(packer, corpus):
    assert packer({"id": 1, "text": " "})["packed_reason"] == "no_text: the document is empty"
    assert packer({"id": 1, "text": None})["packed_passed"] is False
    long = packer({"id": 1, "text": " ".join(corpus)})
    assert long["packed_reason"].startswith("too_long")
    assert long["packed_text"] == ""
    alone = packer({"id": 1, "text": "nothing shares these"})
    assert alone["packed_reason"].startswith("corpus_too_small: 3 of")
    assert alone["packed_text"] == "nothing shares these"
    assert alone["document_position"] == 1
    with pytest.raises(TypeError, match="not int"):
        packer({"id": 1, "text": 3})
    with pytest.raises(KeyError, match="reads the column 'id'"):
        packer({"text": "x"})
    with pytest.raises(ValueError, match="min_tokens <= max_tokens"):
        LongContextPacker(packer.index, count_words, min_tokens=9, max_tokens=8)
    with pytest.raises(ValueError, match="give each text its own"):
        BM25Index(["a", "b"], ["x", "x"])


def test_a_real_tokenizer_on_the_real_corpora(shared_data):
    """8K to 64K tokens of a byte-level BPE, English and Chinese: never above the target, at most 8 below it."""
    texts = {}
    for language, stop in (("en", 400), ("zh", 300)):
        with gzip.open(shared_data / "debian-docs-quality" / f"{language}.jsonl.gz", "rt", encoding="utf-8") as file:
            texts[language] = [json.loads(line)["text"] for _, line in zip(range(stop), file)]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([*texts["en"][:40], *texts["zh"][:40]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    for language, documents in texts.items():
        packer = LongContextPacker(BM25Index(documents), tokenizer)
        reasons = Counter()
        for number in range(3):
            row = packer({"id": number, "text": documents[number]})
            reasons[row["packed_reason"].split(":")[0]] += 1
            if row["packed_passed"]:
                assert row["packed_tokens"] == len(tokenizer(row["packed_text"], verbose=False)["input_ids"])
                assert 8192 <= row["target_tokens"] <= 65536
                assert row["target_tokens"] - 8 <= row["packed_tokens"] <= row["target_tokens"]
                assert row["packed_text"][row["document_start"] :].startswith(documents[number])
        assert reasons["ok"] >= 2, (language, reasons)
