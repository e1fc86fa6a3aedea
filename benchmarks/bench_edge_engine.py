"""
The edge engine beside `model.generate`, drafts beside none, and memory beside the plan.

    python benchmarks/bench_edge_engine.py                      # all CPU parts: about half an hour on two cores
    python benchmarks/bench_edge_engine.py --parts speed draft
    python benchmarks/bench_edge_engine.py --parts gpu --json benchmarks/results/edge_engine_gpu.json   # on a CUDA GPU

`speed`: seconds a token of `generate`, of the engine with eager and with compiled steps; a tiny Llama (4 layers,
hidden size 128) and SmolLM2-135M-Instruct in float32, prompts of 100 tokens, 64 new ones. `draft`: SmolLM2 repeats a
paragraph of WikiText-2, the engine with prompt lookup beside the engine alone. Arms run interleaved, on one thread,
and CPU seconds are counted, so that other work on the machine matters less. `memory`: the anonymous memory of a
process at its peak, libraries included, beside the plan's bytes, reserve included; and after each 100 of 500 tokens.

`gpu`: MiniCPM4-8B's shape with random weights in bfloat16: bytes a second at batch 1 as a share of what copying a
large tensor reaches, and decode time over 131,072 and 32,768 cached tokens, sparse; with `--int4 FOLDER` the same for
an INT4 checkpoint of that shape.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from harness import machine
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from transformers_minicpm4 import InfLLMv2Config, MiniCPM4Config, MiniCPM4ForCausalLM
from transformers_minicpm4.cli.assets import smollm2_path
from transformers_minicpm4.edge.engine import EdgeEngine
from transformers_minicpm4.generation.drafts import PromptLookupDraft


PARTS = ("speed", "draft", "memory", "gpu")
PROMPT, NEW = 100, 64
RESULTS = Path(__file__).parent / "results" / "edge_engine_cpu.json"


def interleave(arms: dict, rounds: int, label: str) -> dict[str, list[float]]:
    """CPU seconds of every call, after one warm-up each; the order turns round from round to round."""
    for arm in arms.values():
        arm()
    times = {name: [] for name in arms}
    for turn in tqdm(range(rounds), desc=label, file=sys.stderr, leave=False):
        for name in list(arms)[:: 1 if turn % 2 == 0 else -1]:
            begin = time.process_time()
            arms[name]()
            times[name].append(time.process_time() - begin)
    return times


def compared(times: dict[str, list[float]], base: str, tokens: int) -> list[dict]:
    rows = []
    for name, values in times.items():
        ratios = sorted(theirs / mine for theirs, mine in zip(times[base], values, strict=True))
        rows.append(
            {
                "arm": name,
                "ms a token": round(statistics.median(values) / tokens * 1e3, 3),
                f"speed-up over {base}": round(statistics.median(ratios), 2),
                "range": [round(ratios[0], 2), round(ratios[-1], 2)],
                "rounds": len(values),
            }
        )
    return rows


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def smollm2():
    model = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(smollm2_path())


def speed(rounds: int) -> dict:
    return {name: speed_of(name, model, rounds) for name, model in {"tiny": tiny(), "SmolLM2": smollm2()[0]}.items()}


def speed_of(name: str, model, rounds: int) -> dict:
    prompts = [torch.randint(10, 500, (1, PROMPT), generator=torch.Generator().manual_seed(i)) for i in range(64)]
    engines = {
        f"engine, {'compiled' if compile else 'eager'}": EdgeEngine(model, context=256, compile=compile)
        for compile in (False, True)
    }
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    answers = {}
    # No prompt comes twice to an engine, which would find it in its cache.
    turns = dict.fromkeys(["generate", *engines], 0)

    def arm(name):
        prompt = prompts[turns[name]]
        turns[name] += 1
        if name == "generate":
            answer = model.generate(prompt, **options)[0, PROMPT:].tolist()
        else:
            answer = engines[name].generate(prompt[0].tolist(), **options).token_ids
        answers.setdefault(turns[name], []).append(answer)

    begin = time.perf_counter()
    engines["engine, compiled"].generate(prompts[-1][0].tolist(), max_new_tokens=2)
    compiling = time.perf_counter() - begin
    times = interleave({name: lambda name=name: arm(name) for name in turns}, rounds, name)
    same = sum(each[0] == other for each in answers.values() for other in each[1:])
    rows = compared(times, "generate", NEW)
    show(f"{name}, {PROMPT} + {NEW} tokens (equal answers: {same} of {2 * len(answers)})", rows)
    return {
        "arms": rows,
        "answers equal to generate's": f"{same} of {2 * len(answers)}",
        "seconds until compiled": round(compiling, 1),
    }


def paragraphs(tokenizer, count: int) -> list[list[dict]]:
    import pyarrow.parquet

    data = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext2" / "test.parquet"
    texts = [text.strip() for text in pyarrow.parquet.read_table(data)["text"].to_pylist()]
    texts = [text for text in texts if 90 <= len(tokenizer(text)["input_ids"]) <= 160][:count]
    return [[{"role": "user", "content": f"Repeat this text word for word:\n\n{text}"}] for text in texts]


def draft(rounds: int) -> dict:
    model, tokenizer = smollm2()
    prompts = paragraphs(tokenizer, rounds + 2)
    engines = {
        "no draft": EdgeEngine(model, tokenizer, context=512),
        "prompt lookup": EdgeEngine(model, tokenizer, context=512, draft=PromptLookupDraft()),
    }
    turns, answers, tokens, passes = (
        dict.fromkeys(engines, 0),
        {},
        dict.fromkeys(engines, 0),
        dict.fromkeys(engines, 0),
    )

    def arm(name):
        answer = engines[name].generate(prompts[turns[name]], max_new_tokens=96)
        turns[name] += 1
        answers.setdefault(turns[name], []).append(answer.token_ids)
        tokens[name] += len(answer.token_ids)
        passes[name] += answer.passes

    times = interleave({name: lambda name=name: arm(name) for name in engines}, rounds, "drafts")
    same = sum(one == other for one, other in answers.values())
    rows = compared(times, "no draft", 96)
    for row in rows:
        row["tokens a pass"] = round(tokens[row["arm"]] / passes[row["arm"]], 2)
    show(f"SmolLM2 repeats paragraphs, up to 96 tokens (equal answers: {same} of {len(answers)})", rows)
    return {"arms": rows, "equal answers": f"{same} of {len(answers)}"}


MEMORY = """
import json, sys, torch
torch.set_num_threads(1)
import transformers_minicpm4
from transformers_minicpm4.edge.engine import EdgeEngine
from transformers_minicpm4.edge.device_profile import detect

