"""Rounds with 10 to 10,000 registered clients: what a round of ten of them costs, in seconds and in memory, against how many there are.

    python benchmarks/scale.py [--json] [--rounds 16]

The pocket's fine-tuning under launcher=local: a base of the pocket's size that was hardly trained, two authors a client, one epoch a round. Clients share rows
(scale_run.Shared), for there are twenty authors. Every population is a process of its own; their rounds run in turn, so that another process on the machine slows
all alike. Peaks are those of a second, shorter run, in which malloc hands back what is freed. A round is everything from the sending of its tasks to that of the next round's. Besides, one round each with cohorts of 2 to 64 clients. About three minutes.

Exit code 1 where a bound is missed: from the second round on the round with 10,000 clients costs at most 1.1 times that with 10 (median of the
rounds' ratios); the roll call of 10,000, apart, takes 3 s at most; the process's peak grows by less than 2 kB a client. Ratio and roll call are judged by CPU
time, which does not count what other processes take; wall clock is told beside it. The roll call is everything between the launch and the first tasks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from scale_run import Size, make_folder, serve

from fedunlearn.data.pocket.build import PocketRecipe, ensure_pocket
from fedunlearn.data.pocket.pretrain import BaseRecipe

POPULATIONS, COHORT, COHORTS = (10, 100, 1_000, 10_000), 10, (2, 4, 8, 16, 32, 64)
ROUNDS, FEWEST = 16, 3
ROUND_RATIO, ROLL_CALL_SECONDS, BYTES_A_CLIENT = 1.1, 3.0, 2_000
MEMORY = Path("/dev/shm")
HANDS_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""The C library's malloc then gives freed memory back, and a peak is repeated to 2 MiB instead of 10; steps take half as long again."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run. roll_call: CPU seconds and, beside, wall; cpu: of each round from the second on; seconds: their wall clock. mib: the process's peak."""

    population: int
    cohort: int
    roll_call: float
    roll_call_wall: float
    cpu: tuple[float, ...]
    seconds: tuple[float, ...]
    mib: float


