"""However the ids arrive, the pieces are the decoded text up to the first stop string, and no piece is taken back."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from transformers_minicpm4.generation.text_stream import REPLACEMENT, TextStream


TEXTS = [
    "The quick brown fox can't jump over 13 lazy dogs, aaab!\n\n  Indented,   and more.",
    "大模型在手机上运行。𠮷野家的「牛肉饭」，很好吃！\n你好，世界",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈, 👍🏽 e\u0301 ❤️‍🔥🇨🇳",
    "naïve café — Größe ½ ﷽ \ufffd ok \ufffd",
    "    leading and trailing    ",
]
STOPS = [
    (), ("aab",), ("fox", "own"), ("大模", "运行。𠮷", "世界"), ("👧", "\u200d❤"), ("\n\n", "\n你"), (" ",),
    ("\ufffd",), ("abc", "ab", "bc!"), ("quick brown", "brown f", "ick brown fox can't jump over 13 lazy cats"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bpe():
    """SmolLM2's own byte-level BPE."""
    from transformers_minicpm4.cli.assets import smollm2_path

    try:
        return AutoTokenizer.from_pretrained(smollm2_path())
    except FileNotFoundError as error:
        pytest.skip(f"no converted SmolLM2 weights: {error}")


def sentencepiece(decoder):
    """Unigram with leading-space marks and byte fallback, as in Llama's and MiniCPM4's vocabularies."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁the", "The", "▁quick", "▁bro", "wn", "▁fox"]
    pieces += ["大", "模型", "在", "手机", "。", "你好", "aa", "ab"]
    pieces += [*"abcdefghijklmnopqrstuvwxyz'!,.0123456789"]
    backend = Tokenizer(models.Unigram([(piece, -float(len(pieces) - i)) for i, piece in enumerate(pieces)], 0, True))
    if decoder == "llama":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>", "<|call|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=["bpe", "llama", "metaspace"])
def tokenizer(request):
    return request.getfixturevalue("bpe") if request.param == "bpe" else sentencepiece(request.param)


def byte_level_alphabet():
    """The character that byte-level vocabularies write for each byte (Radford et al. 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def sequences(tokenizer, generator):
    """Ids of real text, cut anywhere; with special tokens in between; random ids; ids of random bytes."""
    vocabulary = tokenizer.get_vocab()
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    if "<0x00>" in vocabulary:
        single = [vocabulary[f"<0x{byte:02X}>"] for byte in range(256)]
    else:
        single = [vocabulary.get(name, 0) for name in byte_level_alphabet()]
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        yield ids
        yield ids[generator.randrange(len(ids)) :][: generator.randrange(1, len(ids) + 1)] * 3
        mixed = list(ids)
        for _ in range(6):
            mixed.insert(generator.randrange(len(mixed) + 1), generator.choice(special))
        yield mixed
        yield [*[generator.choice(special)] * 12, *ids]
        # One byte a token, as small vocabularies write Chinese and emoji.
        if "<0x00>" in vocabulary:
            yield [single[byte] for byte in text.encode()]
    yield [generator.randrange(len(tokenizer) + 20) for _ in range(60)]
    for alphabet in (single, single[-80:], [*single[-12:], *special], [*single[-30:], *tokenizer.encode(TEXTS[1])]):
        yield [generator.choice(alphabet) for _ in range(generator.randrange(80))]
    # Beginnings of characters, and whole ones, in a row.
    parts = ["F09F98", "F09F", "F0", "E4BD", "E4", "98", "FF", "61", "E4BDA0"]
    for few in (parts[:1], parts[:2], parts[:5], parts, parts):
        drawn = "".join(generator.choice(few) for _ in range(30))
        yield [single[byte] for byte in bytes.fromhex(drawn)]
    yield []


def chunks(ids, generator):
    longest = generator.choice([1, 1, 2, 4, 50])
    while ids:
        size = generator.randint(0, longest)
        yield ids[:size]
        ids = ids[size:]


def expected(text, stops):
    """Cut and stop string by looking at every place in turn."""
    for place in range(len(text)):
        for stop in sorted(stops, key=len):
            if text.startswith(stop, place):
                return text[:place], stop
    return text, None


def whole(tokenizer, ids, skip):
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def test_pieces_are_the_decoded_text_up_to_the_first_stop_string(tokenizer):
    generator = random.Random(1)
    found = 0
    for turn in range(6):
        for ids in sequences(tokenizer, generator):
            skip = bool(turn % 2)
            text = whole(tokenizer, ids, skip)
            drawn = [text[i : i + generator.randint(1, 9)] for i in (generator.randrange(len(text) + 1),)]
            stops = generator.choice([*STOPS, ("<|", "</s>"), *[tuple(filter(None, drawn))] * 4])
            stream = TextStream(tokenizer, stops, skip)
            pieces = [stream.put(chunk) for chunk in chunks(ids, generator)]
            assert stream.text == "".join(pieces)
            pieces.append(stream.end())
            assert ("".join(pieces), stream.stopped) == expected(text, stops)
            assert stream.text == "".join(pieces)
            assert stream.end() == ""
            found += stream.stopped is not None
    assert found > 50


def test_no_piece_is_ever_taken_back(tokenizer):
    """After every token, what was returned begins the text of every continuation."""
    generator = random.Random(2)
    continuations = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS[:3]] + [[]]
    for ids in sequences(tokenizer, generator):
        ids = ids[:40]
        stream = TextStream(tokenizer)
        for place, token in enumerate(ids):
            stream.put([token])
            for continuation in continuations:
                assert whole(tokenizer, ids[: place + 1] + continuation, True).startswith(stream.text)


