"""The words a classifier sees: equal to the released script's chain, written here as the loop it is."""

import gzip
import json
import random
import re
import time
import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from transformers_minicpm4.data.ultraclean.normalize import (
    DEFAULT_TOKENIZER,
    load_tokenizer,
    normalize,
    to_words,
    to_words_batch,
    unicode_form,
)


TEXTS = [
    "",
    " \n\t ",
    "Hello, World!\n\n\n\nNext\r\n\r\n\r\nline\ttab   spaces  ",
    "a\n \n\n\nb\n\n",
    "Über naïve façade ﬁne ①②",
    "TM™ №5 ℡ Å",
    "全角，ＡＢＣ　１２３ 中文不变",
    "한국어 텍스트 が ぱ ภาษาไทย हिन्दी",
    "emoji 😀👩‍👩‍👧 and rare 𠀀龘",
    "nul\0inside\x0b\x0c\x1f\x85\u2028end",
    "literal \\n and \\\\t",
    "\u0301\u0302",
    "İstanbul ẞ ß",
    "x" * 5000,
]


def slow_normalize(text):
    text = re.sub("\n{3,}", "\n\n", text).lower()
    return "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn")


def slow_to_words(text, tokenizer=None):
    text = slow_normalize(text)
    if tokenizer is not None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        text = " ".join([tokenizer.decode([i]) for i in ids])
    for character, letter in ("\n", "n"), ("\r", "r"), ("\t", "t"):
        text = text.replace(character, "\\" + letter)
    return re.sub(" +", " ", text).strip()


def train(kind):
    """Small tokenizers of the kinds on the Hub, each with its own way of writing spaces."""
    if kind == "byte-level BPE":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    elif kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator([slow_normalize(text) for text in TEXTS] * 3, trainer)
    return tokenizer


def test_normalize_is_the_slow_chain_on_every_code_point():
    everything = [chr(i) for i in range(0x110000)]
    for start in range(0, len(everything), 64):
        text = " ".join(everything[start : start + 64])
        assert normalize(text) == slow_normalize(text)


def test_every_character_that_can_move_is_looked_for_in_long_runs():
    """What makes the exactness below hold for all of Unicode: a new version of Unicode may break it."""
    from transformers_minicpm4.data.ultraclean.normalize import _MANY_MARKS

    for i in range(0x110000):
        if unicodedata.combining(unicodedata.normalize("NFKD", chr(i))[0]):
            assert _MANY_MARKS.fullmatch(chr(i) * 31), hex(i)


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_long_runs_of_marks_are_sorted_as_unicodedata_does(form):
    generator = random.Random(form)
    marks = [chr(i) for i in range(0x300, 0x1E950) if unicodedata.category(chr(i))[0] == "M"] + ["\uff9e", "\uff9f"]
    # Characters of many classes, spacing ones that move (Mc), blockers of class 0, and what decomposes into several.
    few = "\u0301\u0327\u0345\u302e\u302f\U0001d165\U00016ff0\u034f\u0344\u0dda\uff9e\u05b0\u0f77"
    for _ in range(300):
        parts = []
        for _ in range(generator.randint(1, 4)):
            parts += generator.choices(
                ["a", "é", "ｶ", "\U0001d15e", "가", "\u1100", " ", "ẛ̣"], k=generator.randint(0, 2)
            )
            parts += generator.choices(generator.choice([marks, few]), k=generator.randint(0, 200))
        text = "".join(parts)
        assert unicode_form(form, text) == unicodedata.normalize(form, text)
        assert normalize(text) == slow_normalize(text)


@pytest.mark.parametrize("marks", ["\u0345\u0301\u0327", "\U0001d165\U00016ff0", "\u302e\uff9e"])
def test_a_long_run_of_marks_takes_time_in_proportion(marks):
    from transformers_minicpm4.data.ultraclean.deduplicate import tokenize

    text = "a" + marks * 40_000
    start = time.process_time()
    normalize(text)
    tokenize(text)
    assert time.process_time() - start < 2  # the quadratic way: over 10


