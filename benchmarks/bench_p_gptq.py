"""
Perplexity of a model after RTN, GPTQ, P-GPTQ and S-P-GPTQ, with and without the stored prefix, over seeds.

    python benchmarks/bench_p_gptq.py                 # 64 rows of 512 tokens, 32,768 tokens read, 5 seeds: hours
    python benchmarks/bench_p_gptq.py --quick         # 16 rows, 8,192 tokens, 3 seeds: about an hour of CPU
    python benchmarks/bench_p_gptq.py --peer          # GPTQ of Optimum and gptqmodel beside ours, same rows
    python benchmarks/bench_p_gptq.py --trained       # a small model that was never rounded: 15 minutes of CPU
    python benchmarks/bench_p_gptq.py --dtype float32 # on CPUs without bfloat16 instructions: three times faster

The model is SmolLM2-135M-Instruct as `make assets` makes it: its linear layers come from a Q4_1 file, so that even
"full precision" has been rounded once. All linear layers, groups of 64, symmetric. Calibration from the validation
split of WikiText-2, perplexity from its test split in rows of 512, over positions after the first of a row. Every row
begins with the model's `<|im_start|>`: computed by the quantized model ("computed"), or given as keys and values of
the full precision ("stored"). A seed is a choice of calibration rows, the same for all methods, so that they are
compared in pairs. Results go into the JSON file one by one; a run that was stopped goes on where it was. A seed that
was run in both dtypes counts once, as it was run last, and a pair is of one dtype. Full precision, rounding and CPU
seconds in the table are those of the checkpoint's dtype where they were run.

With `--trained` the model is the small Llama of `examples/p_gptq.py`, trained in float32 on the last three quarters of
the validation split (the train split is not among the shared data). Calibration is from the first quarter, in rows of
256; all else is as above.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from harness import machine
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from transformers_minicpm4 import PGPTQQuantizer, minicpm4_to_llama
from transformers_minicpm4.cli.assets import smollm2_path
from transformers_minicpm4.model.prefix_cache import PrefixCache
from transformers_minicpm4.quantization.p_gptq.calibration import calibration_rows
from transformers_minicpm4.quantization.p_gptq.solver import round_to_nearest


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import p_gptq


ROOT = Path(__file__).resolve().parents[1]
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext2"
GROUP = 64
PREFIX = [1]
ARMS = {
    "GPTQ": {"skip_first": 0, "prefix_weight": 1.0},
    "P-GPTQ, 4 left out": {"skip_first": 4, "prefix_weight": 0.0},
    "P-GPTQ, prefix left out": {"skip_first": 1, "prefix_weight": 0.0},
    "S-P-GPTQ, prefix left out": {"skip_first": 1, "prefix_weight": 0.0, "smoothing": True},
}

TRAINING = {"steps": 800, "batch_size": 4, "length": 512, "seed": 0}

# Runs in the peer's environment, where our package cannot be imported.
PEER = """
import json, sys, time, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
from optimum.gptq import GPTQQuantizer
source, rows, bits, output = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3]), sys.argv[4]
model = AutoModelForCausalLM.from_pretrained(source, dtype=sys.argv[5])
began = time.process_time()
quantizer = GPTQQuantizer(bits=bits, dataset=[{"input_ids": torch.tensor([r]), "attention_mask": torch.ones(1, len(r),
dtype=torch.long)} for r in rows],
    group_size=64, damp_percent=0.01, desc_act=False, act_group_aware=False, sym=True, batch_size=1, model_seqlen=512,
    modules_in_block_to_quantize=[["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
                                  ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]])
model = quantizer.quantize_model(model, AutoTokenizer.from_pretrained(source))
seconds = time.process_time() - began
state = {}
for name, module in model.named_modules():
    if hasattr(module, "dequantize_weight"):
        state[name + ".weight"] = module.dequantize_weight().t().contiguous()
torch.save({"seconds": seconds, "weights": state}, output)
"""


def load(source: Path, dtype: str = "auto"):
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()


def as_llama(checkpoint: Path) -> Path:
    """The same weights under Llama's names, which the peer knows."""
    folder = ROOT / "build" / "bench_p_gptq" / "smollm2-llama"
    if not (folder / "config.json").is_file():
        minicpm4_to_llama(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)).save_pretrained(
            folder
        )
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def texts(split: str) -> str:
    return "".join(pq.read_table(WIKITEXT / f"{split}.parquet")["text"].to_pylist())


def trained() -> Path:
    """The small model, trained once and kept."""
    folder = ROOT / "build" / "bench_p_gptq" / "-".join(["trained", *map(str, TRAINING.values())])
    if not folder.is_dir():
        began = time.process_time()
        text = texts("validation")
        model, tokenizer = p_gptq.train(text[len(text) // 4 :], **TRAINING)
        print(f"trained in {time.process_time() - began:.0f} CPU seconds", flush=True)
        partial = folder.with_name("trained.unfinished")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    return folder


@torch.no_grad()
def first_over_median(model, rows: torch.Tensor) -> list[float]:
    """Of each block: the largest |input| of down_proj at the prefix over the median position's, `rows` [B, S]."""
    found = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: found.append(args[0].abs().amax(-1)))
        for layer in model.model.layers
    ]
    model(input_ids=torch.cat([torch.tensor(PREFIX).expand(len(rows), -1), rows], 1))
    for handle in handles:
        handle.remove()
    return [round((largest[0, 0] / largest[:, 1:].median()).item(), 2) for largest in found]


