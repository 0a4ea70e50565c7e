"""The recorded runs, made once."""

import gc
import logging
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import helpers_recorded as recorded
import hypothesis.statistics
from helpers_clients import Client
from helpers_fuzz import LONG
from helpers_recorded import Recorded

TOLD = pytest.StashKey[list]()
PHASES = ("reuse-phase", "generate-phase", "shrink-phase")


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.fuzz)


@pytest.fixture(autouse=True)
def _counted(request):
    """How many examples a test tried, and how long they took: told at the end of a long run."""
    with hypothesis.statistics.collector.with_value(lambda found: request.config.stash[TOLD].append((request.node.name, found))):  # fmt: skip
        yield


def pytest_configure(config):
    config.stash[TOLD] = []


def pytest_terminal_summary(terminalreporter, config):
    for name, found in config.stash[TOLD] if LONG else ():
        tried = [case for phase in PHASES for case in found.get(phase, {}).get("test-cases", ())]
        counts = {status: sum(case["status"] == status for case in tried) for status in ("valid", "invalid", "overrun", "interesting")}  # fmt: skip
        terminalreporter.write_line(f"{name}: {counts}, {sum(case['runtime'] for case in tried):.0f} s")


@pytest.fixture(scope="session")
def place():
    """A folder in memory where there is one: thousands of files are flushed."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def recorded_runs(pocket, place) -> dict[str, Recorded]:
    """Three real runs: `tuned` (side-car), `unlearned` from it (reference, released rows), `remembered` (memory, ranks of clients' own)."""
    saves = place / "saves"
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


@pytest.fixture(scope="module", params=["tuned", "unlearned", "remembered"])
def client(recorded_runs, request):
    """The ClientApp of each recorded run."""
    with Client(recorded_runs[request.param]).seen_working() as client:
        yield client
