"""
Packed ternary linear layers on CPU against dense layers and PyTorch's own int8 and int4 products.

    python benchmarks/bench_ternary.py --quick
    python benchmarks/bench_ternary.py --json benchmarks/results/ternary_cpu.json

The layers are those of an 8B model's MLP, 4096 x 16384 and back. All arms of a row run in turns, so that the dense
arms empty the caches before the packed one reads its weight from memory. int4 holds the same ternary weight in
groups, int8 the same codes with one scale an output (it has no groups). Before anything is timed every arm's answer is
checked against the dense product of its weight in float64. Memory is that of a process which does nothing but hold
and run one layer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import torch
from harness import interleave, report, summarize

from transformers_minicpm4.quantization.bitcpm4 import ternary_cpu
from transformers_minicpm4.quantization.bitcpm4.ternary_linear import dequantize_ternary, ternary_linear
from transformers_minicpm4.quantization.bitcpm4.ternary_packing import pack_ternary, unpack_ternary


SHAPES = [(16384, 4096), (4096, 16384)]
MEMORY_ARMS = ("none", "packed", "dense fp32", "dense bf16", "int8 bf16", "int4 bf16")


def make_packed(outputs: int, inputs: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random packed layer, built in small blocks so that building it leaves no trace in peak memory."""
    packed = torch.empty(outputs, inputs // 4, dtype=torch.uint8)
    for rows in packed.split(8):
        rows.copy_(pack_ternary(torch.randint(-1, 2, (len(rows), inputs), dtype=torch.int8)))
    return packed, (torch.rand(outputs, -(-inputs // group)) * 0.02 + 0.01).half()


def int4_layer(packed: torch.Tensor, scales: torch.Tensor, group: int, inputs: int, dtype: torch.dtype) -> tuple:
    """The same weight for `_weight_int4pack_mm_for_cpu`: 4-bit codes, a scale and an offset a group."""
    codes = unpack_ternary(packed, inputs).int() + 8
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    steps = scales.T.to(dtype)
    return weight, group, torch.stack([steps, torch.zeros_like(steps)], 2).contiguous()


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def product(outputs: int, inputs: int, group: int, rows: int, rounds: int) -> dict:
    """Time of one layer at `rows` rows, all arms."""
    packed, scales = make_packed(outputs, inputs, group)
    weight = dequantize_ternary(packed, scales, group, inputs)
    half = weight.bfloat16()
    x = torch.randn(rows, inputs)
    x_half = x.bfloat16()
    linear = torch.nn.functional.linear
    arms = {
        "ours fp32": lambda: ternary_linear(x, packed, scales, group),
        "ours bf16": lambda: ternary_linear(x_half, packed, scales, group),
        "dense fp32": lambda: linear(x, weight),
        "dense bf16": lambda: linear(x_half, half),
    }
    want = x.double() @ weight.double().T
    limits = {"ours fp32": 1e-6, "ours bf16": 5e-3, "dense fp32": 1e-5, "dense bf16": 2e-2}
    codes = unpack_ternary(packed, inputs)
    channel = scales[:, 0].contiguous()
    # PyTorch's float32 forms of these take minutes for many rows.
    both = (("bf16", torch.bfloat16, x_half), ("fp32", torch.float32, x))
    for name, dtype, given in both[: 2 if rows == 1 else 1]:
        four = int4_layer(packed, scales, group, inputs, dtype)
        arms[f"int4 {name}"] = lambda given=given, four=four: torch.ops.aten._weight_int4pack_mm_for_cpu(given, *four)
        limits[f"int4 {name}"] = 2e-2
        steps = channel.to(dtype)
        arms[f"int8 {name}"] = lambda given=given, steps=steps: torch.ops.aten._weight_int8pack_mm(given, codes, steps)
    errors = {}
    for name in list(arms):
        try:
            answer = arms[name]()
        except RuntimeError as error:  # an arm that this build of PyTorch lacks
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
            del arms[name]
            continue
        expected = x.double() @ (codes * channel[:, None].double()).T if name.startswith("int8") else want
        errors[name] = relative_rms(answer, expected)
        if errors[name] > limits.get(name, 2e-2):
            raise SystemExit(f"{name} at {rows} rows answers something else: relative RMS {errors[name]:.1e}")
    arms["read dense fp32"] = weight.view(torch.int32).max  # a read of the largest weight, as fast as PyTorch reads
    times = interleave(arms, rounds, f"{outputs} x {inputs}, {rows} rows")
    row = summarize(times, "ours fp32", ["dense fp32"])
    ours = packed.nbytes + scales.nbytes
    read = weight.nbytes / row["median_ms"]["read dense fp32"] / 1e6
    speed = ours / row["median_ms"]["ours fp32"] / 1e6
    row |= {
        "what": "decode" if rows == 1 else "prefill",
        "layer": f"{inputs} -> {outputs}",
        "group": group,
        "rows": rows,
        "over dense bf16": summarize(times, "ours bf16", ["dense bf16"])["ratio"],
        "GB/s": round(speed, 2),
        "GB/s read": round(read, 2),
        "share of bandwidth": f"{speed / read:.0%}" if rows == 1 else "",
        "relative_rms": {name: float(f"{error:.2e}") for name, error in errors.items()},
    }
    for bits in ("int8", "int4"):
        present = [name for name in times if name.startswith(bits)]
        if present:
            row[f"over {bits}"] = summarize(times, "ours fp32", present)["ratio"]
    return row


# -------------------------------------------------------------------------------------------------------------- memory


def status(field: str) -> int:
    """Bytes of a field of `/proc/self/status`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024


def hold(arm: str, outputs: int, inputs: int, group: int) -> dict:
    """Memory of this process with one layer: how much it grew, and how much more at most while the layer ran."""
    if arm == "packed":
        ternary_cpu.kernels()
    x = torch.randn(1, inputs, dtype=torch.float32 if arm in ("none", "packed", "dense fp32") else torch.bfloat16)
    small = torch.randn(64, 64)
    torch.nn.functional.linear(small, small)  # what PyTorch itself takes at a first call
    make_packed(64, inputs, group)
    before = status("VmRSS")
    call = None
    if arm == "packed":
        packed, scales = make_packed(outputs, inputs, group)
        call = lambda: ternary_linear(x, packed, scales, group)  # noqa: E731
    elif arm.startswith("dense"):
        weight = torch.ones(outputs, inputs, dtype=x.dtype)
        call = lambda: torch.nn.functional.linear(x, weight)  # noqa: E731
    elif arm == "int8 bf16":
        codes, steps = torch.ones(outputs, inputs, dtype=torch.int8), torch.ones(outputs, dtype=x.dtype)
        call = lambda: torch.ops.aten._weight_int8pack_mm(x, codes, steps)  # noqa: E731
    elif arm == "int4 bf16":
        four = torch.zeros(outputs, inputs // 2, dtype=torch.uint8).fill_(0x99)
        steps = torch.ones(inputs // group, outputs, 2, dtype=x.dtype)
        call = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, four, group, steps)  # noqa: E731
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    for _ in range(5 if call else 0):
        call()
    return {"resident": status("VmRSS") - before, "peak": status("VmHWM") - before}


def memory(outputs: int, inputs: int, group: int) -> dict:
    """Every arm in a process of its own."""
    found = {}
    for arm in MEMORY_ARMS:
        command = [sys.executable, __file__, "--hold", arm, *map(str, (outputs, inputs, group))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[arm] = json.loads(said.splitlines()[-1])
    dense = found["dense bf16"]
    return {
        "what": "memory",
        "layer": f"{inputs} -> {outputs}",
        "group": group,
        "resident over bf16": round(found["packed"]["resident"] / dense["resident"], 3),
        "peak over bf16": round(found["packed"]["peak"] / dense["peak"], 3),
        "MiB": {arm: {name: round(size / 2**20, 1) for name, size in sizes.items()} for arm, sizes in found.items()},
    }


def stored(outputs: int, inputs: int, group: int) -> dict:
    """The layer's tensors over the bytes of its bfloat16 weight."""
    packed, scales = make_packed(outputs, inputs, group)
    size = (packed.nbytes + scales.nbytes) / (outputs * inputs * 2)
    name = "channel" if group == inputs else group
    return {"what": "state dict", "layer": f"{inputs} -> {outputs}", "group": name, "size over bf16": round(size, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape and few rounds, under a minute")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--only", choices=["decode", "prefill", "memory", "size"], help="one part alone")
    parser.add_argument("--json", metavar="FILE", help="write all figures there as JSON")
    parser.add_argument("--hold", nargs=4, metavar=("ARM", "O", "I", "G"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.hold:
        print(json.dumps(hold(args.hold[0], *map(int, args.hold[1:]))))
        return
    load = os.getloadavg()[0]
    shapes, groups = (SHAPES[:1], (64,)) if args.quick else (SHAPES, (64, 128))
    rows = []
    with torch.inference_mode():
        for outputs, inputs in shapes if args.only in (None, "decode") else ():
            rows += [product(outputs, inputs, group, 1, 7 if args.quick else 41) for group in groups]
        for outputs, inputs in shapes if args.only in (None, "prefill") and not args.quick else ():
            rows += [product(outputs, inputs, 64, count, rounds) for count, rounds in ((32, 11), (512, 3))]
        for outputs, inputs in shapes if args.only in (None, "memory") else ():
            rows += [memory(outputs, inputs, group) for group in groups]
        if args.only in (None, "size"):
            rows += [stored(16384, 4096, group) for group in (32, 64, 128, 4096)]
    for row in rows:
        if "median_ms" in row:
            row["median ms"] = ", ".join(f"{name} {value:,.2f}" for name, value in row["median_ms"].items())
            row["range"] = " to ".join(map(str, row["ratio_range"]))
        row["load before"] = round(load, 2)
        row["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "unset")
    timing = [
        "what", "layer", "group", "rows", "ratio", "range", "over dense bf16", "over int8", "over int4", "GB/s",
        "share of bandwidth", "median ms",
    ]  # fmt: skip
    tables = {"median_ms": timing, "MiB": ["what", "layer", "group", "resident over bf16", "peak over bf16", "MiB"]}
    for key, columns in {**tables, "size over bf16": ["what", "layer", "group", "size over bf16"]}.items():
        if chosen := [row for row in rows if key in row]:
            report(chosen, columns, None)
            print()
    if args.json:
        report(rows, ["what", "layer", "group"], args.json)


if __name__ == "__main__":
    main()