@torch.no_grad()
def perplexity(model, rows: torch.Tensor, prefix: PrefixCache | None = None) -> float:
    """Over positions after the first of each row; the prefix computed by the model, or given."""
    total = 0.0
    for part in rows.split(4):
        if prefix is None:
            head = torch.tensor(PREFIX).expand(len(part), -1)
            logits = model(input_ids=torch.cat([head, part], 1)).logits[:, len(PREFIX) :]
        else:
            logits = model(input_ids=part, past_key_values=prefix.to_cache(model, len(part)), use_cache=True).logits
        total += functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        ).item()
    return math.exp(total / (rows.numel() - len(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer", action="store_true", help="compare with Optimum and gptqmodel (benchmarks/peers.py)")
    parser.add_argument("--trained", action="store_true", help="a small model trained here instead of SmolLM2")
    parser.add_argument("--seeds", type=int, nargs="+", help="choices of rows; default 0 1 2 3 4, with --quick 0 1 2")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32"], help="what the model computes in")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS), help="none: the peer alone")
    parser.add_argument("--json", type=Path, help="default benchmarks/results/p_gptq_{smollm2,trained}.json")
    args = parser.parse_args()
    if args.trained and args.peer:
        parser.error("--peer compares on SmolLM2; leave --trained out")
    name = "trained" if args.trained else "smollm2"
    args.json = args.json or ROOT / "benchmarks" / "results" / f"p_gptq_{name}.json"
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    num_samples, read, seeds = (16, 8192, range(3)) if args.quick else (64, 32768, range(5))
    source = trained() if args.trained else as_llama(smollm2_path())
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = torch.tensor(tokenizer(texts("test"), verbose=False)["input_ids"][:read]).view(-1, 512)
    setting = {"rows": num_samples, "row_tokens": 512, "tokens_read": read, "group_size": GROUP, "prefix": PREFIX}
    calibration_text, row_tokens = texts("validation"), 512
    if args.trained:
        calibration_text, row_tokens = calibration_text[: len(calibration_text) // 4], 256
        setting |= {"calibration_row_tokens": row_tokens, "training": TRAINING}
    done = json.loads(args.json.read_text()) if args.json.is_file() else {"machine": machine(), "runs": []}
    if done.setdefault("setting", setting) != setting:
        sys.exit(f"{args.json} has runs of another size; name another file with --json")

    def record(**run) -> None:
        done["runs"].append(run)
        args.json.write_text(json.dumps(done, indent=1) + "\n")
        print(json.dumps(run), flush=True)

    def known(method: str, bits: int, seed: int, dtype: str | None = None) -> bool:
        """`dtype` `None`: in either."""
        return any(
            (run["method"], run["bits"], run["seed"]) == (method, bits, seed)
            and dtype in (None, run.get("dtype", "auto"))
            for run in done["runs"]
        )

    def calibration(seed: int) -> list[torch.Tensor]:
        return calibration_rows(
            [calibration_text], tokenizer,
            num_samples=num_samples, max_length=row_tokens, seed=seed, prefix_ids=PREFIX,
        )  # fmt: skip

    in_dtype = {} if args.dtype == "auto" else {"dtype": args.dtype}
    model = load(source, **in_dtype)
    prefix = PrefixCache.from_model(model, PREFIX)
    if not known("full precision", 16, 0):
        record(
            method="full precision", bits=16, seed=0, **in_dtype,
            computed=perplexity(model, rows), stored=perplexity(model, rows, prefix),
            **({"first_over_median": first_over_median(model, rows[:8])} if args.trained else {}),
        )  # fmt: skip
    for bits in args.bits:
        if known("RTN", bits, 0):
            continue
        model = load(source, **in_dtype)
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.weight.data.copy_(round_to_nearest(module.weight, bits=bits, group_size=GROUP).dequantize())
        record(
            method="RTN", bits=bits, seed=0, **in_dtype,
            computed=perplexity(model, rows), stored=perplexity(model, rows, prefix),
        )  # fmt: skip
    for seed in args.seeds or seeds:
        for bits in args.bits:
            if args.peer:
                peer(source, rows, prefix, calibration(seed), bits, seed, args.dtype, known, record)
            for method in args.arms:
                if known(method, bits, seed, args.dtype):
                    continue
                model = load(source, **in_dtype)
                quantizer = PGPTQQuantizer(
                    bits=bits, group_size=GROUP, dataset=calibration(seed), num_samples=num_samples,
                    max_length=row_tokens, prefix_ids=PREFIX, **ARMS[method],
                )  # fmt: skip
                began = time.process_time()
                quantizer.quantize_model(model)
                seconds = time.process_time() - began
                down = [row["error"] for row in quantizer.report if row["layer"].endswith("down_proj")]
                record(
                    method=method, bits=bits, seed=seed, **in_dtype, seconds=round(seconds, 1),
                    computed=perplexity(model, rows), stored=perplexity(model, rows, quantizer.prefix),
                    down_proj_error=statistics.geometric_mean(down),
                )  # fmt: skip
    table(done["runs"])


def peer(source, rows, prefix, calibration, bits, seed, dtype, known, record) -> None:
    """GPTQ by Optimum and gptqmodel, and ours with the same settings (no scale search), on the same rows."""
    from peers import make_gptqmodel

    in_dtype = {} if dtype == "auto" else {"dtype": dtype}
    if not known("Optimum + gptqmodel", bits, seed, dtype):
        with tempfile.TemporaryDirectory(dir=ROOT / "build" / "bench_p_gptq") as folder:
            given, output, log = (Path(folder, name) for name in ("rows.json", "peer.pt", "peer.log"))
            given.write_text(json.dumps([row.tolist() for row in calibration]))
            command = [make_gptqmodel(), "-I", "-c", PEER, source, given, str(bits), output, dtype]
            with log.open("w") as file:
                if subprocess.run(command, stdout=file, stderr=file).returncode:
                    sys.exit(log.read_text()[-4000:])
            found = torch.load(output)
        model = load(source, dtype)
        state = model.state_dict()
        for name, weight in found["weights"].items():
            state[name].copy_(weight)
        assert len(found["weights"]) == 210, len(found["weights"])
        record(
            method="Optimum + gptqmodel", bits=bits, seed=seed, **in_dtype, seconds=round(found["seconds"], 1),
            computed=perplexity(model, rows), stored=perplexity(model, rows, prefix),
        )  # fmt: skip
    if not known("GPTQ, no scale search", bits, seed, dtype):
        model = load(source, dtype)
        quantizer = PGPTQQuantizer(
            bits=bits, group_size=GROUP, dataset=calibration, num_samples=len(calibration), max_length=512,
            skip_first=0, prefix_weight=1.0, scale_search=False, batch_size=1,
        )  # fmt: skip
        began = time.process_time()
        quantizer.quantize_model(model)
        seconds = time.process_time() - began
        record(
            method="GPTQ, no scale search", bits=bits, seed=seed, **in_dtype, seconds=round(seconds, 1),
            computed=perplexity(model, rows), stored=perplexity(model, rows, prefix),
        )  # fmt: skip


def table(runs: list[dict]) -> None:
    print("\n| bits | method | seeds | prefix computed | prefix stored | down_proj error | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for bits, method in dict.fromkeys((run["bits"], run["method"]) for run in runs):
        mine = {run["seed"]: run for run in runs if (run["bits"], run["method"]) == (bits, method)}.values()
        cells = []
        for key, form in (
            ("computed", "{:.2f}"),
            ("stored", "{:.2f}"),
            ("down_proj_error", "{:.2e}"),
            ("seconds", "{:.0f}"),
        ):
            values = [run[key] for run in mine if key in run]
            if key == "seconds":  # of one dtype: the checkpoint's, where there are such runs
                values = [run[key] for run in mine if key in run and "dtype" not in run] or values
            cell = form.format(statistics.mean(values)) if values else ""
            if len(values) > 1 and key in ("computed", "stored"):
                cell += f" ± {statistics.stdev(values):.2f}"
            cells.append(cell)
        print(f"| {bits} | {method} | {len(mine)} | " + " | ".join(cells) + " |")
    compared = [("GPTQ", method) for method in ARMS if method != "GPTQ"]
    for other, method in [*compared, ("Optimum + gptqmodel", "GPTQ, no scale search")]:
        print(f"\n{method} over {other}, same rows, perplexity as mean ± standard error over seeds:")
        for bits in dict.fromkeys(run["bits"] for run in runs):
            theirs, ours = (
                {(run["seed"], run.get("dtype")): run for run in runs if (run["bits"], run["method"]) == (bits, name)}
                for name in (other, method)
            )
            pairs = {key[0]: (ours[key], run) for key, run in theirs.items() if key in ours}  # a seed counts once
            if len(pairs) < 2:
                continue
            cells = []
            for key in ("computed", "stored"):
                above = [mine[key] / their[key] - 1 for mine, their in pairs.values()]
                error = statistics.stdev(above) / len(above) ** 0.5
                cells.append(f"{key} {statistics.mean(above):+.2%} ± {error:.2%}")
            time_ratio = statistics.median(mine["seconds"] / their["seconds"] for mine, their in pairs.values())
            print(f"{bits} bits, {len(pairs)} seeds: {', '.join(cells)}; CPU time {time_ratio:.2f} (median)")


if __name__ == "__main__":
    main()
