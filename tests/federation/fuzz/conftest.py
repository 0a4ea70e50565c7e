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
from helpers_clients import Client
from helpers_recorded import Recorded


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.fuzz)


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
