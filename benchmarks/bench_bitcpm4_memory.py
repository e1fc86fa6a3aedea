"""
Bytes of SmolLM2-135M in bfloat16 and with packed ternary layers: on disk, and resident after loading and one forward
pass of 64 tokens, each arm in a process of its own. Rounded without training: sizes do not depend on the values.

    OMP_NUM_THREADS=1 python benchmarks/bench_bitcpm4_memory.py --json benchmarks/results/bitcpm4_memory_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from harness import report
from transformers import AutoModelForCausalLM

from transformers_minicpm4.cli.assets import smollm2_path
from transformers_minicpm4.quantization.bitcpm4.quantizer import BitCPM4Quantizer, packed_sizes


ARM = """
import gc, json, sys
import torch, transformers_minicpm4
from transformers import AutoModelForCausalLM

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096

# What importing and a first small product take is no model's doing.
torch.ones(64, 64) @ torch.ones(64, 64)
before = resident()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
with torch.no_grad():
    model(input_ids=torch.arange(64)[None], use_cache=False, logits_to_keep=1)
print(json.dumps({"resident": resident() - before}))
"""


def measure(folder: Path) -> int:
    # PyTorch's own allocations go back to the system at once, so that what is resident is what is held.
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", ARM, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])["resident"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--json")
    parser.add_argument("--group_size", type=int, default=64)
    arguments = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "bfloat16"
        AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.bfloat16).save_pretrained(dense)
        quantizer = BitCPM4Quantizer.from_pretrained(dense, group_size=arguments.group_size)
        packed = quantizer.quantize(Path(folder) / "packed")
        sizes = packed_sizes(AutoModelForCausalLM.from_pretrained(packed))
        layers = {"bfloat16": sizes["ternary_bfloat16"], "packed ternary": sizes["ternary"]}
        for name, path in (("bfloat16", dense), ("packed ternary", packed)):
            files = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            rows.append(
                {
                    "weights": name,
                    "converted layers, MB": round(layers[name] / 1e6, 1),
                    "all files, MB": round(files / 1e6, 1),
                    "resident, MB": round(measure(path) / 1e6, 1),
                }
            )
    for column in list(rows[0])[1:]:
        rows[1][column.replace(", MB", ", ratio")] = round(rows[1][column] / rows[0][column], 3)
    report(rows, [*rows[0], *[column for column in rows[1] if column.endswith("ratio")]], arguments.json)


if __name__ == "__main__":
    main()
