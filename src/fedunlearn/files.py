"""Files that are either whole or not there: written under a temporary name, flushed to the disk, then renamed.

The name is flushed too (the folder it stands in): after a power loss it is the old file or the whole new one, never an empty one.
"""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from fedunlearn.errors import UserError

_TEMPORARY = re.compile(r"^\.(.+)\.tmp\d+$")
_ASIDE = re.compile(r"^\.(.+)\.old\d+$")


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
        _flush(path.parent)
    except OSError as error:
        raise disk_fault(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Writes JSON atomically, keys sorted, indented, piece by piece: the text of it all is never in memory. See write_bytes; raises ValueError for NaN and infinities."""
    pieces = json.JSONEncoder(sort_keys=True, allow_nan=False, ensure_ascii=False, indent=2).iterencode(value)
    _write(path, (piece.encode("utf-8") for piece in chain(pieces, "\n")))


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises OSError or ValueError, which names the file; the way out is the caller's to tell."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return read


def append_line(path: Path, line: str) -> None:
    """Appends one line and flushes it to the disk. Raises UserError where the disk is full; the file then is as it was."""
    before = path.stat().st_size if path.is_file() else None
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        if before is None:
            _flush(path.parent)
    except OSError as error:
        with suppress(OSError):  # half a line would stop resume from reading the file
            os.truncate(path, before or 0)
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
        flush_tree(temporary)
        _take_place(temporary, path)
        _flush(path.parent)
    except OSError as error:
        raise disk_fault(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:  # from the inside out; those that hold something stay
            with suppress(OSError):
                parent.rmdir()


def flush_tree(folder: Path) -> None:
    """Flushes every file and folder below to the disk. Raises OSError where it is full: some file systems say so only now."""
    for place, _, files in os.walk(folder):
        for name in files:
            _flush(Path(place, name))
        _flush(Path(place))


def _flush(path: Path) -> None:
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def settle(path: Path) -> None:
    """Mends what a writer of `path` left that was killed: what it had put aside comes back where nothing has taken its place, temporaries go.

    Only for whoever has `path` to itself: a temporary of a writer that lives would go too. Raises UserError where that cannot be done.
    """
    try:
        beside = list(path.parent.iterdir()) if path.parent.is_dir() else []
        for left in (place for place in beside if _names(_ASIDE, place) == path.name):
            _drop(left) if os.path.lexists(path) else left.rename(path)
        for left in (place for place in beside if _names(_TEMPORARY, place) == path.name):
            _drop(left)
    except OSError as error:
        raise disk_fault(error, path) from error


def settle_below(folder: Path) -> None:
    """Does the same for everything in a folder, at any depth; see settle."""
    for place, folders, files in os.walk(folder):
        left = [name for name in (*folders, *files) if _TEMPORARY.match(name) or _ASIDE.match(name)]
        folders[:] = [name for name in folders if name not in left]
        for name in {found[1] for one in left if (found := _TEMPORARY.match(one) or _ASIDE.match(one))}:
            settle(Path(place, name))


def _names(pattern: re.Pattern[str], place: Path) -> str | None:
    found = pattern.match(place.name)
    return found[1] if found else None


def _drop(place: Path) -> None:
    shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()


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
    _drop(old)


def take_lock(file: int) -> bool:
    """Whether an open file's lock is ours now; False where somebody else holds it. It goes with the open file, so with its process at the latest.

    Raises OSError where the place cannot be locked at all.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def disk_fault(error: OSError, path: Path) -> UserError:
    """Says what the operating system refused, by the name the user knows `path` by, and the way out."""
    shown = Path(*(_TEMPORARY.sub(r"\1", part) for part in path.parts))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"disk full while saving {shown}: nothing half-written was left; free some space and give the same command again "
            "(with resume=true where the run's folder exists)"
        )
    return UserError(
        f"{shown} cannot be written ({error.strerror or error}): choose another place (a run: paths.saves_dir or task_name; a cache or a pocket: "
        "paths.cache_dir, paths.pocket_dir; a script: --to), or mend the rights there"
    )
