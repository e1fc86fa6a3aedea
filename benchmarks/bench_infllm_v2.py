"""
InfLLM v2 against dense attention on CPU: a decode step, prefill, and peak memory. Selection is always included.

    python benchmarks/bench_infllm_v2.py --quick
    python benchmarks/bench_infllm_v2.py --json benchmarks/results/infllm_v2_cpu.json

The dense arm that counts is the fastest of Transformers' own SDPA path and SDPA with the group folded into the query
axis; for a slice of the last queries of a prefill a third one is added, SDPA without any mask, which computes a little
more but reads no mask and so bounds what dense can do. float32, head size 128, the released sparse_config.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from types import SimpleNamespace

import torch
from harness import interleave, report, summarize
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from transformers_minicpm4.infllm_v2 import InfLLMv2CacheLayer, InfLLMv2Config, infllm_v2_attention
from transformers_minicpm4.infllm_v2.reference import compress_keys


CONFIG = InfLLMv2Config()
SIZE = 128
SCALING = SIZE**-0.5


def make_keys(groups: int, total: int, correlated: bool) -> torch.Tensor:
    """Independent keys, or keys that drift: neighbouring queries then choose much the same blocks, as in real text."""
    key = torch.randn(1, groups, total, SIZE)
    if correlated:
        topics = torch.randn(1, groups, total // 512 + 1, SIZE).repeat_interleave(512, 2)[:, :, :total]
        key = 0.7 * key + topics
    return key


def decode(total: int, rounds: int) -> dict:
    """One step through the cache layer: 32 query heads, 2 key/value heads."""
    heads, groups = 32, 2
    layer = InfLLMv2CacheLayer(CONFIG)
    layer.update(make_keys(groups, total - 1, False), torch.randn(1, groups, total - 1, SIZE), row_starts=[0])
    query, new = torch.randn(1, heads, 1, SIZE), torch.randn(1, groups, 1, SIZE)
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True, training=False)

    def step(attend):
        def run():
            key, value = layer.update(new, new, row_starts=[0])
            result = attend(key, value)
            layer.crop(-1)
            return result

        return run

    arms = {
        "transformers sdpa": step(lambda k, v: sdpa_attention_forward(module, query, k, v, None, scaling=SCALING)),
        "sdpa, group folded": step(
            lambda k, v: scaled_dot_product_attention(query.view(1, groups, -1, SIZE), k, v, scale=SCALING)
        ),
        "infllm_v2": step(
            lambda k, v: infllm_v2_attention(query, k, v, CONFIG, compressed_keys=layer.compressed_keys)
        ),
    }
    row = summarize(interleave(arms, rounds, f"decode {total}"), "infllm_v2", list(arms)[:2])
    read = 2 * CONFIG.selected_blocks * CONFIG.block_size + sum(k.shape[2] for k in layer.compressed_keys)
    row.update(what="decode step", keys=total, limit=round(2 * total / read, 2))
    row["share of limit"] = f"{row['ratio'] / row['limit']:.0%}"
    return row


def prefill_slice(total: int, queries: int, rounds: int, correlated: bool) -> dict:
    """The last `queries` of `total` positions: 16 query heads, 1 key/value head."""
    heads = 16
    key, value = make_keys(1, total, correlated), torch.randn(1, 1, total, SIZE)
    query = torch.randn(1, heads, queries, SIZE)
    mask = torch.arange(total) <= torch.arange(total - queries, total)[:, None]
    module = SimpleNamespace(num_key_value_groups=heads, is_causal=True, training=False)
    compressed = tuple(compress_keys(key, *CONFIG.windows(coarse)) for coarse in (False, True))
    arms = {
        "transformers sdpa": lambda: sdpa_attention_forward(
            module, query, key, value, mask[None, None], scaling=SCALING
        ),
        "sdpa, no mask": lambda: scaled_dot_product_attention(query, key, value, scale=SCALING, enable_gqa=True),
        "sdpa, group folded, no mask": lambda: scaled_dot_product_attention(
            query.view(1, 1, -1, SIZE), key, value, scale=SCALING
        ),
        "infllm_v2": lambda: infllm_v2_attention(query, key, value, CONFIG, compressed_keys=compressed),
    }
    row = summarize(interleave(arms, rounds, f"prefill slice {total}"), "infllm_v2", list(arms)[:3])
    row.update(
        what=f"prefill, last {queries} queries, {'correlated' if correlated else 'independent'} keys", keys=total
    )
    return row


def prefill_whole(total: int, rounds: int) -> dict:
    """A whole causal prefill: 16 query heads, 1 key/value head."""
    heads = 16
    key, value = make_keys(1, total, False), torch.randn(1, 1, total, SIZE)
    query = torch.randn(1, heads, total, SIZE)
    module = SimpleNamespace(num_key_value_groups=heads, is_causal=True, training=False)
    arms = {
        "transformers sdpa": lambda: sdpa_attention_forward(module, query, key, value, None, scaling=SCALING),
        "infllm_v2": lambda: infllm_v2_attention(query, key, value, CONFIG),
    }
    row = summarize(interleave(arms, rounds, f"prefill {total}"), "infllm_v2", list(arms)[:1])
    row.update(what="prefill, whole", keys=total)
    return row


PEAK = """
import resource, sys, torch
torch.set_num_threads(2)
from transformers_minicpm4.infllm_v2 import InfLLMv2Config, infllm_v2_attention
total = int(sys.argv[1])
def run(n):
    q, k = torch.randn(1, 16, n, 128), torch.randn(1, 1, n, 128)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        out = infllm_v2_attention(q, k, k, InfLLMv2Config())
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20, out.numel() * 4 / 2**30
peak, output = run(total)
print(peak - output)
"""


def peak_memory(total: int) -> dict:
    """Peak resident memory of a whole prefill beyond inputs and output, in a process of its own, in GiB."""
    result = subprocess.run([sys.executable, "-c", PEAK, str(total)], capture_output=True, text=True, check=True)
    return {
        "what": "prefill, peak memory beyond inputs and output, GiB",
        "keys": total,
        "ratio": round(float(result.stdout), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short lengths and few rounds, under a minute")
    parser.add_argument("--only", choices=["decode", "slice", "whole", "memory"], help="one part alone")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    lengths = (32_768,) if args.quick else (32_768, 131_072)
    with torch.no_grad():
        if args.only in (None, "decode"):
            rows += [decode(total, 11 if args.quick else 51) for total in lengths]
        if args.only in (None, "slice") and args.quick:
            rows.append(prefill_slice(32_768, 256, 3, False))
        elif args.only in (None, "slice"):
            cases = [(total, correlated) for total in (32_768, 65_536) for correlated in (False, True)]
            rows += [prefill_slice(total, 1024, 3, correlated) for total, correlated in cases]
        if args.only in (None, "whole") and not args.quick:
            rows += [prefill_whole(total, rounds) for total, rounds in ((8_192, 5), (16_384, 3), (32_768, 1))]
        if args.only in (None, "memory") and not args.quick:
            rows.append(peak_memory(65_536))
    for row in rows:
        row["median ms"] = ", ".join(f"{name} {value:,.1f}" for name, value in row.get("median_ms", {}).items())
        row["range"] = " to ".join(map(str, row.get("ratio_range", [])))
    report(rows, ["what", "keys", "ratio", "range", "limit", "share of limit", "median ms"], args.json)


if __name__ == "__main__":
    main()