def status(name):
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(name))

engine = EdgeEngine.from_pretrained(sys.argv[1], context=2048, compile=False, profile=detect(cuda=()))
open("/proc/self/clear_refs", "w").write("5")
prompt = torch.randint(10, 40000, (1400,), generator=torch.Generator().manual_seed(0)).tolist()
engine.generate(prompt, max_new_tokens=10)
peak = status("VmHWM") - status("RssFile")
engine.model.generation_config.eos_token_id = None
marks = []
for count, piece in enumerate(engine.stream(prompt, max_new_tokens=500, eos_token_id=[]), 1):
    if engine.last.passes % 100 == 0:
        marks.append(status("RssAnon"))
planned = engine.plan.total_bytes
print(json.dumps({"planned": planned, "peak": peak, "after": marks, "tokens": len(engine.last.token_ids)}))
"""


def memory(rounds: int) -> dict:
    """In a process of its own; files that are mapped left out."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(smollm2_path())], capture_output=True, text=True, check=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    found["planned / peak"] = round(found["planned"] / found["peak"], 3)
    found["growth over 400 tokens, bytes"] = found["after"][-1] - found["after"][0]
    print(json.dumps(found, indent=1))
    return found


def gpu(rounds: int, int4: str | None) -> dict:
    if not torch.cuda.is_available():
        raise SystemExit("the part `gpu` needs a CUDA GPU, and PyTorch sees none here.")
    device = torch.device("cuda")
    found = {"device": torch.cuda.get_device_name(), "copy bytes a second": copy_bandwidth(device)}
    settings = InfLLMv2Config()
    config = MiniCPM4Config(
        vocab_size=73_448, hidden_size=4096, intermediate_size=16_384, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=2, max_position_embeddings=140_000, sparse_config=settings.to_dict(), eos_token_id=2,
    )  # fmt: skip
    models = {"bf16": lambda: random_model(config, device)}
    if int4:
        models["int4"] = lambda: AutoModelForCausalLM.from_pretrained(int4, device_map=device).eval()
    for name, make in models.items():
        model = make()
        engine = EdgeEngine(model, context=135_000)
        weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
        weights += sum(b.nbytes for b in model.buffers())
        row = {"weight bytes": weights}
        for length in (1024, 32_768, 131_072):
            row[f"ms a token at {length:,}"] = round(step_seconds(engine, length, rounds) * 1e3, 3)
        row["share of copy bandwidth at 1,024"] = round(
            weights / (row["ms a token at 1,024"] / 1e3) / found["copy bytes a second"], 3
        )
        row["131,072 / 32,768"] = round(row["ms a token at 131,072"] / row["ms a token at 32,768"], 3)
        row["eager equals captured"] = same_tokens(engine)
        found[name] = row
        print(name, json.dumps(row, indent=1), flush=True)
        del engine, model
        torch.cuda.empty_cache()
    return found


