"""The benchmark that times a real federation: what it calls a fault, and one quick story for real."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deploying import faults, story
from deployment import faults_table, story_table
from differences import largest_difference
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "benchmarks/deployment.py"]


def a_run(folder, value=1.0, counted=faults.ROUNDS, rounds=faults.ROUNDS, name="a"):
    """A finished run's folder, in whose first `counted` rounds the victim counted."""
    (folder / "adapter").mkdir(parents=True)
    save_file({name: torch.tensor([value, 2.0])}, folder / "adapter" / "adapter_model.safetensors")
    lines = [
        {"round": n, "clients": [{"client_id": faults.VICTIM, "weight": float(n <= counted)}]}
        for n in range(1, rounds + 1)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


WHOLE = faults.Cost(fault="none", seconds=60.0, lost=0.0, resumed=False, difference=0.0, counted=5, ended="", faults=())


def judged(tmp_path, fault, **mine):
    a_run(tmp_path / "whole")
    folder = a_run(tmp_path / "mine", **mine)
    federation = SimpleNamespace(run_folder=lambda kind, task: tmp_path / task)
    return faults._judged(federation, fault, folder, 72.5, "error: x; go on with resume=true", [], WHOLE)


def test_a_run_that_came_to_the_same_adapter_holds(tmp_path):
    found = judged(tmp_path, faults.Fault(name="f"), value=1.0 + 5e-7)
    assert (found.faults, found.lost, found.resumed, found.counted) == ((), 12.5, True, 5)


def test_another_adapter_is_a_fault_where_the_same_clients_were_to_count(tmp_path):
    found = judged(tmp_path, faults.Fault(name="f"), value=1.1)
    assert found.faults == ("its adapter differs by 0.1, client 1 counted in 5 rounds",)
    assert "its adapter differs" in str(list(faults_table([found]).columns[-1].cells))


def test_a_client_that_missed_a_round_is_a_fault_unless_the_fault_wants_it(tmp_path):
    assert judged(tmp_path / "a", faults.Fault(name="f"), counted=4).faults
    assert not judged(tmp_path / "b", faults.Fault(name="f", equal=False), counted=0, value=3.0).faults


def test_a_run_with_too_few_rounds_is_a_fault(tmp_path):
    assert judged(tmp_path, faults.Fault(name="f", equal=False), rounds=3).faults == (
        "client 1 was asked in 3 rounds of 5",
    )


def test_the_largest_difference_is_by_tensor_and_infinite_where_they_do_not_fit(tmp_path):
    one, other = a_run(tmp_path / "one", 1.0), a_run(tmp_path / "other", 1.5)
    assert largest_difference(one, other) == 0.5
    assert largest_difference(one, a_run(tmp_path / "third", name="b")) == float("inf")
    assert largest_difference(one, a_run(tmp_path / "fourth", float("nan"))) == float("inf")
    assert largest_difference(one, tmp_path) == float("inf")


def test_a_story_holds_where_every_adapter_is_launcher_locals():
    assert story.Story(acts=(), differences={"a": 0.0, "b": 1e-6}, up=1.0).holds
    assert not story.Story(acts=(), differences={"a": 0.0, "b": 2e-6}, up=1.0).holds


def test_rounds_below_one_are_refused():
    done = subprocess.run([*COMMAND, "--story", "--rounds", "0"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--rounds 0 must be at least 1" in done.stderr


@pytest.mark.slow
def test_the_story_over_superlink_is_launcher_locals():
    command = [*COMMAND, "--story", "--rounds", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)["story"]
    assert told["holds"]
    assert [(act["task"], act["rounds"]) for act in told["acts"]] == [(act.task, 1) for act in story.ACTS]
    assert all(act["bytes"][0] > 0 and act["bytes"][2] > 0 for act in told["acts"])
    assert all(act["figures"]["utility"] is not None for act in told["acts"])
    played = story.Played(**{**told["acts"][0], "bytes": tuple(told["acts"][0]["bytes"])})
    assert story_table(story.Story(acts=(played,), differences={}, up=1.0)).row_count == 1
