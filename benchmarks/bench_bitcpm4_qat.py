"""
How much of what ternary rounding destroys minutes of QAT on a CPU bring back: SmolLM2-135M, all weights trained, the
held-out log-perplexity after every few steps. `examples/bitcpm4.py` with more steps, one process, and a picture:

    OMP_NUM_THREADS=1 python benchmarks/bench_bitcpm4_qat.py --json benchmarks/results/bitcpm4_qat_cpu.json

The options are those of the example. The training text is WikiText-2's validation split, the held-out text its test
split: QAT adapts to that text as well, which the full-precision figure (the model as it was) does not. The figure of
token frequencies is what knowing how often each token occurs in the training text gives, and nothing of their order.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from harness import machine
from transformers import AutoTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import bitcpm4


DEFAULTS = ["--steps", "80", "--batch_size", "4", "--length", "256", "--eval_blocks", "16", "--eval_steps", "10"]
ROOT = Path(__file__).resolve().parents[1]


def token_frequencies(arguments: argparse.Namespace) -> float:
    """Held-out nats a token of the training text's frequencies, 0.1 added to each count."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model or bitcpm4.smollm2_path())
    training, held_out = (
        bitcpm4.Blocks(tokenizer, text, arguments.length, limit).rows.flatten()
        for text, limit in zip(bitcpm4.texts(arguments), (None, arguments.eval_blocks))
    )
    counts = torch.bincount(training, minlength=len(tokenizer)).double() + 0.1
    return -(counts[held_out] / counts.sum()).log().mean().item()


def plot(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    found = result["log_perplexity"]
    steps = [0, *(step for step, _ in result["curve"])]
    values = [found["rounded to ternary"], *(value for _, value in result["curve"])]
    axes.plot(steps, values, marker=".", label="ternary, QAT")
    axes.axhline(found["rounded to ternary"], color="C3", linestyle=":", label="rounded, no training")
    axes.axhline(result["token_frequencies"], color="C2", linestyle="-.", linewidth=0.8, label="token frequencies")
    axes.axhline(found["full precision"], color="0.4", linestyle="--", label="full precision")
    half = (found["rounded to ternary"] + found["full precision"]) / 2
    axes.axhline(half, color="0.8", linewidth=0.8, label="half of the gap")
    axes.set_ylabel("held out,\nnats a token")
    axes.legend(fontsize=8)
    flips = [(entry["step"], entry["ternary/flip_rate"]) for entry in result["monitor"]]
    below.bar(*zip(*flips), width=0.6 * (flips[1][0] - flips[0][0]) if len(flips) > 1 else 1)
    below.set_ylabel("codes changed")
    below.set_xlabel(f"optimizer step of {result['settings']['batch_size'] * result['settings']['length']:,} tokens")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    own = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip(), add_help=False)
    own.add_argument("--json", type=Path)
    own.add_argument("--plot", type=Path, default=ROOT / "docs" / "bitcpm4_qat.png")
    options, rest = own.parse_known_args(argv)
    arguments = bitcpm4.parse_arguments([*DEFAULTS, *rest])
    start, processor = time.perf_counter(), time.process_time()
    result = bitcpm4.run(arguments)
    result["seconds"] = {
        "wall": round(time.perf_counter() - start),
        "processor": round(time.process_time() - processor),
        "training": next((e["train_runtime"] for e in result["log_history"] if "train_runtime" in e), None),
    }
    result["settings"] = {name: str(v) if isinstance(v, Path) else v for name, v in vars(arguments).items()}
    result["token_frequencies"] = token_frequencies(arguments)
    result["curve"] = [(e["step"], e["eval_loss"]) for e in result["log_history"] if "eval_loss" in e]
    print("| held out | nats a token |\n| --- | --- |")
    for name, value in result["log_perplexity"].items():
        print(f"| {name} | {value:.3f} |")
    print(f"| token frequencies | {result['token_frequencies']:.3f} |")
    print(f"\n{result['gap_closed']:.1%} of the gap closed; {result['seconds']} s; {result['bytes']} bytes")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        partial = options.json.with_suffix(".partial")
        partial.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
        partial.replace(options.json)
    plot(result, options.plot)


if __name__ == "__main__":
    main()
