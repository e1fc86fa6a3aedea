"""What `minicpm4 env` reports is what is there."""

import json
import platform
from importlib import metadata

import pytest
import torch

from transformers_minicpm4.cli import env


def test_versions_are_those_of_the_installed_distributions(run_cli):
    versions = json.loads(run_cli("env", "--json").out)["versions"]
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == metadata.version("torch")
    assert versions["huggingface_hub"] == metadata.version("huggingface_hub")


def test_an_absent_package_is_said_to_be_absent(run_cli, monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no_such_distribution"))
    versions = json.loads(run_cli("env", "--json").out)["versions"]
    assert versions["no_such_distribution"] == "not installed"


@pytest.mark.parametrize("value", ["3", None])
@pytest.mark.parametrize("name", env.VARIABLES)
def test_environment_variables_are_those_of_the_process(monkeypatch, name, value):
    if value is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, value)
    assert env.describe_environment()["environment variables"][name] == (value or "not set")


def test_threads_are_those_pytorch_uses(run_cli):
    assert f"PyTorch uses {torch.get_num_threads()} threads" in run_cli("env").out


def test_a_usable_implementation_runs_and_another_is_refused():
    from transformers_minicpm4.infllm_v2 import InfLLMv2Config, infllm_v2_attention

    tensor = torch.randn(1, 1, 8, 4)
    for name, state in env.describe_implementations().items():
        if state == "usable":
            infllm_v2_attention(tensor, tensor, tensor, InfLLMv2Config(), implementation=name)
        else:
            with pytest.raises(ValueError, match=name):
                infllm_v2_attention(tensor, tensor, tensor, InfLLMv2Config(), implementation=name)


def test_text_holds_every_value_of_the_json(run_cli):
    text = run_cli("env").out
    for section in json.loads(run_cli("env", "--json").out).values():
        for name, value in section.items():
            assert any(line.split(maxsplit=1) == [name, value] for line in text.splitlines()), name
