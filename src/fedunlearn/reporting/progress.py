"""Progress of long stages with the time left: a bar on a terminal, a log line now and then elsewhere."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yields `items` unchanged and shows how many of `total` are done and how long the rest will take.

    On a terminal a bar that goes away when done; else a log line at most every 10 seconds, and none for shorter stages.
    """
    console = Console(stderr=True)
    yield from _bar(items, label, total, console) if console.is_terminal else _lines(items, label, total)


def _bar(items: Iterable[T], label: str, total: int, console: Console) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)
        for item in items:
            yield item
            progress.advance(task)


def _lines(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    start = said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES and done < total:
            said = now
            log.info("%s: %d of %d, %.0f s left", label, done, total, (now - start) / done * (total - done))
