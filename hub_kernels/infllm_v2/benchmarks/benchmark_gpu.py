"""
The kernels on a GPU against dense attention: correctness first, then speed. Needs torch and triton, nothing else;
under eight minutes.

    python hub_kernels/infllm_v2/benchmarks/benchmark_gpu.py --json gpu.json

What is measured (bfloat16, head size 128, 32 query and 2 key/value heads, blocks of 64 tokens, causal):

- training: forward and backward at 32K x 8, 64K x 4 and 128K x 2 with 64 blocks read, against PyTorch's FlashAttention
  and cuDNN backends and the flash-attn package where installed. Two sets of blocks: "window" (the first block, the
  query's own and the 32 before it, the rest at random) and "random" (the own one, the rest at random: nothing shared);
- selection at 128K (compress, score, choose; released config) beside the sparse forward;
- prefill at 128K and decode at 128K, batch 16, released config (96 blocks), selection included, against the fastest
  dense arm, the one with the group folded into the query axis among them.

Times are medians over rounds in which the arms take turns; the ceilings (copy bandwidth, matrix product rate) are
measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from load import load


HEADS, GROUPS, SIZE, BLOCK = 32, 2, 128, 64
WINDOWS = {"size": 32, "stride": 16, "ratio": 4}
RELEASED = {"num_selected": 96, "init_blocks": 1, "window_blocks": 32, "block_size": BLOCK}
# (tokens, rows) of the published table, and its ratios of FlashAttention to the original CUDA kernels, both passes
# (H100).
TABLE = {(32_768, 8): 1.57, (65_536, 4): 2.76, (131_072, 2): 4.61}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative RMS


class Bench:
    """One device, its clock, and how long to measure."""

    def __init__(self, device: str, rounds: int):
        self.device, self.rounds, self.cuda = device, rounds, device == "cuda"

    def seconds(self, run) -> float:
        """One call on the device's own clock."""
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def interleave(self, arms: dict, rounds: int | None = None) -> dict[str, float]:
        """Median milliseconds of each arm; an arm that fails is reported and left out."""
        times = {}
        for name, run in list(arms.items()):
            try:
                run()
                run()
                times[name] = []
            except (RuntimeError, ValueError, NotImplementedError) as error:
                print(f"  (left out: {name}: {str(error).splitlines()[0][:120]})", flush=True)
        for turn in range(rounds or self.rounds):
            for name in list(times)[:: 1 if turn % 2 == 0 else -1]:
                times[name].append(self.seconds(arms[name]))
        return {name: statistics.median(values) * 1e3 for name, values in times.items()}

    def graph(self, run):
        """The same work as one graph replay, as a server would run it; without a GPU the call itself."""
        if not self.cuda:
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


def bounds(lengths: list[int], device: str) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item() if want.any() else float(got.norm())


# ------------------------------------------------------------------------------------------------------- correctness


