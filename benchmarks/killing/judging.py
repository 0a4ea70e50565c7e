"""What a kill left and what came of it, against the run that nobody killed."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from differences import largest_difference

from fedunlearn.federation.checkpoint import HISTORY
from fedunlearn.federation.ledger import FILE as LEDGER
from fedunlearn.federation.ledger import FOLDER as LEDGER_FOLDER
from fedunlearn.models.adapter_files import WEIGHTS
from killing.launchers import LAUNCHERS, When
from killing.stage import NUM_ROUNDS, Place

COUNTED_TWICE = ("attempt", "bytes_down", "bytes_down_reference", "bytes_up")
"""What a client that is asked again is entitled to, where the run goes on by itself."""
SECONDS_TEXT = 20
"""Bytes by which two equal replies may differ: each says how many seconds it took, in figures."""


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """One run. at: seconds after its start at which it was killed; whole: rounds on disk then; in_write: a checkpoint was half-written.

    repeated: rounds under way at the kill, which must be run again (taken from what was on disk then, not counted; 0 where the run goes on by itself); lost: rounds
    on disk that were run again. differing: bytes of the result; by: its largest difference. faults: why it does not hold. seconds: until it was done.
    """

    launcher: str
    run: int
    victim: str
    when: When
    at: float
    whole: int
    in_write: bool
    repeated: int
    lost: int
    differing: int
    by: float
    faults: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What was done: to which victim of which launcher, when, and at how many seconds."""

    launcher: str
    run: int
    victim: str
    when: When
    at: float = 0.0


def half_written(folder: Path, number: int | None = None) -> bool:
    """Whether the temporary folder of a checkpoint is there: of that round, or of any."""
    beginning = "." if number is None else f".{number:04d}.tmp"
    try:
        names = os.listdir(folder / "rounds")
    except FileNotFoundError:
        return False
    return any(name.startswith(beginning) and ".tmp" in name for name in names)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of the history."""
    path = folder / HISTORY
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@dataclass(frozen=True)
class Seen:
    """What a kill left: each whole round's inode, rounds in the history, and whether a checkpoint was half-written."""

    rounds: dict[int, int]
    told: int
    in_write: bool

    @classmethod
    def of(cls, folder: Path) -> "Seen":
        return cls(_inodes(folder), len(lines_of(folder)), half_written(folder))


def _inodes(folder: Path) -> dict[int, int]:
    return {int(path.name): path.stat().st_ino for path in (folder / "rounds").glob("[0-9]*")}


def judged(kill: Kill, seen: Seen, faults: list[str], place: Place, than: Place, seconds: float) -> Attacked:
    """Compares a run that was killed, and gone on with until it was done, with the undisturbed one."""
    launcher = LAUNCHERS[kill.launcher]
    victim = launcher.victims[kill.victim]
    folder, whole = place.folder, than.folder
    after = _inodes(folder)
    lost = sum(after.get(round) != inode for round, inode in seen.rounds.items())
    differing = _differing(folder / "adapter" / WEIGHTS, whole / "adapter" / WEIGHTS)
    by = largest_difference(folder, whole) if differing else 0.0
    faults = [*faults, *([f"{lost} whole rounds were run again"] if lost else [])]
    if by > launcher.tolerance or (differing and not launcher.tolerance):
        faults.append(f"{differing} bytes of the adapter differ, by {by:.1g} at most")
    if differing and launcher.tolerance:
        faults += _others_counted(lines_of(folder), lines_of(whole))
    else:
        faults += _unlike(lines_of(folder), lines_of(whole), COUNTED_TWICE if victim.survived else ())
        if _differing(folder / LEDGER_FOLDER / LEDGER, whole / LEDGER_FOLDER / LEDGER):
            faults.append("the ledger differs")
    left = [path.name for path in folder.parent.rglob("*") if ".tmp" in path.name or ".lock" in path.name]
    faults += [f"left behind: {left}"] if left else []
    return Attacked(
        launcher=kill.launcher,
        run=kill.run,
        victim=kill.victim,
        when=kill.when,
        at=round(kill.at, 2),
        whole=len(seen.rounds),
        in_write=seen.in_write,
        repeated=int(len(seen.rounds) < NUM_ROUNDS) if not victim.survived else 0,
        lost=lost,
        differing=differing,
        by=by,
        faults=tuple(faults),
        seconds=round(seconds, 1),
    )


def _others_counted(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[str]:
    """Rounds in which other clients counted; what else two histories hold hangs on the last bit of the adapter."""
    mine, its = (
        [(line["round"], sorted(c["client_id"] for c in line["clients"] if c["weight"] > 0)) for line in told]
        for told in (lines, others)
    )
    return [] if mine == its else [f"clients counted in {mine} in place of {its}"]


def _differing(one: Path, other: Path) -> int:
    """Bytes in which two files differ; all of the longer where one is missing."""
    first, second = (path.read_bytes() if path.is_file() else b"" for path in (one, other))
    return sum(a != b for a, b in zip(first, second, strict=False)) + abs(len(first) - len(second))


def _unlike(lines: list[dict[str, Any]], others: list[dict[str, Any]], left_out: tuple[str, ...]) -> list[str]:
    """Where two histories differ in anything but seconds."""
    if len(lines) != len(others):
        return [f"the history has {len(lines)} lines in place of {len(others)}"]
    found = []
    for line, other in zip(lines, others, strict=True):
        keys = _differ(line, other, left_out)
        if len(line["clients"]) == len(other["clients"]):
            pairs = zip(line["clients"], other["clients"], strict=True)
            keys += [f"{key} of client {one['client_id']}" for one, its in pairs for key in _differ(one, its, left_out)]
        else:
            keys.append("clients")
        found += [f"round {line['round']} differs in {', '.join(keys)}"] if keys else []
    return found


def _differ(one: dict[str, Any], other: dict[str, Any], left_out: tuple[str, ...]) -> list[str]:
    """Keys whose values differ, but for seconds and what hangs on them."""
    gone = {"seconds", "seconds_loading", "parts", "clients", *left_out}
    keys = sorted(key for key in one.keys() | other.keys() if key not in gone and one.get(key) != other.get(key))
    return [key for key in keys if key != "bytes_up" or abs(one[key] - other[key]) > SECONDS_TEXT]
