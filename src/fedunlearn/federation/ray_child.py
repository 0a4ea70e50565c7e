"""The child process of launcher=ray: Flower's simulation engine around the very apps that the other launchers run."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedunlearn.config.launcher import RayLauncher
from fedunlearn.config.parse import parse_config
from fedunlearn.config.run import TrainRun
from fedunlearn.errors import UserError
from fedunlearn.federation.client_app import make_client_app
from fedunlearn.federation.launchers.ray import FAILURE
from fedunlearn.federation.server_app import make_server_app
from fedunlearn.federation.worker import end_with_parent
from fedunlearn.files import write_json
from fedunlearn.reporting.run_folder import run_path


def main(config_json: str) -> None:
    """Runs the simulation to its end; a fault of the server goes into <folder>/failure.json, for the engine gives none out."""
    run = parse_config(json.loads(config_json))
    assert isinstance(run, TrainRun)
    assert isinstance(run.launcher, RayLauncher)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    launcher = run.launcher
    init = {
        "include_dashboard": False,
        "log_to_driver": True,
        **({"address": launcher.address} if launcher.address else {}),
    }
    resources = {"num_cpus": launcher.client_cpus, "num_gpus": launcher.client_gpus}
    backend: Any = {"init_args": init, "client_resources": resources}
    run_simulation(
        server_app=_telling(make_server_app(config_json), run_path(run)),
        client_app=make_client_app(config_json),
        num_supernodes=run.trainer.federated.num_clients,
        backend_config=backend,
    )


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
