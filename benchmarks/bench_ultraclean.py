"""
Quality filtering from jsonl to jsonl against datatrove, and UltraClean's words against the script's loop; CPU seconds.

    python benchmarks/bench_ultraclean.py [--documents 24000] [--rounds 3]

datatrove 0.10.1 runs in an environment of its own (`--peer-python`; made in build/peers/datatrove by default, since
its fastText build and ours carry one module name). Both sides score the same raw documents with the same model, put
spaces for newlines and keep scores from 0.5; the run fails where they keep different documents. Every arm is a process
from start to end, timed by the system (user + system); arms alternate. Each is also run on ten documents: what that
takes is start-up, and is subtracted for the figures per document. The model is trained here, once, on the corpus.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path

from harness import machine


ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT.parent / "shared" / "data" / "debian-docs-quality" / "en.jsonl.gz"
PEERS = ["datatrove==0.10.1", "fasttext-numpy2-wheel", "fasteners", "orjson", "regex"]

DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import FastTextClassifierFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
model, folder, output = sys.argv[1:]
LocalPipelineExecutor(
    pipeline=[
        JsonlReader(folder),
        FastTextClassifierFilter(model, keep_labels=("pos", 0.5), newline_replacement=" "),
        JsonlWriter(output, output_filename="kept.jsonl", compression=None),
    ],
    workers=1,
    skip_completed=False,
    logging_dir=output + "/logs",
).run()
"""

# Arrow batches all the way: rows become Python objects only to be written.
STREAM = """
import json, os, sys
import datasets
from transformers_minicpm4.data.ultraclean.scorer import QualityFilter, QualityScorer
model, folder, output = sys.argv[1:]
stream = datasets.load_dataset("json", data_files=folder + "/*.jsonl", split="train", streaming=True)
stream = stream.with_format("arrow").map(QualityScorer(model, normalize=False), batched=True)
stream = stream.filter(QualityFilter(), batched=True)
os.makedirs(output)
encode = json.JSONEncoder(ensure_ascii=False).encode
with open(output + "/kept.jsonl", "w", encoding="utf-8") as file:
    for table in stream.iter(1000):
        file.writelines(encode(row) + "\\n" for row in table.to_pylist())
"""

MAP = """
import sys
import datasets
from transformers_minicpm4.data.ultraclean.scorer import QualityFilter, QualityScorer
model, folder, output = sys.argv[1:]
rows = datasets.load_dataset("json", data_files=folder + "/*.jsonl", split="train", cache_dir=output + "/cache")
rows = rows.map(QualityScorer(model, normalize=False), batched=True)
rows.filter(QualityFilter(), batched=True).to_json(output + "/kept.jsonl")
"""


