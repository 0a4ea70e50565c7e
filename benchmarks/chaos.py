"""Runs that are killed at random moments and gone on with, against the run that nobody kills: is more lost than the round under way?

    python benchmarks/chaos.py [--json] [--runs 20] [--seed 0] [--processes 2] [--launchers local isolate ray superlink]

SIGKILL to the command, to launcher.isolate=true's worker, to Ray's engine and to a client's actor: before the run's folder is there, at any moment after, and while a
round's checkpoint is half-written. Then the same command with resume=true until it is done. The adapter's bytes, the ledger and every line of history.jsonl but
its seconds must be those of the undisturbed run, whole rounds must not be run again, nothing may stay behind.

launcher=superlink: a SuperLink and four SuperNodes with TLS and node keys on loopback, one federation for all of its runs. SIGKILL to the ServerApp, to a SuperNode
and all below it (started again), to the SuperLink, to a node's worker, to the submitter. The adapter may differ by 1e-6; where its bytes do not, all else must be
the same too. A command that is not killed itself must go on to the end, or end with the way out.

--runs N: N runs of launcher=local (two in five of them with isolate), two for every five of launcher=ray, one for every five of launcher=superlink. --seed: when, and with which
victim each launcher's runs begin. Exit code 1 where one does not hold.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from threading import Event

from killing.attack import attack
from killing.field import Field, opened
from killing.judging import Attacked
from killing.launchers import LAUNCHERS
from killing.stage import Stage, Undisturbed, undisturbed
from rich.console import Console
from rich.table import Table

OF = 20


def all_attacks(place: Path, names: list[str], runs: int, seed: int, processes: int) -> Iterator[Attacked]:
    """Builds the stage, runs each launcher undisturbed, then attacks; results come as they are done.

    Runs that share a federation come one after the other, beside those of other launchers. Whoever stops asking waits for the runs under way, and for no more.
    """
    stop = Event()
    stage = Stage.build(place)
    numbers = {name: range(-(-LAUNCHERS[name].share * runs // OF)) for name in names}
    with ThreadPoolExecutor(processes) as pool:
        jobs = [
            pool.submit(_in_turn, stage, name, numbers[name], seed, stop) for name in names if LAUNCHERS[name].deployed
        ]
        alone = [Field(name=name, stage=stage) for name in names if not LAUNCHERS[name].deployed]
        whole = {field.name: pool.submit(_undisturbed, field) for field in alone}
        jobs += [pool.submit(_alone, field, whole, number, seed) for field in alone for number in numbers[field.name]]
        try:
            for job in as_completed(jobs):
                yield from job.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _undisturbed(field: Field) -> Undisturbed:
    return undisturbed(field.stage, field.place(None), *field.overrides)


def _in_turn(stage: Stage, name: str, numbers: range, seed: int, stop: Event) -> list[Attacked]:
    with opened(stage, name) as field:
        than = _undisturbed(field)
        return [attack(field, than, number, seed) for number in numbers if not stop.is_set()]


def _alone(field: Field, whole: "Mapping[str, Future[Undisturbed]]", number: int, seed: int) -> list[Attacked]:
    return [attack(field, whole[field.name].result(), number, seed)]


def table_of(done: list[Attacked]) -> Table:
    """One line a run."""
    table = Table(
        *("launcher", "run", "killed", "when", "at", "rounds on disk", "run again: under way at the kill", "lost"),
        *("bytes differing", "by", "seconds", ""),
    )
    for one in sorted(done, key=lambda one: (one.launcher, one.run)):
        when = f"{one.when}, half-written" if one.in_write else one.when
        held = "; ".join(one.faults) or "ok"
        found = (one.whole, one.repeated, one.lost, one.differing, f"{one.by:.1g}", one.seconds, held)
        cells = (one.run, one.victim, when, f"{one.at:.2f} s", *found)
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the federation ends with us
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
