"""One attack: start, kill, go on until it is done, compare with the run that nobody killed."""

import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace

import psutil

from fedunlearn.federation.rounds import ROLL_CALL
from fedunlearn.files import take_lock
from fedunlearn.reporting.run_lock import lock_path
from killing.field import Field
from killing.judging import Attacked, Kill, Seen, half_written, judged, lines_of
from killing.launchers import Command, Victim
from killing.stage import NUM_ROUNDS, Place, Undisturbed

DRAWS, SPAN, FREE_WITHIN, ENDS_WITHIN = 5, 0.95, 30.0, 600.0
"""Moments that are tried until one comes before the end, each in half of the time of the one before, for the machine may be faster than it was; the share of the undisturbed run they are drawn from; seconds until a killed run's folder is
free, and until a command has ended that goes on by itself.
"""
WAY_OUT = "resume=true"
USER_ERROR = 2


def attack(field: Field, than: Undisturbed, number: int, seed: int) -> Attacked:
    """Attacks run `number` of a launcher; the seed says when, and with whom it begins."""
    launcher, place, began = field.launcher, field.place(number), time.monotonic()
    victim_name, when = launcher.attacks[(number + seed) % len(launcher.attacks)]
    kill = Kill(launcher=field.name, run=number, victim=victim_name, when=when)
    draw, victim = random.Random(f"{seed}/{field.name}/{number}"), launcher.victims[victim_name]
    for missed in range(DRAWS):
        place.clear()
        command = field.stage.attacked(place, *field.overrides)
        at = _strike(command, field, kill, than, draw.random() / 2**missed, draw)
        seen = Seen.of(place.folder)
        if at is not None:
            break
    else:
        raise RuntimeError(f"{field.name} run {number}: {DRAWS} moments all came after its end")
    _start_again(field, victim)
    faults = [*_ended(command, place, field), *_freed(place, field, than), *_done(field, place, command)]
    return judged(replace(kill, at=at), seen, faults, place, than.place, time.monotonic() - began)


def _strike(
    command: Command, field: Field, kill: Kill, than: Undisturbed, share: float, draw: random.Random
) -> float | None:
    """Kills the victim at its moment, this share of what the undisturbed run took. Gives the moment, None where it came too late."""
    began, victim = time.monotonic(), field.launcher.victims[kill.victim]
    folder = field.place(kill.run).folder
    if kill.when == "start":
        time.sleep(share * than.made)
    elif kill.when == "checkpoint":
        number = draw.randint(1, NUM_ROUNDS)
        _await(command, lambda: half_written(folder, number))
        time.sleep(share * _writing(than, number))
    else:
        marker, first = (folder / ROLL_CALL, than.called) if victim.called else (folder, than.made)
        last = than.trained if victim.while_rounds else than.seconds
        _await(command, marker.exists)
        time.sleep(share * SPAN * (last - first))
    if command.poll() is not None or (found := _found(command, field, victim)) is None:
        command.wait(ENDS_WITHIN)
        return None
    at = time.monotonic() - began
    _kill(found, victim)
    return at


def _found(command: Command, field: Field, victim: Victim) -> psutil.Process | None:
    try:
        return victim.find(command, field.federation)
    except psutil.Error:
        return None


def _kill(found: psutil.Process, victim: Victim) -> None:
    """SIGKILL, and waits until it has taken effect; where nobody takes note of a process's end it stays a zombie."""
    gone = [found, *(found.children(recursive=True) if victim.machine else ())]
    for process in gone:
        process.kill()
    while any(_alive(process) for process in gone):
        time.sleep(0.0005)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _start_again(field: Field, victim: Victim) -> None:
    """What a machine's owner does when it is back; all else starts again by itself."""
    if field.federation is None:
        return
    for client, node in field.federation.nodes.items():
        if victim.machine and node.process.poll() is not None:
            field.federation.start_again(client)


def _ended(command: Command, place: Place, field: Field) -> list[str]:
    """Waits for the command, which was killed itself, or goes on, or tells why it does not."""
    try:
        code = command.wait(ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        command.kill()
        command.wait()
        return [f"the command had not ended {ENDS_WITHIN:g} s after the kill"]
    if field.launcher.deployed and code > 0 and (code != USER_ERROR or WAY_OUT not in place.said()):
        return [f"the command ended with code {code} and no way out: {place.said()[-300:]!r}"]
    return []


def _await(command: Command, holds: Callable[[], bool]) -> None:
    while command.poll() is None and not holds():
        time.sleep(0.0005)


def _writing(than: Undisturbed, number: int) -> float:
    """Seconds that the undisturbed run wrote that round."""
    return float(lines_of(than.place.folder)[number - 1]["parts"]["writing"])


def _freed(place: Place, field: Field, than: Undisturbed) -> list[str]:
    """Waits until nobody holds the folder's lock any more: what the kill orphaned must end by itself; a server carries a run to its end, whoever follows it."""
    within = FREE_WITHIN + (2 * than.seconds if field.launcher.deployed else 0.0)
    path, end = lock_path(place.folder), time.monotonic() + within
    while path.is_file():
        with path.open("rb") as file:
            if take_lock(file.fileno()):
                return []
        if time.monotonic() > end:
            return [f"its folder was still in use {within:g} s after the kill"]
        time.sleep(0.05)
    return []


def _done(field: Field, place: Place, command: Command) -> list[str]:
    """Gives the command again, with resume=true where there is a folder; it must end well."""
    code = command.returncode
    if code != 0:
        more = (WAY_OUT,) if place.folder.is_dir() else ()
        code = field.stage.attacked(place, *field.overrides, *more).wait(ENDS_WITHIN)
    return [] if code == 0 else [f"going on ended with code {code}: {place.said()[-300:]!r}"]
