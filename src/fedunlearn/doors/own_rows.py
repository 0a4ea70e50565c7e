"""Taking one client's rows out of TOFU."""

from pathlib import Path

from fedunlearn.data.own_rows import write_own
from fedunlearn.data.ownership import FILE, read_partition
from fedunlearn.data.tofu import load_tofu
from fedunlearn.errors import UserError


def split_off(tofu_path: str, partition: Path, client: int, to: Path) -> str:
    """Writes a client's folder and says how many rows it holds. partition: a run's folder or its partition.json. Raises UserError where `to` is there already."""
    if to.exists():
        raise UserError(f"--to {str(to)!r} is there already: name a folder that is to be made")
    found = read_partition(partition / FILE if partition.is_dir() else partition)
    write_own(load_tofu(tofu_path), found, client, to)
    return f"{to}: {len(found.clients[client])} of {sum(map(len, found.clients))} rows"
