"""The command line itself: help, dispatch, exit codes, one sentence for each error."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import transformers_minicpm4
from transformers_minicpm4.cli import env
from transformers_minicpm4.cli import main as command_line
from transformers_minicpm4.cli.errors import UserError


PARSED = [name for name in command_line.COMMANDS if name not in command_line.HANDED_OVER]


@pytest.mark.parametrize("command", PARSED)
def test_help_teaches_by_example(run_cli, command):
    result = run_cli(command, "--help")
    assert result.code == 0
    assert f"\n  minicpm4 {command}" in result.out.split("examples:")[1]


def test_general_help_names_every_command(run_cli):
    result = run_cli("--help")
    assert result.code == 0
    listed = result.out.split("commands:")[1]
    assert set(command_line.COMMANDS) <= set(re.findall(r"^    ([\w-]+)\b", listed, re.M))


def test_help_imports_no_heavy_library():
    # A bare parent package stands in for ours, whose import registers and so needs Transformers.
    program = f"""
import sys, types
package = types.ModuleType("transformers_minicpm4")
package.__path__ = [{str(Path(transformers_minicpm4.__file__).parent)!r}]
sys.modules["transformers_minicpm4"] = package
from transformers_minicpm4.cli.main import build_parser
build_parser().format_help()
heavy = {{"torch", "transformers", "huggingface_hub", "safetensors", "numpy"}} & set(sys.modules)
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_a_command_it_shows_help_and_fails(run_cli):
    result = run_cli()
    assert result.code == 2
    assert "examples:" in result.err


def test_an_unknown_command_is_refused_with_the_known_ones(run_cli):
    result = run_cli("trian")
    assert result.code == 2
    assert "trian" in result.sentence
    assert "generate" in result.sentence


def test_version_is_that_of_the_package(run_cli):
    result = run_cli("--version")
    assert result.code == 0
    assert result.out.strip() == transformers_minicpm4.__version__
    assert env.package_version("transformers_minicpm4") in (None, transformers_minicpm4.__version__)


def raising(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize(
    "error, code, sentence",
    [
        (UserError("This was given; that is allowed."), 2, "minicpm4 env: This was given; that is allowed."),
        (
            RuntimeError("a\n  b"),
            1,
            "minicpm4 env: unexpected RuntimeError: a b (--debug shows where)",
        ),
        (KeyError(), 1, "minicpm4 env: unexpected KeyError: KeyError (--debug shows where)"),
    ],
    ids=["input", "fault", "fault without a message"],
)
def test_an_error_is_one_sentence_and_an_exit_code(run_cli, monkeypatch, error, code, sentence):
    monkeypatch.setattr(env, "run", raising(error))
    result = run_cli("env")
    assert (result.code, result.out, result.err) == (code, "", sentence + "\n")


@pytest.mark.parametrize("arguments", [("--debug", "env"), ("env", "--debug"), ("env", "--debug", "--json")])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(run_cli, monkeypatch, arguments):
    monkeypatch.setattr(env, "run", raising(UserError("Not so.")))
    result = run_cli(*arguments)
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.endswith("minicpm4 env: Not so.\n")


def test_interruption_is_quiet(run_cli, monkeypatch):
    monkeypatch.setattr(env, "run", raising(KeyboardInterrupt()))
    result = run_cli("env")
    assert (result.code, result.err.strip()) == (130, "")


def test_a_reader_that_goes_away_is_no_error():
    # `minicpm4 env | true`: the pipe is closed before anything is written.
    program = (
        "import sys; from transformers_minicpm4.cli import env, main;"
        "env.run = lambda args: print('x' * 100_000, flush=True);"
        "input(); sys.exit(main.main(['env']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0, errors
    assert b"BrokenPipe" not in errors


@pytest.mark.parametrize("command", command_line.HANDED_OVER)
@pytest.mark.parametrize("arguments", [[], ["--help"], ["m", "--port", "1", "--", "-x"], ["--debug", "info", "m"]])
def test_arguments_of_a_handed_over_command_are_left_alone(command, arguments):
    assert command_line.parse([command, *arguments]).arguments == arguments
    parsed = command_line.parse(["--debug", command, *arguments])
    assert (parsed.arguments, parsed.debug) == (arguments, True)
