"""launcher=local: server and clients one after another on this machine; deterministic, no daemons.

The clients work in this process, or with launcher.isolate=true in one worker process that a deadline can end.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from fedunlearn.config.launcher import LocalLauncher
from fedunlearn.config.parse import parse_config
from fedunlearn.config.run import TrainRun
from fedunlearn.config.trainer import FederatedArgs
from fedunlearn.federation.client_app import close_sites, make_client_app
from fedunlearn.federation.isolated_grid import Deadlines, IsolatedGrid
from fedunlearn.federation.launchers.base import launch
from fedunlearn.federation.local_grid import RUN_ID, SERVER_NODE, LocalGrid
from fedunlearn.federation.server_app import make_server_app
from fedunlearn.federation.turn import HEADER
from fedunlearn.federation.wire import LONGEST_RECORD
from fedunlearn.federation.worker import Charge
from fedunlearn.models.adapter_files import WEIGHTS
from fedunlearn.models.resident import release
from fedunlearn.models.source import START
from fedunlearn.reporting.run_folder import run_path

log = logging.getLogger(__name__)
CLIENT_APP = f"{make_client_app.__module__}:{make_client_app.__qualname__}"


@launch.register
def launch_local(launcher: LocalLauncher, plain: Mapping[str, object]) -> None:
    """Calls the ServerApp over a LocalGrid or an IsolatedGrid.

    Without isolation a client that hangs or kills the process takes the run with it; resume=true goes on.
    """
    config_json = json.dumps(plain, sort_keys=True)
    run = parse_config(plain)
    assert isinstance(run, TrainRun)
    grids = _isolated(launcher, run, config_json) if launcher.isolate else _here(run, config_json)
    with grids as grid:
        make_server_app(config_json)(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), {}))


@contextmanager
def _here(run: TrainRun, config_json: str) -> Iterator[Grid]:
    timeout = run.trainer.federated.round_timeout
    if timeout != FederatedArgs.round_timeout:
        log.warning(
            "launcher=local keeps no time in a round: trainer.federated.round_timeout=%g does not act (launcher.isolate=true lets it)",
            timeout,
        )
    try:
        yield LocalGrid(make_client_app(config_json), run.trainer.federated.num_clients)
    finally:
        close_sites()


@contextmanager
def _isolated(launcher: LocalLauncher, run: TrainRun, config_json: str) -> Iterator[Grid]:
    release()  # the worker holds the base; this process needs none until the rounds are done
    federated = run.trainer.federated
    deadlines = Deadlines(
        start=launcher.start_timeout, query=federated.roll_call_timeout, train=federated.round_timeout
    )
    charge = Charge(
        app=CLIENT_APP,
        argument=config_json,
        num_clients=federated.num_clients,
        log_level=logging.getLogger().getEffectiveLevel(),
    )
    grid = IsolatedGrid(charge, deadlines, largest_reply(run))
    try:
        grid.start()  # before the roll call, whose deadline it would eat
        yield grid
    finally:
        grid.close()


def largest_reply(run: TrainRun) -> int:
    """Bytes above which a reply is not even read: what the gate allows for a whole adapter, and the scalars beside it."""
    adapter = run_path(run) / START / WEIGHTS
    return int(run.gate.max_reply_ratio * adapter.stat().st_size) + LONGEST_RECORD + HEADER
