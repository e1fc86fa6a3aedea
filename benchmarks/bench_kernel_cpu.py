"""
The Hub kernel's C++ operators against dense attention on CPU: a decode step and a slice of a prefill, with selection.

    python hub_kernels/infllm_v2/scripts/build.py
    python benchmarks/bench_kernel_cpu.py --quick
    python benchmarks/bench_kernel_cpu.py --json benchmarks/results/kernel_cpu.json

All arms take one step through the same cache and run in turns. `kernel` is the kernel's one-call
`infllm_v2_attention`, `kernel, operators` its operators one by one; `blockwise` is this package without the kernel.
The dense arm that counts is the fastest. float32, head size 128, the released sparse_config. On a machine that others
use too, set OMP_WAIT_POLICY=passive: each parallel region otherwise waits for the scheduler, in every arm.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from bench_infllm_v2 import CONFIG, SCALING, SIZE, make_keys
from harness import interleave, report, summarize
from kernels import get_local_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from transformers_minicpm4.infllm_v2 import InfLLMv2CacheLayer, infllm_v2_attention
from transformers_minicpm4.infllm_v2.reference import compress_keys


KERNEL = Path(__file__).resolve().parents[1] / "hub_kernels" / "infllm_v2"
WINDOWS = {"size": CONFIG.kernel_size, "stride": CONFIG.kernel_stride, "ratio": 4}
CHOICE = {
    "num_selected": CONFIG.selected_blocks,
    "init_blocks": CONFIG.init_blocks,
    "window_blocks": CONFIG.window_size // CONFIG.block_size,
    "block_size": CONFIG.block_size,
}
FIELDS = (
    "kernel_size", "kernel_stride", "init_blocks", "block_size", "window_size", "topk", "dense_len", "dense_switch",
)  # fmt: skip
SETTINGS = {name: getattr(CONFIG, name) for name in FIELDS}


def compare(arms: dict, peers: list[str], rounds: int, label: str) -> dict:
    """The kernel's ratio over the fastest dense arm, and the other sparse arms' beside it."""
    times = interleave(arms, rounds, label)
    row = summarize(times, "kernel", peers)
    for name in arms:
        if name not in ("kernel", *peers):
            row[f"ratio, {name}"] = summarize(times, name, peers)["ratio"]
    return row


def decode(kernel, total: int, rounds: int, dtype: torch.dtype) -> dict:
    """One step through the cache layer: 32 query heads, 2 key/value heads."""
    heads, groups = 32, 2
    layer = InfLLMv2CacheLayer(CONFIG)
    value = torch.randn(1, groups, total - 1, SIZE, dtype=dtype)
    layer.update(make_keys(groups, total - 1, False).to(dtype), value, row_starts=[0])
    query = torch.randn(1, heads, 1, SIZE, dtype=dtype)
    new = torch.randn(1, groups, 1, SIZE, dtype=dtype)
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True, training=False)
    lengths = torch.tensor([total], dtype=torch.int32)

    def step(attend):
        def run():
            key, value = layer.update(new, new, row_starts=[0])
            result = attend(key, value)
            layer.crop(-1)
            return result

        return run

    def operators(key, value):
        queries = query.transpose(1, 2)
        fine, coarse = layer.compressed_keys
        scores = kernel.block_scores_decode(
            queries, fine, coarse, lengths, total, block_size=CONFIG.block_size, **WINDOWS
        )
        return kernel.sparse_attention_decode(queries, key, value, lengths, scores=scores, **CHOICE).transpose(1, 2)

    arms = {
        "transformers sdpa": step(lambda k, v: sdpa_attention_forward(module, query, k, v, None, scaling=SCALING)),
        "sdpa, group folded": step(
            lambda k, v: scaled_dot_product_attention(query.view(1, groups, -1, SIZE), k, v, scale=SCALING)
        ),
        "blockwise": step(
            lambda k, v: infllm_v2_attention(query, k, v, CONFIG, compressed_keys=layer.compressed_keys)
        ),
        "kernel": step(
            lambda k, v: kernel.infllm_v2_attention(query, k, v, compressed_keys=layer.compressed_keys, **SETTINGS)
        ),
        "kernel, operators": step(operators),
    }
    row = compare(arms, list(arms)[:2], rounds, f"decode {total}")
    read = 2 * CONFIG.selected_blocks * CONFIG.block_size + sum(k.shape[2] for k in layer.compressed_keys)
    row.update(what=f"decode step, {str(dtype).removeprefix('torch.')}", keys=total, limit=round(2 * total / read, 2))
    row["share of limit"] = f"{row['ratio'] / row['limit']:.0%}"
    return row


def prefill_slice(kernel, total: int, queries: int, rounds: int, correlated: bool) -> dict:
    """The last `queries` of `total` positions: 16 query heads, 1 key/value head."""
    heads = 16
    key, value = make_keys(1, total, correlated), torch.randn(1, 1, total, SIZE)
    query = torch.randn(1, heads, queries, SIZE)
    mask = torch.arange(total) <= torch.arange(total - queries, total)[:, None]
    module = SimpleNamespace(num_key_value_groups=heads, is_causal=True, training=False)
    compressed = tuple(compress_keys(key, *CONFIG.windows(coarse)) for coarse in (False, True))
    packed = tuple(keys[0].transpose(0, 1) for keys in compressed)
    bounds_q, bounds_k = (torch.tensor([0, count], dtype=torch.int32) for count in (queries, total))
    positions = torch.arange(total - queries, total, dtype=torch.int32)

    def operators():
        rows = query[0].transpose(0, 1)
        scores = kernel.block_scores(
            rows, *packed, bounds_q, bounds_k, queries, total, block_size=CONFIG.block_size, **WINDOWS
        )
        blocks = kernel.select_blocks(scores, positions, **CHOICE)
        return kernel.sparse_attention(
            rows, key[0].transpose(0, 1), value[0].transpose(0, 1), blocks, bounds_q, bounds_k, queries, total,
            block_size=CONFIG.block_size,
        )  # fmt: skip

    arms = {
        "transformers sdpa": lambda: sdpa_attention_forward(
            module, query, key, value, mask[None, None], scaling=SCALING
        ),
        "sdpa, no mask": lambda: scaled_dot_product_attention(query, key, value, scale=SCALING, enable_gqa=True),
        "sdpa, group folded, no mask": lambda: scaled_dot_product_attention(
            query.view(1, 1, -1, SIZE), key, value, scale=SCALING
        ),
        "blockwise": lambda: infllm_v2_attention(query, key, value, CONFIG, compressed_keys=compressed),
        "kernel": lambda: kernel.infllm_v2_attention(query, key, value, compressed_keys=compressed, **SETTINGS),
        "kernel, operators": operators,
    }
    row = compare(arms, list(arms)[:3], rounds, f"prefill slice {total}")
    row.update(
        what=f"prefill, last {queries} queries, {'correlated' if correlated else 'independent'} keys", keys=total
    )
    return row


def prefill_whole(kernel, total: int, rounds: int) -> dict:
    """A whole causal prefill: 16 query heads, 1 key/value head."""
    heads = 16
    key, value = make_keys(1, total, False), torch.randn(1, 1, total, SIZE)
    query = torch.randn(1, heads, total, SIZE)
    module = SimpleNamespace(num_key_value_groups=heads, is_causal=True, training=False)
    arms = {
        "transformers sdpa": lambda: sdpa_attention_forward(module, query, key, value, None, scaling=SCALING),
        "kernel": lambda: kernel.infllm_v2_attention(query, key, value, **SETTINGS),
    }
    row = compare(arms, list(arms)[:1], rounds, f"prefill {total}")
    row.update(what="prefill, whole", keys=total)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short lengths and few rounds, under a minute")
    parser.add_argument("--only", choices=["decode", "slice", "whole"], help="one part alone")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--kernel", type=Path, default=KERNEL, help="the kernel's folder, which holds build/")
    parser.add_argument("--json", metavar="FILE", help="write all figures there as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    kernel = get_local_kernel(args.kernel, backend="cpu")
    rows = []
    lengths = (32_768,) if args.quick else (32_768, 131_072)
    with torch.no_grad():
        if args.only in (None, "decode"):
            rows += [decode(kernel, total, 11 if args.quick else 51, torch.float32) for total in lengths]
            if not args.quick:
                rows.append(decode(kernel, 131_072, 51, torch.bfloat16))
        if args.only in (None, "slice") and args.quick:
            rows.append(prefill_slice(kernel, 32_768, 256, 3, False))
        elif args.only in (None, "slice"):
            rows += [prefill_slice(kernel, 65_536, 1024, 3, correlated) for correlated in (False, True)]
        if args.only in (None, "whole") and not args.quick:
            rows += [prefill_whole(kernel, total, rounds) for total, rounds in ((8_192, 3), (16_384, 3), (32_768, 1))]
    for row in rows:
        row["median ms"] = ", ".join(f"{name} {value:,.1f}" for name, value in row["median_ms"].items())
        row["range"] = " to ".join(map(str, row["ratio_range"]))
        row["operators"] = row.get("ratio, kernel, operators", "")
        row["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "unset")
    report(rows, ["what", "keys", "ratio", "operators", "range", "limit", "share of limit", "median ms"], args.json)


if __name__ == "__main__":
    main()