def check(kernel, bench: Bench, lengths: tuple[int, ...], dtypes, shapes) -> list[dict]:
    """Every operator against the definition in float32, on inputs drawn anew; raises where an error is too large."""
    plain, device, rows = kernel.ops.plain, bench.device, []
    for dtype in dtypes:
        for group, size in shapes:
            cu, longest, total = bounds(list(lengths), device), max(lengths), sum(lengths)
            args = (cu, cu, longest, longest)
            query = torch.randn(total, group * 2, size, device=device).to(dtype)
            key, value = torch.randn(2, total, 2, size, device=device).to(dtype)
            scaling = size**-0.5
            fine, coarse = kernel.compress_keys(key, cu, longest, **WINDOWS)
            want_fine, want_coarse = plain.compress_keys(key.float(), cu, longest, *WINDOWS.values())
            scores = kernel.block_scores(query, fine, coarse, *args, **WINDOWS)
            want_scores = plain.block_scores(query, fine, coarse, *args, BLOCK, *WINDOWS.values(), scaling)
            positions = torch.cat([torch.arange(length) for length in lengths]).int().to(device)
            blocks = kernel.select_blocks(scores, positions, 9, window_blocks=3)
            if not torch.equal(blocks, plain.select_blocks(scores, positions, 9, 1, 3, BLOCK)):
                raise SystemExit("select_blocks chooses other blocks than its definition")
            inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
            output, lse = kernel.sparse_attention(*inputs, blocks, *args)
            grad = torch.randn_like(output)
            output.backward(grad)
            exact = (query.float(), key.float(), value.float())
            want, want_lse = plain.sparse_attention(*exact, blocks, *args, BLOCK, scaling)
            gradients = plain.sparse_attention_backward(
                grad.float(), *exact, want, want_lse, blocks, *args, BLOCK, scaling
            )
            found = {
                "fine": (fine, want_fine), "coarse": (coarse, want_coarse), "scores": (scores, want_scores),
                "output": (output, want), "lse": (lse, want_lse),
                **{f"gradient of {n}": (t.grad, w) for n, t, w in zip(("query", "key", "value"), inputs, gradients)},
            }  # fmt: skip
            again = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
            kernel.sparse_attention(*again, blocks, *args)[0].backward(grad)
            if not all(torch.equal(a.grad, b.grad) for a, b in zip(inputs, again)):
                raise SystemExit("two backward passes differ")
            found.update(check_decode(kernel, plain, dtype, group, size, device, longest))
            for name, (got, reference) in found.items():
                error = relative_rms(got.detach(), reference)
                rows.append(
                    {"operator": name, "dtype": str(dtype)[6:], "group": group, "head size": size, "error": error}
                )
                limit = 1e-5 if name in ("scores", "lse") else TOLERANCE[dtype]
                if not error <= limit:
                    raise SystemExit(
                        f"{name} ({dtype}, group {group}, head size {size}): relative RMS {error:.2e} > {limit}"
                    )
    return rows


