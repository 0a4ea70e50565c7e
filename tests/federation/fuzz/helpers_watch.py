"""What a process does to the world while it works on a message, by Python's audit events."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod", "shutil.rmtree")  # fmt: skip
NEVER = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.connect", "socket.getaddrinfo")  # fmt: skip
_seen: list[tuple[str, str]] | None = None
_hooked = False


def _hear(event: str, args: tuple) -> None:
    if _seen is None:
        return
    if event == "open" and isinstance(args[0], str | bytes | os.PathLike) and (args[2] or 0) & WRITES:
        _seen.append((event, os.fsdecode(args[0])))
    elif event in CHANGES:
        _seen.extend((event, os.fsdecode(arg)) for arg in args[:2] if isinstance(arg, str | bytes | os.PathLike))
    elif event in NEVER:
        _seen.append((event, repr(args)))


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """Inside the block every write, and everything that no client may do, goes into the list: (event, path or arguments)."""
    global _seen, _hooked
    if not _hooked:  # a hook stays for the life of the process
        sys.addaudithook(_hear)
        _hooked = True
    _seen = seen = []
    try:
        yield seen
    finally:
        _seen = None


def strayed(seen: list[tuple[str, str]], *allowed: Path) -> list[tuple[str, str]]:
    """What was done outside these folders, or may not be done at all."""
    inside = tuple(f"{folder.resolve()}{os.sep}" for folder in allowed)
    return [
        (event, where)
        for event, where in seen
        if event in NEVER or not f"{os.path.realpath(where)}{os.sep}".startswith(inside)
    ]