class Child:
    """A run in a process of its own, which waits before each round."""

    def __init__(self, process: "subprocess.Popen[str]", size: Size) -> None:
        self._process, self._size = process, size
        self._called = self._told()
        self._next()  # the first round, with all that is made on first use
        self._rounds: list[dict[str, float]] = []

    def go_on(self) -> None:
        """Runs one round."""
        self._rounds.append(self._next())

    def end(self) -> Measured:
        """Runs to the end."""
        last = self._next()
        return Measured(
            population=self._size.population,
            cohort=self._size.cohort,
            roll_call=self._called["cpu"],
            roll_call_wall=self._called["seconds"],
            cpu=tuple(told["cpu"] for told in self._rounds),
            seconds=tuple(told["seconds"] for told in self._rounds),
            mib=last["mib"],
        )

    def _next(self) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._told()

    def _told(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a run of {self._size.population} clients ended with exit code {self._process.wait()}")
        told: dict[str, float] = json.loads(line)
        return told


@contextmanager
def started(size: Size, env: Mapping[str, str]) -> Iterator[Child]:
    """A run that stands after its first round; its process is ended with the block."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps(asdict(size))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )
    with process:
        try:
            yield Child(process, size)
        except BaseException:
            process.kill()
            raise


def in_turn(sizes: Sequence[Size], env: Mapping[str, str]) -> list[Measured]:
    """Runs of the same number of rounds, a round of each after another; the first is not told, nor the last, which ends otherwise."""
    with ExitStack() as stack:
        children = [stack.enter_context(started(size, env)) for size in sizes]
        for _ in range(sizes[0].rounds - 2):
            for child in children:
                child.go_on()
        return [child.end() for child in children]


def ratio(first: Measured, other: Measured) -> float:
    """What a round of `other` costs over one of `first`: median over rounds that ran side by side."""
    return median(b / a for a, b in zip(first.cpu, other.cpu, strict=True))


def bytes_a_client(first: Measured, last: Measured) -> float:
    """By how much the peak grows from one population to the other."""
    return (last.mib - first.mib) * 2**20 / (last.population - first.population)


def faults(runs: Sequence[Measured]) -> list[str]:
    """What misses its bound. runs: by population, smallest first."""
    first, last = runs[0], runs[-1]
    at, found = f"{last.population} clients", []
    if not ratio(first, last) <= ROUND_RATIO:
        found.append(
            f"{at}: a round costs {ratio(first, last):.3f} x that of {first.population}, bound {ROUND_RATIO} x"
        )
    if not last.roll_call <= ROLL_CALL_SECONDS:
        found.append(f"{at}: the roll call takes {last.roll_call:.2f} s, bound {ROLL_CALL_SECONDS} s")
    if not bytes_a_client(first, last) < BYTES_A_CLIENT:
        found.append(f"{at}: {bytes_a_client(first, last):.0f} bytes a client, bound {BYTES_A_CLIENT}")
    return found


def shown(runs: Sequence[Measured], cohorts: Sequence[Measured]) -> str:
    """The report in lines."""
    first, last = runs[0], runs[-1]
    lines = [
        f"a round of {first.cohort} clients: CPU s (wall), over that of {first.population}, roll call CPU s (wall), peak MiB"
    ]
    lines += [
        f"  {run.population:>6} registered {median(run.cpu):7.3f} ({median(run.seconds):.3f}) {ratio(first, run):6.3f} x "
        f"{run.roll_call:7.2f} ({run.roll_call_wall:.2f}) {run.mib:8.1f}"
        for run in runs
    ]
    lines.append(
        f"  bounds: {ROUND_RATIO} x, {ROLL_CALL_SECONDS} s; memory grows by {bytes_a_client(first, last):.0f} bytes a client (bound {BYTES_A_CLIENT})"
    )
    lines += ["one round by its cohort: CPU s (wall), peak MiB"] if cohorts else []
    lines += [
        f"  {run.cohort:>6} of {run.population} {median(run.cpu):7.3f} ({median(run.seconds):.3f}) {run.mib:8.1f}"
        for run in cohorts
    ]
    return "\n".join(lines)


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, in memory where there is such a place: every round is flushed to the disk, which others use too."""
    with tempfile.TemporaryDirectory(prefix="scale-", dir=MEMORY if MEMORY.is_dir() else None) as place:
        yield Path(place)


def measured(populations: Sequence[int], cohorts: Sequence[int], rounds: int) -> tuple[list[Measured], list[Measured]]:
    """Runs by population, all at once and in turn, their peaks from one more each; and by cohort, one after another."""
    with scratch() as place:
        pocket = ensure_pocket(0, place / "pocket", PocketRecipe(base=BaseRecipe(steps=20, warmup_steps=4)))

        def made(population: int, cohort: int, rounds: int) -> Size:
            size = Size(
                population=population,
                cohort=cohort,
                rounds=rounds,
                data=str(pocket.data),
                model=str(pocket.model),
                saves=tempfile.mkdtemp(dir=place),
            )
            make_folder(size)
            return size

        runs = in_turn([made(population, COHORT, rounds) for population in populations], {})
        peaks = [in_turn([made(run.population, COHORT, FEWEST)], HANDS_BACK)[0].mib for run in runs]
        runs = [replace(run, mib=mib) for run, mib in zip(runs, peaks, strict=True)]
        return runs, [in_turn([made(max(cohorts), cohort, FEWEST)], {})[0] for cohort in cohorts]


def main() -> int:
    """Measures, tells, and gives 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of each population")
    parser.add_argument("--populations", type=int, nargs="+", default=POPULATIONS, help="registered clients")
    parser.add_argument("--cohorts", type=int, nargs="*", default=COHORTS, help="clients a round")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(Size(**json.loads(args.child)))
        return 0
    runs, cohorts = measured(sorted(args.populations), args.cohorts, args.rounds)
    found = faults(runs)
    if args.json:
        told = {
            "populations": [asdict(run) for run in runs],
            "cohorts": [asdict(run) for run in cohorts],
            "ratio": ratio(runs[0], runs[-1]),
            "roll_call": runs[-1].roll_call,
            "bytes_a_client": bytes_a_client(runs[0], runs[-1]),
            "faults": found,
        }
        print(json.dumps(told, indent=1))
    else:
        print("\n".join([shown(runs, cohorts), *(f"FAIL {fault}" for fault in found)]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
