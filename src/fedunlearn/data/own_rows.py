"""What one client holds of TOFU where it holds no more: its own rows of `full`, under their numbers in the federation."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from fedunlearn.data.tofu import QaRow, Tofu, hash_rows
from fedunlearn.data.tofu_sources import FolderSource
from fedunlearn.errors import UserError
from fedunlearn.files import canonical_json, whole_folder, write_bytes, write_json
from fedunlearn.records.partition import Partition

FILE = "own.json"


@dataclass(frozen=True, kw_only=True)
class Own:
    """Entry i of `full` in this folder is row numbers[i] of the federation. num_rows, data_hash: of the federation's full; rows_hash: of these rows."""

    numbers: tuple[int, ...]
    num_rows: int
    data_hash: str
    rows_hash: str


class OwnTofu(Tofu):
    """TOFU as a client has it that holds its own rows alone: no other split, no row of anybody else."""

    def __init__(self, path: str, folder: Path) -> None:
        super().__init__(path, FolderSource(folder))
        self._own = _read(folder / FILE)
        held = super().rows("full")
        if len(held) != len(self._own.numbers) or hash_rows(held) != self._own.rows_hash:
            raise UserError(f"tofu_path={path!r}: its full is not the one that {FILE} was written for; copy both again")

    @property
    def num_rows(self) -> int:
        """Rows of the federation's `full`."""
        return self._own.num_rows

    def rows(self, split: str) -> tuple[QaRow, ...]:
        """Raises UserError: of no split all rows are here."""
        raise UserError(
            f"tofu_path={self.path!r} holds one client's own rows, no split {split!r}: give a folder with all of TOFU"
        )

    def hash(self, split: str) -> str:
        """The hash of the federation's `full`, as it was when these rows were taken from it."""
        return self._own.data_hash if split == "full" else super().hash(split)

    def row(self, number: int) -> QaRow:
        """One row of `full`. Raises UserError for one that is not here."""
        if number not in self._held:
            raise UserError(
                f"tofu_path={self.path!r} does not hold row {number} of full: it holds {len(self._held)} rows of its client's own"
            )
        return self._held[number]

    @cached_property
    def _held(self) -> dict[int, QaRow]:
        return dict(zip(self._own.numbers, super().rows("full"), strict=True))


def write_own(tofu: Tofu, partition: Partition, client: int, folder: Path) -> None:
    """Writes one client's rows as a folder of its own: full.json, own.json, tofu.json. Raises UserError for another data set, or a client that there is not."""
    if partition.data_hash != tofu.hash("full"):
        raise UserError(f"the partition was made for other data than tofu_path={tofu.path!r}: give those")
    if not 0 <= client < partition.num_clients:
        raise UserError(f"--client {client}: the partition has clients 0 to {partition.num_clients - 1}")
    numbers = partition.clients[client]
    rows = [tofu.row(number) for number in numbers]
    own = Own(numbers=numbers, num_rows=tofu.num_rows, data_hash=partition.data_hash, rows_hash=hash_rows(rows))
    with whole_folder(folder) as place:
        text = "".join(f"{canonical_json(asdict(row))}\n" for row in rows)
        write_bytes(place / "full.json", text.encode())
        write_json(place / FILE, asdict(own))
        write_json(place / "tofu.json", {"rows_per_author": tofu.rows_per_author})


def _read(path: Path) -> Own:
    try:
        own = Own(**json.loads(path.read_text(encoding="utf-8")))
        return Own(**{**asdict(own), "numbers": tuple(map(int, own.numbers))})
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): copy it again, or write it anew with scripts/own_rows.py"
        ) from error