def test_text_is_returned_as_soon_as_a_character_is_complete(bpe):
    """Byte-level BPE: held back is an incomplete character and nothing else."""
    for text in TEXTS:
        stream = TextStream(bpe)
        ids = bpe.encode(text, add_special_tokens=False)
        for place, token in enumerate(ids):
            stream.put([token])
            assert stream.text == whole(bpe, ids[: place + 1], True).rstrip(REPLACEMENT)


def test_of_invalid_bytes_at_most_three_characters_are_held_back(bpe):
    for ids in sequences(bpe, random.Random(4)):
        stream = TextStream(bpe, skip_special_tokens=False)
        for place, token in enumerate(ids):
            stream.put([token])
            assert len(whole(bpe, ids[: place + 1], False)) - len(stream.text) <= 3


def test_a_stop_string_is_held_back_no_longer_than_it_may_come(bpe):
    held = []
    stream = TextStream(bpe, ["aab", "b c d"])
    for character in "xaaaxb c aab":
        stream.put(bpe.encode(character, add_special_tokens=False))
        held.append(stream.text)
    # "aaa" can no longer become "aab" from its first letter, "b c a" not "b c d".
    assert held == ["x", "x", "x", "xa", "xaaax", *["xaaax"] * 4, "xaaaxb c ", "xaaaxb c ", "xaaaxb c "]
    assert stream.stopped == "aab"


def test_an_earlier_stop_string_wins_over_one_that_is_complete_first(bpe):
    for after, text, stop in (("d!", "x", "abcd"), ("e!", "xa", "bc")):
        stream = TextStream(bpe, ["bc", "abcd", "abcdef"])
        for character in "xabc" + after:
            stream.put(bpe.encode(character, add_special_tokens=False))
        stream.end()
        assert (stream.text, stream.stopped) == (text, stop)
    stream = TextStream(bpe, ["bc", "abcd"])
    assert stream.put(bpe.encode("xabc", add_special_tokens=False)) == "x"
    assert (stream.end(), stream.stopped) == ("a", "bc")
    # At one place the shortest, in whatever order they are listed.
    stream = TextStream(bpe, ["abc", "ab"])
    assert stream.put(bpe.encode("xabc", add_special_tokens=False)) == "x"
    assert stream.stopped == "ab"


def test_nothing_after_the_stop_string(tokenizer):
    stream = TextStream(tokenizer, ["quick"])
    stream.put(tokenizer.encode(TEXTS[0], add_special_tokens=False))
    text = stream.text
    assert stream.stopped == "quick"
    assert stream.put(tokenizer.encode(TEXTS[1])) == stream.end() == ""
    assert stream.text == text


def test_an_incomplete_character_at_the_end_is_shown_as_decode_shows_it(tokenizer):
    ids = tokenizer.encode("a🏳", add_special_tokens=False)[:-1]
    stream = TextStream(tokenizer)
    assert stream.put(ids) == "a"
    assert "a" + stream.end() == whole(tokenizer, ids, True)
    assert stream.text.endswith(REPLACEMENT)


def test_cost_of_a_token_does_not_grow(tokenizer):
    """Tokens given to decode, counted: a constant times those of the text, for text, specials and single bytes."""
    generator = random.Random(3)
    byte = [token for name, token in tokenizer.get_vocab().items() if name.startswith("<0x") or len(name) == 1]
    texts = [
        (tokenizer.encode(" ".join(TEXTS), add_special_tokens=False) * 40)[:3000],
        [tokenizer.eos_token_id] * 1000,
        [generator.choice(byte) for _ in range(3000)],
    ]
    for ids in texts:
        stream = TextStream(tokenizer)
        decode, count = stream._decode, 0

        def counted(some, decode=decode):
            nonlocal count
            count += len(some)
            return decode(some)

        stream._decode = counted
        for token in ids:
            stream.put([token])
        stream.end()
        assert stream.text == whole(tokenizer, ids, True)
        assert count < 40 * len(ids)


def test_refusals(bpe):
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(bpe, ["a", ""])
    with pytest.raises(ValueError, match="got 3 of type int"):
        TextStream(bpe, ["a", 3])
    with pytest.raises(ValueError, match=r"write \['ab'\]"):
        TextStream(bpe, "ab")
    with pytest.raises(ValueError, match="lone surrogate"):
        TextStream(bpe, ["\ud83d"])
    stream = TextStream(bpe)
    with pytest.raises(ValueError, match="0 or more, got -100"):
        stream.put([5, -100])
    stream.end()
    with pytest.raises(ValueError, match="has been ended"):
        stream.put([5])