def check_decode(kernel, plain, dtype, group, size, device, longest):
    lengths = torch.tensor([longest, longest // 3], dtype=torch.int32, device=device)
    query = torch.randn(2, 3, group * 2, size, device=device).to(dtype)
    key, value = torch.randn(2, 2, 2, longest, size, device=device).to(dtype)
    fine, coarse = (torch.zeros(2, 2, longest // n + 1, size, device=device, dtype=dtype) for n in (16, 64))
    kernel.update_compressed_keys(
        key, fine, coarse, torch.zeros_like(lengths), torch.zeros_like(lengths), lengths, longest, **WINDOWS
    )
    scores = kernel.block_scores_decode(query, fine, coarse, lengths, longest, **WINDOWS)
    want_scores = plain.block_scores_decode(
        query, fine, coarse, lengths, None, longest, BLOCK, *WINDOWS.values(), size**-0.5
    )
    tree = torch.tensor([[1, 3, 5]] * 2, device=device)
    found = {"scores of a decode step": (scores, want_scores)}
    for name, mask in (("decode", None), ("decode, tree", tree)):
        got = kernel.sparse_attention_decode(
            query, key, value, lengths, scores=scores, tree_mask=mask, num_selected=9, window_blocks=3
        )
        want = plain.sparse_attention_decode(
            query.float(),
            key.float(),
            value.float(),
            None,
            scores,
            lengths,
            None,
            None,
            None,
            mask,
            9,
            1,
            3,
            BLOCK,
            size**-0.5,
        )
        found[name] = (got, want)
    return found


# ------------------------------------------------------------------------------------------------------------- speed


def ceilings(bench: Bench, side: int) -> dict:
    """What the device reaches in a plain copy and a plain matrix product."""
    a, b = torch.randn(2, side, side, device=bench.device).bfloat16()
    source = torch.empty(side * side * 8, device=bench.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times = bench.interleave({"product": lambda: a @ b, "copy": lambda: target.copy_(source)})
    return {
        "TFLOP/s": round(2 * side**3 / times["product"] / 1e9, 1),
        "GB/s": round(2 * source.numel() * 2 / times["copy"] / 1e6, 1),
    }


def draw_blocks(rows: int, tokens: int, selected: int, window: int, device: str) -> torch.Tensor:
    """Blocks `[G, S, T]` as `select_blocks` would give them for random scores."""
    num_blocks, queries = tokens // BLOCK, rows * tokens
    own = (torch.arange(tokens, device=device) // BLOCK).repeat(rows)
    blocks = torch.empty(GROUPS, queries, selected, dtype=torch.int32, device=device)
    candidate = torch.arange(num_blocks, device=device)
    for g in range(GROUPS):
        for begin in range(0, queries, 8192):
            at = own[begin : begin + 8192, None]
            score = torch.rand(at.shape[0], num_blocks, device=device)
            forced = (candidate >= at - window) | (candidate < (window > 0))
            score.masked_fill_(forced, 2.0).masked_fill_(candidate > at, -1.0)
            best = score.topk(selected, dim=1)
            index = best.indices.masked_fill(best.values < 0, num_blocks).sort(1).values
            blocks[g, begin : begin + 8192] = index.masked_fill(index == num_blocks, -1).int()
    return blocks


def sdpa(backend):
    def attend(query, key, value):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return attend


def dense_arms() -> dict:
    arms = {"SDPA, flash": sdpa(SDPBackend.FLASH_ATTENTION), "SDPA, cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION)}
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return arms

    def flash_attn(query, key, value):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return flash_attn_func(query, key, value, causal=True).transpose(1, 2)

    return {"flash-attn package": flash_attn, **arms}


def training(kernel, bench: Bench, tokens: int, rows: int, published: float | None, selected: int) -> list[dict]:
    """Forward and backward of every arm, dense and sparse."""
    print(f"training: {tokens:,} tokens x {rows}", flush=True)
    device = bench.device
    query = torch.randn(rows, tokens, HEADS, SIZE, device=device).bfloat16().requires_grad_()
    key, value = (torch.randn(rows, tokens, GROUPS, SIZE, device=device).bfloat16().requires_grad_() for _ in range(2))
    inputs, grad, cu = (query, key, value), torch.randn_like(query), bounds([tokens] * rows, device)
    arms = {
        name: lambda attend=attend: attend(*(t.transpose(1, 2) for t in inputs)).transpose(1, 2)
        for name, attend in dense_arms().items()
    }
    for name, window in (("InfLLM v2, window", 32 if selected > 33 else 1), ("InfLLM v2, random", 0)):
        blocks = draw_blocks(rows, tokens, selected, window, device)
        arms[name] = lambda blocks=blocks: kernel.sparse_attention(
            *(t.flatten(0, 1) for t in inputs), blocks, cu, cu, tokens, tokens
        )[0].view_as(query)

    def forward(run):
        with torch.no_grad():
            run()

    def both(run):
        for tensor in inputs:
            tensor.grad = None
        run().backward(grad)

    ahead = bench.interleave({name: lambda run=run: forward(run) for name, run in arms.items()}, 5)
    total = bench.interleave({name: lambda run=run: both(run) for name, run in arms.items()}, 3)
    product = 2 * rows * tokens * selected * BLOCK * HEADS * SIZE  # operations of one product over the blocks read
    flash = next((name for name in ("flash-attn package", "SDPA, flash") if name in total), None)
    results = []
    for name in total:
        row = {"tokens": tokens, "rows": rows, "arm": name, "forward ms": round(ahead[name], 2)}
        row.update({"backward ms": round(total[name] - ahead[name], 2), "both ms": round(total[name], 2)})
        if flash and name.startswith("InfLLM"):
            row["forward, ratio to FlashAttention-2"] = round(ahead[flash] / ahead[name], 2)
            row["both, ratio to FlashAttention-2"] = round(total[flash] / total[name], 2)
            row["both, published ratio of the CUDA kernels (H100)"] = published
            row["forward TFLOP/s"] = round(2 * product / ahead[name] / 1e9, 1)
            # 2 products forward; backward 3 for the queries, 4 for keys and values.
            row["both TFLOP/s"] = round(9 * product / total[name] / 1e9, 1)
        results.append(row)
    return results


def selection(kernel, bench: Bench, tokens: int) -> dict:
    """Compress, score and choose for one row of `tokens`, beside the sparse forward over what was chosen."""
    print(f"selection: {tokens:,} tokens", flush=True)
    device = bench.device
    query = torch.randn(tokens, HEADS, SIZE, device=device).bfloat16()
    key, value = torch.randn(2, tokens, GROUPS, SIZE, device=device).bfloat16()
    cu = bounds([tokens], device)
    step = min(tokens, 16_384)
    chunks = [
        (
            begin,
            bounds([step], device),
            bounds([begin + step], device),
            torch.arange(begin, begin + step, device=device).int(),
        )
        for begin in range(0, tokens, step)
    ]
    fine, coarse = kernel.compress_keys(key, cu, tokens, **WINDOWS)

    def score():
        return [
            kernel.block_scores(query[at : at + step], fine, coarse, q, k, step, at + step, **WINDOWS)
            for at, q, k, _ in chunks
        ]

    scores = score()

    def choose():
        return [kernel.select_blocks(part, chunk[3], **RELEASED) for part, chunk in zip(scores, chunks)]

    width = min(RELEASED["num_selected"], tokens // BLOCK)
    blocks = torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=-1) for part in choose()], 1)
    times = bench.interleave({
        "compress": lambda: kernel.compress_keys(key, cu, tokens, **WINDOWS),
        "score": score,
        "choose": choose,
        "sparse forward": lambda: kernel.sparse_attention(query, key, value, blocks, cu, cu, tokens, tokens),
    })  # fmt: skip
    products = HEADS * SIZE * 2 * sum(t // 16 + t // 64 for t in range(0, tokens, 64)) * 64
    total = times["compress"] + times["score"] + times["choose"]
    return {
        "tokens": tokens, **{f"{name} ms": round(value, 3) for name, value in times.items()},
        "selection over sparse forward": round(total / times["sparse forward"], 3),
        "score TFLOP/s": round(products / times["score"] / 1e9, 1),
    }  # fmt: skip


def prefill(kernel, bench: Bench, tokens: int) -> dict:
    """A whole causal prefill of one row, selection included."""
    print(f"prefill: {tokens:,} tokens", flush=True)
    query = torch.randn(1, HEADS, tokens, SIZE, device=bench.device).bfloat16()
    key, value = torch.randn(2, 1, GROUPS, tokens, SIZE, device=bench.device).bfloat16()
    arms = {name: lambda attend=attend: attend(query, key, value) for name, attend in dense_arms().items()}
    arms["InfLLM v2"] = lambda: kernel.infllm_v2_attention(query, key, value)
    return compare({"what": "prefill", "tokens": tokens, "rows": 1}, bench.interleave(arms, 5))


def decode(kernel, bench: Bench, tokens: int, rows: int) -> list[dict]:
    """One step of `rows` rows, as a call and as a graph replay (the dense arms alike)."""
    print(f"decode: {tokens:,} tokens x {rows}", flush=True)
    device = bench.device
    query = torch.randn(rows, 1, HEADS, SIZE, device=device).bfloat16()
    key, value = torch.randn(2, rows, GROUPS, tokens, SIZE, device=device).bfloat16()
    lengths = torch.full((rows,), tokens, dtype=torch.int32, device=device)
    fine, coarse = (torch.zeros(rows, GROUPS, tokens // n, SIZE, device=device).bfloat16() for n in (16, 64))
    zeros = torch.zeros_like(lengths)
    kernel.update_compressed_keys(key, fine, coarse, zeros, zeros, lengths, tokens, **WINDOWS)
    folded = query.view(rows, GROUPS, HEADS // GROUPS, SIZE)

    def fold(backend):
        def run():
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(folded, key, value)

        return run

    def grouped():
        return scaled_dot_product_attention(query.transpose(1, 2), key, value, enable_gqa=True)

    def sparse():
        scores = kernel.block_scores_decode(query, fine, coarse, lengths, tokens, **WINDOWS)
        return kernel.sparse_attention_decode(query, key, value, lengths, scores=scores, **RELEASED)

    arms = {
        "SDPA, group folded, flash": fold(SDPBackend.FLASH_ATTENTION),
        "SDPA, group folded, cuDNN": fold(SDPBackend.CUDNN_ATTENTION),
        "SDPA, group folded, efficient": fold(SDPBackend.EFFICIENT_ATTENTION),
        "SDPA, enable_gqa": grouped,
    }
    try:
        from flash_attn import flash_attn_with_kvcache

        kept = [tensor.transpose(1, 2) for tensor in (key, value)]
        arms["flash-attn package, kvcache"] = lambda: flash_attn_with_kvcache(query, *kept, cache_seqlens=lengths)
    except ImportError:
        pass
    arms["InfLLM v2"] = sparse
    read = rows * GROUPS * SIZE * 2 * (2 * RELEASED["num_selected"] * BLOCK + tokens // 16 + tokens // 64)
    results = []
    for how, prepare in (("call", lambda run: run), ("graph replay", bench.graph)):
        prepared = {}
        for name, run in arms.items():
            try:
                prepared[name] = prepare(run)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                print(f"  (left out: {name}: {str(error).splitlines()[0][:120]})", flush=True)
        row = compare(
            {"what": f"decode, {how}", "tokens": tokens, "rows": rows}, bench.interleave(prepared, 4 * bench.rounds)
        )
        row["byte limit"] = round(2 * rows * GROUPS * tokens * SIZE * 2 / read, 2)
        row["sparse GB/s"] = round(read / row["ms"]["InfLLM v2"] / 1e6, 1)
        results.append(row)
    return results


def compare(row: dict, times: dict) -> dict:
    peers = {name: value for name, value in times.items() if name != "InfLLM v2"}
    fastest = min(peers, key=peers.get) if peers else None
    row["ms"] = {name: round(value, 4) for name, value in times.items()}
    if fastest:
        row.update({"fastest dense": fastest, "ratio": round(peers[fastest] / times["InfLLM v2"], 2)})
    return row


# ------------------------------------------------------------------------------------------------------------ report


def table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for row in rows:
        cells = [row.get(name, "") for name in columns]
        cells = [
            ", ".join(f"{k} {v}" for k, v in cell.items()) if isinstance(cell, dict) else str(cell) for cell in cells
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all figures there as JSON")
    parser.add_argument(
        "--only", choices=["check", "training", "selection", "prefill", "decode"], nargs="+", help="parts"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="tiny sizes, to see that the script runs (on a CPU through the interpreter)",
    )
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        parser.error("no GPU here; --smoke runs tiny sizes through Triton's interpreter (set TRITON_INTERPRET=1)")
    torch.manual_seed(0)
    kernel, bench = load(device), Bench(device, 1 if args.smoke else 9)
    parts = args.only or ["check", "training", "selection", "prefill", "decode"]
    start = time.perf_counter()
    report = {
        "device": torch.cuda.get_device_name() if bench.cuda else platform.processor(),
        "capability": torch.cuda.get_device_capability() if bench.cuda else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python " + " ".join(sys.argv),
        "ceilings": ceilings(bench, 64 if args.smoke else 8192),
    }
    print(json.dumps(report, indent=1), flush=True)
    if "check" in parts:
        if args.smoke:
            report["check"] = check(kernel, bench, (33,), [torch.float32], [(2, 16)])
        else:
            report["check"] = check(kernel, bench, (1500, 1, 700), list(TOLERANCE), [(16, 128), (1, 64), (4, 80)])
        worst = max(report["check"], key=lambda row: row["error"])
        print(
            f"correct: {len(report['check'])} comparisons, largest relative RMS {worst['error']:.1e} ({worst})",
            flush=True,
        )
    if "training" in parts:
        report["training"] = []
        for (tokens, rows), published in ({(128, 1): None} if args.smoke else TABLE).items():
            report["training"] += training(kernel, bench, tokens, rows, published, 2 if args.smoke else 64)
            if bench.cuda:
                torch.cuda.empty_cache()
        print(table(report["training"]), flush=True)
    if "selection" in parts:
        report["selection"] = selection(kernel, bench, 128 if args.smoke else 131_072)
        print(table([report["selection"]]), flush=True)
    if "prefill" in parts:
        report["prefill"] = prefill(kernel, bench, 128 if args.smoke else 131_072)
        print(table([report["prefill"]]), flush=True)
    if "decode" in parts:
        shapes = [(128, 1)] if args.smoke else [(131_072, 16), (131_072, 1), (32_768, 16)]
        report["decode"] = [row for tokens, rows in shapes for row in decode(kernel, bench, tokens, rows)]
        print(table(report["decode"]), flush=True)
    report["seconds"] = round(time.perf_counter() - start, 1)
    print(f"{report['seconds']} s")
    if args.json:
        partial = Path(args.json + ".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(args.json)


if __name__ == "__main__":
    main()
