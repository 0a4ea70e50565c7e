"""Fixtures of the whole suite: a tiny pocket, and configs composed for it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import absl.logging
import pytest
import torch

from fedunlearn.data.pocket.build import PocketPaths, PocketRecipe, ensure_pocket
from fedunlearn.data.pocket.pretrain import BaseRecipe
from fedunlearn.data.pocket.world import WorldSize

absl.logging.get_absl_handler().python_handler.close = lambda: (
    None
)  # it would close pytest's capture when logging is set up anew


@pytest.fixture(scope="session")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> PocketPaths:
    """A pocket with 20 authors x 4 rows and a base of two narrow layers, hardly trained: real files, no quality."""
    recipe = PocketRecipe(
        world=WorldSize(rows_per_author=4, num_crowd=20),
        base=BaseRecipe(vocab_size=400, hidden_size=32, intermediate_size=64, num_layers=2, steps=20, warmup_steps=4),
    )
    return ensure_pocket(7, tmp_path_factory.mktemp("pocket"), recipe)


@pytest.fixture
def saves(tmp_path: Path) -> Path:
    """An empty saves folder of one test."""
    return tmp_path / "saves"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a model gains nothing from a second thread; a run may set its own, and is undone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
