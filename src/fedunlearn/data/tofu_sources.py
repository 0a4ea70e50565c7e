"""Where TOFU's splits come from: a folder in the hub's layout, or a data set on the hub. Rows come out as plain mappings.

A folder is read with the json module: 21 ms for the 4,000 rows of `full`, where load_dataset takes 480 ms the first time and
needs `datasets` imported (2.2 s); the rows are the same (measured on two shared cores).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedunlearn.data.hub import HUB_ID, HubSplit, RawRow, hub_has, load_split, read_rows
from fedunlearn.errors import UserError

LAYOUT = "full.json, forget10.json, ..., or a hub id such as locuslab/TOFU"
_SUFFIXES = (".json", ".jsonl")


class Source(Protocol):
    """A place that holds splits."""

    def read(self, split: str) -> tuple[RawRow, ...]:
        """Gives the split's rows in order; raises UserError where there is no such split or it cannot be read."""

    def layout(self) -> Mapping[str, int]:
        """Gives what the place says of itself: `rows_per_author`, `authors`; empty where it says nothing."""


@dataclass(frozen=True)
class FolderSource:
    """A local folder: `<split>.json` (JSON lines, or one list), and optionally `tofu.json` with `rows_per_author` and `authors`."""

    folder: Path

    def splits(self) -> tuple[str, ...]:
        """Names of the splits that lie there, sorted."""
        found = {path.stem for path in self.folder.iterdir() if path.suffix in _SUFFIXES}
        return tuple(sorted(found - {"tofu", "idk"}))

    def read(self, split: str) -> tuple[RawRow, ...]:
        """Gives the split's rows; raises UserError naming the splits that exist, or the line that is no JSON."""
        for path in (self.folder / f"{split}{suffix}" for suffix in _SUFFIXES):
            if path.is_file():
                return read_rows(path)
        raise UserError(
            f"tofu_path={str(self.folder)!r} has no split {split!r}{self._why_missing(split)}; "
            f"it has: {', '.join(self.splits()) or 'no split at all'}. Choose one of these, or another tofu_path"
        )

    def layout(self) -> Mapping[str, int]:
        """Reads tofu.json; raises UserError where it is no mapping of whole numbers."""
        path = self.folder / "tofu.json"
        if not path.is_file():
            return {}
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            return {key: int(said[key]) for key in ("rows_per_author", "authors") if key in said}
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}: expected a JSON object with whole numbers rows_per_author and authors ({error}); correct or remove it"
            ) from error

    def _why_missing(self, split: str) -> str:
        authors = self.layout().get("authors")
        share = re.search(r"(\d\d)", split)
        if authors is None or share is None:
            return ""
        percent = int(share[1]) if not split.startswith("retain") else 100 - int(share[1])
        if authors * percent % 100 == 0:
            return ""
        return f": {percent} % of its {authors} authors is no whole number of authors"


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub, through `datasets.load_dataset`; online: whether the hub answered when the source was made."""

    name: str
    online: bool

    def read(self, split: str) -> tuple[RawRow, ...]:
        """Downloads the split, or takes it from the cache; raises UserError without network and cache, or without such a split."""
        return load_split(HubSplit("tofu_path", self.name, config=split, split="train"), self.online)

    def layout(self) -> Mapping[str, int]:
        """The hub's TOFU says nothing of itself: 20 rows an author."""
        return {}


def open_source(tofu_path: str) -> Source:
    """Takes a folder that exists, else a hub id; raises UserError where it can be neither, or the hub has no such data set."""
    folder = Path(tofu_path).expanduser()
    if tofu_path and folder.is_dir():
        return FolderSource(folder)
    if folder.exists() or not HUB_ID.fullmatch(tofu_path):
        raise UserError(f"tofu_path={tofu_path!r} is no folder; give the folder that holds {LAYOUT}")
    return HubSource(tofu_path, _hub_has(tofu_path))


def _hub_has(name: str) -> bool:
    return hub_has("tofu_path", name, LAYOUT)
