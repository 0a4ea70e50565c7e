"""The child process of launcher=ray: Flower's simulation engine around the very apps that the other launchers run."""

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedunlearn.config.launcher import RayLauncher
from fedunlearn.config.parse import parse_config
from fedunlearn.config.run import TrainRun
from fedunlearn.errors import UserError
from fedunlearn.federation.client_app import make_client_app
from fedunlearn.federation.launchers.ray import FAILURE
from fedunlearn.federation.ray_cluster import attach, check_nodes, wait_for_room
from fedunlearn.federation.server_app import make_server_app
from fedunlearn.federation.watchdog import watchdog
from fedunlearn.files import write_json
from fedunlearn.orphans import end_with_parent
from fedunlearn.reporting.run_folder import run_path

log = logging.getLogger(__name__)


def main(config_json: str) -> None:
    """Runs the simulation to its end; a fault of cluster or server goes into <folder>/failure.json, for the engine gives none out."""
    run = parse_config(json.loads(config_json))
    assert isinstance(run, TrainRun)
    assert isinstance(run.launcher, RayLauncher)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    folder = run_path(run)
    try:
        _enter_cluster(run, run.launcher, folder)
    except UserError as error:
        ray.shutdown()
        _tell(folder, error.faults)
        os._exit(1)  # the parent ends this process from here on, which Ray would tell of at length
    resources = {"num_cpus": run.launcher.client_cpus, "num_gpus": run.launcher.client_gpus}
    backend: Any = {"client_resources": resources}
    run_simulation(
        server_app=_telling(make_server_app(config_json), folder),
        client_app=make_client_app(config_json),
        num_supernodes=run.trainer.federated.num_clients,
        backend_config=backend,
    )


def _enter_cluster(run: TrainRun, launcher: RayLauncher, folder: Path) -> None:
    """Attaches, and sees to it that every node can work; the engine finds Ray initialised. Raises UserError where it cannot be, within start_timeout."""
    end = time.monotonic() + launcher.start_timeout
    with watchdog(launcher.start_timeout, partial(_give_up, launcher, folder)):  # Ray tries without end
        attach(launcher)
    patience = end - time.monotonic() if launcher.address else 0.0  # nobody joins a cluster of one's own, or leaves it
    nodes = wait_for_room(launcher, patience)
    if launcher.address is None:
        return
    shared = (folder, Path(run.paths.cache_dir))
    check_nodes(nodes, shared, needed_by_clients(run), launcher.start_timeout)
    actors = sum(node.holds(launcher) for node in nodes)
    log.info("launcher.address=%s: %d actors on %d nodes", launcher.address, actors, len(nodes))


def needed_by_clients(run: TrainRun) -> list[Path]:
    """Gives every place that a config names and a client opens; ids of a hub, and `builtin`, among them."""
    args, tokenizer = run.model.model_args, run.model.tokenizer_args
    named = (
        *(args.pretrained_model_name_or_path, args.lora_model_path, tokenizer.pretrained_model_name_or_path),
        *(run.tofu_path, run.muse_path, run.data.idk_path, run.data.alternates_path),
    )
    return [Path(name).expanduser() for name in named if name is not None]


def _give_up(launcher: RayLauncher, folder: Path) -> None:
    where = f"launcher.address={launcher.address!r}" if launcher.address else "launcher=ray"
    _tell(
        folder,
        [
            f"{where}: no Ray cluster let this process in within launcher.start_timeout={launcher.start_timeout:g} s. Is it the head's address (ray start --head "
            "--port=...), and is this machine one of its nodes?"
        ],
    )
    os._exit(1)


def _telling(inner: ServerApp, folder: Path) -> ServerApp:
    """Wraps the server app so that what it raises is written down before the engine swallows it."""
    app = ServerApp()

    @app.main()
    def told(grid: Grid, context: Context) -> None:
        try:
            inner(grid, context)
        except UserError as error:
            _tell(folder, error.faults)
            raise
        except Exception as error:
            _tell(folder, [f"launcher=ray: the server failed: {type(error).__name__}: {error}"])
            raise

    return app


def _tell(folder: Path, faults: Sequence[str]) -> None:
    """Hands faults to the parent; where the disk is so full that not even these fit, they are said on stderr."""
    try:
        write_json(folder / FAILURE, {"faults": list(faults)})
    except UserError:
        sys.stderr.write("".join(f"error: {fault}\n" for fault in faults))
        sys.stderr.flush()


if __name__ == "__main__":
    for file in map(int, sys.argv[2:]):
        os.set_inheritable(file, False)  # this process's alone: Ray's daemons may outlive it
    end_with_parent(int(sys.argv[2]))
    main(sys.argv[1])
