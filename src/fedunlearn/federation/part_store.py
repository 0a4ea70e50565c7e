"""Where a client keeps parts of its tasks: on its own disk, under the hashes the server names them by."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from fedunlearn.federation.wire import one_line
from fedunlearn.files import write_bytes
from fedunlearn.records.adapter import Tensors, hash_tensors

log = logging.getLogger(__name__)
UNREADABLE = (OSError, KeyError, TypeError, ValueError, RuntimeError)
"""What safetensors and torch raise beside SafetensorError, for dtypes and shapes that only one of the two knows."""


@dataclass(frozen=True)
class PartStore:
    """One file a part. What a task does not say to keep is deleted, and asked for again should it be needed."""

    folder: Path

    def _path(self, name: str) -> Path:
        return self.folder / f"part-{name}.safetensors"

    def obtain(
        self, wanted: Collection[str], received: Mapping[str, bytes], keep: Collection[str]
    ) -> tuple[dict[str, Tensors], tuple[str, ...]]:
        """Gives the wanted parts by hash, and the hashes of those that were neither received nor are kept here.

        What was received and is to be kept is written; nothing is trusted that does not have the hash it is named by.
        """
        found: dict[str, Tensors] = {}
        for name in sorted(set(wanted)):
            sent = self._received(name, received[name], name in keep) if name in received else None
            part = self._load(name) if sent is None else sent
            if part is not None:
                found[name] = part
        for old in self.folder.glob("part-*.safetensors"):
            if old.stem.removeprefix("part-") not in keep:
                old.unlink(missing_ok=True)
        return found, tuple(sorted(set(wanted) - set(found)))

    def _received(self, name: str, blob: bytes, keep: bool) -> Tensors | None:
        tensors = _named(name, f"part {name[:12]} that came", lambda: safetensors.torch.load(blob))
        if tensors is not None and keep and not self._path(name).is_file():
            write_bytes(self._path(name), blob)
        return tensors

    def _load(self, name: str) -> Tensors | None:
        path = self._path(name)
        if not path.is_file():
            return None
        tensors = _named(name, str(path), lambda: safetensors.torch.load_file(path))
        if tensors is None:
            path.unlink(missing_ok=True)
        return tensors


def _named(name: str, shown: str, read: Callable[[], Tensors]) -> Tensors | None:
    """Gives the tensors where they have the hash they are named by."""
    try:
        tensors = read()
        if hash_tensors(tensors) == name:
            return tensors
    except (SafetensorError, *UNREADABLE) as error:
        log.warning("%s is damaged (%s): it is asked for anew", shown, one_line(str(error)))
        return None
    log.warning("%s is not what it is named by: it is asked for anew", shown)
    return None


def joined(names: Sequence[str], parts: Mapping[str, Tensors]) -> Tensors:
    """Gives the tensors of several parts together (the halves of an adapter)."""
    return {key: tensor for name in names for key, tensor in parts[name].items()}
