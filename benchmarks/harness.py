"""Interleaved timing of several arms, medians and ratios, as a table and as JSON."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm


def interleave(arms: dict, rounds: int, label: str = "") -> dict[str, list[float]]:
    """
    Seconds of every call: one warm-up each, then `rounds` rounds in which every arm runs once, the order reversed from
    round to round, so that a slow minute of the machine falls on all of them.
    """
    times = {name: [] for name in arms}
    for run in arms.values():
        run()
    gc.collect()
    gc.disable()
    try:
        for turn in tqdm(range(rounds), desc=label, file=sys.stderr, leave=False):
            for name in list(arms)[:: 1 if turn % 2 == 0 else -1]:
                start = time.perf_counter()
                arms[name]()
                times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times


def summarize(times: dict[str, list[float]], ours: str, peers: list[str]) -> dict:
    """Medians in milliseconds, and our speed-up over the fastest peer: the median over rounds of the ratio."""
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    fastest = min(peers, key=medians.get)
    ratios = sorted(theirs / mine for theirs, mine in zip(times[fastest], times[ours]))
    return {
        "median_ms": {name: round(value, 3) for name, value in medians.items()},
        "fastest_peer": fastest,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "rounds": len(ratios),
    }


def machine() -> dict:
    """What a reader needs to place the figures."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python " + " ".join(sys.argv),
    }


def report(rows: list[dict], columns: list[str], path: str | None) -> None:
    """Print a Markdown table of `columns`; write everything to `path`, whole or not at all."""
    print("| " + " | ".join(columns) + " |")
    print("| " + " | ".join("---" for _ in columns) + " |")
    for row in rows:
        print("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |")
    if path:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
        partial.replace(target)
        print(f"\nwritten: {path}")
