"""`minicpm4 chat` holds no model: it needs a server and says how to start one. (Hand-over: test_serve.py.)"""

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import httpx


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_without_a_server_it_names_our_command(run_cli, monkeypatch):
    def refuse(url, **kwargs):
        raise httpx.ConnectError("connection refused")

    monkeypatch.setattr(httpx, "get", refuse)
    result = run_cli("chat", "any-model")
    assert result.code == 2
    assert "minicpm4 serve MODEL" in result.sentence


def test_a_wrong_setting_is_one_sentence(run_cli, monkeypatch):
    class Answer:
        status_code = 500

    monkeypatch.setattr(httpx, "get", lambda url, **kwargs: Answer())
    result = run_cli("chat", "any-model")
    assert result.code == 2
    assert "500" in result.sentence


def test_offline_mode_is_refused_before_the_first_question(run_cli, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = run_cli("chat", "any-model")
    assert result.code == 2
    assert "HF_HUB_OFFLINE" in result.sentence
    assert run_cli("chat", "--help").code == 0
