"""
Peak memory of P-GPTQ from a path at the widths of MiniCPM4-8B, in a process of its own.

    OMP_NUM_THREADS=1 python benchmarks/bench_p_gptq_memory.py --json benchmarks/results/p_gptq_memory_cpu.json

The checkpoint has random weights and two of the model's 32 blocks: blocks are read, solved and put away one by one, so
that a second one shows whether anything stays. Its head is tied to the embeddings, that of the released model is a
matrix of its own, 1.2 GB more in float32. Calibration is 8 rows of 512 tokens; more rows add their hidden states,
which are counted here by hand, and of which at most 4 GB stay in memory. Some ten minutes of CPU and 5 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from harness import report
from transformers.utils import logging

from transformers_minicpm4 import MiniCPM4Config, MiniCPM4ForCausalLM


WIDTHS = {
    "vocab_size": 73448, "hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32,
    "num_key_value_heads": 2, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256,
}  # fmt: skip
ROWS, TOKENS = 8, 512
PRESET_ROWS = 1024

QUANTIZE = f"""
import json, sys, time
import torch
from transformers_minicpm4 import PGPTQConfig, PGPTQQuantizer

def peak():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

imported = peak()
rows = [torch.randint(0, 73448, ({TOKENS},), generator=torch.Generator().manual_seed(row)) for row in range({ROWS})]
config = PGPTQConfig.minicpm4(dataset=rows, num_samples={ROWS}, max_length={TOKENS})
quantizer = PGPTQQuantizer.from_pretrained(sys.argv[1], config=config, compute_dtype=getattr(torch, sys.argv[3]))
loaded, began, peaks = peak(), time.process_time(), []
solve = quantizer._solve_block
quantizer._solve_block = lambda *args: (solve(*args), peaks.append(peak()))
quantizer.quantize(sys.argv[2])
seconds = time.process_time() - began
print(json.dumps({"imported": imported, "loaded": loaded, "blocks": peaks, "end": peak(), "seconds": seconds}))
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--compute-dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = MiniCPM4Config(**WIDTHS, num_hidden_layers=arguments.blocks, dtype=torch.bfloat16)
        torch.set_default_dtype(torch.bfloat16)
        model = MiniCPM4ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        model.save_pretrained(Path(folder) / "source")
        block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
        rest = sum(parameter.numel() for parameter in model.parameters()) - arguments.blocks * block
        del model
        command = [sys.executable, "-c", QUANTIZE, f"{folder}/source", f"{folder}/int4", arguments.compute_dtype]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(result.stderr[-4000:])
        found = json.loads(result.stdout.splitlines()[-1])
    size = {"float32": 4, "bfloat16": 2}[arguments.compute_dtype]
    row = {
        "compute dtype": arguments.compute_dtype,
        "embeddings and head, GB": round(rest * size / 1e9, 2),
        "one block, GB": round(block * size / 1e9, 2),
        "after opening, GB": round(found["loaded"] / 1e9, 2),
        **{f"peak after block {index}, GB": round(peak / 1e9, 2) for index, peak in enumerate(found["blocks"])},
        "peak in all, GB": round(found["end"] / 1e9, 2),
        f"states of {PRESET_ROWS} rows, GB": round(PRESET_ROWS * TOKENS * WIDTHS["hidden_size"] * size / 1e9, 2),
        "CPU s a block": round(found["seconds"] / arguments.blocks),
    }
    report([row], list(row), arguments.json)


if __name__ == "__main__":
    main()
