"""How many examples there are, how much memory one may take, and what is asked of every refusal."""

import os
import resource
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Error, Message, RecordDict
from helpers_recorded import CLIENTS, ReplayingGrid
from hypothesis import HealthCheck, settings

from fedunlearn.federation.faults import REPLY_UNREADABLE
from fedunlearn.federation.wire import content_bytes

LONG = os.environ.get("FUZZ_EXAMPLES")
PAGE, ROOM = os.sysconf("SC_PAGE_SIZE"), 96 * 2**20
"""Bytes that a message may cost beside its size: numpy's and torch's own pools, and a record of a million characters as JSON."""
NO_MEMORY = ("MemoryError", "allocate memory", "not enough memory")
LINE = 300


def examples(share: float = 1.0) -> settings:
    """A few hundred examples that are the same in every run, or FUZZ_EXAMPLES that are new in each."""
    return settings(
        max_examples=int(int(LONG or 200) * share),
        derandomize=LONG is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def room_for(size: int):
    """Inside the block the process may map no more than a small multiple of a message of `size` bytes beside what it has."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM + 16 * size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def size_of(content: RecordDict | None) -> int:
    """Bytes of a message; of one that cannot be sent at all (a lone surrogate) a million."""
    if content is None:
        return 0
    try:
        return content_bytes(content)
    except (ValueError, TypeError):
        return 10**6


def check_told(detail: str) -> None:
    """Why somebody was refused: a line that a terminal can show, and not that memory ran out."""
    assert not any(word in detail for word in NO_MEMORY), detail
    assert detail.isprintable()


def grid_with(recorded, kind: str, client: int, content: RecordDict | None) -> ReplayingGrid:
    """Clients that say what they really said, but for one. None: nothing that could be read."""

    def answer_of(k):
        said = content if k == client else recorded.said[kind, k]
        if said is None:
            return lambda message: Message(Error(REPLY_UNREADABLE, "no message"), reply_to=message)
        return lambda message: Message(said, reply_to=message)

    return ReplayingGrid({k: answer_of(k) for k in range(CLIENTS)})
