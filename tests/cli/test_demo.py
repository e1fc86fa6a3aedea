"""`minicpm4 demo` on the real weights with a shorter text, its parts, and what it refuses before any work."""

import re

import pytest
import torch

from transformers_minicpm4 import InfLLMv2Config
from transformers_minicpm4.cli import blocks_plot, demo, document
from transformers_minicpm4.cli.blocks_plot import Blocks, classify


# 1,500 tokens hold the three answers; these settings read 10 of their 24 blocks.
SHORT = ("--context-tokens", "1500", "--dense-len", "512", "--topk", "8", "--window-size", "128")
STORY = "three rivers and two lakes; the user asks and the assistant answers. " * 20
# The tiny checkpoint has 512 positions and blocks of 64 tokens: read 2 beside the own one, from token 129 on.
TINY = ("--dense-len", "64", "--topk", "2", "--window-size", "0", "--max-new-tokens", "4")


def cells(output, name):
    """The numbers of dense and of sparse in a row of the table."""
    line = next(line for line in output.splitlines() if line.strip().startswith(name))
    return [float(cell.replace(",", "")) for cell in line.split()[-2:]]


def tokens_read(position, settings):
    """What the query at `position` reads, counted from the words of the rule."""
    if position + 1 < settings.dense_len:
        return position + 1
    blocks = min(settings.topk + settings.window_size // settings.block_size, position // settings.block_size + 1)
    return (blocks - 1) * settings.block_size + position % settings.block_size + 1


def check_table(output, settings):
    num_tokens = int(re.search(r"context: ([\d,]+) tokens", output).group(1).replace(",", ""))
    dense, sparse = cells(output, "and read, mean")
    assert (dense, dense) == tuple(cells(output, "tokens a query of the text could see, mean"))
    counts = [tokens_read(position, settings) for position in range(num_tokens)]
    assert dense == round((num_tokens + 1) / 2)
    assert sparse == pytest.approx(sum(counts) / num_tokens, abs=0.5)
    seen = cells(output, "tokens the last query could see")
    read = [line for line in output.splitlines() if line.strip().startswith("and read  ")][0].split()[-2:]
    assert [float(cell.replace(",", "")) for cell in read] == [seen[0], tokens_read(int(seen[0]) - 1, settings)]
    assert sparse < dense
    assert all(rate > 0 for name in ("reading the text", "writing the answer") for rate in cells(output, name))


@pytest.mark.real
def test_the_bundled_questions_are_answered_from_the_text(run_cli, real_checkpoint, tmp_path):
    picture = tmp_path / "blocks.png"
    result = run_cli("demo", *SHORT, "--plot", picture)
    assert result.code == 0, result.out + result.err
    assert re.findall(r"^   (dense|sparse) ", result.out, re.MULTILINE) == ["dense", "sparse"] * 3
    verdicts = re.findall(r"\[(right|wrong)\]$", result.out, re.MULTILINE)
    assert len(verdicts) == 6
    assert verdicts[::2].count("right") >= 2
    for dense, sparse in zip(verdicts[::2], verdicts[1::2]):
        assert sparse == "right" or dense == "wrong"
    assert result.out.count("to be selected") >= 2
    check_table(result.out, InfLLMv2Config(dense_len=512, topk=8, window_size=128))
    engine = result.out[result.out.index("the edge engine") :]
    assert engine.count("same tokens") == 2
    plain, alone, drafting = (
        float(a_pass) for a_pass in re.findall(r" ([\d.]+)(?:  same tokens)?$", engine, re.MULTILINE)[:3]
    )
    assert plain == alone == 1 < drafting
    assert max(len(line) for line in result.out.splitlines() if not line.startswith("picture:")) <= 100

    from matplotlib import image

    pixels = image.imread(picture)[..., :3]
    assert min(pixels.shape[:2]) > 500
    for colour in (blocks_plot.SKIPPED, blocks_plot.WINDOW, blocks_plot.INITIAL, blocks_plot.SELECTED):
        wanted = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        share = ((torch.tensor(pixels) - wanted).abs().amax(-1) < 0.01).float().mean()
        assert share > 0.002, colour


@pytest.fixture
def story(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text(STORY)
    return file


def test_another_model_answers_other_questions(run_cli, checkpoint, story, tmp_path):
    """An answer to a cache that was filled in chunks, used and cropped is the answer to the whole prompt."""
    asked = ("--question", "how many lakes?", "--question", "who answers?")
    options = ("--model", checkpoint, "--file", story, *TINY, *asked, "--plot", tmp_path / "blocks.svg")
    result = run_cli("demo", *options)
    assert result.code == 0, result.err
    assert "1. how many lakes?" in result.out
    assert "2. who answers?" in result.out
    assert len(re.findall(r"\[(same|other) words\]", result.out)) == 2
    assert "known answer" not in result.out
    check_table(result.out, InfLLMv2Config(dense_len=64, topk=2, window_size=0))
    assert (tmp_path / "blocks.svg").read_text().count("<path") > 10


def test_cached_answers_equal_fresh_ones(tiny_model, tokenizer, sparse_config):
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config.pad_token_id = 0
    text, questions = tokenizer(STORY)["input_ids"][:150], ([5, 6, 7], [9, 8])
    for settings in (None, sparse_config):
        reading = demo.Reading("", model, tokenizer, settings)
        reading.read(text)
        for question in questions:
            streamed = reading.answer(text, question, 12, one_sentence=False)
            ids = torch.tensor([text + question])
            fresh = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)
            assert streamed == tokenizer.decode(fresh[0, ids.shape[1] :], skip_special_tokens=True)
            assert reading.cache.get_seq_length() == len(text)


def test_a_models_own_sparse_config_decides(run_cli, make_checkpoint, story):
    own = InfLLMv2Config(dense_len=128, topk=2, window_size=64).to_dict()
    options = ("--model", make_checkpoint(sparse_config=own), "--file", story, "--max-new-tokens", "2")
    assert "at most 3 blocks of 64 tokens, from token 193 on" in run_cli("demo", *options).out
    assert "at most 4 blocks of 64 tokens, from token 257 on" in run_cli("demo", *options, "--topk", "3").out
    assert "sparse attention reads everything" in run_cli("demo", *options, "--topk", "8").out


def test_recorded_blocks_are_those_of_the_rule(tiny_model, sparse_config):
    """Two calls and a crop between them; `read_tokens` counts them as the words of the rule do."""
    model = tiny_model("infllm_v2", sparse_config=sparse_config.to_dict())
    recorder = blocks_plot.Recorder(model)
    ids = torch.randint(1, 120, (1, 150))
    with torch.no_grad():
        cache = model(ids[:, :80], use_cache=True).past_key_values
        model(ids[:, 80:], past_key_values=cache)
    blocks = recorder.take(cache, sparse_config)
    recorder.close()
    assert blocks.read.shape == (2, 150, 19)
    assert blocks.visible_tokens().tolist() == list(range(1, 151))
    counts = [tokens_read(position, sparse_config) for position in range(150)]
    assert blocks.read_tokens(8).tolist() == counts
    kinds = classify(blocks, sparse_config, 0)
    assert torch.equal(kinds >= 2, blocks.read[0])
    assert kinds[149].tolist()[-3:] == [2, 2, 2]
    assert kinds[149, 0] == 3
    assert (kinds[149] == 4).sum() == 1


def test_read_tokens_counts_a_part_of_the_own_block():
    read = torch.tensor([[[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 1]]], dtype=torch.bool)
    assert Blocks(read, first=1).read_tokens(2).tolist() == [2, 3, 2, 3]


def test_every_bundled_answer_is_in_the_reference():
    from pydoc_data.topics import topics

    known = [question for question in document.QUESTIONS if document.find(question.evidence, topics[question.topic])]
    assert len(known) >= document.ASKED
    for question in known:
        start, stop = document.find_answer(question, topics[question.topic])
        assert question.is_right(topics[question.topic][start:stop])
        assert not question.is_right(f"{question.text} {question.lead}")


def test_a_spare_question_replaces_one_without_evidence(tokenizer, monkeypatch):
    from pydoc_data.topics import topics

    gone = document.QUESTIONS[0]
    monkeypatch.setitem(topics, gone.topic, "Nothing is said here.")
    args = demo_arguments(context_tokens=20_000)
    asked = document.collect(args, tokenizer, 50_000).questions
    assert len(asked) == document.ASKED
    assert gone not in asked


def test_a_shorter_budget_keeps_the_topics_with_answers(tokenizer):
    args = demo_arguments(context_tokens=7_000)
    taken = document.collect(args, tokenizer, 50_000)
    assert document.count_tokens(tokenizer, taken.text) <= 7_000
    assert [question.topic for question in taken.questions] == [q.topic for q in document.QUESTIONS[: document.ASKED]]


def demo_arguments(**changes):
    import argparse

    parser = argparse.ArgumentParser()
    demo.register(parser.add_subparsers())
    return argparse.Namespace(**{**vars(parser.parse_args(["demo"])), **changes})


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--file", "no-such-file.txt"), "'no-such-file.txt' cannot be read: No such file"),
        (("--question", "  "), "A --question is empty"),
        (("--plot", "blocks.txt"), "does not name a picture"),
        (("--plot", "no-such-folder/blocks.png"), "an existing folder"),
        (("--topk", "1"), "topk (1) must be at least init_blocks + 1"),
        (("--context-tokens", "10"), "the shortest topic of the Python reference that answers a question has"),
        (("--max-new-tokens", "0"), "at least 1 is needed"),
    ],
)
def test_unusable_input_is_one_sentence(run_cli, checkpoint, arguments, words):
    result = run_cli("demo", "--model", checkpoint, *arguments)
    assert result.code == 2
    assert words in result.sentence
    assert result.out == ""


