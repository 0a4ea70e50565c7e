"""Runs that are killed at random moments and gone on with, against the run that nobody kills: is more lost than the round under way?

    python benchmarks/chaos.py [--json] [--runs 20] [--seed 0] [--processes 2] [--launchers local isolate ray]

SIGKILL to the command, to launcher.isolate=true's worker, to Ray's engine and to a client's actor: before the run's folder is there, at any moment after, and while a
round's checkpoint is half-written. Then the same command with resume=true until it is done. The adapter's bytes, the ledger and every line of history.jsonl but
its seconds must be those of the undisturbed run, whole rounds must not be run again, nothing may stay behind. --runs N: N runs of launcher=local (two in five
of them with isolate) and two for every five of launcher=ray. Exit code 1 where one does not hold.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from killing.attack import Attacked, attack
from killing.launchers import LAUNCHERS
from killing.stage import Stage, undisturbed
from rich.console import Console
from rich.table import Table

OF = 20


def all_attacks(place: Path, names: list[str], runs: int, seed: int, processes: int) -> Iterator[Attacked]:
    """Builds the stage, runs each launcher undisturbed, then attacks; results come in order."""
    stage = Stage.build(place)
    numbers = {name: -(-LAUNCHERS[name].share * runs // OF) for name in names}
    with ThreadPoolExecutor(processes) as pool:
        than = dict(
            zip(
                numbers,
                pool.map(lambda name: undisturbed(stage, place / name, *LAUNCHERS[name].overrides), numbers),
                strict=True,
            )
        )
        jobs = [(name, number) for name, count in numbers.items() for number in range(count)]
        yield from pool.map(lambda job: attack(stage, than[job[0]], *job, seed), jobs)


def table_of(done: list[Attacked]) -> Table:
    """One line a run."""
    table = Table(
        "launcher", "run", "killed", "when", "at", "rounds on disk", "repeated", "lost", "bytes differing", ""
    )
    for one in done:
        when = f"{one.when}, half-written" if one.in_write else one.when
        held = "; ".join(one.faults) or "ok"
        cells = (one.run, one.victim, when, f"{one.at:.2f} s", one.whole, one.repeated, one.lost, one.differing, held)
        table.add_row(one.launcher, *map(str, cells))
    return table


def main() -> int:
    """Attacks, prints, judges."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--launchers", nargs="+", choices=list(LAUNCHERS), default=list(LAUNCHERS))
    args = parser.parse_args()
    began, done = time.monotonic(), list[Attacked]()
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        for one in all_attacks(Path(place), args.launchers, args.runs, args.seed, args.processes):
            done.append(one)
            print(
                f"{time.monotonic() - began:6.1f} s  {one.launcher} {one.run}: {'; '.join(one.faults) or 'ok'}",
                file=sys.stderr,
            )
    seconds, bad = time.monotonic() - began, [one for one in done if one.faults]
    if args.json:
        print(json.dumps({"runs": [asdict(one) for one in done], "failed": len(bad), "seconds": round(seconds, 1)}))
    else:
        Console(width=200).print(table_of(done))
        print(f"{len(done) - len(bad)} of {len(done)} runs ended as if nobody had killed them, {seconds:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
