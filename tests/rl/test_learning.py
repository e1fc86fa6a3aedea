"""A real learning run: chunk-wise GRPO ends where GRPO ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_chunkwise_learning.py"


@pytest.mark.slow
def test_chunks_learn_as_much_as_whole_rollouts(tmp_path):
    """Three seeds of 100 steps each; final reward (of the last 20 steps) not below vanilla's by more than 0.03."""
    found = tmp_path / "learning.json"
    command = [sys.executable, str(SCRIPT), "--json", str(found), "--plot", str(tmp_path / "learning.png")]
    subprocess.run(command, check=True, env={**os.environ, "CI": "true"})
    result = json.loads(found.read_text())
    assert len(result["runs"]) == 6
    assert result["reward"]["difference"] > -0.03
    assert result["held_out"]["difference"] > -0.03
    assert result["held_out"]["chunk-wise, L/4"] > result["start"]
