"""Several requests in sequence: one run each, every one from the adapter that the last one left."""

import logging
from pathlib import Path
from typing import cast

from fedunlearn.config.run import TrainRun
from fedunlearn.doors.compose import ComposedConfig, changed, model_from
from fedunlearn.doors.prepare import check_requests
from fedunlearn.doors.stages import Carry, run_federated
from fedunlearn.records.evaluation import EvalLog
from fedunlearn.reporting.run_folder import check_folders, is_done, run_path

log = logging.getLogger(__name__)


def run_served(composed: ComposedConfig, carry: Carry | None = None) -> tuple[Path, EvalLog | None]:
    """Runs a federation, once for each request where there are several; gives the last folder and its evaluation. carry: see run_federated."""
    run = composed.run
    if isinstance(run, TrainRun) and run.mode == "unlearn" and len(run.requests or ()) > 1:
        return run_requests(composed, run, carry)
    return run_path(run), run_federated(composed, carry)


def run_requests(composed: ComposedConfig, run: TrainRun, carry: Carry | None = None) -> tuple[Path, EvalLog | None]:
    """Serves the requests one after the other, as runs `<task_name>.1`, `<task_name>.2` ...; gives the last folder and its evaluation.

    All of them, and their folders, are checked before the first begins. With resume=true those that are done are left alone, the one that was
    stopped goes on.
    """
    legs = split_requests(composed, run)
    check_folders((leg.run, leg.plain) for leg in legs)
    check_requests(run)
    folder, result = run_path(run), None
    for number, leg in enumerate(legs, 1):
        folder = run_path(leg.run)
        if leg.run.resume and is_done(folder):
            log.info("request %d of %d: %s is done", number, len(legs), folder)
            continue
        log.info("request %d of %d: %s", number, len(legs), folder)
        result = run_federated(leg, carry)
    return folder, result


def split_requests(composed: ComposedConfig, run: TrainRun) -> tuple[ComposedConfig, ...]:
    """Gives one config a request; from the second on the model is the run before. Only what is there is resumed."""
    legs: list[ComposedConfig] = []
    for number, request in enumerate(cast("list[object]", composed.plain["requests"]), 1):
        changes: dict[str, object] = {"task_name": f"{run.task_name}.{number}", "requests": [request]}
        if legs:
            changes["model"] = model_from(composed.plain, str(run_path(legs[-1].run)))
        leg = changed(composed, changes)
        there = run_path(leg.run).is_dir()
        legs.append(leg if there or not run.resume else changed(leg, {"resume": False}))
    return tuple(legs)
