"""`minicpm4 plan` prints the plan of the library, needs no weights, and answers bad input with one sentence."""

import json
import re

import pytest

from transformers_minicpm4 import InfLLMv2Config, MiniCPM4Config
from transformers_minicpm4.cli import describe
from transformers_minicpm4.edge.device_profile import PROFILES, device_profile
from transformers_minicpm4.edge.memory_plan import DRAFTS, PRECISIONS, DraftSpec, plan_memory


def make(**changes):
    fields = {
        "vocab_size": 73448,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "sparse_config": InfLLMv2Config(),
    }
    return MiniCPM4Config(**{**fields, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration and nothing else: MiniCPM4-0.5B's sizes."""
    path = tmp_path_factory.mktemp("config")
    make().save_pretrained(path)
    return path


def plan(run_cli, *arguments):
    result = run_cli("plan", *arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_the_json_is_the_librarys_plan(run_cli, folder):
    found = plan(run_cli, folder, "--device", "orin-nano", "--context", 20000, "--precision", "int4", "--batch", 2)
    expected = plan_memory(make(), device_profile("orin-nano"), context=20000, precision="int4", batch=2)
    assert found == json.loads(json.dumps({"model": str(folder), **expected.to_dict()}))


def test_draft_options_reach_the_plan(run_cli, folder):
    options = ("--draft", "eagle", "--draft-window", 512, "--draft-vocabulary", 8192, "--tree-size", 24)
    found = plan(run_cli, folder, "--device", "thor", *options, "--chunk", 256)
    spec = DraftSpec(window=512, vocabulary=8192, tree_size=24)
    expected = plan_memory(make(), device_profile("thor"), draft=spec, chunk=256)
    assert found["table"] == expected.table
    everything = plan(run_cli, folder, "--device", "thor", "--draft", "eagle", "--draft-vocabulary", 0)
    assert everything["draft"]["vocabulary"] is None


@pytest.mark.parametrize("options", [(), ("--draft", "eagle3"), ("--dense",), ("--batch", "3")])
def test_the_text_says_what_the_json_says(run_cli, folder, options):
    arguments = (folder, "--device", "orin-nx", "--precision", "int4", *options)
    found, text = plan(run_cli, *arguments), run_cli("plan", *arguments).out
    for section in found["table"].values():
        for name, count in section.items():
            row = re.search(rf"{name.replace('_', ' ')} +[\d.]+ [GM]B +{count:,}$", text, re.M)
            assert bool(row) == bool(count), name
    assert re.search(rf"^total .* {found['total_bytes']:,}$", text, re.M)
    assert f"{found['budget_bytes']:,}  (" in text
    assert f"{found['context']:,} tokens" in text
    assert f"{found['roofline']['full']:.1f} at {found['context']:,} tokens" in text
    assert "int4 in groups of 128, the rest in bf16" in text
    assert ("InfLLM v2" in text) == found["sparse"] == ("--dense" not in options)
    assert ("draft: a round" in text) == ("--draft" in options)
    assert all(f"note: {note}" in text for note in found["notes"])


def test_auto_is_this_machine(run_cli, folder, monkeypatch):
    from transformers_minicpm4.edge import device_profile as module

    box = device_profile("cpu-ddr5").replace(name="this very box")
    monkeypatch.setattr(module, "detect", lambda: box)
    assert plan(run_cli, folder)["device"]["name"] == "this very box"

    def fail():
        raise ValueError("no MemTotal here")

    monkeypatch.setattr(module, "detect", fail)
    assert run_cli("plan", folder).sentence == "minicpm4 plan: no MemTotal here"


def test_available_and_bandwidth_replace_the_profiles(run_cli, folder):
    usual = plan(run_cli, folder, "--device", "orin-nano", "--context", 4096)
    found = plan(run_cli, folder, "--device", "orin-nano", "--context", 4096, "--available", 5.5, "--bandwidth", 51)
    assert found["device"]["memory_available"] == 5_500_000_000
    assert found["roofline"]["full"] == pytest.approx(usual["roofline"]["full"] / 2)
    assert any("assumption" in note for note in usual["notes"])
    assert not any("assumption" in note for note in found["notes"])


def test_a_file_is_as_good_as_its_folder(run_cli, folder, tmp_path):
    renamed = tmp_path / "my-model.json"
    renamed.write_text((folder / "config.json").read_text())
    tables = [plan(run_cli, path, "--device", "thor")["table"] for path in (folder, folder / "config.json", renamed)]
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.parametrize("form", ["minicpm", "unnamed"])
def test_a_released_configuration(run_cli, tmp_path, as_released, form):
    make(scale_emb=12, dim_model_base=256, scale_depth=1.4).save_pretrained(tmp_path)
    before = plan(run_cli, tmp_path, "--device", "thor")
    assert plan(run_cli, as_released(tmp_path, form), "--device", "thor") == before


def test_the_context_is_the_one_that_info_states(run_cli, folder, monkeypatch):
    from transformers_minicpm4.cli import plan as command

    assert plan(run_cli, folder, "--device", "thor")["context_limit"] == describe.context_length(make())
    monkeypatch.setattr(command, "context_length", lambda config: 131072)
    assert plan(run_cli, folder, "--device", "thor")["context"] == 131072


def test_other_families(run_cli, tmp_path):
    from transformers import Qwen3Config

    Qwen3Config(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, head_dim=32).save_pretrained(tmp_path)
    assert plan(run_cli, tmp_path, "--device", "thor")["sparse"] is False


def test_help_names_every_choice(run_cli):
    text = run_cli("plan", "--help").out
    listed = re.search(r"^devices: auto \(this machine\), (.*?)\n\n", text, re.M | re.S)[1]
    assert listed.replace("\n", " ").split(", ") == list(PROFILES)
    assert all(name in text for name in (*PRECISIONS, *DRAFTS))


def test_what_does_not_fit_says_what_is_missing_and_what_would(run_cli, folder):
    result = run_cli(
        "plan", folder, "--device", "orin-nano", "--available", 1.6, "--context", 32768, "--precision", "bf16"
    )
    assert result.code == 2
    assert re.search(r"bf16 with a context of 32,768 tokens needs .* bytes\) are missing", result.sentence)
    would = re.search(r"([\d,]+) tokens with int4", result.sentence)
    fits = plan(
        run_cli, folder, "--device", "orin-nano", "--available", 1.6, "--precision", "int4",
        "--context", would[1].replace(",", ""),
    )  # fmt: skip
    assert fits["precision"] == "int4"


@pytest.mark.parametrize(
    "options, words",
    [
        (("--device", "tx2"), "'tx2' is not known; known are auto, orin-nano"),
        (("--device", "orin-nano", "--available", "0"), "--available 0 was given; give a number of GB above 0"),
        (("--device", "orin-nano", "--available", "80"), "80 GB is more than the 8.00 GB that orin-nano has"),
        (("--device", "orin-nano", "--bandwidth", "nan"), "--bandwidth nan"),
        (("--device", "orin-nano", "--group-size", "64"), "without a precision"),
        (("--device", "orin-nano", "--draft", "eagle", "--tree-size", "65"), "2 to 64 nodes"),
        (("--device", "orin-nano", "--draft", "eagle", "--draft-vocabulary", "-1"), "vocabulary must be 1 or more"),
    ],
)
def test_bad_options_are_one_sentence(run_cli, folder, options, words):
    result = run_cli("plan", folder, *options)
    assert result.code == 2
    assert words in result.sentence


@pytest.mark.parametrize("options", [("--context", "0"), ("--precision", "int3"), ("--draft", "medusa")])
def test_values_the_parser_refuses(run_cli, folder, options):
    result = run_cli("plan", folder, *options)
    assert result.code == 2
    assert options[1] in result.sentence


def test_no_configuration(run_cli, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    result = run_cli("plan", broken)
    assert result.code == 2
    assert f"{broken} is no JSON text" in result.sentence
    assert "holds no config.json" in run_cli("plan", tmp_path).sentence
    broken.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as a configuration" in run_cli("plan", broken).sentence


def test_a_mixture_of_experts_is_refused(run_cli, tmp_path):
    from transformers import MixtralConfig

    MixtralConfig().save_pretrained(tmp_path)
    result = run_cli("plan", tmp_path, "--device", "thor")
    assert result.code == 2
    assert "mixture of 8 experts" in result.sentence
