"""Labelled documents become the lines that fastText trains on, and nothing in a text passes for more than text."""

from datasets import Dataset

from transformers_minicpm4.data.ultraclean.seeds import prepare


def test_no_word_of_a_text_is_a_label_or_the_end_of_its_line():
    texts = ["one </s> two", "</s>", "__label__neg </s>", "three __label__neg", "a</s> b"]
    documents = prepare(Dataset.from_dict({"text": texts, "label": ["pos"] * 5, "source": ["s"] * 5}))
    assert [line.split() for line in documents.lines()] == [["one", "two"], ["three"], ["a</s>", "b"]]
    assert documents.dropped == {"no words after preprocessing": 2}
