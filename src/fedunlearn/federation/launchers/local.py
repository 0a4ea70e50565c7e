"""launcher=local: server and clients in this process, one after another; deterministic, no daemons."""

import json
import logging
from collections.abc import Mapping

from flwr.app import Context, RecordDict

from fedunlearn.config.launcher import LocalLauncher
from fedunlearn.config.parse import parse_config
from fedunlearn.config.run import TrainRun
from fedunlearn.config.trainer import FederatedArgs
from fedunlearn.federation.client_app import close_sites, make_client_app
from fedunlearn.federation.launchers.base import launch
from fedunlearn.federation.local_grid import RUN_ID, SERVER_NODE, LocalGrid
from fedunlearn.federation.server_app import make_server_app

log = logging.getLogger(__name__)


@launch.register
def launch_local(launcher: LocalLauncher, plain: Mapping[str, object]) -> None:
    """Calls the ServerApp over a LocalGrid. A client that hangs or kills the process takes the run with it; resume=true goes on."""
    config_json = json.dumps(plain, sort_keys=True)
    run = parse_config(plain)
    assert isinstance(run, TrainRun)
    timeout = run.trainer.federated.round_timeout
    if timeout != FederatedArgs.round_timeout:
        log.warning("launcher=local keeps no time in a round: trainer.federated.round_timeout=%g does not act", timeout)
    grid = LocalGrid(make_client_app(config_json), run.trainer.federated.num_clients)
    try:
        make_server_app(config_json)(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), {}))
    finally:
        close_sites()
