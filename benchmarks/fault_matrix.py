"""Every strategy and preset under every fault of one client in seven, and in roles of two under those that no median can judge.

    python benchmarks/fault_matrix.py [--json] [--processes 2]

A cell is a whole run of two rounds through the real round loop, with a client that is at fault in both. It holds where the
adapter (side-car included) is bit-equal to that of the run in which only this client's replies are missing, the history gives the
right reason code and is strict JSON, and the run ends well; a zero update must give what the aggregation gives when it is called
directly. Small roles: two owners that unlearn and two others, one of the four at fault. The last column is what Flower's own FedAvg makes of the same fault. Exit code 1 where a cell fails.
"""

import argparse
import json
import logging
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from faults.catalogue import BY_NAME, Fault, RollCallFault
from faults.cells import Cell, as_json, cells_of_row
from faults.isolated import real_cells
from faults.recording import NUM_CLIENTS, Recorded, record
from faults.rows import ROWS
from faults.small_roles import NUM_SMALL, SMALL_ROLES, small_cells_of_row
from faults.stock import Stock
from rich.console import Console
from rich.table import Table

MEMORY = Path("/dev/shm")
WIDTH = 200


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, in memory where there is such a place: every round is flushed to the disk."""
    with tempfile.TemporaryDirectory(prefix="fault-matrix-", dir=MEMORY if MEMORY.is_dir() else None) as place:
        yield Path(place)


def all_cells(recorded: Recorded, place: Path, processes: int) -> list[Cell]:
    """All rows, several at a time, then the clients that die and hang for real."""
    began, cells = time.monotonic(), []
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row, done in zip(ROWS, pool.map(cells_of_row, [recorded.folder] * len(ROWS), ROWS), strict=True):
            cells += done
            held = sum(cell.ok for cell in done)
            print(f"{time.monotonic() - began:6.1f} s  {row.name}: {held} of {len(done)}", file=sys.stderr)
        small = [cell for done in pool.map(small_cells_of_row, [recorded.folder] * len(ROWS), ROWS) for cell in done]
        print(
            f"{time.monotonic() - began:6.1f} s  {SMALL_ROLES}: {sum(c.ok for c in small)} of {len(small)}",
            file=sys.stderr,
        )
        cells += small
    return [*cells, *real_cells(recorded, place / "isolated")]


def table_of(cells: list[Cell], stock: Stock) -> Table:
    """One line a fault; a column for each group of rows, the reason code, and Flower's stock FedAvg."""
    groups = list(dict.fromkeys(row.group for row in ROWS))
    table = Table("one client of seven", *groups, "code", "Flower's stock FedAvg", title="fault matrix")
    for name in dict.fromkeys(cell.fault for cell in cells if cell.group in groups):
        held = [_told([cell for cell in cells if (cell.fault, cell.group) == (name, group)]) for group in groups]
        table.add_row(name, *held, _code(BY_NAME.get(name)), stock.becomes(name))
    return table


def small_table_of(cells: list[Cell]) -> Table:
    """One line a fault and role; a column for each group of rows."""
    group_of = {row.name: row.group for row in ROWS}
    groups = list(dict.fromkeys(group_of.values()))
    table = Table("one client of four", *groups, title=SMALL_ROLES)
    small = [cell for cell in cells if cell.group == SMALL_ROLES]
    for name in dict.fromkeys(cell.fault for cell in small):
        table.add_row(
            name, *(_told([c for c in small if (c.fault, group_of[c.row]) == (name, group)]) for group in groups)
        )
    return table


def _told(cells: list[Cell]) -> str:
    bad = [f"{cell.row}: {cell.found[:40]}" for cell in cells if not cell.ok]
    return "; ".join(bad) or f"ok {len(cells)}"


def _code(fault: Fault | RollCallFault | None) -> str:
    if isinstance(fault, RollCallFault):
        return "refused"
    return "counts" if fault is None or not fault.code else fault.code


def main() -> int:
    """Records, plays, judges, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="all cells as JSON in place of the table")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    began = time.monotonic()
    logging.disable(logging.WARNING)
    with scratch() as place:
        recorded = record(place)
        cells = all_cells(recorded, place, args.processes)
        stock = Stock(recorded)
        seconds = time.monotonic() - began
        bad = [cell for cell in cells if not cell.ok]
        if args.json:
            faults = dict.fromkeys(cell.fault for cell in cells if cell.group != SMALL_ROLES)
            told = {"cells": [as_json(cell) for cell in cells], "stock": {name: stock.becomes(name) for name in faults}}
            print(json.dumps({**told, "failed": len(bad), "seconds": round(seconds, 1)}, indent=1))
        else:
            Console(width=WIDTH).print(table_of(cells, stock), small_table_of(cells))
            for cell in cells:
                if cell.group == "isolate" or not cell.ok:
                    print(f"{cell.row} / {cell.fault}: {cell.found}")
    clients = f"one client of {NUM_CLIENTS}, or of {NUM_SMALL} in roles of two, at fault"
    print(
        f"{len(cells) - len(bad)} of {len(cells)} cells ok ({clients}), {seconds:.0f} s",
        file=sys.stderr if args.json else sys.stdout,
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
