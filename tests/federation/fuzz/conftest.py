"""The recorded runs, how many examples there are, and how much memory one may take."""

import gc
import logging
import os
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

import recorded
from recorded import Recorded

LONG = os.environ.get("FUZZ_EXAMPLES")
PAGE, ROOM = os.sysconf("SC_PAGE_SIZE"), 96 * 2**20
"""Bytes that a message may cost beside its size: numpy's and torch's own pools, and a record of a million characters as JSON."""


def examples(share: float = 1.0) -> settings:
    """A few hundred examples that are the same in every run, or FUZZ_EXAMPLES that are new in each."""
    return settings(
        max_examples=int(int(LONG or 120) * share),
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


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.fuzz)


@pytest.fixture(scope="session")
def recorded_runs(pocket, tmp_path_factory) -> dict[str, Recorded]:
    """Three real runs: `tuned` (side-car), `unlearned` from it (reference, released rows), `remembered` (memory, ranks of clients' own)."""
    saves = tmp_path_factory.mktemp("fuzz") / "saves"
    tuned = recorded.record(pocket, saves, "finetune", "tuned", *recorded.TUNED)
    origin = f"model.model_args.pretrained_model_name_or_path={saves}/finetune/tuned"
    unlearned = recorded.record(pocket, saves, "unlearn", "unlearned", origin, *recorded.UNLEARNED)
    remembered = recorded.record(pocket, saves, "unlearn", "remembered", *recorded.REMEMBERED)
    return {"tuned": tuned, "unlearned": unlearned, "remembered": remembered}


@pytest.fixture(autouse=True)
def _quiet():
    """Warnings and tracebacks of what is refused are not what these tests look at."""
    logging.disable(logging.CRITICAL)
    gc.freeze()
    yield
    gc.unfreeze()
    logging.disable(logging.NOTSET)
