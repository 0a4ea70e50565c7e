"""A tiny run asks no host outside: not for a name, not for a connection."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_runs import CONFIGS, SMALL, finetune, unlearn

DOOR = Path(CONFIGS).parent / "src" / "fed_train.py"
OWN = ("127.0.0.1", "::1", "localhost")


class LookUp(BaseException):
    """Not an Exception, so that nothing on the way takes it for a fault of the network and goes on."""


@pytest.fixture
def asked(monkeypatch) -> list:
    """Every look-up of a name and every connection to a host; each raises."""
    told: list = []
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def names(*args, **kwargs):
        told.append(args)
        raise LookUp(args)

    def guarded(real):
        def call(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in OWN:
                names(address)
            return real(self, address)

        return call

    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr"):
        monkeypatch.setattr(socket, name, names)
    monkeypatch.setattr(socket.socket, "connect", guarded(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
    return told


def test_a_run_here_looks_nothing_up(pocket, saves, asked):
    start = finetune(pocket, saves, "ft", "eval.at_end=true")
    unlearn(pocket, saves, start, "un")
    assert asked == []


def test_the_guard_bites(asked):
    with pytest.raises(LookUp):
        socket.create_connection(("example.invalid", 80), timeout=1)
    with pytest.raises(LookUp):
        socket.socket().connect(("192.0.2.1", 80))
    assert len(asked) == 2


def can_unshare() -> bool:
    """Whether this user may make a network namespace of its own, in which there is not even a loopback."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    return subprocess.run([unshare, "-rn", "true"], capture_output=True, timeout=30).returncode == 0


@pytest.mark.parametrize("isolate", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_a_run_goes_through_where_there_is_no_network_at_all(pocket, saves, isolate):
    """The door as a user starts it, without the variables that switch look-ups of transformers and Flower off."""
    if not can_unshare():
        pytest.skip("no network namespace can be made here (unshare -rn)")
    quiet = ("HF_HUB_OFFLINE", "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "TRANSFORMERS_OFFLINE")
    environment = {key: value for key, value in os.environ.items() if key not in quiet}
    places = (f"tofu_path={pocket.data}", f"model.model_args.pretrained_model_name_or_path={pocket.model}", f"paths.saves_dir={saves}", f"paths.cache_dir={saves}/cache", f"paths.pocket_dir={saves}/pocket", "task_name=alone")  # fmt: skip
    told = ("--config-name=train-lora.yaml", "experiment=finetune/tofu/pocket", f"launcher.isolate={isolate}", *places, *SMALL)  # fmt: skip
    command = ["unshare", "-rn", sys.executable, str(DOOR), *told, "trainer.federated.num_clients=2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (saves / "finetune" / "alone" / "done.json").is_file()
    for word in ("Retrying", "Connection", "resolve", "Max retries"):
        assert word not in done.stderr, done.stderr[-3000:]
