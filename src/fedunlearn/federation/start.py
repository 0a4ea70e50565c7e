"""What a run began with, on disk: the adapter as <run>/start/, its side-car as the first blocks of <run>/sidecar/, who owns how many rows."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from fedunlearn.errors import UserError
from fedunlearn.federation.block_store import FOLDER, BlockStore
from fedunlearn.files import read_object, write_json
from fedunlearn.models.adapter_files import read_folder, save_adapter
from fedunlearn.models.source import BEGAN, START
from fedunlearn.records.adapter import Adapter
from fedunlearn.records.partition import OwnedRows
from fedunlearn.records.rounds import ClientRows

Count = Callable[[tuple[int, ...]], int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """run_id: of this run alone, kept when it goes on. adapter: with its side-car; blocks: that side-car's hashes. rows: what each client owns by the partition, entry k is client k."""

    run_id: str
    adapter: Adapter
    blocks: tuple[str, ...]
    rows: tuple[ClientRows, ...]


def save_start(folder: Path, adapter: Adapter, owned: Sequence[OwnedRows], count: Count = len) -> None:
    """Writes start/, began.json and where there is one the side-car into a run's folder. count: examples that rows make."""
    save_adapter(folder / START, adapter.replace(adapter.tensors, {}))
    blocks = [BlockStore(folder / FOLDER).keep(adapter.sidecar)] if adapter.sidecar else []
    rows = [asdict(counted(one, count)) for one in owned]
    write_json(folder / BEGAN, {"run_id": uuid4().hex[:16], "sidecar": blocks, "rows": rows})


def counted(owned: OwnedRows, count: Count = len) -> ClientRows:
    """How many examples a client's rows make, as it declares them at the roll call. count: of some rows; as many as there are where each row is one example."""
    num_forget, num_retain = count(owned.forget), count(owned.retain)
    exist = owned.num_owned == len(owned.forget) + len(
        owned.retain
    )  # where fine-tuning is replayed the forget rows do not
    return ClientRows(
        client_id=owned.client_id,
        num_owned=num_forget + num_retain if exist else num_retain,
        num_forget=num_forget,
        num_retain=num_retain,
    )


def load_start(folder: Path) -> Start:
    """Reads them again. Raises UserError where something is missing or damaged."""
    factors, _ = read_folder(folder / START)
    saved = _began(folder)
    try:
        run_id, rows = str(saved["run_id"]), tuple(ClientRows(**row) for row in saved["rows"])
    except (KeyError, TypeError) as error:
        raise _damaged(folder, error) from error
    blocks = began_with(folder)
    sidecar = BlockStore(folder / FOLDER).read(blocks)
    return Start(run_id=run_id, adapter=factors.replace(factors.tensors, sidecar), blocks=blocks, rows=rows)


def began_with(folder: Path) -> tuple[str, ...]:
    """Gives the hashes of the side-car blocks that a run began with. Raises UserError where that is not to be read."""
    try:
        return tuple(str(name) for name in _began(folder)["sidecar"])
    except (KeyError, TypeError) as error:
        raise _damaged(folder, error) from error


def _began(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / BEGAN)
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, why: object) -> UserError:
    return UserError(f"{str(folder / BEGAN)!r} is missing or damaged ({why}): overwrite=true starts anew")
