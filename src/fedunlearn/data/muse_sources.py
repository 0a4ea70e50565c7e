"""Where MUSE's subsets come from: a folder in the hub's layout, or a data set on the hub. Rows come out as plain mappings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedunlearn.data.hub import HUB_ID, HubSplit, RawRow, hub_has, load_split, read_parquet, read_rows
from fedunlearn.errors import UserError

KEY = "muse_path"
LAYOUT = "raw/forget.json, knowmem/forget_qa.json, ..., or a hub id such as muse-bench/MUSE-News"
SUFFIXES = (".json", ".jsonl", ".parquet")


class MuseSource(Protocol):
    """A place that holds subsets of splits."""

    def read(self, subset: str, split: str) -> tuple[RawRow, ...]:
        """Gives the split's rows in order; raises UserError where there is no such subset or split, or it cannot be read."""


@dataclass(frozen=True)
class MuseFolder:
    """A local folder: `<subset>/<split>` as .json or .jsonl (JSON lines, or one list) or .parquet; on the hub `<split>-00000-of-00001.parquet`, one file a shard."""

    folder: Path

    def read(self, subset: str, split: str) -> tuple[RawRow, ...]:
        """Gives the split's rows; raises UserError naming the subsets, or the subset's splits, that exist."""
        place = self.folder / subset
        if not place.is_dir():
            raise UserError(
                f"{KEY}={str(self.folder)!r} has no subset {subset!r} (a folder of splits); it has: {_told(self._subsets())}. Add it, or take another {KEY}"
            )
        for path in (place / f"{split}{suffix}" for suffix in SUFFIXES):
            if path.is_file():
                return read_parquet([path]) if path.suffix == ".parquet" else read_rows(path)
        shards = sorted(place.glob(f"{split}-*-of-*.parquet"))
        if shards:
            return read_parquet(shards)
        raise UserError(
            f"{KEY}={str(self.folder)!r} has no split {split!r} in its subset {subset!r}; it has: {_told(_splits(place))}. Add {subset}/{split}.json, or take another {KEY}"
        )

    def _subsets(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.is_dir())


@dataclass(frozen=True)
class MuseHub:
    """A data set on the hub, whose configurations are the subsets; online: whether the hub answered when the source was made."""

    name: str
    online: bool

    def read(self, subset: str, split: str) -> tuple[RawRow, ...]:
        """Downloads the split, or takes it from the cache; raises UserError without network and cache, or without such a split."""
        return load_split(HubSplit(KEY, self.name, config=subset, split=split, shown=f"{subset}/{split}"), self.online)


def open_muse_source(muse_path: str) -> MuseSource:
    """Takes a folder that exists, else a hub id; raises UserError where it can be neither, or the hub has no such data set."""
    folder = Path(muse_path).expanduser()
    if muse_path and folder.is_dir():
        return MuseFolder(folder)
    if folder.exists() or not HUB_ID.fullmatch(muse_path):
        raise UserError(f"{KEY}={muse_path!r} is no folder; give the folder that holds {LAYOUT}")
    return MuseHub(muse_path, hub_has(KEY, muse_path, LAYOUT))


def _splits(place: Path) -> list[str]:
    return sorted({path.stem.split("-")[0] for path in place.iterdir() if path.suffix in SUFFIXES})


def _told(names: list[str]) -> str:
    return ", ".join(names) or "none at all"
