"""
Compile every Triton kernel ahead of time for GPUs that are not here, and tell what each needs.

    python hub_kernels/infllm_v2/scripts/aot.py                       # all targets, a Markdown table
    python hub_kernels/infllm_v2/scripts/aot.py --targets sm_90 --only forward

Compiling is not correctness: it shows that a kernel fits a GPU's registers and shared memory. The launches are those
of the operators themselves at the released shapes (bfloat16, 32 query and 2 key/value heads, head size 128,
96 blocks of 64),
recorded instead of run; nothing here is written down a second time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from load import load
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


# Shared memory one block may use, in bytes (CUDA programming guide, technical specifications per compute capability;
# LDS of a CDNA 3 compute unit).
SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_87": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_110": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
NO_SPILLS = ("sm_80", "sm_87", "sm_89", "sm_90")
torch.set_num_threads(1)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def record(dtype: torch.dtype, target: str) -> list[tuple]:
    """Every kernel once, with the arguments it is launched with: (name, function, arguments, options)."""
    triton_kernels = load("cuda").ops._triton()
    sys.modules[triton_kernels.__name__.replace("kernels", "common")].CAPABILITY = (
        int(target[3:]) // 10 if target.startswith("sm_") else 8
    )
    launches = {}

    def run(self, *args, grid, warmup=False, **options):
        launches.setdefault(self.fn.__name__, (self, args, options))

    original, triton.JITFunction.run = triton.JITFunction.run, run
    try:
        heads, groups, size, queries, keys = 32, 2, 128, 256, 131_072
        query, key = torch.empty(queries, heads, size, dtype=dtype), torch.empty(keys, groups, size, dtype=dtype)
        rows = (
            torch.tensor([0, queries], dtype=torch.int32),
            torch.tensor([0, keys], dtype=torch.int32),
            queries,
            keys,
        )
        windows, scaling = (32, 16, 4), size**-0.5
        fine, coarse = triton_kernels.compress_keys(key, rows[1], keys, *windows)
        triton_kernels.block_scores(query, fine, coarse, *rows, 64, *windows, scaling)
        scores = torch.empty(groups, queries, keys // 64)
        triton_kernels.select_blocks(scores, torch.zeros(queries, dtype=torch.int32), 96, 1, 32, 64)
        blocks = torch.zeros(groups, queries, 96, dtype=torch.int32)
        lse = torch.empty(queries, heads)
        triton_kernels.sparse_attention(query, key, key, blocks, *rows, 64, scaling)
        triton_kernels.sparse_attention_backward(query, query, key, key, query, lse, blocks, *rows, 64, scaling)
        one, cache = torch.empty(1, 1, heads, size, dtype=dtype), key.transpose(0, 1)[None]
        lengths = torch.tensor([keys], dtype=torch.int32)
        compressed = [tensor.transpose(0, 1)[None] for tensor in (fine, coarse)]
        triton_kernels.block_scores_decode(one, *compressed, lengths, None, keys, 64, *windows, scaling)
        triton_kernels.sparse_attention_decode(
            one, cache, cache, None, scores[:, :1], lengths, None, None, None, None, 96, 1, 32, 64, scaling
        )
    finally:
        triton.JITFunction.run = original
    return [(name.strip("_").removesuffix("_kernel"), *launch) for name, launch in launches.items()]


def compile_for(target: str, function, args, options) -> dict:
    """Registers, spills and shared memory of one kernel on one target."""
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(function.params, args)):
        if parameter.is_constexpr or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    chip = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    compiled = triton.compile(source, target=chip, options=options)
    if target.startswith("sm_"):
        registers, spilled = _cubin_usage(compiled.asm["cubin"])
    else:
        facts = {name: int(count) for name, count in re.findall(r"\.(\w+):\s+(\d+)\s*$", compiled.asm["amdgcn"], re.M)}
        registers, spilled = facts["vgpr_count"], facts["private_segment_fixed_size"]
    return {
        "registers": registers,
        "spilled bytes a thread": spilled,
        "shared bytes": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
    }


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    figures = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return figures["REG"], figures["STACK"] + figures["LOCAL"]


def _task(task: tuple[str, str, str]) -> dict:
    target, name, dtype = task
    for kernel, function, args, options in record(getattr(torch, dtype), target):
        if kernel == name:
            return {"kernel": name, "target": target, **compile_for(target, function, args, options)}
    raise ValueError(f"no kernel {name!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=SHARED_LIMIT,
        metavar="TARGET",
        help=f"among {', '.join(SHARED_LIMIT)} (all that fit the dtype)",
    )
    parser.add_argument("--only", nargs="+", metavar="KERNEL", help="these kernels alone, by name as in the table")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="processes")
    parser.add_argument("--json", metavar="FILE", help="write the table there as JSON")
    args = parser.parse_args()
    # The float32 products of a CUDA build of torch are not those of a ROCm build.
    fits = [
        target
        for target in SHARED_LIMIT
        if args.dtype != "float32" or target.startswith("sm_") != bool(torch.version.hip)
    ]
    targets = args.targets or fits
    names = [name for name, *_ in record(getattr(torch, args.dtype), "sm_80")]
    unknown = sorted(set(args.only or ()) - set(names))
    if unknown:
        parser.error(f"no kernel {', '.join(unknown)}; there are {', '.join(names)}")
    tasks = [(target, name, args.dtype) for name in args.only or names for target in targets]
    rows = []
    print("| kernel | target | warps | registers | spilled bytes a thread | shared bytes |\n" + "| --- " * 6 + "|")
    with contextlib.ExitStack() as stack:
        run = map
        if args.jobs > 1:
            # Not forked: a child of a process whose OpenMP threads have run waits for them forever.
            context = multiprocessing.get_context("spawn")
            run = stack.enter_context(ProcessPoolExecutor(args.jobs, context)).map
        for row in run(_task, tasks):
            rows.append(row)
            print(
                f"| {row['kernel']} | {row['target']} | {row['warps']} | {row['registers']} | "
                f"{row['spilled bytes a thread']} | {row['shared bytes']:,} |",
                flush=True,
            )
    if args.json:
        partial = Path(args.json + ".partial")
        partial.write_text(
            json.dumps({"triton": triton.__version__, "dtype": args.dtype, "rows": rows}, indent=1) + "\n"
        )
        partial.replace(args.json)
    bad = []
    for row in rows:
        name = f"{row['kernel']} on {row['target']}"
        if row["shared bytes"] > SHARED_LIMIT[row["target"]]:
            bad.append(
                f"{name}: {row['shared bytes']:,} bytes of shared memory, {SHARED_LIMIT[row['target']]:,} are there"
            )
        if row["spilled bytes a thread"] and row["target"] in NO_SPILLS and args.dtype != "float32":
            bad.append(f"{name}: spills {row['spilled bytes a thread']} bytes a thread")
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
