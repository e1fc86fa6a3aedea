"""What `make kernels` writes: loadable variants, whole or not at all."""

import json
import re
import runpy
import shutil
import subprocess
import sys

import pytest
from kernels import get_kernel, get_local_kernel

from .conftest import KERNEL, REPO


BACKENDS = ("cpu", "cuda", "rocm")


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_backend_has_its_variant(kernel_folder):
    assert sorted(path.name for path in (kernel_folder / "build").iterdir()) == [f"torch-{name}" for name in BACKENDS]
    sources = {path.name for path in (KERNEL / "torch-ext" / "infllm_v2").iterdir() if path.suffix in (".py", ".cpp")}
    namespaces = set()
    for backend in BACKENDS:
        variant = kernel_folder / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["name"] == "infllm-v2"
        assert (metadata["version"], metadata["license"]) == (1, "Apache-2.0")
        assert metadata["backend"] == {"type": backend}
        assert metadata["python-depends"] == []  # triton comes with torch on a GPU, and is none of the curated names
        assert metadata["id"] in (variant / "_ops.py").read_text()
        namespaces.add(metadata["id"])
        files = {path.name for path in variant.iterdir() if path.is_file()}
        assert files == sources | {"_ops.py", "metadata.json"}
    assert len(namespaces) == len(BACKENDS)


@pytest.mark.parametrize("inside", ["", "build", "build/torch-cpu"])
def test_a_local_folder_loads(kernel_folder, inside):
    kernel = get_local_kernel(kernel_folder / inside)
    assert {"infllm_v2_attention", "sparse_attention", "layers", "flash_attn_forward"} <= set(kernel.__all__)


def test_local_kernels_redirects_a_name(kernel_folder, kernel, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPO}={kernel_folder}")
    assert get_kernel(REPO, version=1) is kernel


def test_sources_import_torch_and_triton_alone():
    import ast

    allowed = {"torch", "triton", "__future__", *sys.stdlib_module_names}
    for path in (KERNEL / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name}:{node.lineno} imports {name}"


def test_a_second_build_replaces_the_first(build, tmp_path):
    build.build(tmp_path)
    first = content(tmp_path)
    (tmp_path / "torch-cpu" / "left_over.py").write_text("")
    (tmp_path / "torch-cpu" / "ops.py").write_text("broken")
    build.build(tmp_path)
    assert content(tmp_path) == first


@pytest.mark.parametrize("after", [0, 3, 20])
def test_an_interrupted_build_leaves_whole_variants(build, tmp_path, monkeypatch, after):
    build.build(tmp_path)
    before = content(tmp_path)
    copied = []
    original = shutil.copy2

    def copy(source, target):
        if len(copied) == after:
            raise KeyboardInterrupt
        copied.append(source)
        return original(source, target)

    monkeypatch.setattr(build.shutil, "copy2", copy)
    with pytest.raises(KeyboardInterrupt):
        build.build(tmp_path)
    assert content(tmp_path) == before


def test_what_a_killed_build_left_is_removed(build, tmp_path):
    (tmp_path / ".partial-abc" / "new").mkdir(parents=True)
    (tmp_path / ".partial-abc" / "new" / "ops.py").write_text("half")
    build.build(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"torch-{name}" for name in BACKENDS]


def test_the_command_says_what_it_wrote(tmp_path):
    command = [sys.executable, KERNEL / "scripts" / "build.py", "--target", tmp_path / "build"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert out.splitlines() == [f"built {tmp_path / 'build' / f'torch-{name}'}" for name in BACKENDS]


def test_the_example_and_the_snippet_of_the_card_run(kernel_folder, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPO}={kernel_folder}")
    (snippet,) = re.findall(r"```python\n(.*?)```", (KERNEL / "CARD.md").read_text(encoding="utf-8"), re.S)
    exec(compile(snippet.replace("<owner>/infllm-v2", REPO), "CARD.md", "exec"), {})
    assert capsys.readouterr().out == "96 of 313 blocks read\n"
    shutil.copy(KERNEL / "example.py", kernel_folder / "example.py")
    runpy.run_path(str(kernel_folder / "example.py"))
    out = capsys.readouterr().out
    assert "96 of 313 blocks read" in out
    assert float(re.search(r"attention over them: (\S+)", out)[1]) < 1e-5


def test_the_card_names_what_is_exported(kernel):
    card = (KERNEL / "CARD.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", card)) | {"layers", "ops"}
    assert set(kernel.__all__) <= named
