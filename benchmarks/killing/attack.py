"""One attack: start, kill, go on until it is done, compare with the run that nobody killed."""

import fcntl
import json
import os
import random
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedunlearn.federation.checkpoint import HISTORY
from fedunlearn.federation.ledger import FILE as LEDGER
from fedunlearn.federation.ledger import FOLDER as LEDGER_FOLDER
from fedunlearn.federation.rounds import ROLL_CALL
from fedunlearn.models.adapter_files import WEIGHTS
from fedunlearn.reporting.run_lock import lock_path
from killing.launchers import LAUNCHERS, Victim, When
from killing.stage import NUM_ROUNDS, Stage, Undisturbed, folder_of

DRAWS, SPAN, FREE_WITHIN = 5, 0.95, 30.0
"""Moments that are tried until one comes before the end; the share of the undisturbed run they are drawn from; seconds until a killed run's folder is free."""
COUNTED_TWICE = ("attempt", "bytes_down", "bytes_down_reference", "bytes_up")
"""What a client that is asked again is entitled to, where the run goes on by itself."""
SECONDS_TEXT = 20
"""Bytes by which two equal replies may differ: each says how many seconds it took, in figures."""


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """One run. at: seconds after its start at which it was killed; whole: rounds on disk then; in_write: a checkpoint was half-written.

    repeated: rounds under way at the kill that were run again; lost: rounds on disk that were. differing: bytes of the result. faults: why it does not
    hold.
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
    faults: tuple[str, ...]


def attack(stage: Stage, than: Undisturbed, name: str, number: int, seed: int) -> Attacked:
    """Attacks run `number` of a launcher; the seed says when."""
    chosen = LAUNCHERS[name]
    victim_name, when = chosen.attacks[number % len(chosen.attacks)]
    victim = chosen.victims[victim_name]
    draw, saves = random.Random(f"{seed}/{name}/{number}"), stage.place / f"{name}{number}"
    for _ in range(DRAWS):
        shutil.rmtree(saves, ignore_errors=True)
        command = stage.attacked(saves, *chosen.overrides)
        at = _kill(command, victim, when, folder_of(saves), than, draw)
        seen = _Seen.of(folder_of(saves))
        if victim.survived:
            command.wait()
        if at is not None:
            break
    else:
        raise RuntimeError(f"{name} run {number}: {DRAWS} moments all came after its end")
    faults = [*_freed(saves), *_done(stage, saves, command, *chosen.overrides)]
    return _judged(name, number, victim_name, when, at, seen, faults, saves, than)


def _kill(
    command: "subprocess.Popen[bytes]",
    victim: Victim,
    when: When,
    folder: Path,
    than: Undisturbed,
    draw: random.Random,
) -> float | None:
    """Kills the victim at its moment, and waits for the command where that is not to survive. Gives the moment, None where it came too late."""
    began, share = time.monotonic(), draw.random()
    if when == "start":
        time.sleep(share * than.made)
    elif when == "checkpoint":
        number = draw.randint(1, NUM_ROUNDS)
        _await(command, lambda: _half_written(folder, number))
        time.sleep(share * _writing(than, number))
    else:
        marker, first = (folder / ROLL_CALL, than.called) if victim.called else (folder, than.made)
        last = than.trained if victim.mark else than.seconds  # what the rounds are made with ends with them
        _await(command, marker.exists)
        time.sleep(share * SPAN * (last - first))
    found = victim.find(command)
    if found is None or command.poll() is not None:
        command.wait()
        return None
    at = time.monotonic() - began
    found.kill()
    if not victim.survived:
        command.wait()
    else:
        psutil.wait_procs([found])
    return at


def _await(command: "subprocess.Popen[bytes]", holds: Any) -> None:
    while command.poll() is None and not holds():
        time.sleep(0.0005)


def _half_written(folder: Path, number: int | None = None) -> bool:
    """Whether the temporary folder of a checkpoint is there: of that round, or of any."""
    beginning = "." if number is None else f".{number:04d}.tmp"
    try:
        names = os.listdir(folder / "rounds")
    except FileNotFoundError:
        return False
    return any(name.startswith(beginning) and ".tmp" in name for name in names)


def _writing(than: Undisturbed, number: int) -> float:
    """Seconds that the undisturbed run wrote that round."""
    return float(_lines(folder_of(than.saves))[number - 1]["parts"]["writing"])


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of the history."""
    path = folder / HISTORY
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@dataclass(frozen=True)
class _Seen:
    """What a kill left: each whole round's inode, rounds in the history, and whether a checkpoint was half-written."""

    rounds: dict[int, int]
    told: int
    in_write: bool

    @classmethod
    def of(cls, folder: Path) -> "_Seen":
        return cls(_inodes(folder), len(_lines(folder)), _half_written(folder))


def _inodes(folder: Path) -> dict[int, int]:
    return {int(path.name): path.stat().st_ino for path in (folder / "rounds").glob("[0-9]*")}


def _freed(saves: Path) -> list[str]:
    """Waits until nobody holds the folder's lock any more: what the kill orphaned must end by itself."""
    path, end = lock_path(folder_of(saves)), time.monotonic() + FREE_WITHIN
    while path.is_file():
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return []
            except OSError:
                if time.monotonic() > end:
                    return [f"its folder was still in use {FREE_WITHIN:g} s after the kill"]
        time.sleep(0.05)
    return []


def _done(stage: Stage, saves: Path, command: "subprocess.Popen[bytes]", *overrides: str) -> list[str]:
    """Gives the command again, with resume=true where there is a folder; it must end well."""
    code = command.returncode
    if code != 0:
        more = ("resume=true",) if folder_of(saves).is_dir() else ()
        code = stage.attacked(saves, *overrides, *more).wait()
    return [] if code == 0 else [f"going on ended with code {code}: {stage.said(saves)[-300:]!r}"]


def _judged(
    name: str,
    number: int,
    victim: str,
    when: When,
    at: float,
    seen: _Seen,
    faults: list[str],
    saves: Path,
    than: Undisturbed,
) -> Attacked:
    folder, whole = folder_of(saves), folder_of(than.saves)
    after = _inodes(folder)
    lost = sum(after.get(round) != inode for round, inode in seen.rounds.items())
    differing = _differing(folder / "adapter" / WEIGHTS, whole / "adapter" / WEIGHTS)
    twice = COUNTED_TWICE if LAUNCHERS[name].victims[victim].survived else ()
    faults += [f"{lost} whole rounds were run again"] if lost else []
    faults += [f"{differing} bytes of the adapter differ"] if differing else []
    faults += _unlike(_lines(folder), _lines(whole), twice)
    if _differing(folder / LEDGER_FOLDER / LEDGER, whole / LEDGER_FOLDER / LEDGER):
        faults.append("the ledger differs")
    left = [path.name for path in folder.parent.rglob("*") if ".tmp" in path.name or ".lock" in path.name]
    faults += [f"left behind: {left}"] if left else []
    return Attacked(
        launcher=name,
        run=number,
        victim=victim,
        when=when,
        at=round(at, 2),
        whole=len(seen.rounds),
        in_write=seen.in_write,
        repeated=int(len(seen.rounds) < NUM_ROUNDS) if not LAUNCHERS[name].victims[victim].survived else 0,
        lost=lost,
        differing=differing,
        faults=tuple(faults),
    )


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
    gone = {"seconds", "parts", "clients", *left_out}
    keys = sorted(key for key in one.keys() | other.keys() if key not in gone and one.get(key) != other.get(key))
    return [key for key in keys if key != "bytes_up" or abs(one[key] - other[key]) > SECONDS_TEXT]