def random_model(config, device):
    with device:
        torch.set_default_dtype(torch.bfloat16)
        model = MiniCPM4ForCausalLM._from_config(config, attn_implementation="infllm_v2")
        torch.set_default_dtype(torch.float32)
    return model.eval()


def copy_bandwidth(device) -> float:
    """Bytes read and written a second by copying 2 GB."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        target.copy_(source)
    begin.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * source.nbytes / (begin.elapsed_time(end) / 1e3)


@torch.no_grad()
def step_seconds(engine: EdgeEngine, length: int, rounds: int) -> float:
    """A decode step behind `length` tokens, whose keys are noise: what a step costs does not depend on them."""
    runner = engine._runner
    for layer in runner.cache.layers:
        for tensor in layer.tensors():
            tensor.normal_()
    runner.lengths = [length]
    token = torch.tensor([7], device=runner.device)
    for _ in range(5):
        runner.decode(token)
    times = []
    for _ in range(max(rounds, 20)):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        runner.decode(token)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def same_tokens(engine: EdgeEngine) -> bool:
    """600 tokens with captured steps and without."""
    prompt = torch.randint(10, 70_000, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    plain = EdgeEngine(engine.model, context=700, compile=False, capture=False)
    options = {"max_new_tokens": 600, "eos_token_id": None}
    engine.reset()
    return engine.generate(prompt, **options).token_ids == plain.generate(prompt, **options).token_ids


def show(title: str, rows: list[dict]) -> None:
    print(f"\n{title}\n")
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--int4", metavar="FOLDER", help="an INT4 checkpoint for the part gpu")
    parser.add_argument("--json", default=RESULTS, help=f"default {RESULTS.relative_to(RESULTS.parents[2])}")
    args = parser.parse_args()
    if "gpu" not in args.parts:
        torch.set_num_threads(1)
    path = Path(args.json)
    kept = json.loads(path.read_text()) if path.is_file() else {}
    for part in args.parts:
        found = gpu(args.rounds, args.int4) if part == "gpu" else globals()[part](args.rounds)
        kept[part] = {"machine": machine(), **found}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(kept, indent=1) + "\n")
        partial.replace(path)


if __name__ == "__main__":
    main()
