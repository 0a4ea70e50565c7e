"""Files that are either whole or not there: written under a temporary name, then renamed."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from fedunlearn.errors import UserError

_TEMPORARY = re.compile(r"^\.(.+)\.tmp\d+$")


def canonical_json(value: object) -> str:
    """Gives JSON text with sorted keys and no NaN; equal values give equal text. Raises ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically. Raises UserError where the disk is full or the place cannot be written; nothing half-written stays."""
    _write(path, (data,))


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise disk_fault(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Writes JSON atomically, keys sorted, indented, piece by piece: the text of it all is never in memory. See write_bytes; raises ValueError for NaN and infinities."""
    pieces = json.JSONEncoder(sort_keys=True, allow_nan=False, ensure_ascii=False, indent=2).iterencode(value)
    _write(path, (piece.encode("utf-8") for piece in chain(pieces, "\n")))


def append_line(path: Path, line: str) -> None:
    """Appends one line and flushes it to the disk. Raises UserError where the disk is full; the file then is as it was."""
    before = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):  # half a line would stop resume from reading the file
            os.truncate(path, before)
        raise disk_fault(error, path) from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path` that takes its place when the block ends well, and goes away when it does not.

    Raises UserError where the disk is full or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _take_place(temporary, path)
    except OSError as error:
        raise disk_fault(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:  # from the inside out; those that hold something stay
            with suppress(OSError):
                parent.rmdir()


def _take_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    old = path.with_name(f".{path.name}.old{os.getpid()}")
    path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        old.rename(path)
        raise
    if old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old)


def disk_fault(error: OSError, path: Path) -> UserError:
    """Says what the operating system refused, by the name the user knows `path` by, and the way out."""
    shown = Path(*(_TEMPORARY.sub(r"\1", part) for part in path.parts))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"disk full while saving {shown}: nothing half-written was left; free some space and give the same command again "
            "(with resume=true where the run's folder exists)"
        )
    return UserError(
        f"{shown} cannot be written ({error.strerror or error}): choose another paths.saves_dir or task_name (a cache or a pocket: "
        "paths.cache_dir, paths.pocket_dir), or mend the rights there"
    )
