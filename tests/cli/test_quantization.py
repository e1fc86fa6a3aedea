"""`optimum-cli minicpm4 quantize|ternarize|export`, as optimum runs it."""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum.commands.register.register_minicpm4 import (
    export_arguments,
    quantize_arguments,
    ternarize_arguments,
)
from small_models import SIZES, logits, make
from transformers_minicpm4 import BitCPM4Config
from transformers_minicpm4.quantization.export.gptq import load_gptq


ROOT = Path(__file__).parents[2]
OPTIMUM = Path(sys.executable).with_name("optimum-cli")


HEARS_CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def cli(*arguments, code=0, cwd=None):
    result = subprocess.run(
        [OPTIMUM, "minicpm4", *map(str, arguments)], capture_output=True, text=True, timeout=240, check=False, cwd=cwd
    )
    assert result.returncode == code, result.stderr[-2000:]
    return result


@pytest.fixture
def source(real_checkpoint, tmp_path):
    """A tiny Llama with a real tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(real_checkpoint)
    tokenizer.save_pretrained(tmp_path / "source")
    make(vocab_size=len(tokenizer), tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_quantize_then_export(source, tmp_path):
    rows = [json.dumps({"body": f"Line {number} of a text about rivers and bridges."}) for number in range(400)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    small = ["--num-samples", 8, "--max-length", 32, "--group-size", 32]
    data = ["--dataset", tmp_path / "text.jsonl"]
    wrong = cli("quantize", source, "-o", tmp_path / "int4", *data, *small, code=2)
    assert "no column 'text'; its columns are ['body']" in wrong.stderr
    assert wrong.stderr.count("\n") <= 2 + wrong.stderr.count("\r")
    data += ["--text-column", "body"]
    done = cli("quantize", source, "-o", tmp_path / "int4", *data, *small, "--prefix-ids", 1)
    assert "4 bits by P-GPTQ" in done.stdout
    again = cli("quantize", source, "-o", tmp_path / "int4", *data, *small, code=2)
    assert "not empty" in again.stderr
    model = load_gptq(tmp_path / "int4")
    assert AutoTokenizer.from_pretrained(tmp_path / "int4")("rivers")["input_ids"]

    cli("export", tmp_path / "int4", "--to", "gguf", "-o", tmp_path / "model.gguf")
    from gguf import GGUFReader

    reader = GGUFReader(tmp_path / "model.gguf")
    assert len(reader.tensors) == 2 + 9 * SIZES["num_hidden_layers"]
    assert model.config.num_hidden_layers == SIZES["num_hidden_layers"]
    refused = cli("export", source, "--to", "marlin", "-o", tmp_path / "marlin", code=2)
    assert "not quantized and cannot become marlin" in refused.stderr
    assert not (tmp_path / "marlin").exists()


def test_a_stopped_command_goes_on(source, tmp_path):
    """Ctrl-C between blocks, with the options that a plain run does not take."""
    lines = "\n".join(f"Line {number} of a text about rivers and bridges." for number in range(8000))
    (tmp_path / "text.txt").write_text(lines)
    arguments = [
        "quantize", source, "-o", tmp_path / "int4", "--dataset", tmp_path / "text.txt", "--preset", "minicpm4",
        "--group-size", 32, "--num-samples", 256, "--max-length", 128, "--smoothing", "--asymmetric",
        "--compute-dtype", "float32",
    ]  # fmt: skip
    # Where the suite itself runs in the background, its children would ignore Ctrl-C.
    start = [sys.executable, "-c", HEARS_CTRL_C, OPTIMUM, "minicpm4", *map(str, arguments)]
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "int4.unfinished" / "block-00000.safetensors").is_file():
            assert process.poll() is None, process.stderr.read()[-2000:]
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said[-2000:]
    assert "stopped; the same command goes on" in said
    assert not (tmp_path / "int4").exists()
    done = cli(*arguments)
    assert "blocks found in" in done.stderr
    config = json.loads((tmp_path / "int4" / "quantize_config.json").read_text())
    assert config["checkpoint_format"] == "gptq_v2"
    assert config["meta"]["method"] == "S-P-GPTQ"
    assert not (tmp_path / "int4.unfinished").exists()


def test_ternarize_then_export(source, tmp_path):
    cli("ternarize", source, "-o", tmp_path / "ternary", "--group-size", 32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "ternary")
    cli("export", tmp_path / "ternary", "--to", "gptq", "-o", tmp_path / "gptq2")
    read = load_gptq(tmp_path / "gptq2", torch.float32)
    assert torch.allclose(logits(read), logits(packed), atol=1e-4 * float(logits(packed).abs().max()))
    refused = cli("ternarize", tmp_path / "ternary", "-o", tmp_path / "twice", code=2)
    assert "packed ternary already" in refused.stderr
    wrong = cli("export", tmp_path / "ternary", "--to", "gptq", "--type", "F16", "-o", tmp_path / "wrong", code=2)
    assert "--type: for --to gguf alone" in wrong.stderr


def test_ternarize_takes_trained_latents_as_they_were_trained(source, tmp_path):
    """Group size and layers left alone come with them."""
    config = BitCPM4Config(group_size=16, modules_to_not_convert=["down_proj"])
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(tmp_path / "latents")
    cli("ternarize", tmp_path / "latents", "-o", tmp_path / "ternary")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "ternary")
    assert torch.allclose(logits(packed), logits(model), atol=1e-4 * float(logits(model).abs().max()))
    cli("ternarize", source, "-o", tmp_path / "same", "--group-size", 16, "--modules-to-not-convert", "down_proj")
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "same")
    assert torch.equal(logits(same), logits(packed))


@pytest.mark.parametrize("fake_quantized", [False, True])
def test_ternarize_stores_the_rest_in_the_dtype_asked_for(source, tmp_path, fake_quantized):
    """Half the embeddings; codes and scales are what they are without it."""
    cli("ternarize", source, "-o", tmp_path / "plain", "--group-size", 32)
    given, options = source, ["--group-size", 32]
    if fake_quantized:
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain").dequantize().save_pretrained(tmp_path / "fake")
        given, options = tmp_path / "fake", ["--fake-quantized"]
    cli("ternarize", given, "-o", tmp_path / "half", "--dtype", "bfloat16", *options)
    plain, half = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("plain", "half"))
    assert plain.keys() == half.keys()
    for name, tensor in half.items():
        packed = tensor.dtype == torch.uint8 or name.endswith("weight_scale")
        assert tensor.dtype == (plain[name].dtype if packed else torch.bfloat16)
        assert torch.equal(tensor, plain[name].to(tensor.dtype))


def test_every_option_says_its_default():
    for arguments in (quantize_arguments, ternarize_arguments, export_arguments):
        parser = argparse.ArgumentParser()
        arguments(parser)
        for action in parser._actions:
            if action.option_strings and not action.required and action.dest != "help":
                assert "(default: " in action.help, action.option_strings
                if action.default not in (None, False):
                    assert f"(default: {action.default})" in action.help


def test_the_defaults_that_help_names_are_those_of_the_configs():
    from transformers_minicpm4 import PGPTQConfig
    from transformers_minicpm4.quantization.bitcpm4.configuration import BitCPM4Config

    parser = argparse.ArgumentParser()
    quantize_arguments(parser)
    texts = {action.dest: action.help for action in parser._actions}
    plain, preset = PGPTQConfig(), PGPTQConfig.minicpm4()
    for name in ("bits", "group_size", "batch_size", "seed"):
        assert f"(default: {getattr(plain, name)})" in texts[name]
    for name in ("num_samples", "max_length"):
        assert f"(default: {getattr(plain, name)}; {getattr(preset, name)} with --preset)" in texts[name]
    assert (plain.sym, plain.skip_first, plain.prefix_weight) == (True, 4, 1)
    words = (
        f"{preset.bits} bits, groups of {preset.group_size}, {preset.num_samples} rows of {preset.max_length} tokens"
    )
    assert words in texts["preset"]
    parser = argparse.ArgumentParser()
    ternarize_arguments(parser)
    assert f"(default: {BitCPM4Config().group_size})" in {a.dest: a.help for a in parser._actions}["group_size"]


def test_help_is_light_and_teaches(tmp_path):
    shown = cli("quantize", "--help")
    assert "goes on where it was" in shown.stdout
    script = (
        "import sys; from optimum.commands.optimum_cli import main\n"
        "sys.argv = ['optimum-cli', 'minicpm4', 'export', '-h']\n"
        "try: main()\nexcept SystemExit: pass\nassert 'transformers' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


def test_the_wheel_carries_the_plug_in_and_no_init_on_its_path(source, tmp_path):
    """
    Installed into an environment where nothing of this repository can be seen, it adds the command, and that works.
    """
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
        capture_output=True,
        timeout=240,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "optimum/commands/register/register_minicpm4.py" in names
    assert not any(name.startswith("optimum/") and name.endswith("__init__.py") for name in names)
    assert "transformers_minicpm4/quantization/bitcpm4/ternary_cpu.cpp" in names
    # Everything that is installed here but us, by links; optimum as a copy, since our command lies in its folder.
    venv.create(tmp_path / "clean", with_pip=False)
    python = tmp_path / "clean" / "bin" / "python"
    (site,) = (tmp_path / "clean" / "lib").glob("python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name == "optimum":
            shutil.copytree(entry, site / entry.name)
        elif entry.suffix != ".pth" and "transformers_minicpm4" not in entry.name:
            (site / entry.name).symlink_to(entry)
    show = "import sys; from optimum.commands.optimum_cli import main; main()"
    without = subprocess.run([python, "-c", show, "--help"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert "minicpm4" not in without.stdout
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel],
        check=True,
        capture_output=True,
        timeout=120,
    )
    command = [python, "-c", show, "minicpm4", "ternarize", source, "-o", tmp_path / "ternary", "--group-size", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "packed ternary" in done.stdout
    assert (site / "transformers_minicpm4").is_dir()
    version = subprocess.run(
        [tmp_path / "clean" / "bin" / "minicpm4", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert version.returncode == 0, version.stderr[-2000:]
