"""`minicpm4 serve` and `minicpm4 chat` are Transformers' own commands, in a process that knows MiniCPM4."""

import pytest
import torch
import transformers
import transformers.cli.transformers
from transformers.cli.serving.model_manager import ModelManager

from transformers_minicpm4 import MiniCPM4ForCausalLM
from transformers_minicpm4.cli import serve


@pytest.fixture
def clean_transformers():
    """Undo what `make_architectures_known` writes, whether or not Transformers has such a class itself."""
    before = transformers.__dict__.get("MiniCPM4ForCausalLM")
    yield
    transformers.__dict__.pop("MiniCPM4ForCausalLM", None)
    if before is not None:
        transformers.__dict__["MiniCPM4ForCausalLM"] = before


@pytest.mark.usefixtures("clean_transformers")
@pytest.mark.parametrize("arguments", [["--port", "1", "m", "--json"], []])
@pytest.mark.parametrize("command", ["serve", "chat"])
@pytest.mark.parametrize("stop, code", [(None, 0), (SystemExit(0), 0), (SystemExit(2), 2), (SystemExit("no"), 1)])
def test_arguments_and_exit_code_pass_through(run_cli, monkeypatch, command, arguments, stop, code):
    calls = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def app(args, prog_name):
        calls.append(args)
        if stop is not None:
            raise stop

    monkeypatch.setattr(transformers.cli.transformers, "app", app)
    assert run_cli(command, *arguments).code == code
    assert calls == [[command, *arguments]]


@pytest.mark.usefixtures("clean_transformers")
@pytest.mark.parametrize("command, option", [("serve", "--port"), ("chat", "--system-prompt")])
def test_help_is_that_of_transformers(run_cli, command, option):
    result = run_cli(command, "--help")
    assert result.code == 0
    assert f"minicpm4 {command}" in result.out
    assert option in result.out


@pytest.mark.usefixtures("clean_transformers")
@pytest.mark.parametrize("form", ["ours", "minicpm", "unnamed"])
def test_the_server_can_load_every_form_of_checkpoint(make_checkpoint, as_released, form):
    folder = as_released(make_checkpoint(), form)
    serve.make_architectures_known()
    # The step of the server that needs no web framework; private, so this test also watches that it stays.
    manager = ModelManager.__new__(ModelManager)
    manager.attn_implementation = "infllm_v2"
    manager.dtype, manager.device, manager.trust_remote_code, manager.quantization = "auto", "cpu", False, None
    model = manager._load_model(f"{folder}@main")
    assert isinstance(model, MiniCPM4ForCausalLM)
    assert model.config._attn_implementation == "infllm_v2"
    expected = MiniCPM4ForCausalLM.from_pretrained(folder)
    for (name, got), (_, wanted) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(got, wanted), name


@pytest.mark.usefixtures("clean_transformers")
def test_missing_serving_packages_are_one_sentence(run_cli, monkeypatch):
    monkeypatch.setattr("transformers.cli.serve.is_serve_available", lambda: False)
    result = run_cli("serve", "any-model")
    assert result.code == 2
    assert "pip install 'transformers[serving]'" in result.sentence
