"""The datatrove adapter: its conversions here, the step itself in an environment that has datatrove."""

import gzip
import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from transformers_minicpm4.data.ultraclean import datatrove_step
from transformers_minicpm4.data.ultraclean.datatrove_step import documents_to_batch, run_batch, update_documents


# Made by the benchmark against datatrove (benchmarks/bench_ultraclean.py).
PEER = Path(__file__).parents[3] / "build" / "peers" / "datatrove" / "bin" / "python"


@dataclass
class Document:
    text: str
    id: str
    metadata: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Short:
    def __call__(self, batch):
        return [reason is None for reason in self.reasons(batch)]

    def reasons(self, batch):
        return ["short" if len(text) < 3 else None for text in batch["text"]]


def documents():
    return [Document("one text", "a", {"n": 1}), Document("x", "b", {"m": "q"}), Document("数据过滤", "c", {})]


def test_documents_and_batches_round_trip():
    batch = documents_to_batch(documents(), "body")
    assert batch == {
        "n": [1, None, None],
        "m": [None, "q", None],
        "id": ["a", "b", "c"],
        "body": ["one text", "x", "数据过滤"],
    }
    changed = documents()
    update_documents(changed, {"body": ["1", "2", "3"], "id": ["u", "v", "w"], "score": [0.5, None, 1.0]}, "body")
    assert changed[1] == Document("2", "v", {"m": "q", "score": None})
    assert [d.metadata.get("n") for d in changed] == [1, None, None]


def test_maps_add_and_filters_give_reasons():
    docs = documents()
    assert run_batch(lambda batch: {"length": [len(t) for t in batch["text"]]}, docs) == [None] * 3
    assert [d.metadata["length"] for d in docs] == [8, 1, 4]
    assert run_batch(Short(), docs) == [None, "short", None]
    assert docs[1].metadata == {"m": "q", "length": 1}
    with pytest.raises(TypeError, match="2 values in column 'x' for 3 documents"):
        run_batch(lambda batch: {"x": [1, 2]}, docs)
    with pytest.raises(TypeError, match="gave NoneType for 3 documents"):
        run_batch(lambda batch: None, docs)


def test_without_datatrove_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(ImportError, match="pip install datatrove"):
        _ = datatrove_step.UltraCleanStep
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = datatrove_step.Other


# The adapter is loaded by its path: the package's other needs (torch, ...) are not in that environment.
PIPELINE = """
    import importlib.util, sys
    from dataclasses import dataclass

    source, adapter, folder = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("datatrove_step", adapter)
    module = sys.modules["datatrove_step"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    @dataclass(frozen=True)
    class Lines:
        def __call__(self, batch):
            return {"lines": [text.count("\\n") + 1 for text in batch["text"]]}

    @dataclass(frozen=True)
    class Enough:
        least: int
        def __call__(self, batch):
            return [n >= self.least for n in batch["lines"]]
        def reasons(self, batch):
            return [None if n >= self.least else "few lines" for n in batch["lines"]]

    if __name__ == "__main__":  # datatrove's workers import this script again
        excluded = JsonlWriter(folder + "/excluded", compression=None)
        LocalPipelineExecutor(
            pipeline=[
                JsonlReader(source),
                module.UltraCleanStep(Lines(), batch_size=7),
                module.UltraCleanStep(Enough(10), batch_size=16, exclusion_writer=excluded),
                JsonlWriter(folder + "/kept", compression=None),
            ],
            logging_dir=folder + "/logs",
            tasks=2,
            workers=WORKERS,
        ).run()
"""


@pytest.mark.skipif(not PEER.exists(), reason="no build/peers/datatrove (benchmarks/bench_ultraclean.py makes it)")
def test_a_datatrove_pipeline_keeps_counts_and_excludes(shared_data, tmp_path):
    if subprocess.run([PEER, "-c", "import datatrove"], capture_output=True).returncode:
        pytest.skip("build/peers/datatrove has no datatrove yet")
    with gzip.open(shared_data / "debian-docs-quality" / "en.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [row for row, _ in zip(map(json.loads, lines), range(100))]
    (tmp_path / "source").mkdir()
    for part in (0, 1):
        text = "".join(json.dumps(row) + "\n" for row in rows[part::2])
        (tmp_path / "source" / f"{part}.jsonl").write_text(text)
    script = tmp_path / "pipeline.py"
    script.write_text(textwrap.dedent(PIPELINE).replace("WORKERS", "2"))
    run = subprocess.run(
        [PEER, script, tmp_path / "source", datatrove_step.__file__, tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr[-3000:]

    def read(name):
        files = sorted((tmp_path / name).glob("*.jsonl"))
        return sorted((json.loads(line) for f in files for line in f.read_text().splitlines()), key=lambda r: r["id"])

    lines = {row["id"]: row["text"].count("\n") + 1 for row in rows}
    kept, excluded = read("kept"), read("excluded")
    assert [(r["id"], r["metadata"]["lines"]) for r in kept] == sorted((i, n) for i, n in lines.items() if n >= 10)
    assert [(r["id"], r["metadata"]["filter_reason"]) for r in excluded] == sorted(
        (i, "few lines") for i, n in lines.items() if n < 10
    )
    assert {r["id"]: r["text"] for r in kept + excluded} == {row["id"]: row["text"] for row in rows}
    stats = json.loads((tmp_path / "logs" / "stats.json").read_text())
    step = next(s for s in stats if "Enough" in s["name"])["stats"]
    count = {key: value["total"] if isinstance(value, dict) else value for key, value in step.items()}
    assert (count["total"], count["forwarded"], count["dropped_few lines"]) == (100, len(kept), len(excluded))
