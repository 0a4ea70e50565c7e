"""A line that a user reads once, however often a process comes by."""

import functools
import logging

log = logging.getLogger(__name__)


@functools.cache
def say_once(line: str) -> None:
    """Warns with the line, once a process: a config is settled anew at each stage of a run."""
    log.warning("%s", line)
