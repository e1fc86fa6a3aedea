"""Near and exact duplicates: against all pairs by brute force, and the same however the work is divided."""

import gzip
import json
import pickle
import random

import pytest
from datasets import Dataset

from transformers_minicpm4.data.ultraclean.deduplicate import (
    DuplicateFilter,
    MinHashSignature,
    TextHash,
    jaccard,
    lsh_bands,
    mark_exact_duplicates,
    mark_near_duplicates,
    shingles,
    tokenize,
)


pytest.importorskip("datasketch")


def corpus(shared_data, language, size):
    with gzip.open(shared_data / "debian-docs-quality" / f"{language}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [{"id": row["id"], "text": row["text"][:1500]} for row, _ in zip(map(json.loads, lines), range(size))]


def with_edits(rows, seed=0):
    """Copies of some rows in which every few hundredth character is gone; chains of copies of copies too."""
    generator = random.Random(seed)
    rows = list(rows)
    for n in range(len(rows) // 3):
        row = generator.choice(rows)
        share = generator.choice([0.0, 0.002, 0.005, 0.01])
        text = "".join(c for c in row["text"] if generator.random() >= share)
        rows.append({"id": f"{generator.choice('az')}.copy/{n}", "text": text})
    generator.shuffle(rows)
    return rows


def brute_force(rows, threshold, size=5):
    """id -> id of the kept document, by comparing every pair and walking the graph."""
    sets = {row["id"]: shingles(row["text"], size) for row in rows}
    links = {i: [j for j in sets if j != i and jaccard(sets[i], sets[j]) >= threshold] for i in sets}
    kept = {}
    for i in sorted(sets):
        todo = [i]
        while todo:
            at = todo.pop()
            if at not in kept:
                kept[at] = i
                todo += links[at]
    return {i: None if kept[i] == i else kept[i] for i in sets}, sets


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_marks_are_those_of_all_pairs(shared_data, language, threshold):
    rows = with_edits(corpus(shared_data, language, 150))
    expected, sets = brute_force(rows, threshold)
    marked = mark_near_duplicates(Dataset.from_list(rows), threshold)
    assert [row["id"] for row in marked] == [row["id"] for row in rows]
    assert dict(zip(marked["id"], marked["duplicate_of"])) == expected
    assert 20 < sum(kept is not None for kept in expected.values()) < 150
    for row in marked:
        if row["duplicate_of"] is not None:
            assert row["similarity"] == jaccard(sets[row["id"]], sets[row["duplicate_of"]])


def test_a_chain_is_one_cluster():
    words = [f"w{i}" for i in range(40)]
    rows = [{"id": i, "text": " ".join(words[i : i + 30])} for i in (2, 0, 1, 3)]
    near = mark_near_duplicates(Dataset.from_list(rows), 0.9)  # neighbours share 25 of 27 shingles, ends 23 of 29
    assert near["duplicate_of"][:] == [0, None, 0, 0]
    assert near["similarity"][:] == [24 / 28, None, 25 / 27, 23 / 29]


def test_rows_without_tokens_and_short_rows():
    rows = [{"text": t} for t in ("", None, "!?", "one", "One.", "\ud7ff\x00")]
    marked = mark_near_duplicates(Dataset.from_list(rows), id_column=None)
    assert marked["duplicate_of"][:] == [None, None, None, None, 3, None]


def test_signature_is_datasketch_s_and_divides(shared_data):
    from datasketch import MinHash

    texts = Dataset.from_list(
        corpus(shared_data, "zh", 40) + corpus(shared_data, "en", 40) + [{"id": "", "text": None}]
    )
    signature = pickle.loads(pickle.dumps(MinHashSignature(num_perm=64, seed=3)))
    signed = texts.map(signature, batched=True, batch_size=17)["minhash"][:]
    for text, values in zip(texts["text"], signed):
        sketch = MinHash(64, 3)
        for shingle in shingles(text or ""):
            sketch.update(shingle.encode())
        assert values == sketch.hashvalues.tolist()
    assert texts.map(signature, batched=True, num_proc=2)["minhash"][:] == signed
    assert [row["minhash"] for row in texts.to_iterable_dataset(3).map(signature, batched=True)] == signed


def test_tokens_are_words_and_chinese_characters():
    assert tokenize("The ＱＵＩＣＫ fox's 数据, in_x!") == ["the", "quick", "fox", "s", "数", "据", "in_x"]
    assert shingles("数据过滤", 3) == {"数 据 过", "据 过 滤"}


def test_exact_duplicates():
    texts = ["B b", "a  text\n", "A text", "", " ", None, "Ａ TEXT", "a text."]
    rows = Dataset.from_list([{"id": 9 - i, "text": text} for i, text in enumerate(texts)])
    marked = mark_exact_duplicates(rows)
    assert marked["duplicate_of"][:] == [None, 3, 3, None, None, None, None, None]
    assert marked["similarity"][:] == [None, 1.0, 1.0, *[None] * 5]
    kept = marked.filter(DuplicateFilter(), batched=True)
    assert kept["id"][:] == [9, 6, 5, 4, 3, 2]
    assert DuplicateFilter().reasons(marked[:3]) == [None, "duplicate", "duplicate"]
    assert TextHash()({"text": texts})["text_hash"][3] == ""


@pytest.mark.parametrize("ids", [[1, 2, 3], ["a", "b", "c"]])
@pytest.mark.parametrize("name", [None, "numpy", "pandas", "torch"])
def test_the_filter_keeps_what_is_null_in_any_format(ids, name):
    rows = Dataset.from_dict({"id": ids, "text": ["a", "b", "A"]})
    marked = mark_exact_duplicates(rows).with_format(name)
    assert marked.filter(DuplicateFilter(), batched=True).with_format(None)["id"][:] == ids[:2]


@pytest.mark.parametrize("function", [MinHashSignature(num_perm=16), TextHash()])
def test_a_single_row_is_refused(function):
    rows = Dataset.from_dict({"text": ["ab cd", "ef", None]})
    for dataset in (rows, rows.to_iterable_dataset(), rows.with_format("numpy")):
        with pytest.raises(TypeError, match="column 'text' .* pass batched=True"):
            list(dataset.map(function))
    marked = mark_exact_duplicates(rows, id_column=None)
    for dataset in (marked, marked.to_iterable_dataset()):
        with pytest.raises(TypeError, match="column 'duplicate_of' .* pass batched=True"):
            list(dataset.filter(DuplicateFilter()))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.95, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold):
    bands, rows = lsh_bands(threshold, 128)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.99


def test_errors():
    rows = Dataset.from_list([{"id": 1, "text": "a"}, {"id": 1, "text": "b"}])
    with pytest.raises(ValueError, match="1 repeated ids"):
        mark_near_duplicates(rows)
    with pytest.raises(ValueError, match=r"no column 'body'; the columns are \['id', 'text'\]"):
        mark_near_duplicates(rows, text_column="body")
    with pytest.raises(ValueError, match="already"):
        mark_exact_duplicates(mark_exact_duplicates(rows, id_column=None), id_column=None)
    with pytest.raises(TypeError, match="without streaming"):
        mark_near_duplicates(rows.to_iterable_dataset())
    with pytest.raises(ValueError, match=r"threshold=1.5"):
        mark_near_duplicates(rows, 1.5)
    with pytest.raises(ValueError, match="raise num_perm"):
        lsh_bands(0.01, 16)
    with pytest.raises(TypeError, match="row 1 of the batch holds int"):
        MinHashSignature()({"text": ["a", 3]})
    with pytest.raises(KeyError, match="set text_column"):
        MinHashSignature()({"body": ["a"]})
