"""The scripts beside the kernel, at tiny sizes or for one target: a machine with a GPU has only to start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


def run(script, *arguments, **environment):
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run(
        [sys.executable, ROOT / script, *arguments], capture_output=True, text=True, env=variables, check=False
    )


def test_every_kernel_fits_a_gpu_that_is_not_here(tmp_path):
    """Compiled ahead of time for one target; `make kernels-aot` does all of them."""
    found = run("scripts/aot.py", "--targets", "sm_90", "--jobs", "1", "--json", str(tmp_path / "aot.json"))
    assert found.returncode == 0, found.stderr
    rows = json.loads((tmp_path / "aot.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} >= {"compress", "scores", "select", "forward", "backward_key", "decode"}
    assert all(row["spilled bytes a thread"] == 0 for row in rows)
    refused = run("scripts/aot.py", "--only", "no_such_kernel")
    assert refused.returncode == 2
    assert "no kernel no_such_kernel; there are compress" in refused.stderr


@pytest.mark.skipif(sys.platform == "darwin", reason="Triton's interpreter is not built for macOS")
def test_the_gpu_benchmark_runs_at_tiny_sizes(tmp_path):
    arguments = ("--smoke", "--only", "check", "decode", "--json", str(tmp_path / "gpu.json"))
    found = run("benchmarks/benchmark_gpu.py", *arguments, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert found.returncode == 0, found.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["operator"] for row in report["check"]} >= {"output", "gradient of key", "decode, tree"}
    assert all(row["ms"]["InfLLM v2"] > 0 for row in report["decode"])


def test_the_host_makes_four_launches_a_decode_step():
    found = run("benchmarks/host_cost.py", "--calls", "3")
    assert found.returncode == 0, found.stderr
    assert "| infllm_v2_attention | 4 |" in found.stdout
