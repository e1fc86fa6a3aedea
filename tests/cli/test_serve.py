"""`minicpm4 serve` from the command line: it answers, it stops when told to, and says what is wrong in a sentence."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
import transformers.cli.transformers

from transformers_minicpm4.cli import serve


@pytest.mark.parametrize("arguments", [["--port", "1", "m", "--json"], []])
@pytest.mark.parametrize("stop, code", [(None, 0), (SystemExit(0), 0), (SystemExit(2), 2), (SystemExit("no"), 1)])
def test_chat_passes_arguments_and_exit_code_through(run_cli, monkeypatch, arguments, stop, code):
    calls = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def app(args, prog_name):
        calls.append(args)
        if stop is not None:
            raise stop

    monkeypatch.setattr(transformers.cli.transformers, "app", app)
    assert run_cli("chat", *arguments).code == code
    assert calls == [["chat", *arguments]]


def test_help_of_chat_is_that_of_transformers(run_cli):
    result = run_cli("chat", "--help")
    assert result.code == 0
    assert "minicpm4 chat" in result.out
    assert "--system-prompt" in result.out


def test_help_of_serve_shows_how_to_ask(run_cli):
    result = run_cli("serve", "--help")
    assert result.code == 0
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in result.out
    assert "--draft {lookup}" in result.out


def test_it_answers_and_stops_at_an_interrupt(checkpoint):
    arguments = [str(checkpoint), "--port", "0", "--context", "128", "--draft", "lookup", "--no-compile"]
    command = [sys.executable, "-m", "transformers_minicpm4.cli.main", "serve", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = iter(process.stderr.readline, "")
        ready = next(line for line in lines if "Ctrl-C stops" in line)
        address = re.search(r"http://127\.0\.0\.1:\d+/v1", ready)[0]
        assert "context 128 tokens" in ready
        messages = [{"role": "user", "content": "Hi"}]
        body = {"model": checkpoint.name, "messages": messages, "max_tokens": 3, "temperature": 0}
        asked = urllib.request.Request(
            f"{address}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 3
        # Interrupted in the midst of an answer.
        endless = {**body, "stream": True, "max_tokens": None}
        asked.data = json.dumps(endless).encode()
        with urllib.request.urlopen(asked, timeout=60) as answer:
            answer.readline()
            process.send_signal(signal.SIGINT)
            rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert "Error" not in rest


def test_it_stops_while_steps_are_compiled(checkpoint):
    command = [sys.executable, "-m", "transformers_minicpm4.cli.main", "serve", str(checkpoint)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--port", "0", "--context", "128"], stderr=subprocess.PIPE, text=True, env=environment
    )
    with process:
        try:
            told = next(line for line in process.stderr if "compiled" in line or "Ctrl-C stops" in line)
            if "compiled" not in told:
                pytest.skip("no compiler: there is nothing to interrupt")
            next(line for line in process.stderr if "Ctrl-C stops" in line)
            process.send_signal(signal.SIGINT)
            rest = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert (process.returncode, rest) == (130, "[stopped in the midst of a computation]\n")


def test_a_taken_port_is_told_before_a_model_is_loaded(run_cli):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_cli("serve", "no-such-folder/at/all", "--port", port)
    assert result.code == 2
    assert str(port) in result.sentence
    assert "--port" in result.sentence


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_an_address_of_another_machine_is_refused(run_cli, host):
    result = run_cli("serve", "any-model", "--host", host, "--port", 0)
    assert result.code == 2
    assert "--host" in result.sentence


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["./no-such-folder"], "no folder"),
        (["MODEL", "--context", "100000"], "512 positions"),
        (["MODEL", "--api-key", " "], "key"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(run_cli, checkpoint, arguments, word):
    arguments = [checkpoint if argument == "MODEL" else argument for argument in arguments]
    result = run_cli("serve", *arguments, "--port", 0, "--no-compile")
    assert result.code == 2, result.err
    assert word in result.sentence


@pytest.mark.parametrize("arguments", [["--port", "70000"], ["--queue", "-1"], ["--context", "0"], ["--draft", "x"]])
def test_numbers_out_of_range_are_refused(run_cli, arguments):
    result = run_cli("serve", "any-model", *arguments)
    assert result.code == 2
    assert arguments[1] in result.sentence


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_missing_packages_are_one_sentence(run_cli, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = run_cli("serve", "any-model")
    assert result.code == 2
    assert "pip install 'transformers_minicpm4[serve]'" in result.sentence


@pytest.mark.parametrize(
    "host, alone", [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box.lan", False)]
)
def test_a_server_for_others_without_a_key_is_noticed(host, alone):
    assert serve.is_this_machine_alone(host) == alone
