"""The ledger: every accepted update of every round on disk, hash-chained, for server-side methods and for whoever checks a run.

ledger = Ledger(Path("saves/finetune/ft"))
for entry in ledger.entries():            # raises UserError where the chain is broken
    if entry.kind == "update":
        tensors = ledger.read(entry)      # the factors that client sent in that round
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError

from fedunlearn.errors import UserError
from fedunlearn.files import append_line, canonical_json, write_bytes
from fedunlearn.records.adapter import Tensors, hash_tensors
from fedunlearn.records.ledger import GLOBAL, LedgerEntry
from fedunlearn.records.rounds import ClientOutcome

FOLDER, FILE = "ledger", "ledger.jsonl"
FIRST = "0" * 64
HEADER, HEADER_PER_TENSOR = 4_096, 400
"""What a file's safetensors header and a line, norms by module included, take at most beside the tensors, for the estimate."""


@dataclass(frozen=True)
class Ledger:
    """The ledger of one run; run: its folder."""

    run: Path

    @property
    def exists(self) -> bool:
        """Whether the run keeps one."""
        return self._lines_path.is_file()

    @property
    def _lines_path(self) -> Path:
        return self.run / FOLDER / FILE

    def path(self, entry: LedgerEntry) -> Path:
        """Where an entry's tensors lie, unless they were purged."""
        name = "global" if entry.client_id == GLOBAL else f"client{entry.client_id:05d}"
        return self.run / FOLDER / f"round{entry.round:04d}" / f"{name}.safetensors"

    def entries(self) -> tuple[LedgerEntry, ...]:
        """Gives all lines in order. Raises UserError where there is no ledger, a line is damaged, or the chain is broken."""
        try:
            lines = self._lines_path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise self._broken(0, f"it is no text ({error.reason})") from error
        except OSError as error:
            raise UserError(
                f"{str(self.run)!r} has no ledger ({error.strerror}): make that run anew with ledger.enabled=true, or choose a method that needs none"
            ) from error
        found: list[LedgerEntry] = []
        for number, line in enumerate(lines, 1):
            found.append(self._checked(line, number, found[-1].hash if found else FIRST))
        return tuple(found)

    def _checked(self, line: str, number: int, previous: str | None) -> LedgerEntry:
        try:
            entry = LedgerEntry(**json.loads(line))
            sealed = entry.sealed()
        except (ValueError, TypeError) as error:
            raise self._broken(number, f"it cannot be read ({error})") from error
        if previous not in (None, entry.previous) or sealed.hash != entry.hash:
            raise self._broken(number, "it is not what the chain says")
        return entry

    def _broken(self, number: int, why: str) -> UserError:
        return UserError(
            f"ledger {str(self._lines_path)!r}, line {number}: {why}; the ledger was changed after it was written and proves nothing: make the run anew with overwrite=true"
        )

    @property
    def head(self) -> str:
        """The hash of the last line: it stands for the whole ledger. Only that line is read; `entries` checks the chain."""
        lines = self._lines_path.read_text(encoding="utf-8").splitlines() if self.exists else []
        return self._checked(lines[-1], len(lines), None).hash if lines else FIRST

    def head_of(self, last_round: int) -> str:
        """Gives the hash of the last line up to a round. Raises UserError where a line is not what was written; a last one that was cut off is left out."""
        head = FIRST
        for entry in self._whole():
            head = entry.hash if entry.round <= last_round else head
        return head

    def _whole(self) -> Iterator[LedgerEntry]:
        """Gives the lines that a kill did not cut off, each checked by itself."""
        text = self._lines_path.read_text(encoding="utf-8") if self.exists else ""
        for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
            yield self._checked(line, number, None)

    def read(self, entry: LedgerEntry) -> Tensors:
        """Gives an entry's tensors. Raises UserError where they were purged, are damaged, or others."""
        with self._reading(entry) as path:
            tensors: Tensors = safetensors.torch.load_file(path)
        if hash_tensors(tensors) != entry.tensors:
            raise self._damaged(path, "other tensors than the chain says")
        return tensors

    def read_tensor(self, entry: LedgerEntry, name: str) -> torch.Tensor:
        """Gives one tensor of an entry that `read` has found whole. Raises UserError where it cannot be read any more."""
        with self._reading(entry) as path, safetensors.safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    @contextmanager
    def _reading(self, entry: LedgerEntry) -> Iterator[Path]:
        path = self.path(entry)
        try:
            yield path
        except FileNotFoundError as error:
            raise UserError(
                f"ledger {str(path)!r} is not there: purged after client {entry.client_id} was forgotten, or lost; its norms are all that is left"
            ) from error
        except (OSError, SafetensorError) as error:
            raise self._damaged(path, str(error)) from error

    def _damaged(self, path: Path, why: str) -> UserError:
        return UserError(f"ledger {str(path)!r} is damaged ({why}): make the run anew with overwrite=true")

    def begin(self, parent: "Ledger | None") -> None:
        """Begins an empty ledger; the first line names the head of the one it goes on from."""
        write_bytes(self._lines_path, b"")
        if parent is not None and parent.exists:
            self._append(LedgerEntry(kind="parent", round=0, client_id=GLOBAL, tensors=parent.head, previous=FIRST), {})

    def keep_round(
        self,
        number: int,
        before: Tensors,
        outcomes: Mapping[int, ClientOutcome],
        norms: Mapping[int, Mapping[str, float]],
        updates: Iterator[tuple[int, Tensors]],
    ) -> None:
        """Appends a round: the adapter it began with, then each update that counted, client by client. norms: by client and module."""
        first = LedgerEntry(
            kind="global", round=number, client_id=GLOBAL, tensors=hash_tensors(before), previous=self.head
        )
        head = self._append(first, before)
        for client, tensors in updates:
            told = outcomes[client]
            entry = LedgerEntry(
                kind="update",
                round=number,
                client_id=client,
                tensors=hash_tensors(tensors),
                previous=head,
                role=told.role.value,
                weight=told.weight,
                num_examples=told.num_examples,
                norms=norms[client],
            )
            head = self._append(entry, tensors)

    def _append(self, entry: LedgerEntry, tensors: Tensors) -> str:
        sealed = entry.sealed()
        if tensors:
            write_bytes(self.path(sealed), safetensors.torch.save({key: t.contiguous() for key, t in tensors.items()}))
        append_line(self._lines_path, canonical_json(asdict(sealed)))
        return sealed.hash

    def cut(self, last_round: int) -> None:
        """Drops lines of rounds after `last_round`: a stop may fall between a round's ledger and its checkpoint. Their tensors are written over.

        Raises UserError where a line is not what was written.
        """
        kept = [canonical_json(asdict(entry)) for entry in self._whole() if entry.round <= last_round]
        write_bytes(self._lines_path, "".join(f"{line}\n" for line in kept).encode("utf-8"))

    def purge(self, clients: Collection[int]) -> int:
        """Deletes the tensors of these clients' updates and gives how many files went; the lines, with hashes and norms, stay."""
        gone = [entry for entry in self.entries() if entry.kind == "update" and entry.client_id in clients]
        deleted = 0
        for entry in gone:
            with suppress(FileNotFoundError):
                self.path(entry).unlink()
                deleted += 1
        return deleted


def estimated_bytes(adapter_bytes: int, update_bytes: int, num_tensors: int, num_rounds: int, num_clients: int) -> int:
    """Gives what a ledger needs at most: each round its adapter and one update a client, with headers and lines. num_tensors: of the adapter."""
    beside = HEADER + num_tensors * HEADER_PER_TENSOR
    return num_rounds * (adapter_bytes + beside + num_clients * (update_bytes + beside))
