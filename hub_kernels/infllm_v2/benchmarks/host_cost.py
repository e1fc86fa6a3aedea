"""
What a decode step costs the host before Triton takes over: launches a layer, and the microseconds of Python,
dispatcher and checks around them. Runs anywhere: the launches are counted instead of made, so Triton's own launcher is
not in the figure.

    python hub_kernels/infllm_v2/benchmarks/host_cost.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path


os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from load import load


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="calls a figure is the median of")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    kernel, launches = load("cuda"), []
    kernel.ops.implementation = lambda tensor: kernel.ops._triton()
    kernel.ops._looks_at_values = lambda tensor: False  # as for tensors on a GPU
    triton.JITFunction.run = lambda self, *args, grid, warmup, **options: launches.append(self.fn.__name__)

    tokens, rows = 8192, 1
    query = torch.zeros(rows, 32, 1, 128, dtype=torch.bfloat16)
    key, value = torch.zeros(2, rows, 2, tokens, 128, dtype=torch.bfloat16)
    compressed = tuple(torch.zeros(rows, 2, tokens // n, 128, dtype=torch.bfloat16) for n in (16, 64))
    lengths = torch.full((rows,), tokens, dtype=torch.int32)

    def operators():
        scores = kernel.block_scores_decode(query.transpose(1, 2), *compressed, lengths, tokens)
        kernel.sparse_attention_decode(query.transpose(1, 2), key, value, lengths, scores=scores)

    def one_call():
        kernel.infllm_v2_attention(query, key, value, compressed_keys=compressed)

    results = []
    for name, run in (("the two operators", operators), ("infllm_v2_attention", one_call)):
        run()
        launches.clear()
        run()
        count, times = len(launches), []
        for _ in range(args.calls):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        results.append({"what": name, "launches": count, "microseconds": round(statistics.median(times) * 1e6, 1)})
    print("| decode step of one layer | launches | host, us (median) |\n| --- | --- | --- |")
    for row in results:
        print(f"| {row['what']} | {row['launches']} | {row['microseconds']} |")
    return results


if __name__ == "__main__":
    main()
