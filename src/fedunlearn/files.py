"""Files that are either whole or not there: written under a temporary name, then renamed."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedunlearn.errors import UserError


def canonical_json(value: object) -> str:
    """Gives JSON text with sorted keys and no NaN; equal values give equal text. Raises ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically. Raises UserError where the disk is full or the place cannot be written; nothing half-written stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _told(error, path) from error


def write_json(path: Path, value: object) -> None:
    """Writes JSON atomically, keys sorted, indented; see write_bytes."""
    text = json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False, indent=2)
    write_bytes(path, (text + "\n").encode("utf-8"))


def append_line(path: Path, line: str) -> None:
    """Appends one line and flushes it to the disk. Raises UserError where the disk is full."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _told(error, path) from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path` that takes its place when the block ends well, and goes away when it does not.

    Raises UserError where the disk is full or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _take_place(temporary, path)
    except OSError as error:
        raise _told(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    old = path.with_name(f".{path.name}.old{os.getpid()}")
    path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old)


def _told(error: OSError, path: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"disk full while saving {path}: nothing half-written was left; free some space and run again with resume=true"
        )
    return UserError(f"{path} cannot be written ({error.strerror}): choose another paths.saves_dir or task_name")
