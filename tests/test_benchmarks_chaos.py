"""The benchmark that kills runs: what it calls a fault, and one run of each launcher for real."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killing.judging import Kill, Seen, judged
from killing.launchers import LAUNCHERS
from killing.stage import NUM_ROUNDS, Place
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
CLIENT = {"client_id": 0, "weight": 1.0, "seconds": 0.5, "bytes_up": 1000}


def a_run(saves, rounds=NUM_ROUNDS, weights=b"adapter", **changed):
    """A finished run's folder, as far as it is compared."""
    folder = Place(saves).folder
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    lines = [
        {"round": n, "seconds": 1.0, "parts": {}, "clients": [{**CLIENT, **changed}]} for n in range(1, rounds + 1)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in range(1, rounds + 1):
        (folder / "rounds" / f"{number:04d}").mkdir(parents=True)
    return folder


def judge(tmp_path, seen=None, name="local", victim="command"):
    mine, its = Place(tmp_path / "killed"), Place(tmp_path / "whole")
    kill = Kill(launcher=name, run=0, victim=victim, when="round", at=0.5)
    return judged(kill, seen or Seen.of(mine.folder), [], mine, its, 2.0)


def an_adapter(saves, value):
    save_file({"a": torch.tensor([value, 1.0])}, Place(saves).folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def whole(tmp_path):
    a_run(tmp_path / "whole")
    return tmp_path


def test_a_run_that_ended_as_if_nobody_had_killed_it_holds(whole):
    a_run(whole / "killed", seconds=7.0, bytes_up=1002)
    found = judge(whole, Seen({}, 0, True))
    assert (found.faults, found.repeated, found.lost, found.differing, found.in_write) == ((), 1, 0, 0, True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": b"adaptes"}, "1 bytes of the adapter differ, by"),
        ({"weights": b"adapter more"}, "5 bytes of the adapter differ, by"),
        ({"weight": 0.5}, "round 1 differs in weight of client 0"),
        ({"bytes_up": 2000}, "round 4 differs in bytes_up of client 0"),
        ({"rounds": 3}, "the history has 3 lines in place of 4"),
    ],
)
def test_what_differs_is_a_fault(whole, changes, said):
    a_run(whole / "killed", **changes)
    assert any(fault.startswith(said) for fault in judge(whole).faults)


def test_a_whole_round_that_was_run_again_is_a_fault(whole):
    a_run(whole / "killed")
    found = judge(whole, Seen({1: 1, 2: 1}, 2, False))
    assert (found.lost, found.faults) == (2, ("2 whole rounds were run again",))


def test_what_stays_behind_is_a_fault(whole):
    folder = a_run(whole / "killed")
    (folder / "rounds" / ".0002.tmp77").mkdir()
    assert judge(whole).faults == ("left behind: ['.0002.tmp77']",)


def test_a_client_that_is_asked_again_may_weigh_more_on_the_wire(whole):
    a_run(whole / "killed", bytes_up=2000)
    assert judge(whole, name="isolate", victim="worker").faults == ()


def deployed(whole, value, **changed):
    """What launcher=superlink is told of a run whose adapter has `value` where the undisturbed one has 0."""
    a_run(whole / "killed", **changed)
    an_adapter(whole / "whole", 0.0)
    an_adapter(whole / "killed", value)
    return judge(whole, name="superlink", victim="ServerApp")


def test_an_adapter_of_real_machines_may_differ_by_its_tolerance(whole):
    found = deployed(whole, 5e-7, loss=0.3)  # what hangs on the adapter's last bit may differ then
    assert (found.faults, found.by) == ((), pytest.approx(5e-7))
    assert found.differing > 0


def test_an_adapter_that_differs_by_more_is_a_fault(whole):
    assert deployed(whole, 5e-6).faults[0].endswith("bytes of the adapter differ, by 5e-06 at most")


def test_other_clients_that_counted_are_a_fault_even_where_the_adapter_is_close(whole):
    assert "clients counted in" in deployed(whole, 5e-7, weight=0.0).faults[0]


def test_the_same_bytes_must_come_with_the_same_history(whole):
    assert "round 1 differs in loss of client 0" in deployed(whole, 0.0, loss=0.3).faults


def test_an_adapter_that_is_not_there_is_a_fault(whole):
    folder = a_run(whole / "killed")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    assert judge(whole).faults[0] == "7 bytes of the adapter differ, by inf at most"


def test_every_attack_names_a_victim_of_its_launcher():
    for one in LAUNCHERS.values():
        assert {victim for victim, _ in one.attacks} == set(one.victims)


def faults_of(names, seconds):
    """The faults that a run over these launchers tells; none, where it ends well."""
    command = [sys.executable, "benchmarks/chaos.py", "--json", "--runs", "1", "--launchers", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    assert {run["launcher"] for run in told["runs"]} == set(names)
    faults = [fault for run in told["runs"] for fault in run["faults"]]
    assert (done.returncode, told["failed"] > 0) == (int(bool(faults)), bool(faults))
    return faults


@pytest.mark.slow
def test_it_runs_and_its_exit_code_says_whether_all_hold():
    assert faults_of([name for name, launcher in LAUNCHERS.items() if not launcher.deployed], 600) == []


@pytest.mark.slow
def test_it_runs_over_real_processes():
    assert faults_of(["superlink"], 1500) == []
