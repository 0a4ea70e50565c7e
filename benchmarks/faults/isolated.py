"""A client that really dies and one that really hangs, once each, in the worker process of launcher.isolate=true."""

import json
import time
from dataclasses import replace
from pathlib import Path

from fedunlearn.config.launcher import LocalLauncher
from fedunlearn.federation.isolated_grid import Deadlines, IsolatedGrid
from fedunlearn.federation.worker import Charge

from .cells import Bench, Cell
from .recording import NUM_CLIENTS, Recorded
from .replay import make_app
from .rows import ROWS

DEADLINES = Deadlines(start=120, query=30, train=3)
REAL = {"dies": "crashed", "hangs": "timeout"}
APP = f"{make_app.__module__}:{make_app.__qualname__}"


def real_cells(recorded: Recorded, place: Path) -> list[Cell]:
    """One run of one round each, against the row's reference."""
    bench = Bench(recorded, place, ROWS[0])
    return [_real_cell(bench, what, code) for what, code in REAL.items()]


def _real_cell(bench: Bench, what: str, code: str) -> Cell:
    began = time.monotonic()
    told = {"folder": str(bench.recorded.folder), "client": bench.faulty, "what": what}
    grid = IsolatedGrid(Charge(app=APP, argument=json.dumps(told), num_clients=NUM_CLIENTS), DEADLINES)
    federated = replace(bench.run.trainer.federated, num_rounds=1)
    run = replace(
        bench.run, launcher=LocalLauncher(isolate=True), trainer=replace(bench.run.trainer, federated=federated)
    )
    try:
        grid.start()
        played = bench.play_on(grid, run)
    finally:
        grid.close()
    found = "ok"
    if played.error:
        found = f"ended the run: {played.error}"
    elif played.codes(bench.faulty) != (code,):
        found = f"codes {played.codes(bench.faulty)} instead of {code!r}"
    elif played.hashes != bench.without.hashes[:1]:
        found = "another adapter"
    elif sum(bool(client["reason"]) for client in played.lines[0]["clients"]) != 1:
        found = "it cost others their place"
    return Cell(
        row=bench.row.name,
        group="isolate",
        fault=f"{what} for real",
        found=found,
        codes=played.codes(bench.faulty),
        seconds=round(time.monotonic() - began, 3),
    )
