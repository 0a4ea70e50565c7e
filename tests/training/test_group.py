"""Several processes that work as one: the error that is told is the one that was first."""

import signal
import subprocess

import pytest
from helpers_families import base_of

from fedunlearn.config.parallel import NO_TP_TRAINING
from fedunlearn.training.parallel.group import Group, GroupError
from fedunlearn.training.parallel.job import Frame


def asked(name, folder):
    """Starts two such members, gives them a job and ends them."""
    group = Group(f"helpers_members:{name}", 2, device="cpu", timeout=120.0)
    try:
        group.start(folder, {})
        group.ask(Frame({}, {}))
    finally:
        group.close()


def test_a_death_is_named_though_another_process_speaks_first(tmp_path):
    """What is left of them may well tell of a lost connection before the death is seen."""
    with pytest.raises(GroupError, match=r"^process 1 died \(signal SIGKILL\): all of them were ended$"):
        asked("Lost", tmp_path)


def test_an_error_is_named_where_nobody_died(tmp_path):
    with pytest.raises(GroupError, match=r"^process 0: ValueError: a fault of its own: all of them were ended$"):
        asked("Wrong", tmp_path)


def test_tensor_parallel_training_fails_as_its_refusal_says(tmp_path):
    """When PEFT has learnt it this fails, and trainer.parallel=tp can be built."""
    base_of("llama").save_pretrained(tmp_path)
    with pytest.raises(GroupError, match=r"RuntimeError: shape '\[.*\]' is invalid for input of size"):
        asked("Split", tmp_path)
    assert "RuntimeError: shape '[" in NO_TP_TRAINING
    assert "is invalid for input of size" in NO_TP_TRAINING


def test_where_one_cannot_be_started_the_others_are_ended(tmp_path, monkeypatch):
    """The system has room for one process, and not for the second."""
    started, own = [], subprocess.Popen

    def popen(*said, **more):
        if started:
            raise BlockingIOError("no room for another process")
        started.append(own(*said, **more))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", popen)
    group = Group("helpers_members:Wrong", 2, device="cpu", timeout=120.0)
    with pytest.raises(BlockingIOError, match="no room"):
        group.start(tmp_path, {})
    (first,) = started
    try:
        assert first.returncode == -signal.SIGKILL
        assert group.pids == ()
    finally:
        first.kill()


def test_where_a_charge_cannot_be_sent_its_process_is_ended(tmp_path, monkeypatch):
    started, own = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *s, **m: started.append(own(*s, **m)) or started[-1])
    with pytest.raises(TypeError, match="not JSON serializable"):
        Group("helpers_members:Wrong", 2, device="cpu", timeout=120.0).start(tmp_path, {"charge": object()})
    (first,) = started
    try:
        assert first.returncode == -signal.SIGKILL
    finally:
        first.kill()
