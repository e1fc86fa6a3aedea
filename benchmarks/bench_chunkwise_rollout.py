"""
CPU seconds of chunk-wise GRPO against TRL's GRPOTrainer: sampling and whole training steps.

Task, tokenizer and model are those of `examples/chunkwise_grpo.py`, warm-started once (build/chunkwise). Every arm is
a real `train()` in a thread of its own; a turnstile lets the arms take their steps in turns, one at a time. Weights
hardly move (lr 1e-7), so all arms sample from one policy throughout. The first steps, in which chunked arms fill up,
are left out. Times are CPU seconds of the process (`time.process_time`), one torch thread.

Chunked arms sample in calls of at most a batch's rows (`rollout_batch_size`), but for those called "one call", in
which short and long rows share a call and its padding. "means" are ratios of the sums over all steps, with the range
of nine in ten bootstrap samples of the steps; the others are ratios of medians:

    OMP_NUM_THREADS=1 python benchmarks/bench_chunkwise_rollout.py --json benchmarks/results/chunkwise_rollout_cpu.json
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import torch
from harness import report
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from transformers_minicpm4 import MiniCPM4ForCausalLM
from transformers_minicpm4.rl import ChunkwiseGRPOConfig, ChunkwiseGRPOTrainer


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import chunkwise_grpo as example


ROOT = Path(__file__).resolve().parents[1]
LENGTH = example.REPLY_LENGTH
# Equal for both trainers: GRPO with clip-higher, dual clip and overlong masking, no KL term.
LOSS = {"epsilon": 0.2, "epsilon_high": 0.28, "delta": 3.0, "beta": 0.0, "mask_truncated_completions": True}
COMMON = {
    "num_generations": 4,
    "max_completion_length": LENGTH,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    **LOSS,
}
# What chunk-wise sampling alone is about: no filter that draws more prompts.
PLAIN = {"dynamic_sampling": False, "garble_filter": False}


def warm_policy(steps: int, seed: int = 0) -> MiniCPM4ForCausalLM:
    """The example's policy after its warm start, made once."""
    folder = ROOT / "build" / "chunkwise" / f"warm_{steps}_{seed}"
    if not folder.is_dir():
        policy = example.make_policy(seed)
        example.warm_start(policy, example.make_tokenizer(), steps, seed)
        policy.save_pretrained(folder)
    return MiniCPM4ForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make_trainer(policy, problems, chunk_length: int | None, callbacks=(), **settings) -> GRPOTrainer:
    """`chunk_length=None` is TRL's own trainer."""
    kind = {"output_dir": tempfile.mkdtemp(), **COMMON, **settings}
    if chunk_length is None:
        trainer_class, args = GRPOTrainer, GRPOConfig(**kind)
    else:
        trainer_class = ChunkwiseGRPOTrainer
        args = ChunkwiseGRPOConfig(chunk_length=chunk_length, **{**PLAIN, **kind})
    trainer = trainer_class(
        model=policy,
        reward_funcs=example.right_answer,
        args=args,
        train_dataset=problems,
        processing_class=example.make_tokenizer(),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Turnstile(TrainerCallback):
    """Lets one trainer run at a time, a step each, in a fixed order."""

    def __init__(self, arms: list[str]):
        self.arms, self.turn, self.condition = list(arms), arms[0], threading.Condition()

    def wait_for(self, name: str) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self.turn == name)

    def pass_on(self, name: str, leave: bool = False) -> None:
        with self.condition:
            place = self.arms.index(name)
            following = self.arms[(place + 1) % len(self.arms)]
            if leave:
                self.arms.remove(name)
            self.turn = following
            self.condition.notify_all()


