"""Replies of one round, kept on disk as they arrive: memory does not grow with the cohort."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from fedunlearn.aggregation.reduce import ReadTensor
from fedunlearn.files import write_bytes


class Spool:
    """One safetensors file a client; gone when the block of `open_spool` ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, client: int, blob: bytes) -> None:
        """Keeps a client's adapter; a later one of the same client takes its place."""
        write_bytes(self._folder / f"{client}.safetensors", blob)

    @contextmanager
    def reader(self, clients: Iterable[int]) -> Iterator[ReadTensor]:
        """Gives a function (client id, name) -> tensor; files are mapped, not loaded."""
        with ExitStack() as stack:
            files = {
                k: stack.enter_context(safe_open(self._folder / f"{k}.safetensors", framework="pt")) for k in clients
            }

            def read(client: int, name: str) -> torch.Tensor:
                tensor: torch.Tensor = files[client].get_tensor(name)
                return tensor

            yield read


@contextmanager
def open_spool(run_folder: Path) -> Iterator[Spool]:
    """Gives an empty spool in the run's folder."""
    folder = run_folder / "rounds" / ".spool"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield Spool(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
