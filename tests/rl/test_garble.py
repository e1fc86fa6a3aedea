"""The garble filter: planted garble is found, real text is left alone, and what must not matter does not."""

import pickle
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from transformers_minicpm4.rl import garble
from transformers_minicpm4.rl.garble import REASONS, GarbleFilter


VOCABULARY = 49152
CLEAN = "nothing to see"


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def ordinary(random):
    """Builder of ids as frequent as words are, without a loop."""
    return lambda size: np.minimum(random.zipf(1.3, size) + random.integers(0, 50, size), VOCABULARY - 1)


def looped(prefix, block, size):
    return np.concatenate([prefix, np.resize(block, size)]).tolist()


# ---- the definitions, slowly ----------------------------------------------------------------------------------------


def brute_period(ids, settings):
    """Smallest period with enough copied tokens, by walking."""
    share = int(np.ceil(settings.loop_share * len(ids)))
    tokens = min(max(share, settings.min_repeated_tokens), settings.enough_repeated_tokens)
    for period in range(1, settings.max_period + 1):
        run = longest = 0
        for place in range(period, len(ids)):
            run = run + 1 if ids[place] == ids[place - period] else 0
            longest = max(longest, run)
        if longest >= max(tokens, (settings.min_repeats - 1) * period):
            return period
    return None


@pytest.mark.parametrize("stride", [1, 2, 8, 13])
def test_loops_equal_the_definition(random, monkeypatch, stride):
    monkeypatch.setattr(garble, "STRIDE", stride)
    found = []
    for trial in range(300):
        settings = GarbleFilter(
            min_repeated_tokens=int(random.integers(2, 30)),
            enough_repeated_tokens=int(random.integers(30, 50)),
            loop_share=float(random.uniform(0.05, 0.6)),
            min_repeats=int(random.integers(2, 5)),
            max_period=int(random.integers(1, 40)),
        )
        before, after = (random.integers(0, 3, int(random.integers(0, 40))) for _ in range(2))
        loop = np.resize(random.integers(0, 3, int(random.integers(1, 25))), int(random.integers(1, 90)))
        ids = np.concatenate([before, loop, after])
        expected = brute_period(ids.tolist(), settings)
        assert settings._loop_period(ids) == expected, (trial, settings, ids.tolist())
        found.append(expected)
    assert 50 < sum(period is not None for period in found) < 290  # both answers occur
    assert len(set(found)) > 10


@pytest.mark.parametrize("n", range(1, 12))
def test_ngrams_are_counted_exactly(random, n):
    for size in (n, n + 1, 40, 300):
        ids = random.integers(0, 3, size)
        expected = len({tuple(ids[i : i + n]) for i in range(size - n + 1)})
        assert garble._distinct_ngrams(garble._ranks(ids), n) == expected


# ---- planted garble -------------------------------------------------------------------------------------------------


def test_every_loop_of_three_repeats_is_found(ordinary):
    """Half of the completion, all periods up to 200: found exactly if the half holds the period three times."""
    for size in (256, 1024, 4096):
        for period in range(1, 201):
            half = size // 2
            reason = GarbleFilter()(looped(ordinary(half), ordinary(period), half), CLEAN)
            if half >= 3 * period:
                assert reason == ("token_run" if period == 1 else reason)
                assert reason in ("token_run", "repetition"), (size, period)
            elif half < 2.9 * period:
                assert reason is None, (size, period)


def test_a_loop_is_found_wherever_it_stands(ordinary):
    for at in (0, 100, 1400):
        text = ordinary(1400)
        ids = np.concatenate([text[:at], np.resize(ordinary(30), 600), text[at:]])
        assert GarbleFilter()(ids, CLEAN) == "repetition"
        assert GarbleFilter()([*ids, 2], CLEAN) == "repetition"  # an end token after it


