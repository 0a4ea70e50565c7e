"""A deadline for what cannot be given one: it acts from another thread."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def watchdog(seconds: float, bite: Callable[[], None]) -> Iterator[None]:
    """Calls `bite` once after so many seconds (may be infinite), from another thread, unless the block has been left; after the block it is not called, nor under way."""
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), bite)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
