"""launcher=ray: the same bits as local, and an end with an error where a client dies or hangs."""

import time

import psutil
import pytest
from helpers_runs import adapter_bytes, finetune, unlearn

from fedunlearn.errors import UserError

pytest.importorskip("ray")
HOSTILE = ("launcher=ray", "method=grad_ascent", "trainer.federated.round_timeout=20")


@pytest.fixture(autouse=True)
def _methods_on_the_path(monkeypatch):
    """Ray's workers import the tests' methods by name."""
    monkeypatch.setenv("PYTHONPATH", str(__import__("pathlib").Path(__file__).resolve().parent.parent))


def _ray_processes():
    return [
        p for p in psutil.process_iter(["name"]) if (p.info["name"] or "").startswith(("raylet", "gcs_server", "ray::"))
    ]


def test_ray_gives_the_bits_of_local(pocket, saves):
    before = len(_ray_processes())
    local = finetune(pocket, saves, "local")
    ray = finetune(pocket, saves, "ray", "launcher=ray")
    assert adapter_bytes(local) == adapter_bytes(ray)
    assert len(_ray_processes()) == before


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