def test_a_long_completion_needs_512_copied_tokens_and_not_a_quarter(ordinary):
    assert GarbleFilter()(looped(ordinary(32_000), ordinary(50), 600), CLEAN) == "repetition"
    assert GarbleFilter()(looped(ordinary(32_000), ordinary(50), 500), CLEAN) is None
    assert GarbleFilter()(looped(ordinary(32_000), [7], 480), CLEAN) is None  # zeros, a ruler


def test_a_loop_that_changes_a_token_each_time_is_found_by_its_ngrams(random, ordinary):
    for _ in range(50):
        ids = np.resize(ordinary(100), 2000)
        ids[50::100] = random.integers(VOCABULARY, 2 * VOCABULARY, 20)  # a counter in each round
        assert GarbleFilter()(ids, CLEAN) == "repeated_ngrams"
        assert GarbleFilter(ngram_share=1)(ids, CLEAN) is None


@pytest.mark.parametrize("size", [64, 256, 4096])
def test_random_bytes_are_found(random, size):
    for _ in range(100):
        text = random.bytes(size).decode("utf-8", errors="replace")
        assert GarbleFilter()(list(range(size)), text) == "invalid_text"


@pytest.mark.parametrize("code", [0xFFFD, 0x00, 0x1B, 0x7F, 0xD800, 0xE000, 0xF0000, 0xFFFF])
def test_characters_that_are_no_text(code):
    character = chr(code)
    assert GarbleFilter()([1, 2], "word " * 20 + f"{character}x" * 12) == "invalid_text"
    assert GarbleFilter()([1, 2], "word " * 20 + f"{character}x" * 7) is None  # too few
    assert GarbleFilter()([1, 2], "word " * 100 + f"{character}x" * 12) is None  # too small a share
    assert GarbleFilter(invalid_share=1)([1, 2], f"{character}x" * 50) is None


def test_white_space_and_format_characters_are_text():
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467\ufe0f"
    for text in ("\t\n" * 500, "\f\v\r\n" * 200, family * 100, "\u202bشكرا\u202c " * 50, "\u3000中文，。" * 50):
        assert GarbleFilter()([1, 2, 3], text) is None


# ---- what must not matter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_character_cut_at_the_end_does_not_count(count):
    """With a threshold of one character, so that any other replacement character flags it."""
    settings = GarbleFilter(min_invalid_characters=1, invalid_share=0.01)
    assert settings([1], "中" * 10 + "\ufffd" * count) is None
    assert settings([1], "\ufffd" * count) is None
    assert settings([1], "中" * 10 + "\ufffd" * 4) == "invalid_text"
    assert settings([1], "中" * 5 + "\ufffd" + "中" * 5) == "invalid_text"
    for cut in range(1, 4):
        assert settings([1], "text " * 10 + "😀".encode()[:cut].decode(errors="replace")) is None


def test_more_of_the_same_never_unflags(random, ordinary):
    flagged = 0
    for _ in range(30):
        prefix, block = ordinary(int(random.integers(0, 700))), ordinary(int(random.integers(1, 90)))
        before = False
        for repeats in range(1, 40):
            now = GarbleFilter()(looped(prefix, block, repeats * len(block)), CLEAN) is not None
            assert now or not before, (len(prefix), len(block), repeats)
            before = now
        flagged += before
    assert flagged > 20
    texts = ["word " * 30 + "\ufffdx" * count for count in range(200)]
    found = [GarbleFilter()([1], text) is not None for text in texts]
    assert found == sorted(found)
    assert found[-1]


def test_names_of_tokens_do_not_matter(random, ordinary):
    reasons = set()
    for trial in range(40):
        ids = ordinary(600)
        if trial % 4 == 1:
            ids = np.asarray(looped(ids[:300], ordinary(20), 300))
        elif trial % 4 == 2:
            ids[100:400] = 5
        elif trial % 4 == 3:
            ids = np.resize(ordinary(90), 900)
            ids[::90] = np.arange(10) + VOCABULARY
        names = random.permutation(4 * VOCABULARY)
        reason = GarbleFilter()(ids, CLEAN)
        assert GarbleFilter()(names[ids], CLEAN) == reason
        assert GarbleFilter()((names[ids] - 10**12).tolist(), CLEAN) == reason  # nor that they are small
        reasons.add(reason)
    assert reasons == {None, "token_run", "repetition", "repeated_ngrams"}


