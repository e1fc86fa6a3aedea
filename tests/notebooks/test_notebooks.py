"""Each notebook is the rendering of its text source, runs from top to bottom in a real kernel, and shows its point."""

import ast
import re
from pathlib import Path

import pytest


jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed: extra `notebooks`")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: extra `notebooks`")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: extra `notebooks`")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: extra `notebooks`")

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def shown(notebook, kind="stdout"):
    """What the cells printed, and the types of what they displayed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.get("name") == kind)
    types = [name for output in outputs for name in output.get("data", {})]
    return text, types


def test_every_notebook_has_its_source_and_its_line_in_the_readme():
    assert SOURCES
    assert [source.with_suffix(".ipynb") for source in SOURCES] == sorted(NOTEBOOKS.glob("*.ipynb"))
    readme = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    assert [source.stem for source in SOURCES if f"({source.stem}.ipynb)" not in readme] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_rendering_is_that_of_the_source(source):
    rendered = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert cells(rendered) == cells(jupytext.read(source)), "run `make notebooks`"
    assert all(cell.execution_count for cell in rendered.cells if cell.cell_type == "code"), "run `make notebooks`"
    assert source.with_suffix(".ipynb").stat().st_size < 100_000, "outputs belong below 100 kB"


@pytest.mark.real
def test_long_document(real_checkpoint):
    notebook = jupytext.read(NOTEBOOKS / "01_long_document.py")
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    text, types = shown(notebook)
    answers = {line.split(": ")[0]: line for line in text.splitlines() if "anonymous functions" in line}
    assert answers.keys() == {"infllm_v2", "sdpa"}, text
    assert "image/png" in types
    found, layers = map(int, text.split("it was read in ")[1].split(" layers")[0].split(" of "))
    assert 0 < found <= layers == 30
    assert shown(notebook, "stderr")[0].count("\n") <= 1, "only the remark on the unused sparse_config was expected"


def test_kernel():
    notebook = jupytext.read(NOTEBOOKS / "02_kernel.py")
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    text, types = shown(notebook)
    assert float(text.split("root mean square error: ")[1].split()[0]) < 1e-5
    assert types.count("image/png") == 2
    assert "times faster than dense here" in text


def test_ultraclean():
    notebook = jupytext.read(NOTEBOOKS / "03_ultraclean.py")
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    text, types = shown(notebook)
    counts = ast.literal_eval(next(line for line in text.splitlines() if line.startswith("{'kept'")))
    assert counts["empty"] == counts["missing"] == 1
    assert counts["kept"] > 300
    assert "| reference |" in text
    assert "image/png" in types


@pytest.mark.real
def test_quantization(real_checkpoint):
    notebook = jupytext.read(NOTEBOOKS / "04_quantization.py")
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    text, types = shown(notebook)
    errors = {
        line.split("first position")[0].strip(): [float(part) for part in re.findall(r"([\d.]+)%", line)]
        for line in text.splitlines()
        if "first position" in line
    }
    (_, rounding), (plain_first, plain), (first, prefix_aware) = (errors[k] for k in ("rounding", "GPTQ", "P-GPTQ"))
    assert prefix_aware < rounding
    assert prefix_aware < plain
    assert first > plain_first, "somebody has to pay: the stored prefix replaces this position"
    assert float(re.search(r"([\d.]+) of the bytes in bfloat16", text)[1]) < 0.15
    difference, outputs = map(float, re.search(r"product: ([\d.e+-]+), outputs up to ([\d.]+)", text).groups())
    assert difference < 1e-5 * outputs
    assert types.count("image/png") == 1


def test_chunkwise_rl():
    notebook = jupytext.read(NOTEBOOKS / "05_chunkwise_rl.py")
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    text, types = shown(notebook)
    whole, chunked = map(float, re.search(r"used slots: whole ([\d.]+), chunk-wise ([\d.]+)", text).groups())
    assert chunked > 1.5 * whole
    spanning, completions = map(int, re.search(r"(\d+) of (\d+) completions were sampled by more", text).groups())
    assert 0.1 * completions < spanning < completions
    assert types.count("image/png") == 3
    assert shown(notebook, "stderr")[0] == ""


@pytest.mark.real
def test_edge_engine(real_checkpoint):
    notebook = jupytext.read(NOTEBOOKS / "06_edge_engine.py")
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    text, types = shown(notebook)
    passes = dict(
        re.findall(r"^(no draft|prompt lookup) .* in (\d+) passes; as model.generate: True$", text, re.MULTILINE)
    )
    assert 3 * int(passes["prompt lookup"]) < int(passes["no draft"])
    tokens, reused = map(int, re.search(r"second prompt: (\d+) tokens, (\d+) of them", text).groups())
    assert tokens > reused > tokens / 2
    covered = [float(share) for share in re.findall(r"cover ([\d.]+)%", text)]
    assert covered == sorted(covered)
    assert types.count("image/png") == 1


@pytest.mark.real
def test_runtimes(real_checkpoint):
    for package in ("xllamacpp", "gguf", "llguidance", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"{package} is not installed: extras `executors`, `serve`, `test`")
    notebook = jupytext.read(NOTEBOOKS / "07_runtimes.py")
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    text, types = shown(notebook)
    right, wrong = map(float, re.findall(r"slope +([\d.]+)", text))
    assert abs(right - 1) < 0.02  # 48 tokens in 8 bits
    assert wrong / right == pytest.approx(1.1, abs=2e-3)
    first, second = re.findall(r"same likeliest +([\d.]+)%", text)
    assert first == second
    tokens, passes = map(int, re.search(r"with drafts: .* \((\d+) tokens in (\d+) passes\)", text).groups())
    assert passes < tokens
    assert "the same tokens: True" in text
    assert text.count("call: get-weather") == 2
    assert "refused: get-weather.days must be integer, not '3'" in text
    assert "streamed: ['1.', '1'," in text
    assert "in form: {'city': 'Paris'" in text
    assert "refused: temperature must be" in text
    assert types.count("image/png") == 1
