"""The side-car of a run on the server's disk: one safetensors file a block, named by hash, in <run>/sidecar/."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from fedunlearn.aggregation.factors import Module, side_by_side
from fedunlearn.aggregation.product import LowRank
from fedunlearn.errors import UserError
from fedunlearn.files import write_bytes
from fedunlearn.records.adapter import Tensors, hash_tensors

FOLDER = "sidecar"


@dataclass(frozen=True)
class BlockStore:
    """Blocks are frozen float32 factors of scale 1; a side-car is a list of their hashes, its rank the sum of theirs, module by module."""

    folder: Path

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def keep(self, tensors: Tensors) -> str:
        """Writes a block and gives its hash."""
        name = hash_tensors(tensors)
        if not self._path(name).is_file():
            write_bytes(self._path(name), safetensors.torch.save({key: t.contiguous() for key, t in tensors.items()}))
        return name

    def take(self, run: Path, name: str) -> str:
        """Copies a block out of another run's folder and gives its hash. Raises UserError where it is gone, damaged or another."""
        return self.keep(BlockStore(run / FOLDER).read([name]))

    def blob(self, name: str) -> bytes:
        """Gives a block's bytes. Raises UserError where it is gone, damaged or another than it is named by."""
        blob = self._bytes(name)
        self._checked(name, blob)
        return blob

    def _bytes(self, name: str) -> bytes:
        try:
            return self._path(name).read_bytes()
        except OSError as error:
            raise UserError(
                f"side-car block {str(self._path(name))!r} cannot be read ({error}): start anew with overwrite=true"
            ) from error

    def read(self, names: Sequence[str]) -> Tensors:
        """Gives the whole side-car, blocks side by side; empty for none. Raises UserError for a block that is gone, damaged or another."""
        return side_by_side([self._checked(name, self._bytes(name)) for name in names])

    def _checked(self, name: str, blob: bytes) -> Tensors:
        try:
            tensors: Tensors = safetensors.torch.load(blob)
        except SafetensorError as error:
            raise UserError(
                f"side-car block {str(self._path(name))!r} is damaged ({error}): start anew with overwrite=true"
            ) from error
        if hash_tensors(tensors) != name:
            raise UserError(
                f"side-car block {str(self._path(name))!r} is not what it is named by: start anew with overwrite=true"
            )
        return tensors

    def of_module(self, names: Sequence[str], module: Module) -> LowRank | None:
        """Gives what the side-car adds to one module, float64; None where there is no block. Raises UserError for a block that cannot be read."""
        pairs = []
        for name in names:
            with self._opened(name) as file:
                pairs.append((file.get_tensor(module.b), file.get_tensor(module.a)))
        if not pairs:
            return None
        return LowRank(torch.cat([b.double() for b, _ in pairs], 1), torch.cat([a.double() for _, a in pairs], 0))

    def rank_of(self, names: Sequence[str], modules: Iterable[Module]) -> dict[str, int]:
        """Gives the side-car's rank by module name, from the files' headers. Raises UserError for a block that cannot be read."""
        ranks = {module.name: 0 for module in modules}
        keys = {module.name: module.a for module in modules}
        for name in names:
            with self._opened(name) as file:
                for path in ranks:
                    ranks[path] += file.get_slice(keys[path]).get_shape()[0]
        return ranks

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        try:
            with safe_open(self._path(name), framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"side-car block {str(self._path(name))!r} is gone or damaged ({error}): start anew with overwrite=true"
            ) from error

    def drop_all_but(self, names: Iterable[str]) -> None:
        """Deletes blocks that no checkpoint names any more."""
        kept = {self._path(name) for name in names}
        for path in self.folder.glob("*.safetensors"):
            if path not in kept:
                path.unlink()