def test_hostile_input_costs_no_more_comparisons_than_ordinary_input(random, ordinary, monkeypatch):
    """The work is a number of passes over the tokens that does not grow with them."""
    passes = []
    plain = garble._longest_copy

    def counted(ids, period, stride=1):
        passes.append(len(ids) // stride)
        return plain(ids, period, stride)

    monkeypatch.setattr(garble, "_longest_copy", counted)

    def cost(ids):
        passes.clear()
        GarbleFilter()(ids, CLEAN)
        return sum(passes) / len(ids)

    for size in (2000, 8000, 32_000):
        places = np.arange(size)
        noise = random.integers(0, VOCABULARY, size)
        assert cost(ordinary(size)) <= 1.1 * GarbleFilter.max_period / garble.STRIDE
        for ids in (np.where(places % 8 == 0, 1, noise), random.integers(0, 2, size), places // 400, places % 1000):
            assert cost(ids) <= GarbleFilter.max_period * (1 + 1 / garble.STRIDE)


def test_the_forms_ids_come_in(ordinary):
    import torch

    ids = looped(ordinary(100), ordinary(9), 200)
    copy = pickle.loads(pickle.dumps(GarbleFilter(max_period=20)))
    assert copy == GarbleFilter(max_period=20)
    for form in (ids, tuple(ids), np.array(ids), torch.tensor(ids)):
        assert copy(form, CLEAN) == "repetition"
    assert GarbleFilter()([], "") is None
    assert {"token_run", "repetition", "repeated_ngrams", "invalid_text"} == set(REASONS)


# ---- real text ------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_text_is_clean(real_checkpoint):
    """Python's own sources and documentation: at most 1 piece of 1,000 (docs/garble.md measures all of them)."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_checkpoint)
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not {"site-packages", "test"} & {*path.parts}]
    texts = ["\n".join(topics.values()), *(path.read_text(encoding="utf-8", errors="replace") for path in files[::12])]
    pieces, flagged = 0, []
    for ids in (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts):
        for size in (256, 1024):
            for start in range(0, len(ids) - size + 1, size):
                piece = ids[start : start + size]
                pieces += 1
                # A completion begins at a whole character; a piece may not.
                if reason := GarbleFilter()(piece, tokenizer.decode(piece).lstrip("\ufffd")):
                    flagged.append((reason, tokenizer.decode(piece)[-80:]))
    assert pieces > 1000
    assert len(flagged) <= pieces / 1000, flagged


@pytest.mark.real
def test_a_greedy_loop_of_a_real_model_is_found(real_checkpoint):
    """Greedy decoding of a small model ends in a loop on this prompt."""
    import torch
    from transformers import AutoTokenizer

    from transformers_minicpm4 import MiniCPM4ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(real_checkpoint)
    model = MiniCPM4ForCausalLM.from_pretrained(real_checkpoint, dtype=torch.float32).eval()
    given = torch.tensor([tokenizer("The cat sat on the mat. The cat")["input_ids"]])
    ids = model.generate(given, max_new_tokens=95, do_sample=False)[0, given.shape[1] :].tolist()
    assert GarbleFilter()(ids, tokenizer.decode(ids, skip_special_tokens=True)) == "repetition"
    assert GarbleFilter()(ids[:40], tokenizer.decode(ids[:40])) is None  # too early to say


CHINESE = """
小型语言模型能够在手机和笔记本电脑上直接运行，不必把用户的数据送到远方的服务器。为了让它们读懂很长的文章，研究者
把注意力限制在少数相关的片段上：每个词先与压缩后的键比较，再从得分最高的几个块里取回完整的内容。

例一：求方程 x² − 5x + 6 = 0 的根。解：因式分解得 (x − 2)(x − 3) = 0，故 x = 2 或 x = 3。代入检验：4 − 10 + 6 = 0，
9 − 15 + 6 = 0，两个根都正确。

一、早晨的市场里，卖菜的人高声叫着价钱，孩子们在摊位之间跑来跑去。二、中午下了一场小雨，石板路闪着光，茶馆里坐满了
避雨的客人。三、傍晚天晴了，河面上浮着几只木船，船夫慢慢地摇着桨，远处传来寺院的钟声。
"""
SONG = """
Oh, the lamp in the window is burning low, / And the wind from the harbour is crying, / {}
Sing ho, for the sailor who comes home late, / Sing ho, for the bread and the fire, / Sing ho!
"""
VERSES = (
    "The boats have been gone since the turn of the moon, / With the silver nets over them lying.",
    "My brother went first, with a song on his lips, / And my father, to steer for him, after.",
    "The priest rang the bell till the rope came apart, / And the gulls gave him nothing but laughter.",
    "At dawn there were three of them, then there were five, / And their lanterns like stars that were dying.",
    "So set out the cups and put wood on the coals, / And be done with your knitting and sighing.",
)


@pytest.mark.real
def test_forms_that_repeat_by_nature_are_clean(real_checkpoint):
    import json
    from http import HTTPStatus

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_checkpoint)
    rows = [(status.value, status.phrase, status.description) for status in HTTPStatus]
    table = "\n".join(f"| {value:<6} | {phrase:<40} | {text:<80} |" for value, phrase, text in rows)
    texts = {
        "Chinese": CHINESE,
        "refrains": "".join(SONG.format(verse) for verse in VERSES),
        "table": f"| {'-' * 6} | {'-' * 40} | {'-' * 80} |\n{table}",
        "JSON": json.dumps([dict(zip(("value", "phrase", "description"), row)) for row in rows], indent=2),
        "enumeration": "\n".join(f"{i}. {phrase}: {text}" for i, (_, phrase, text) in enumerate(rows)),
        "counting": ", ".join(map(str, range(1, 1000))),
        "squares": "\n".join(f"The square of {i} is {i} * {i} = {i * i}." for i in range(1, 200)),
        "large number": f"10^75 = 1{'0' * 75}, and 2^900 = {2**900}.",
        "rulers": "\n".join(f"{title}\n{'=' * 100}\n{'-' * 100}\n{text}" for _, title, text in rows),
    }
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) > 100, name
        assert GarbleFilter()(ids, text) is None, name


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"min_repeats": 1}, "min_repeats=1: a whole number of at least 2 is needed"),
        ({"max_period": 0}, "max_period=0: a whole number of at least 1"),
        ({"max_period": 2.5}, "max_period=2.5: a whole number"),
        ({"ngram": True}, "ngram=True: a whole number"),
        ({"min_repeated_tokens": None}, "min_repeated_tokens=None: a whole number of at least 2"),
        ({"min_invalid_characters": 0}, "min_invalid_characters=0: a whole number of at least 1"),
        ({"enough_repeated_tokens": 79}, r"enough_repeated_tokens=79: .* at least 80 \(min_repeated_tokens\)"),
        ({"loop_share": 0}, "loop_share=0: a share above 0 and at most 1"),
        ({"ngram_share": 1.01}, "ngram_share=1.01: a share"),
        ({"invalid_share": float("nan")}, "invalid_share=nan: a share"),
        ({"invalid_share": "5%"}, "invalid_share='5%': a share"),
    ],
)
def test_bad_thresholds(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        GarbleFilter(**settings)


def test_bad_completions():
    with pytest.raises(TypeError, match=r"shape \[1, 3\] and type int64: one row of integers is needed"):
        GarbleFilter()([[1, 2, 3]], "")
    with pytest.raises(TypeError, match="type float64: one row of integers"):
        GarbleFilter()([1.0, 2.0], "")
    with pytest.raises(TypeError, match="text is bytes: the decoded completion, a string"):
        GarbleFilter()([1], b"")
