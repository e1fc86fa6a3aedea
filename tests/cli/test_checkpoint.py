"""Checkpoints that cannot be used meet one sentence, from `info` and `generate` alike, before any weight is loaded."""

import json
import os
import shutil

import pytest
from huggingface_hub import constants, errors
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(params=["info", "generate"])
def refuse(request, run_cli, monkeypatch):
    """Run a command on a folder that it must refuse; returns its sentence."""

    def load(*args, **kwargs):
        pytest.fail("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)

    def run(model):
        extra = ["--prompt", "three rivers"] if request.param == "generate" else ["--check"]
        result = run_cli(request.param, model, *extra)
        assert (result.code, result.out) == (2, "")
        assert result.sentence.startswith(f"minicpm4 {request.param}: ")
        return result.sentence

    return run


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "broken")


@pytest.mark.parametrize("path", ["./none", "/none/at/all", "~/none-at-all", "a/b/c"])
def test_a_missing_folder(refuse, path):
    sentence = refuse(path)
    assert repr(path) in sentence
    assert "There is no folder" in sentence


def test_a_file_instead_of_a_folder(refuse, checkpoint):
    assert "is a file" in refuse(checkpoint / "config.json")


def test_a_folder_without_configuration(refuse, tmp_path):
    assert "no config.json" in refuse(tmp_path)


@pytest.mark.parametrize("text", ["{", "", "[1]", '"config"'])
def test_a_configuration_that_is_no_json_object(refuse, broken, text):
    (broken / "config.json").write_text(text)
    assert "config.json" in refuse(broken)


def test_a_configuration_with_a_field_of_the_wrong_type(refuse, broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": "two"}))
    assert "num_hidden_layers" in refuse(broken)


def test_a_sparse_config_that_is_not_allowed(refuse, broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "sparse_config": {"topk": 8}}))
    assert "sparse_config lacks" in refuse(broken)


def test_an_architecture_that_nobody_knows(refuse, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "abacus", "architectures": ["AbacusForCounting"]}')
    sentence = refuse(tmp_path)
    assert "AbacusForCounting" in sentence
    assert "'abacus'" in sentence


def test_generate_refuses_another_known_architecture_and_info_describes_it(run_cli, tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    result = run_cli("generate", tmp_path, "--prompt", "three")
    assert result.code == 2
    assert "'llama'" in result.sentence
    described = run_cli("info", tmp_path, "--json")
    assert described.code == 0
    assert json.loads(described.out)["attention"] == {"mode": "dense", "can_be_sparse": False, "sparse_config": None}


def weights(folder):
    return folder / "model.safetensors"


# Nothing, half of the header's length, a part of the header, half of the data, all but one byte.
@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_weights(refuse, broken, keep):
    size = weights(broken).stat().st_size
    os.truncate(weights(broken), size // 2 if keep == 0.5 else keep % size)
    assert "truncated" in refuse(broken)


def test_weights_with_bytes_behind_the_last_tensor(refuse, broken):
    with weights(broken).open("ab") as file:
        file.write(b"\0" * 8)
    assert "corrupt" in refuse(broken)


@pytest.mark.parametrize("position", [0, 8, 9, 40])
def test_a_damaged_header(refuse, broken, position):
    content = bytearray(weights(broken).read_bytes())
    content[position : position + 3] = b"\xff\xff\xff"
    weights(broken).write_bytes(content)
    assert "corrupt" in refuse(broken)


def test_a_tensor_whose_bytes_do_not_fit_its_shape(refuse, broken):
    content = weights(broken).read_bytes()
    # The same length, so that only the shape is wrong.
    assert b'"shape":[64]' in content
    weights(broken).write_bytes(content.replace(b'"shape":[64]', b'"shape":[63]', 1))
    assert "do not fit the shape" in refuse(broken)


def test_no_weights_at_all(refuse, broken):
    weights(broken).unlink()
    assert "model.safetensors" in refuse(broken)


def test_a_missing_shard_is_named(refuse, make_checkpoint):
    folder = make_checkpoint(save_options={"max_shard_size": "60KB"})
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    assert shards[1].name in refuse(folder)


def test_an_index_that_is_none(refuse, make_checkpoint):
    folder = make_checkpoint(save_options={"max_shard_size": "60KB"})
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "not an index" in refuse(folder)


@pytest.mark.parametrize(
    "error, words",
    [
        (errors.LocalEntryNotFoundError("no"), "cannot be reached"),
        (errors.OfflineModeIsEnabled("no"), "cannot be reached"),
        (errors.EntryNotFoundError("no"), "no config.json"),
        (OSError("the disk is full"), "the disk is full"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_hub_that_does_not_give_the_checkpoint(refuse, monkeypatch, error, words):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    sentence = refuse("somebody/something")
    assert words in sentence
    assert "somebody/something" in sentence


def test_offline_mode_is_named_as_the_reason(refuse, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    sentence = refuse("somebody/something-that-is-not-cached")
    assert "HF_HUB_OFFLINE is set" in sentence
    assert "hf download somebody/something-that-is-not-cached" in sentence


def test_a_name_that_is_no_hub_id(refuse):
    assert "nor a valid Hub id" in refuse("what is this")
