"""A federation of real processes on loopback, one SuperLink and three SuperNodes with TLS and node keys: what it costs, and what it costs when a part of it fails.

    python benchmarks/deployment.py [--story] [--faults] [--rounds 4] [--json]

--story: the pocket's recipes (experiment={finetune,retrain,unlearn}/tofu/pocket with three clients) over launcher=superlink, evaluated: where the seconds and bytes
go, and the largest difference of the adapters to those of launcher=local. Each stage has --rounds rounds at most; the recipes want 10, 10 and 4.

--faults: fine-tuning of five rounds; in the second of them a client's worker is killed, or hangs, its SuperNode is killed and started again, or the SuperLink is; and a
client that raises in every task. A run must go on to its end, or stop with one error and go on with resume=true; where the same clients counted, to the same adapter.

Without either, both. Exit code 1 where an adapter differs by more than 1e-6 or a run does not end so.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from deploying.faults import Cost, costs
from deploying.story import ACTS, Story, tell_story
from rich.console import Console
from rich.table import Table

from fedunlearn.data.pocket.build import ensure_pocket

POCKET = Path(__file__).resolve().parents[1] / "saves" / "pocket"
ROUNDS = 4


def story_table(story: Story) -> Table:
    """One line a run."""
    head = ("run", "rounds", "submitted", "prepared", "roll call", "first round", "other rounds", "finished", "whole")
    table = Table(
        *head, "MB down", "reference", "up", *next(iter(story.acts)).figures, title="seconds, bytes and figures"
    )
    for act in story.acts:
        seconds = (act.submitted, act.prepared, act.roll_call, act.first_round, act.later_rounds, act.finished)
        cells = [act.task, str(act.rounds), *(_cell(value, 1) for value in (*seconds, act.whole))]
        cells += [f"{value / 1e6:.2f}" for value in act.bytes]
        cells += [_cell(value, 3) for value in act.figures.values()]
        table.add_row(*cells)
    return table


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def faults_table(found: list[Cost]) -> Table:
    """One line a fault."""
    table = Table("fault", "seconds", "lost", "ended", "adapter differs by", "client counted in rounds", "")
    for cost in found:
        ended = "resumed" if cost.resumed else "went on"
        cells = (f"{cost.seconds:.1f}", f"{cost.lost:+.1f}", ended, f"{cost.difference:.1g}", str(cost.counted))
        table.add_row(cost.fault, *cells, "; ".join(cost.faults) or "ok")
    return table


def _story(place: Path, rounds: int, console: Console) -> tuple[bool, object]:
    story = tell_story(place, ensure_pocket(0, POCKET), rounds)
    recipe = ", ".join(f"{act.task} {min(rounds, act.recipe)} of {act.recipe}" for act in ACTS)
    console.print(f"rounds of the recipes: {recipe}; the federation was up after {story.up:.1f} s")
    console.print(story_table(story))
    for task, difference in story.differences.items():
        console.print(f"{task}: the adapter differs from launcher=local's by {difference:.1g} at most")
    return story.holds, {**asdict(story), "holds": story.holds}


def _faults(place: Path, console: Console) -> tuple[bool, object]:
    found = list[Cost]()
    for cost in costs(place):
        print(f"{cost.seconds:6.1f} s  {cost.fault}: {'; '.join(cost.faults) or 'ok'}", file=sys.stderr)
        found.append(cost)
    console.print(faults_table(found))
    return not any(cost.faults for cost in found), [asdict(cost) for cost in found]


def main() -> int:
    """Runs what is asked for, prints, judges."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--story", action="store_true")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each stage of the story at most")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the federation ends with us
    console, held, told = Console(width=200, quiet=args.json), [], {}
    both = args.story == args.faults
    with tempfile.TemporaryDirectory(prefix="deployment-") as place:
        for name, wanted, work in (
            ("story", args.story, lambda at: _story(at, args.rounds, console)),
            ("faults", args.faults, lambda at: _faults(at, console)),
        ):
            if wanted or both:
                (Path(place) / name).mkdir()
                good, told[name] = work(Path(place) / name)
                held.append(good)
    if args.json:
        print(json.dumps(told))
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
