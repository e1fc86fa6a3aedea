"""`optimum-cli minicpm4 quantize|ternarize|export`, as optimum runs it."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from small_models import SIZES, logits, make
from transformers_minicpm4.quantization.export.gptq import load_gptq


ROOT = Path(__file__).parents[2]
OPTIMUM = Path(sys.executable).with_name("optimum-cli")


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


def test_ternarize_then_export(source, tmp_path):
    cli("ternarize", source, "-o", tmp_path / "ternary", "--group-size", 32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "ternary")
    cli("export", tmp_path / "ternary", "--to", "gptq", "-o", tmp_path / "gptq2")
    read = load_gptq(tmp_path / "gptq2", torch.float32)
    assert torch.allclose(logits(read), logits(packed), atol=1e-4 * float(logits(packed).abs().max()))
    refused = cli("ternarize", tmp_path / "ternary", "-o", tmp_path / "twice", code=2)
    assert "packed ternary already" in refused.stderr


def test_help_is_light_and_teaches(tmp_path):
    shown = cli("quantize", "--help")
    assert "goes on where it was" in shown.stdout
    script = (
        "import sys; from optimum.commands.optimum_cli import main\n"
        "sys.argv = ['optimum-cli', 'minicpm4', 'export', '-h']\n"
        "try: main()\nexcept SystemExit: pass\nassert 'transformers' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


def test_the_wheel_carries_the_plug_in_and_no_init_on_its_path(tmp_path):
    """The wheel, unpacked beside optimum alone, adds the command; sources, templates and kernels are inside."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
        capture_output=True,
        timeout=240,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "optimum/commands/register/register_minicpm4.py" in names
    assert not any(name.startswith("optimum/") and name.endswith("__init__.py") for name in names)
    assert "transformers_minicpm4/quantization/bitcpm4/ternary_cpu.cpp" in names
    script = (
        "import sys; sys.path[:] = [path for path in sys.path if not path.endswith('/src')]\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "from optimum.commands.optimum_cli import load_optimum_namespace_cli_commands as load\n"
        "names = [(command[0] if isinstance(command, tuple) else command) for command in load()]\n"
        "import optimum.commands.register.register_minicpm4 as found; print(found.__file__, len(names))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60, cwd=tmp_path
    ).stdout
    assert str(tmp_path / "site") in shown
    assert shown.split()[-1] == "1"
