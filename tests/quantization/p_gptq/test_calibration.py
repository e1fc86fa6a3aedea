"""Calibration rows from everything that users have, and a sentence for what cannot be used."""

import pytest
import torch
from datasets import Dataset

from transformers_minicpm4.quantization.p_gptq.calibration import (
    CalibrationError,
    batches,
    calibration_rows,
    digest,
)


class Letters:
    """A tokenizer of letters that puts token 1 before each text, as Llama's does."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}


TEXTS = ["abcdefgh" * 10, "", "the quick brown fox " * 10]


def test_rows_are_pieces_of_the_joined_text_after_the_prefix():
    rows = calibration_rows(TEXTS, Letters(), num_samples=8, max_length=16)
    joined = "".join(TEXTS)
    assert len(rows) == 8
    for row in rows:
        assert len(row) == 16
        assert int(row[0]) == 1
        assert "".join(map(chr, row[1:].tolist())) in joined
    own = calibration_rows(TEXTS, Letters(), num_samples=2, max_length=16, prefix_ids=[7, 8])
    assert own[0][:2].tolist() == [7, 8]


def test_same_rows_for_the_same_seed_alone():
    same = [digest(calibration_rows(TEXTS, Letters(), num_samples=4, max_length=16, seed=seed)) for seed in (0, 0, 1)]
    assert same[0] == same[1] != same[2]


def test_a_dataset_gives_the_rows_of_its_texts():
    dataset = Dataset.from_dict({"body": TEXTS})
    rows = calibration_rows(dataset, Letters(), num_samples=4, max_length=16, text_column="body")
    assert digest(rows) == digest(calibration_rows(TEXTS, Letters(), num_samples=4, max_length=16))


@pytest.mark.parametrize(
    "row",
    [
        [3, 4, 5],
        torch.tensor([3, 4, 5]),
        torch.tensor([[3, 4, 5]]),
        {"input_ids": [3, 4, 5]},
        {"input_ids": [0, 0, 3, 4, 5], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": torch.tensor([[3, 4, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])},
    ],
)
def test_tokenized_rows_are_taken_without_their_padding(row):
    (taken,) = calibration_rows([row], num_samples=5)
    assert taken.tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([], {}, "is empty"),
        (None, {}, "type NoneType"),
        ({"text": "a"}, {}, "type dict"),
        (["ab"], {"tokenizer": Letters()}, "has 2 tokens and one row needs 15"),
        (["ab" * 20], {"tokenizer": Letters()}, "which make 2 rows of 15, and num_samples=4"),
        (TEXTS, {}, "without a tokenizer"),
        ([TEXTS[0], 3], {"tokenizer": Letters()}, "row 1 is int"),
        ([[1.5, 2.5]], {}, "row 0 is list"),
        ([{"other": 1}], {}, "have a text in column 'text'"),
        ([[4]], {}, "has 1 tokens"),
        (TEXTS, {"tokenizer": Letters(), "num_samples": 0}, "num_samples=0"),
        (TEXTS, {"tokenizer": Letters(), "prefix_ids": list(range(16))}, "no room after 16"),
    ],
)
def test_bad_data_is_named(dataset, options, message):
    with pytest.raises(CalibrationError, match=message):
        calibration_rows(dataset, **{"num_samples": 4, "max_length": 16, **options})


def test_batches_keep_every_token_once():
    rows = [torch.arange(length) + 1 for length in (3, 7, 5, 7, 2)]
    made = batches(rows, 2)
    seen = [
        part["input_ids"][index][part["attention_mask"][index] == 1]
        for part in made
        for index in range(len(part["input_ids"]))
    ]
    assert sorted(map(len, seen)) == [2, 3, 5, 7, 7]
    assert all(torch.equal(row, torch.arange(len(row)) + 1) for row in seen)
    assert all((part["input_ids"][part["attention_mask"] == 0] == 0).all() for part in made)
