"""One run, one folder, one process: who works in a run's folder holds its lock, and the kernel lets go of it when that process dies.

The lock is <parent>/.<folder's name>.lock: beside the folder, not in it, for a run that starts anew puts another folder in the place of the old one.
It is there while a run goes on, and says who holds it.
"""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from fedunlearn.errors import UserError
from fedunlearn.files import disk_fault, settle, take_lock
from fedunlearn.reporting.run_folder import folder_exists

log = logging.getLogger(__name__)
_HELD: dict[Path, int] = {}
"""Locks of this process: path -> open file."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the lock of a run's folder, which need not exist yet; then what a killed holder left beside it is mended (files.settle).

    Raises UserError, naming the holder, where another process has it, or this one does already. It changes nothing in the folder; where the
    folder was not made after all, no trace stays.
    """
    path = lock_path(folder)
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        file = _acquired(folder, path)
        try:
            settle(folder)
            _HELD[path] = file
            yield
        finally:
            _HELD.pop(path, None)
            path.unlink(missing_ok=True)  # while it is held: whoever has opened it since finds out that it is gone
            os.close(file)
    finally:
        for parent in missing:  # from the inside out; those that hold something stay
            with suppress(OSError):
                parent.rmdir()


def lock_path(folder: Path) -> Path:
    """Where the lock of a run's folder lies: one file, however the folder is spelt."""
    return folder.parent.resolve() / f".{folder.name}.lock"


def held_locks() -> tuple[int, ...]:
    """Gives the open files of this process's locks. A child that writes into the folder inherits them: while it lives the folder is not free."""
    return tuple(_HELD.values())


def _acquired(folder: Path, path: Path) -> int:
    """Gives the locked file."""
    while True:
        file = _opened(folder, path)
        try:
            if not take_lock(file):
                raise _in_use(folder, path)
            if _is_at(file, path):
                _say_who(file)
                return file
        except UserError:
            os.close(file)
            raise
        except OSError as error:
            os.close(file)
            raise disk_fault(error, path) from error
        os.close(file)  # its holder ended and took it away in between


def _opened(folder: Path, path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        folder_exists(folder)  # says what is wrong with its place, where it knows
        raise disk_fault(error, folder) from error


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _say_who(file: int) -> None:
    """The time is for people only: nothing is judged by it."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    said = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"
    os.ftruncate(file, 0)
    os.pwrite(file, said.encode(), 0)


def _in_use(folder: Path, path: Path) -> UserError:
    return UserError(
        f"{str(folder)!r} is in use by {_holder(path)}: wait until that run has ended, or end it, or choose another task_name "
        "(neither resume=true nor overwrite=true takes a folder from a run that is going on)"
    )


def _holder(path: Path) -> str:
    """Who the lock says it is held by; it may be about to say so."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return f"process {said['pid']} on {said['host']}, since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.debug("%s does not say who holds it: %s", path, error)
        return "another process"
