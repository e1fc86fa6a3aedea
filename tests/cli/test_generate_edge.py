"""`minicpm4 generate --engine edge` says the same as without it, and what it planned, guessed and refused."""

import re

import pytest
import torch
from safetensors.torch import load_file

from transformers_minicpm4 import InfLLMv2Config, MiniCPM4ForCausalLM
from transformers_minicpm4.cli import generate_edge
from transformers_minicpm4.edge import device_profile
from transformers_minicpm4.generation.eagle import EagleDraft
from transformers_minicpm4.generation.eagle_training import new_head


PROMPT = "three rivers and two lakes; the user asks and the assistant answers. three rivers and"
SPARSE = {**InfLLMv2Config().to_dict(), "topk": 2, "window_size": 0, "dense_len": 16}


def same(run_cli, folder, *options):
    """The answers with and without the engine, and what the engine said."""
    command = ("generate", folder, "--raw", "--prompt", PROMPT, "--max-new-tokens", "24")
    plain = run_cli(*command)
    edge = run_cli(*command, "--engine", "edge", "--no-compile", *options)
    assert (plain.code, edge.code) == (0, 0), plain.err + edge.err
    assert edge.out == plain.out
    return edge


@pytest.mark.parametrize("sparse", [False, True])
def test_the_answer_is_that_of_generate(run_cli, make_checkpoint, sparse):
    folder = make_checkpoint(sparse_config=SPARSE) if sparse else make_checkpoint()
    for draft in ([], ["--draft", "lookup"], ["--draft", folder]):
        if sparse and draft[1:] == [folder]:
            continue  # a sparse checkpoint as its own draft is loaded densely and may guess otherwise
        result = same(run_cli, folder, *draft)
        planned, budget, tokens = re.search(
            r"\[plan for .*: ([\d.]+) GB of ([\d.]+) GB, fp32, (\d+) tokens\]", result.err
        ).groups()
        assert 0 < float(planned) < float(budget)
        assert ("tokens a pass" in result.sentence) == bool(draft)
    if not sparse:
        # The draft is the target: everything it guesses is right.
        assert float(re.search(r"([\d.]+) tokens a pass", result.sentence)[1]) > 4


def test_an_eagle_head_is_told_from_a_model(run_cli, checkpoint, tmp_path):
    model = MiniCPM4ForCausalLM.from_pretrained(checkpoint)
    EagleDraft(new_head(model), depth=2, topk=2).save_pretrained(tmp_path / "head")
    names = generate_edge.tensor_names(tmp_path / "head")
    assert "fc.weight" in names
    assert "tokens a pass" in same(run_cli, checkpoint, "--draft", tmp_path / "head").sentence


def test_a_head_in_a_bin_file_and_a_broken_one(run_cli, checkpoint, tmp_path):
    model = MiniCPM4ForCausalLM.from_pretrained(checkpoint)
    EagleDraft(new_head(model), depth=2, topk=2).save_pretrained(tmp_path / "head")
    weights = tmp_path / "head" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "head" / "pytorch_model.bin")
    weights.unlink()
    assert generate_edge.draft_kind(str(tmp_path / "head")) == "eagle"
    assert "tokens a pass" in same(run_cli, checkpoint, "--draft", tmp_path / "head").sentence
    weights.write_bytes(b"\x10" * 40)
    result = run_cli("generate", checkpoint, "--prompt", "three", "--engine", "edge", "--draft", tmp_path / "head")
    assert result.code == 2
    assert "truncated or corrupt" in result.sentence


def test_a_prompt_that_is_not_utf8(run_cli, checkpoint):
    result = run_cli("generate", checkpoint, "--prompt", "Name \udcff", "--engine", "edge")
    assert result.code == 2
    assert "is not text in UTF-8" in result.sentence


def test_stop_ends_the_answer_before_itself(run_cli, checkpoint):
    command = ("generate", checkpoint, "--raw", "--prompt", PROMPT, "--max-new-tokens", "24", "--engine", "edge")
    whole = run_cli(*command, "--no-compile").out.rstrip("\n")
    stop = whole[len(whole) // 2 :][:3]
    assert run_cli(*command, "--no-compile", "--stop", stop).out == whole[: whole.index(stop)] + "\n"


def test_seeds_repeat(run_cli, checkpoint):
    command = ("generate", checkpoint, "--raw", "--prompt", PROMPT, "--engine", "edge", "--no-compile")
    draws = [run_cli(*command, "--temperature", "1.5", "--seed", seed).out for seed in ("1", "1", "2")]
    assert draws[0] == draws[1] != draws[2]


def test_a_plan_that_does_not_fit_names_the_missing_bytes(run_cli, checkpoint, monkeypatch):
    small = device_profile.device_profile("orin-nano").replace(memory_available=10**8)
    monkeypatch.setattr(device_profile, "detect", lambda **unused: small)
    result = run_cli("generate", checkpoint, "--prompt", "three", "--engine", "edge")
    assert result.code == 2
    assert re.search(r"\([\d,]+ bytes\) are missing", result.sentence)


@pytest.mark.parametrize("options, words", [
    (["--draft", "lookup"], "belong to --engine edge"),
    (["--engine", "edge", "--draft", "nowhere"], "neither 'lookup' nor a folder with a model"),
    (["--engine", "edge", "--stop", ""], "stop"),
])  # fmt: skip
def test_unusable_options_are_one_sentence(run_cli, checkpoint, options, words):
    result = run_cli("generate", checkpoint, "--prompt", "three", *options)
    assert result.code == 2
    assert words in result.sentence


def test_a_draft_of_another_vocabulary(run_cli, checkpoint, tmp_path):
    from conftest import make_config

    MiniCPM4ForCausalLM(make_config(vocab_size=64)).save_pretrained(tmp_path / "other")
    result = run_cli("generate", checkpoint, "--prompt", "three", "--engine", "edge", "--no-compile", "--draft",
                     tmp_path / "other")  # fmt: skip
    assert result.code == 2
    assert "a vocabulary of 64 tokens" in result.sentence
