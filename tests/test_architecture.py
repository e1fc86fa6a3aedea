"""The walls of the house: who may import whom, and that every public name is documented with its shapes."""

import ast
from pathlib import Path

import pytest

import transformers_minicpm4


ROOT = Path(transformers_minicpm4.__file__).parent

# Room: rooms it may import. `cli` and `registration` may import every room; nobody but `__init__` imports them.
ALLOWED = {
    "infllm_v2": set(),
    "data": set(),
    "model": {"infllm_v2"},
    "quantization": {"model"},
    "rl": {"model", "data"},
    "generation": {"model", "infllm_v2"},
    "edge": {"generation", "quantization", "model", "infllm_v2"},
}


def imported_rooms(path: Path):
    package = path.relative_to(ROOT.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names = [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        for name in names:
            if name[0] == ROOT.name and len(name) > 1:
                yield name[1], node.lineno


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_arrows_point_one_way(room):
    for path in (ROOT / room).rglob("*.py"):
        for other, line in imported_rooms(path):
            assert other == room or other in ALLOWED[room], f"{path.relative_to(ROOT)}:{line} imports {other}"


def test_the_reader_of_imports_sees_both_forms(tmp_path):
    """The test above can fail: an arrow the wrong way is found, absolute or relative."""
    for source in ("from ..model import x", "import transformers_minicpm4.model.conversion"):
        path = ROOT / "infllm_v2" / "_never_written.py"
        tree = ast.parse(source)
        assert tree
        fake = tmp_path / "transformers_minicpm4" / "infllm_v2" / "x.py"
        fake.parent.mkdir(parents=True, exist_ok=True)
        fake.write_text(source)
        found = [room for room, _ in _rooms_below(fake, tmp_path / "transformers_minicpm4")]
        assert found == ["model"], path


def _rooms_below(path, root):
    global ROOT
    kept, ROOT = ROOT, root
    try:
        return list(imported_rooms(path))
    finally:
        ROOT = kept


def test_public_names_have_docstrings():
    for name in transformers_minicpm4.__all__:
        assert (getattr(transformers_minicpm4, name).__doc__ or "").strip(), name
