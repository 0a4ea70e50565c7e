"""The benchmark of a base in shards, started as its docstring says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_two_processes_hold_half_of_the_base_each():
    command = [sys.executable, "benchmarks/sharding.py", "--json", "--blocks", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    assert told["faults"] == []
    assert done.returncode == 0
    assert 0.49 < told["held_ratio"] <= 0.51
    assert sum(told["shards"]) == pytest.approx(told["base"])
    assert told["lone_peak"] > 0
    assert 0 < told["difference"] <= 1e-5