class Arm(TrainerCallback):
    """A trainer that notes what each of its steps took."""

    def __init__(self, name: str, turnstile: Turnstile):
        self.name, self.turnstile = name, turnstile
        self.steps: list[dict] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)

    def attach(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer
        sampling = "_sample_chunks" if isinstance(trainer, ChunkwiseGRPOTrainer) else "_generate_single_turn"
        self._time(sampling, "sampling")
        if isinstance(trainer, ChunkwiseGRPOTrainer):
            self._time("_recompute", "logprobs")
        generate = trainer.model.generate

        def counted(*args, **kwargs):
            ids = generate(*args, **kwargs)
            width = kwargs["input_ids"].shape[1]
            self.counts["decode_steps"] += ids.shape[1] - width
            self.counts["slots"] += (ids.shape[1] - width) * len(ids)
            self.counts["prefilled"] += kwargs["attention_mask"].sum().item()
            self.counts["calls"] += 1
            return ids

        trainer.model.generate = counted

    def _time(self, method: str, key: str) -> None:
        call = getattr(self.trainer, method)

        def timed(*args, **kwargs):
            began = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[key] += time.process_time() - began

        setattr(self.trainer, method, timed)

    def run(self) -> None:
        self.turnstile.wait_for(self.name)
        try:
            self.trainer.train()
        finally:
            self.turnstile.pass_on(self.name, leave=True)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self.turnstile.pass_on(self.name)
            self.turnstile.wait_for(self.name)
        self.seconds.clear()
        self.counts.clear()
        self.began = time.process_time()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in logs:
            return
        step = time.process_time() - self.began
        prefix = "rollout/"
        self.steps.append(
            {
                "sampling": self.seconds["sampling"] - self.seconds["logprobs"],
                "logprobs": self.seconds["logprobs"],
                "step": step,
                **self.counts,
                "trained": logs["completions/mean_length"] * args.train_batch_size,
                "mean_length": logs["completions/mean_length"],
                "max_length": logs["completions/max_length"],
                **{key[len(prefix) :]: value for key, value in logs.items() if key.startswith(prefix)},
            }
        )


def summary(name: str, steps: list[dict], vanilla: list[dict]) -> dict:
    def middle(key: str) -> float:
        return statistics.median(step[key] for step in steps)

    def total(key: str) -> float:
        return sum(step.get(key, 0.0) for step in steps)

    def ratio(key: str, *added: str) -> float:
        ours, theirs = ([sum(step[k] for k in (key, *added)) for step in arm] for arm in (steps, vanilla))
        return round(statistics.median(ours) / statistics.median(theirs), 3)

    def ratio_of_means(key: str, *added: str) -> str:
        ours, theirs = ([sum(step[k] for k in (key, *added)) for step in arm] for arm in (steps, vanilla))
        chooser = random.Random(0)
        found = sorted(
            sum(chooser.choices(ours, k=len(ours))) / sum(chooser.choices(theirs, k=len(theirs))) for _ in range(1000)
        )
        return f"{sum(ours) / sum(theirs):.3f} ({found[50]:.2f} to {found[949]:.2f})"

    trained = total("trained")
    generated = total("tokens_generated") or trained
    return {
        "arm": name,
        "sampling s": round(middle("sampling"), 3),
        "logprobs s": round(middle("logprobs"), 3),
        "step s": round(middle("step"), 3),
        "sampling": ratio("sampling"),
        "sampling, means": ratio_of_means("sampling"),
        "with logprobs": ratio("sampling", "logprobs"),
        "with logprobs, means": ratio_of_means("sampling", "logprobs"),
        "step": ratio("step"),
        "step, means": ratio_of_means("step"),
        "slots used": round(generated / total("slots"), 3),
        "decode steps": round(total("decode_steps") / len(steps), 1),
        "rows a decode step": round(total("slots") / total("decode_steps"), 1),
        "prefilled tokens": round(total("prefilled") / len(steps)),
        "generate calls": round(total("calls") / len(steps), 2),
        "generated / trained": round(generated / trained, 3),
        "mean length": round(total("mean_length") / len(steps), 1),
        "longest": round(total("max_length") / len(steps), 1),
        "staleness": round(total("staleness/mean") / len(steps), 2),
        "staleness max": max(step.get("staleness/max", 0.0) for step in steps),
        "live rows": round(total("live_rows") / len(steps), 1),
        "waiting rows": round(total("waiting_rows") / len(steps), 1),
        "steps measured": len(steps),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--steps", type=int, default=60, help="measured, after the warm-up")
    parser.add_argument("--warm_start_steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=32, help="replies a step")
    parser.add_argument("--learning_rate", type=float, default=1e-7)
    parser.add_argument("--chunks", type=int, nargs="+", default=[LENGTH // 2, LENGTH // 4, LENGTH // 8])
    parser.add_argument("--json")
    arguments = parser.parse_args(argv)

    torch.set_num_threads(1)
    warm_up = LENGTH // min(arguments.chunks) + 2
    plans = {"vanilla": (None, {})}
    for chunk in arguments.chunks:
        name, split = f"L/{LENGTH // chunk}", {"rollout_batch_size": arguments.rows}
        plans[name] = (chunk, {"behavior_logprobs": "generation", **split})
        if chunk < LENGTH // 2:
            plans[f"{name}, recompute"] = (chunk, {"behavior_logprobs": "recompute", **split})
            plans[f"{name}, one call"] = (chunk, {"behavior_logprobs": "generation"})
    turnstile = Turnstile(list(plans))
    problems = example.problems(4096, seed=1)
    arms = []
    for name, (chunk, settings) in plans.items():
        arm = Arm(name, turnstile)
        policy = warm_policy(arguments.warm_start_steps)
        arm.attach(
            make_trainer(
                policy,
                problems,
                chunk,
                [arm],
                per_device_train_batch_size=arguments.rows,
                max_steps=warm_up + arguments.steps,
                learning_rate=arguments.learning_rate,
                seed=2,
                **settings,
            )
        )
        arms.append(arm)
    threads = [threading.Thread(target=arm.run) for arm in arms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    measured = {arm.name: arm.steps[warm_up:] for arm in arms}
    rows = [summary(name, steps, measured["vanilla"]) for name, steps in measured.items()]
    columns = [name for name in rows[0] if name != "steps measured"]
    for row, arm in zip(rows, arms):
        row["steps"] = arm.steps
    report(rows, columns, arguments.json)


if __name__ == "__main__":
    main()
