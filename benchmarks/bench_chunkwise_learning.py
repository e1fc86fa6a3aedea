"""
Does learning suffer from chunks that older policies sampled? Chunk-wise GRPO against TRL's GRPOTrainer, same steps.

The running sums of `examples/chunkwise_grpo.py`: one warm start, then each seed trains both ways with the same loss
(DAPO's token mean, clip-higher, dual clip, overlong masking, no KL term). Runs that are in the JSON already are kept,
so a stopped benchmark goes on where it was. Writes the curves to docs/chunkwise_learning.png:

    OMP_NUM_THREADS=1 python benchmarks/bench_chunkwise_learning.py \
        --json benchmarks/results/chunkwise_learning_cpu.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from bench_chunkwise_rollout import LENGTH, ROOT, example, make_trainer, warm_policy
from harness import machine
from transformers import TrainerCallback


ARMS = {"vanilla": None, "chunk-wise, L/4": LENGTH // 4}
LAST = 20


class Curve(TrainerCallback):
    def __init__(self):
        self.rows = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.process_time()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            self.rows.append(
                {
                    "reward": logs["reward"],
                    "length": logs["completions/mean_length"],
                    "clipped": logs["clip_ratio/region_mean"],
                    "staleness": logs.get("rollout/staleness/mean", 0.0),
                    "cpu_s": round(time.process_time() - self.began, 2),
                }
            )


def run(arguments: argparse.Namespace, chunk: int | None, seed: int) -> dict:
    policy, curve = warm_policy(arguments.warm_start_steps), Curve()
    trainer = make_trainer(
        policy,
        example.problems(4096, seed=1000 + seed),
        chunk,
        [curve],
        per_device_train_batch_size=arguments.rows,
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        seed=seed,
    )
    trainer.train()
    torch.manual_seed(seed)
    held_out = example.accuracy(policy, example.make_tokenizer(), example.problems(arguments.tested, seed=-1))
    return {"held_out": held_out, "curve": curve.rows}


def final(run: dict) -> float:
    return statistics.mean(row["reward"] for row in run["curve"][-LAST:])


def compared(values: dict[str, list[float]]) -> dict:
    """Mean of each arm, and chunk-wise less vanilla by seed with the standard error of its mean."""
    first, second = (values[name] for name in ARMS)
    differences = [b - a for a, b in zip(first, second)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return {
        **{name: round(statistics.mean(found), 4) for name, found in values.items()},
        "difference": round(statistics.mean(differences), 4),
        "standard_error": round(error, 4),
    }


def plot(runs: dict, start: float, path: Path, window: int = 15) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for color, arm in zip(("0.35", "C0"), ARMS):
        curves = [runs[key]["curve"] for key in sorted(runs) if key.startswith(f"{arm}/")]
        smooth = [
            [
                statistics.mean(row["reward"] for row in curve[max(0, place - window + 1) : place + 1])
                for place in range(len(curve))
            ]
            for curve in curves
        ]
        steps = range(window, len(smooth[0]) + 1)
        for line, curve in zip(smooth, curves):
            axes[0].plot(steps, line[window - 1 :], color=color, alpha=0.3, linewidth=0.8)
            axes[1].plot(
                [row["cpu_s"] for row in curve][window - 1 :],
                line[window - 1 :],
                color=color,
                alpha=0.3,
                linewidth=0.8,
            )
        mean = [statistics.mean(values) for values in zip(*smooth)]
        seconds = [statistics.mean(curve[place]["cpu_s"] for curve in curves) for place in range(len(mean))]
        axes[0].plot(steps, mean[window - 1 :], color=color, label=f"{arm} ({len(curves)} seeds)")
        axes[1].plot(seconds[window - 1 :], mean[window - 1 :], color=color)
    for axis in axes:
        axis.axhline(start, color="C3", linestyle=":", linewidth=0.9, label="held out, before")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"reward, mean of {window} steps")
    axes[0].set_xlabel("optimizer step")
    axes[1].set_xlabel("CPU seconds")
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", type=int, default=32, help="replies a step")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--warm_start_steps", type=int, default=180)
    parser.add_argument("--tested", type=int, default=512, help="held-out prompts, one sampled reply each")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "chunkwise" / "learning.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "chunkwise_learning.png")
    arguments = parser.parse_args(argv)

    torch.set_num_threads(1)
    settings = {name: getattr(arguments, name) for name in ("steps", "rows", "learning_rate", "warm_start_steps")}
    found = {"settings": settings, "runs": {}}
    if arguments.json.is_file():
        found = json.loads(arguments.json.read_text())
        if found["settings"] != settings:
            parser.error(f"{arguments.json} has runs with {found['settings']}; remove it, or give another --json")
    if "start" not in found:
        torch.manual_seed(0)
        policy, tokenizer = warm_policy(arguments.warm_start_steps), example.make_tokenizer()
        found["start"] = example.accuracy(policy, tokenizer, example.problems(arguments.tested, seed=-1))
    for seed in arguments.seeds:
        for arm, chunk in ARMS.items():
            key = f"{arm}/{seed}"
            if key in found["runs"]:
                continue
            found["runs"][key] = run(arguments, chunk, seed)
            found["machine"] = machine()
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            partial = arguments.json.with_suffix(".partial")
            partial.write_text(json.dumps(found) + "\n")
            partial.replace(arguments.json)
            result = found["runs"][key]
            cpu = result["curve"][-1]["cpu_s"]
            print(f"{key}: reward {final(result):.3f}, held out {result['held_out']:.3f}, {cpu} s", flush=True)

    runs, seeds = found["runs"], arguments.seeds
    found["reward"] = compared({arm: [final(runs[f"{arm}/{seed}"]) for seed in seeds] for arm in ARMS})
    found["held_out"] = compared({arm: [runs[f"{arm}/{seed}"]["held_out"] for seed in seeds] for arm in ARMS})
    partial = arguments.json.with_suffix(".partial")
    partial.write_text(json.dumps(found) + "\n")
    partial.replace(arguments.json)
    print(f"\nheld out before: {found['start']:.3f}")
    print("| run | reward, last 20 steps | held out |\n| --- | --- | --- |")
    for key, result in sorted(runs.items()):
        print(f"| {key} | {final(result):.3f} | {result['held_out']:.3f} |")
    for name in ("reward", "held_out"):
        print(name, found[name])
    plot(runs, found["start"], arguments.plot)


if __name__ == "__main__":
    main()