@pytest.mark.parametrize(
    "content, words",
    [
        (b" \n", "is empty"),
        (b"\xff\xfe\x00", "is not text in UTF-8"),
        (b"rivers " * 900, "tokens and the model has 512 positions, of which question and answer need"),
    ],
)
def test_unusable_file_is_one_sentence(run_cli, checkpoint, tmp_path, content, words):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    result = run_cli("demo", "--model", checkpoint, "--file", file)
    assert result.code == 2
    assert words in result.sentence


def test_context_tokens_shortens_a_long_file(run_cli, checkpoint, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"rivers " * 900)
    result = run_cli("demo", "--model", checkpoint, "--file", file, "--context-tokens", "300", *TINY)
    assert result.code == 0, result.err
    assert "1. What is the text about?" in result.out


def test_missing_weights_name_the_command(run_cli, monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFORMERS_MINICPM4_CACHE", str(tmp_path))
    result = run_cli("demo")
    assert result.code == 2
    assert "make assets" in result.sentence


def test_missing_matplotlib_names_the_extra_before_any_work(run_cli, monkeypatch):
    monkeypatch.setattr(blocks_plot.importlib.util, "find_spec", lambda name: None)
    result = run_cli("demo", "--plot", "blocks.png")
    assert result.code == 2
    assert "transformers_minicpm4[notebooks]" in result.sentence
    assert len(result.err.splitlines()) == 1


def test_stopping_it_is_one_short_line(run_cli, checkpoint, story, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Reading, "answer", stop)
    result = run_cli("demo", "--model", checkpoint, "--file", story, *TINY)
    assert result.code == 130
    assert result.sentence == "minicpm4 demo: stopped"


def test_sparse_wrong_where_dense_is_right_is_a_finding():
    class Asked:
        questions = (document.Question("q", answer="Yes"), document.Question("r", answer="No"))

    text, agreed = demo.conclusion(Asked, [("yes.", "maybe"), ("perhaps", "no")])
    assert not agreed
    assert "dense attention finds 1 and sparse 1" in text
    assert "the model's own error" in text
    assert demo.conclusion(Asked, [("yes.", "Yes"), ("perhaps", "no")])[1]
