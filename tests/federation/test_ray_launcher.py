"""launcher=ray: the same bits as local, and an end with an error where a client dies or hangs."""

import os
import time
from pathlib import Path

import psutil
import pytest
from helpers_runs import adapter_bytes, finetune, unlearn

from fedunlearn.errors import UserError

pytest.importorskip("ray")
HOSTILE = ("launcher=ray", "method=grad_ascent", "trainer.federated.round_timeout=20")


@pytest.fixture(autouse=True)
def _methods_on_the_path(monkeypatch):
    """Ray's workers import the tests' methods by name."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent), prepend=os.pathsep)


def _ray_processes():
    names = ("raylet", "gcs_server", "ray::")
    return {p.pid for p in psutil.process_iter(["name"]) if (p.info["name"] or "").startswith(names)}


def _left_over(before, seconds=20.0):
    """Processes of Ray's that are there beside those of `before`; an actor that is told to end takes a moment on a busy machine."""
    end = time.monotonic() + seconds
    while (left := _ray_processes() - before) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def test_ray_gives_the_bits_of_local(pocket, saves):
    """With a side-car, whose blocks cross the wire as parts of their own, and with ranks that differ."""
    before = _ray_processes()
    more = ("aggregation=flora", "partition.ranks=[4,2,2,1]", "partition.lora_alphas=[8,8,4,2]")
    local = finetune(pocket, saves, "local", *more)
    ray = finetune(pocket, saves, "ray", "launcher=ray", *more)
    assert adapter_bytes(local) == adapter_bytes(ray)
    assert _left_over(before) == set()


@pytest.mark.slow
def test_a_client_that_kills_its_process_ends_the_run_with_an_error(pocket, saves):
    with pytest.raises(UserError, match=r"client \d: crashed .*ActorDiedError.*cannot go on without a client"):
        unlearn(pocket, saves, None, "dying", *HOSTILE, "method._target_=helpers_methods.Dying")


@pytest.mark.slow
def test_a_client_that_hangs_ends_the_run_after_the_rounds_deadline(pocket, saves):
    began = time.monotonic()
    with pytest.raises(UserError, match=r"client \d: timeout .*cannot go on without a client"):
        unlearn(pocket, saves, None, "hanging", *HOSTILE, "method._target_=helpers_methods.Hanging")
    assert time.monotonic() - began < 120
