"""Folders of short names: a worker's socket lies in its site's folder, and a socket's path has a hundred bytes."""

import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
