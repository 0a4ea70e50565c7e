"""launcher=ray: Flower's simulation engine on Ray, in a child process group under a deadline.

A hung client makes the engine never return, and a dead actor lets later rounds fail in silence with exit code 0: so it runs in
a session of its own, the parent keeps the time, and any client that is lost ends the run with an error. The child ends with its parent, however
that dies, and holds the lock of the run's folder for as long as it lives.
"""

import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from fedunlearn.config.addresses import parse_address
from fedunlearn.config.launcher import RayLauncher
from fedunlearn.config.parse import parse_config
from fedunlearn.config.run import TrainRun
from fedunlearn.errors import UserError
from fedunlearn.federation.launchers.base import check_way, launch
from fedunlearn.models.base import choose_device
from fedunlearn.models.resident import release
from fedunlearn.reporting.run_folder import run_path
from fedunlearn.reporting.run_lock import held_locks

log = logging.getLogger(__name__)
CHILD = "fedunlearn.federation.ray_child"
FAILURE = "failure.json"
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_END = 10.0
SECONDS_TO_CONNECT = 5.0
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@check_way.register
def check_way_to_ray(launcher: RayLauncher) -> None:
    """Raises UserError where Ray is not installed, or nobody listens at launcher.address."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("launcher=ray needs Ray: pip install 'fedunlearn[ray]', or use launcher=local")
    address = parse_address(launcher.address) if launcher.address else None
    if address is None:
        return
    try:
        socket.create_connection((address.host, address.port), SECONDS_TO_CONNECT).close()
    except OSError as error:
        raise UserError(
            f"launcher.address={launcher.address!r}: nobody answers there ({error}). Give the address that `ray start --head` has told, or launcher.address=null for a cluster "
            "of its own on this machine"
        ) from error


@launch.register
def launch_ray(launcher: RayLauncher, plain: Mapping[str, object]) -> None:
    """Runs fedunlearn.federation.ray_child and ends its whole group in any case.

    Raises UserError where Ray is not installed or its cluster cannot be worked on, a client fails, or the deadline of all rounds passes.
    """
    check_way(launcher)
    run = parse_config(plain)
    assert isinstance(run, TrainRun)
    if choose_device(run.model.model_args).type == "cuda" and launcher.client_gpus == 0:
        raise UserError(
            "launcher.client_gpus=0, but the model would run on CUDA: give each actor its share, or model.model_args.device=cpu"
        )
    release()  # the actors hold a base each; this process needs none until they are done
    folder = run_path(run)
    (folder / FAILURE).unlink(missing_ok=True)
    alive, mine = os.pipe()  # nothing is written: that it closes is what the child sees
    try:
        child = _start(plain, (alive, *held_locks()))
        try:
            _wait(child, folder, time.monotonic() + deadline_of(run, launcher))
        finally:
            _end_group(child)
    finally:
        os.close(mine)
        os.close(alive)


def _start(plain: Mapping[str, object], files: tuple[int, ...]) -> "subprocess.Popen[bytes]":
    """Starts the child with some open files: the pipe whose end it dies with, and the locks it holds."""
    return subprocess.Popen(
        [sys.executable, "-m", CHILD, json.dumps(plain), *map(str, files)],
        start_new_session=True,
        env={**os.environ, **QUIET},
        stdin=subprocess.DEVNULL,
        pass_fds=files,
    )


def deadline_of(run: TrainRun, launcher: RayLauncher) -> float:
    """Seconds after which the whole run cannot be right: start, roll call, and every round with all its retries."""
    federated = run.trainer.federated
    return (
        launcher.start_timeout
        + federated.roll_call_timeout
        + federated.num_rounds * (1 + federated.max_retries) * federated.round_timeout
    )


def _wait(child: "subprocess.Popen[bytes]", folder: Path, end: float) -> None:
    while child.poll() is None and not (folder / FAILURE).is_file():
        if time.monotonic() > end:
            raise UserError(
                "launcher=ray: the deadline of all rounds passed; the clients were ended. Every whole round is on disk"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if (folder / FAILURE).is_file():
        raise UserError(*json.loads((folder / FAILURE).read_text(encoding="utf-8"))["faults"])
    if child.returncode != 0:
        raise UserError(
            f"launcher=ray: the simulation ended with code {child.returncode}; see the messages above. Every whole round is on disk"
        )


def _end_group(child: "subprocess.Popen[bytes]") -> None:
    """Ends the child, its session and what has left it (Ray's daemons): first politely, then for good."""
    try:
        family = psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    _, alive = psutil.wait_procs(family, timeout=SECONDS_TO_END / 2)
    for process in alive:
        log.debug("ending left-over process %d", process.pid)
        process.kill()
