"""Semantic deduplication equals the slow loop, whatever the block, and loses no row."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from transformers_minicpm4.data.ultrachat.reasons import reason_counts
from transformers_minicpm4.data.ultrachat.semantic_dedup import find_semantic_duplicates, semantic_deduplicate


def slow_loop(rows, threshold, against=()):
    """Row after row, pair after pair, in float64."""
    kept = [(place, row) for place, row in enumerate(against)]
    twins, cosines = [], []
    for number, row in enumerate(rows):
        found = [(row @ other / (np.linalg.norm(row) * np.linalg.norm(other)), -place) for place, other in kept]
        best = max(found, default=(-2, 0))
        if best[0] >= threshold:
            twins.append(-best[1])
            cosines.append(best[0])
        else:
            kept.append((len(against) + number, row))
            twins.append(-1)
            cosines.append(math.nan)
    return np.array(twins), np.array(cosines)


@pytest.fixture
def vectors():
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(30, 16))
    rows = centres[draw.integers(30, size=200)] + draw.normal(size=(200, 16)) * draw.choice([0.05, 0.3, 0.8], (200, 1))
    return rows * draw.uniform(0.1, 10, (200, 1))


@pytest.mark.parametrize("block_size", [1, 7, 64, 5000])
@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_equals_the_slow_loop_in_blocks(vectors, block_size, threshold):
    twin, cosine = find_semantic_duplicates(vectors[50:], threshold, block_size, against=vectors[:50])
    expected_twin, expected_cosine = slow_loop(vectors[50:], threshold, vectors[:50])
    np.testing.assert_array_equal(twin, expected_twin)
    np.testing.assert_allclose(cosine, expected_cosine, atol=1e-6)
    assert 0 < (twin >= 0).sum() < len(twin)


def test_a_twin_is_kept_and_earlier_and_kept_rows_differ(vectors):
    twin, cosine = find_semantic_duplicates(torch.from_numpy(vectors).float(), 0.8)
    kept = np.flatnonzero(twin < 0)
    for row in np.flatnonzero(twin >= 0):
        assert twin[row] in kept
        assert twin[row] < row
        assert cosine[row] >= 0.8 - 1e-9
    unit = vectors[kept] / np.linalg.norm(vectors[kept], axis=1, keepdims=True)
    assert np.triu(unit @ unit.T, 1).max() < 0.8 + 1e-6


def test_equal_vectors_reach_a_threshold_of_one():
    row = np.random.default_rng(1).normal(size=(1, 33))
    twin, cosine = find_semantic_duplicates(np.concatenate([row, 3 * row, -row, row + 1e-3]), 1.0)
    assert twin.tolist() == [-1, 0, -1, -1]
    assert cosine[1] == pytest.approx(1)


def test_rows_without_direction_are_kept_and_nobodys_twin():
    rows = np.array([[0, 0], [0, 0], [np.nan, 1], [1, 0], [2, 0]])
    assert find_semantic_duplicates(rows, 0.9)[0].tolist() == [-1, -1, -1, -1, 3]


def letters(texts):
    """An encoder anyone can follow: counts of the letters."""
    return np.array([[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts])


def test_a_dataset_keeps_its_rows_and_says_why():
    texts = ["silent night", None, "listen thing", "other words", " ", "OTHER WORDS", "123", "wordless"]
    dataset = Dataset.from_dict({"id": [f"r{n}" for n in range(8)], "text": texts})
    for batch_size, block_size in ((1, 1), (3, 2), (256, 1024)):
        marked = semantic_deduplicate(
            dataset, letters, 0.95, id_column="id", batch_size=batch_size, block_size=block_size
        )
        assert marked["text"][:] == texts
        codes = [reason.split(":")[0] for reason in marked["dedup_reason"]]
        assert codes == ["ok", "no_text", "duplicate", "ok", "no_text", "duplicate", "no_embedding", "ok"]
        assert marked["duplicate_of"][:] == [None, None, "r0", None, None, "r3", None, None]
        assert marked["duplicate_similarity"][2] == pytest.approx(1)
        assert marked["dedup_passed"][:] == [code != "duplicate" for code in codes]
        assert sum(reason_counts(marked["dedup_reason"]).values()) == len(texts)


def test_rl_data_against_supervised_data():
    sft = Dataset.from_dict({"text": ["", "how many apples"]})
    rl = Dataset.from_dict({"text": ["apples, how many", "a new problem", "a problem new"]})
    marked = semantic_deduplicate(rl, lambda texts: torch.from_numpy(letters(texts)), 0.99, against=sft)
    assert marked["duplicate_of"][:] == ["against:1", None, "1"]
    empty = semantic_deduplicate(rl, letters, 0.99, against=sft.select([0]))
    assert empty["duplicate_of"][:] == [None, None, "1"]


def test_wrong_input_is_named():
    dataset = Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]})
    with pytest.raises(TypeError, match="save the stream first"):
        semantic_deduplicate(dataset.to_iterable_dataset(), letters)
    with pytest.raises(KeyError, match="no column 'body'"):
        semantic_deduplicate(dataset, letters, text_column="body")
    with pytest.raises(TypeError, match="holds int"):
        semantic_deduplicate(dataset, letters, text_column="n")
    with pytest.raises(ValueError, match="must give"):
        semantic_deduplicate(dataset, lambda texts: np.zeros((1, 3)))
    with pytest.raises(ValueError, match="cosine above 0"):
        find_semantic_duplicates(np.eye(2), 1.5)
    with pytest.raises(ValueError, match="one encoder"):
        find_semantic_duplicates(np.eye(2), against=np.eye(3))
