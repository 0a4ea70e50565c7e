"""The ServerApp: the round loop over whatever Grid a launcher gives it."""

import json

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedunlearn.config.parse import parse_config
from fedunlearn.config.run import TrainRun
from fedunlearn.federation.rounds import run_rounds
from fedunlearn.federation.site import reads_reference, set_threads
from fedunlearn.reporting.run_folder import run_path


def make_server_app(config_json: str) -> ServerApp:
    """Gives the ServerApp of a run; what it needs beside the config lies in the run's folder."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run = parse_config(json.loads(config_json))
        if not isinstance(run, TrainRun):
            raise TypeError(f"the server runs training and unlearning, not mode={run.mode!r}")
        set_threads(run)
        run_rounds(grid, run, run_path(run), reads_reference(run))

    return app