@pytest.mark.parametrize("text", TEXTS)
def test_words_without_a_tokenizer_are_the_slow_chain(text):
    assert normalize(text) == slow_normalize(text)
    assert to_words(text) == slow_to_words(text)


@pytest.mark.parametrize("clean_up", [False, True])
@pytest.mark.parametrize("kind", ["byte-level BPE", "Unigram", "WordPiece"])
def test_batched_words_are_the_per_id_loop(kind, clean_up):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train(kind), clean_up_tokenization_spaces=clean_up)
    expected = [slow_to_words(text, tokenizer) for text in TEXTS]
    assert to_words_batch(TEXTS, tokenizer) == expected
    assert to_words_batch(TEXTS[::-1], tokenizer) == expected[::-1]
    assert [to_words(text, tokenizer) for text in TEXTS] == expected


def test_two_tokenizers_do_not_share_words():
    first, second = (PreTrainedTokenizerFast(tokenizer_object=train(kind)) for kind in ("byte-level BPE", "Unigram"))
    for tokenizer in (first, second, first):
        assert to_words_batch(TEXTS, tokenizer) == [slow_to_words(text, tokenizer) for text in TEXTS]


def test_special_tokens_and_padding_of_the_tokenizer_stay_out():
    backend = train("byte-level BPE")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", pad_token="<pad>")
    plain = to_words_batch(TEXTS, tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert to_words_batch(TEXTS, tokenizer) == plain
    assert not any("<pad>" in line or "<s>" in line for line in plain)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_corpus_words_of_the_smollm2_tokenizer(shared_data, language):
    from transformers_minicpm4.cli.assets import smollm2_path

    try:
        tokenizer = load_tokenizer(smollm2_path())
    except FileNotFoundError as error:
        pytest.skip(f"no converted SmolLM2: {error}")
    with gzip.open(shared_data / "debian-docs-quality" / f"{language}.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file][::50] + TEXTS
    assert to_words_batch(texts, tokenizer) == [slow_to_words(text, tokenizer) for text in texts]
    assert to_words_batch(texts) == [slow_to_words(text) for text in texts]


def test_facts_of_the_chain():
    """What specs/data.md lists as surprising, as values."""
    assert normalize("X™ №") == "xTM No"
    assert to_words("全角，ＡＢＣ　が") == "全角,abc か"
    assert to_words("a\n\n\n\nb\r\n\r\n\r\n") == "a\\n\\nb\\r\\n\\r\\n\\r\\n"
    assert to_words("  a   b  ") == "a b"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train("byte-level BPE"))
    assert "\ufffd" in to_words("𠀀", tokenizer)


def test_a_lone_surrogate_is_named_and_harmless_without_a_tokenizer():
    assert to_words("a \ud800 B") == "a \ud800 b"
    with pytest.raises(ValueError, match="lone surrogate"):
        to_words_batch(["fine", "a \ud800"], train("byte-level BPE"))


def test_three_megabytes_without_a_space():
    text = "aB" * 1_500_000
    assert to_words(text) == text.lower()
    text = text[:300_000]
    words = to_words(text, PreTrainedTokenizerFast(tokenizer_object=train("byte-level BPE")))
    assert words.replace(" ", "") == text.lower()


def test_load_tokenizer():
    backend = train("Unigram")
    wrapped = load_tokenizer(backend)
    assert load_tokenizer(backend) is wrapped
    assert load_tokenizer(wrapped) is wrapped
    assert load_tokenizer(None) is None
    with pytest.raises(OSError, match="no tokenizer 'no/such'"):
        load_tokenizer("no/such")
    with pytest.raises(TypeError, match="int"):
        load_tokenizer(3)
    assert DEFAULT_TOKENIZER.count("/") == 1
