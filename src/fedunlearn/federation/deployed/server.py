"""The ServerApp that a SuperLink starts: a whole stage on the server's machine, told line by line to whoever follows the run."""

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedunlearn.config.parse import parse_config
from fedunlearn.config.run import TrainRun
from fedunlearn.config.sites import SITE_VARIABLE, ServerSite, read_site
from fedunlearn.errors import UserError
from fedunlearn.federation.deployed.brief import CONFIG_KEY, GO_ON, TOLD, pack_brief
from fedunlearn.federation.deployed.submission import at_server, brief_of
from fedunlearn.federation.rounds import Nodes, run_rounds
from fedunlearn.federation.site import reads_reference, set_threads
from fedunlearn.files import canonical_json
from fedunlearn.records.rounds import RoundResult
from fedunlearn.reporting.run_folder import run_path
from fedunlearn.sites.registry import clients_by_node

Carry = Callable[[Mapping[str, Any]], None]
Stage = Callable[[Mapping[str, Any], Carry], Mapping[str, Any]]


def make_submitted_app(stage: Stage) -> ServerApp:
    """Gives the ServerApp. stage: does everything but the rounds, given the config as it is on this machine and how to carry the rounds out; gives the result in short."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        with telling_faults(), telling_warnings():
            site = _site()
            plain = at_server(site, json.loads(str(context.run_config[CONFIG_KEY])))
            tell("done", stage(plain, lambda prepared: carry(grid, site, prepared)))

    return app


def tell(kind: str, value: object) -> None:
    """Writes one line that `launcher=superlink` reads in the run's log; it begins anew, whatever stands in front of it."""
    sys.stdout.write(f"\n{TOLD}{canonical_json({kind: value})}\n")
    sys.stdout.flush()


@contextmanager
def telling_faults() -> Iterator[None]:
    """What ends the run is told too; where it is no fault of the config (a SuperLink that was killed in the midst of a message), with the way out."""
    try:
        yield
    except UserError as error:
        tell("faults", list(error.faults))
        raise
    except BaseException as error:
        tell("faults", [f"the server failed: {type(error).__name__}: {error}; {GO_ON}"])
        traceback.print_exc()
        raise


@contextmanager
def telling_warnings() -> Iterator[None]:
    """Meanwhile every warning of this package is told too, with its number from 1: a SuperLink shows a ServerApp's output to nobody but who asks for the run's log."""
    logger, teller = logging.getLogger("fedunlearn"), _Teller(logging.WARNING)
    logger.addHandler(teller)
    try:
        yield
    finally:
        logger.removeHandler(teller)


class _Teller(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._told = 0

    def emit(self, record: logging.LogRecord) -> None:
        self._told += 1
        tell("warning", [self._told, record.getMessage()])


def _site() -> ServerSite:
    path = os.environ.get(SITE_VARIABLE)
    if path is None:
        raise UserError(
            "the SuperLink was started without its site YAML: start it with scripts/superlink.py start SITE.yaml"
        )
    return read_site(path, ServerSite)


def carry(grid: Grid, site: ServerSite, plain: Mapping[str, Any]) -> None:
    """Runs the rounds of a prepared run over real nodes; each is told at its roll call what it needs, and every round is told to the follower."""
    run = parse_config(plain)
    assert isinstance(run, TrainRun)
    set_threads(run)
    folder = run_path(run)
    content = pack_brief(brief_of(site, run, plain, folder))
    run_rounds(
        grid,
        run,
        folder,
        reads_reference(run),
        Nodes(content=content, keys=partial(clients_by_node, site), tell=_tell_round),
    )


def _tell_round(result: RoundResult) -> None:
    tell("history", asdict(result))
