"""Where a client keeps the reference adapter: on its own disk, under the hash the server names it by."""

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from fedunlearn.files import write_bytes
from fedunlearn.records.adapter import Tensors, hash_tensors


@dataclass(frozen=True)
class ReferenceStore:
    """One reference a client; an older one is deleted when a new one comes, and asked for again should it be needed."""

    folder: Path

    def _path(self, name: str) -> Path:
        return self.folder / f"reference-{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether the adapter of that hash lies here."""
        return self._path(name).is_file()

    def learn(self, blob: bytes, wanted: str) -> None:
        """Keeps a received adapter if it is the one wanted ('' wants none); in the first round the global adapter is the reference."""
        if not wanted or self.has(wanted) or hash_tensors(safetensors.torch.load(blob)) != wanted:
            return
        for old in self.folder.glob("reference-*.safetensors"):
            old.unlink(missing_ok=True)
        write_bytes(self._path(wanted), blob)

    def load(self, name: str) -> Tensors:
        """Gives the adapter's tensors. Raises ValueError where the file does not have the hash it is named by."""
        tensors = safetensors.torch.load_file(self._path(name))
        if hash_tensors(tensors) != name:
            self._path(name).unlink()
            raise ValueError(f"the reference adapter {name} kept by this client was damaged; it is asked for anew")
        return tensors
