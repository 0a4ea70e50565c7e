"""The benchmark of training's switches, started as its docstring says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_checkpointing_takes_less_memory_in_a_process_of_its_own_for_the_same_adapter():
    command = [sys.executable, "benchmarks/training.py", "--json", "--steps", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    assert told["faults"] == []
    assert done.returncode == 0
    assert 50 < told["saving_mib"] < 2 / 3 * told["plain_mib"]
    assert told["difference"] <= 1e-5
    assert told["batch_seconds"] < 0.1 * told["eager_seconds"]
    assert told["compiling_seconds"] > told["compiled_seconds"]
