"""Where a client keeps the reference adapter: on its own disk, under the hash the server names it by."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from fedunlearn.files import write_bytes
from fedunlearn.records.adapter import Tensors, hash_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceStore:
    """One reference a client; an older one is deleted when a new one comes, and asked for again should it be needed."""

    folder: Path

    def _path(self, name: str) -> Path:
        return self.folder / f"reference-{name}.safetensors"

    def obtain(self, name: str, received: Iterable[bytes]) -> Tensors | None:
        """Gives the adapter of that hash, from this disk or out of what was received with the task (and kept from then on).

        In the first round the global adapter is the reference. None: the client has to ask for it; a damaged file counts as none.
        """
        kept = self._load(name)
        if kept is not None:
            return kept
        for blob in received:
            tensors = safetensors.torch.load(blob)
            if hash_tensors(tensors) == name:
                for old in self.folder.glob("reference-*.safetensors"):
                    old.unlink(missing_ok=True)
                write_bytes(self._path(name), blob)
                return tensors
        return None

    def _load(self, name: str) -> Tensors | None:
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            tensors: Tensors = safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged (%s): the reference adapter is asked for anew", path, error)
            return None
        if hash_tensors(tensors) != name:
            log.warning("%s is not the adapter it is named by: it is asked for anew", path)
            return None
        return tensors