def corpus_rows() -> list[dict]:
    if not CORPUS.is_file():
        raise SystemExit(f"the benchmark's corpus is not here: {CORPUS}")
    with gzip.open(CORPUS, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def make_model(work: Path, rows: list[dict]) -> Path:
    """The paper's hyperparameters, 200,000 buckets, one thread; kept for the next run."""
    import fasttext

    path = work / "model.bin"
    if not path.is_file():
        print("training the model (once)", file=sys.stderr)
        lines = work / "train.txt"
        with open(lines, "w", encoding="utf-8") as file:
            for row in rows[::2]:
                label = "__label__pos" if row["pool"] == "prose" else "__label__neg"
                file.write(label + " " + row["text"].replace("\n", " ") + "\n")
        settings = {"dim": 256, "lr": 0.1, "wordNgrams": 3, "minCount": 5, "epoch": 3, "bucket": 200_000}
        model = fasttext.train_supervised(str(lines), thread=1, verbose=0, **settings)
        model.save_model(str(path) + ".tmp")
        os.replace(str(path) + ".tmp", path)
    return path


def make_documents(folder: Path, rows: list[dict], count: int) -> Path:
    """`count` documents in one jsonl file: the corpus as often as needed, ids made distinct."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = random.Random(0).sample(rows, len(rows))
    with open(folder / "documents.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            kept = {"id": str(number), "text": row["text"], "source": row["source"]}
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
    return folder


def peer_python(given: str | None) -> str:
    if given:
        return given
    folder = ROOT / "build" / "peers" / "datatrove"
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    if subprocess.run(
        [python, "-c", "import datatrove, fasttext, fasteners, orjson, regex"], capture_output=True
    ).returncode:
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS], check=True)
    return str(python)


def run(python: str, code: str, model: Path, folder: Path, output: Path) -> dict:
    """One arm from process start to end: CPU seconds, wall seconds, peak MB, ids kept."""
    subprocess.run(["rm", "-rf", output], check=True)
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    start, log = time.perf_counter(), output.with_suffix(".log")
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [python, "-c", code, str(model), str(folder), str(output)],
            env={**os.environ, **settings},
            stdout=file,
            stderr=file,
        )
        # The usage of this child and of its own children, which `resource.getrusage` would add up over all arms.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"an arm failed:\n{log.read_text()[-3000:]}")
    with open(output / "kept.jsonl", encoding="utf-8") as file:
        kept = [json.loads(line)["id"] for line in file]
    return {
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": time.perf_counter() - start,
        "peak_mb": usage.ru_maxrss / 1024,
        "kept": kept,
    }


def compare_filters(model: Path, work: Path, rows: list[dict], documents: int, rounds: int, peer: str) -> dict:
    folder = make_documents(work / "documents", rows, documents)
    few = make_documents(work / "few", rows, 10)
    arms = {"datatrove": (peer, DATATROVE), "streaming": (sys.executable, STREAM), "map": (sys.executable, MAP)}
    runs, starts = {name: [] for name in arms}, {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name in list(arms)[:: 1 if turn % 2 else -1]:
            start = run(*arms[name], model, few, work / name)
            # The first turn only warms the file cache and compiles modules.
            if turn:
                result = run(*arms[name], model, folder, work / name)
                print(f"{name:10} {start['cpu_s']:6.2f} {result['cpu_s']:6.2f} CPU s", file=sys.stderr)
                starts[name].append(start["cpu_s"])
                runs[name].append(result)
    kept = runs["datatrove"][0]["kept"]
    for name, results in runs.items():
        for result in results:
            if result["kept"] != kept:
                difference = len({*kept} ^ {*result["kept"]})
                raise SystemExit(f"{name} and datatrove ({len(kept)} kept) differ on {difference} documents")
    cpu = {name: [result["cpu_s"] for result in results] for name, results in runs.items()}
    own = {name: [a - b for a, b in zip(values, starts[name])] for name, values in cpu.items()}
    table = {
        name: {
            "cpu_s": [round(value, 2) for value in cpu[name]],
            "start_cpu_s": [round(value, 2) for value in starts[name]],
            "of_datatrove": round(statistics.median(a / b for a, b in zip(cpu[name], cpu["datatrove"])), 3),
            "of_datatrove_without_start": round(
                statistics.median(a / b for a, b in zip(own[name], own["datatrove"])), 3
            ),
            "documents_per_cpu_s_without_start": round(documents / statistics.median(own[name])),
            "peak_mb": round(max(result["peak_mb"] for result in runs[name])),
        }
        for name in arms
    }
    return {"documents": documents, "kept": len(kept), "arms": table}


def memory(model: Path, work: Path, rows: list[dict], documents: int) -> dict:
    """Peak memory of the streaming arm at one corpus size and at four times that."""
    peaks = {}
    for count in (documents, 4 * documents):
        folder = make_documents(work / "documents", rows, count)
        peaks[count] = round(run(sys.executable, STREAM, model, folder, work / "streaming")["peak_mb"])
    return peaks


def load_words_tokenizer(work: Path, rows: list[dict]):
    """SmolLM2's tokenizer where `make assets` has put it, else a byte-level BPE of 8,000 words trained here."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from transformers_minicpm4.cli.assets import smollm2_path

    try:
        return "SmolLM2", AutoTokenizer.from_pretrained(smollm2_path())
    except FileNotFoundError:
        from tokenizers import ByteLevelBPETokenizer

        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator((row["text"] for row in rows), vocab_size=8000, show_progress=False)
        return "byte-level BPE, 8,000", PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)


def compare_words(work: Path, rows: list[dict], documents: int, rounds: int) -> dict:
    """The script's loop decodes every id on its own; ours does so once for each distinct id."""
    import re

    from transformers_minicpm4.data.ultraclean.normalize import normalize, to_words_batch

    name, tokenizer = load_words_tokenizer(work, rows)
    texts = [row["text"] for row in rows[:: max(1, len(rows) // documents)]][:documents]

    def loop():
        lines = []
        for text in texts:
            ids = tokenizer.encode(normalize(text), add_special_tokens=False)
            line = " ".join([tokenizer.decode([token_id]) for token_id in ids])
            line = line.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
            lines.append(re.sub(" +", " ", line).strip())
        return lines

    arms = {"loop": loop, "batched": lambda: to_words_batch(texts, tokenizer)}
    times = {arm: [] for arm in arms}
    if arms["loop"]() != arms["batched"]():
        raise SystemExit("the batched words differ from the loop's")
    for turn in range(rounds):
        for arm in list(arms)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            arms[arm]()
            times[arm].append(time.process_time() - start)
    speed = {arm: round(len(texts) / statistics.median(values)) for arm, values in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["loop"], times["batched"]))
    return {"tokenizer": name, "documents": len(texts), "documents_per_cpu_s": speed, "ratio": round(ratio, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--documents", type=int, default=24_000, help="documents to filter (default: %(default)s)")
    parser.add_argument("--words", type=int, default=1000, help="documents for the words (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each arm (default: %(default)s)")
    parser.add_argument(
        "--peer-python", help="Python with datatrove (default: build/peers/datatrove, made if missing)"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench_ultraclean", help="folder for all files")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "ultraclean_cpu.json")
    arguments = parser.parse_args()

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = corpus_rows()
    model = make_model(arguments.work, rows)
    peer = peer_python(arguments.peer_python)
    result = {
        "machine": machine(),
        "words": compare_words(arguments.work, rows, arguments.words, arguments.rounds),
        "filter": compare_filters(model, arguments.work, rows, arguments.documents, arguments.rounds, peer),
        "peak_mb_streaming": memory(model, arguments.work, rows, arguments.documents // 2),
        "model_mb": round(model.stat().st_size / 2**20),
        "rounds": arguments.rounds,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.output.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    partial.replace(arguments.output)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
