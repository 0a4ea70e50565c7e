"""Builds the pocket, data and base model, on first use and keeps it; what does not match its record is built again."""

import hashlib
import json
import logging
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from fedunlearn.data.pocket.files import write_dataset
from fedunlearn.data.pocket.pretrain import BaseRecipe, pretrain_base
from fedunlearn.data.pocket.tokenizer import train_tokenizer
from fedunlearn.data.pocket.world import PretrainingText, WorldSize, make_world

log = logging.getLogger(__name__)

RECIPE_VERSION = 2
_RECORD = "pocket.json"


@dataclass(frozen=True, kw_only=True)
class PocketRecipe:
    """Everything but the seed that a pocket follows from. `version` rises when the code changes what the same numbers give."""

    version: int = RECIPE_VERSION
    world: WorldSize = field(default_factory=WorldSize)
    base: BaseRecipe = field(default_factory=BaseRecipe)


@dataclass(frozen=True)
class PocketPaths:
    """Where a pocket lies: `data` is a TOFU-like data set folder, `model` a model folder with its tokenizer."""

    data: Path
    model: Path


@dataclass(frozen=True, kw_only=True)
class PocketRecord:
    """What pocket.json says: the recipe's fields, the sha256 of the two folders, and how long the building took."""

    seed: int
    recipe: dict[str, Any]
    data_sha256: str
    model_sha256: str
    seconds: float


def ensure_pocket(seed: int, pocket_dir: Path, recipe: PocketRecipe | None = None) -> PocketPaths:
    """Gives the pocket of a seed, building it at `<pocket_dir>/seed<seed>` where it is missing, of another recipe, or changed.

    Building takes about half a minute. It happens in a temporary folder beside the place and is renamed at the end, so a
    killed run leaves nothing half done under that name. recipe: the tuned one unless given.
    """
    recipe = recipe or PocketRecipe()
    folder = pocket_dir / f"seed{seed}"
    fault = find_fault(folder, seed, recipe)
    if fault is None:
        return _paths(folder)
    log.info("building the pocket of seed %d (%s)", seed, fault)
    pocket_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".seed{seed}-", dir=pocket_dir) as temporary:
        built = Path(temporary) / "pocket"
        _build(built, seed, recipe)
        if find_fault(folder, seed, recipe) is not None:  # another process may have built it meanwhile
            _put(built, folder)
    return _paths(folder)


def find_fault(folder: Path, seed: int, recipe: PocketRecipe) -> str | None:
    """Says why the folder cannot serve as this pocket, or gives None: its record must fit the recipe and its files the record."""
    if not folder.exists():
        return "first use"
    try:
        record = PocketRecord(**json.loads((folder / _RECORD).read_text(encoding="utf8")))
    except (OSError, ValueError, TypeError) as error:
        return f"{_RECORD} cannot be read: {error}"
    if (record.seed, record.recipe) != (seed, asdict(recipe)):
        return "the one on disk follows another recipe"
    paths = _paths(folder)
    for part, wanted in ((paths.data, record.data_sha256), (paths.model, record.model_sha256)):
        if not part.is_dir() or folder_sha256(part) != wanted:
            return f"files of {part.name}/ are not those that were built"
    return None


def folder_sha256(folder: Path) -> str:
    """Gives one sha256 over the names and bytes of all files of a folder, whatever their order on disk."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _build(folder: Path, seed: int, recipe: PocketRecipe) -> None:
    start = time.monotonic()
    paths = _paths(folder)
    paths.data.mkdir(parents=True)
    world = make_world(seed, recipe.world)
    write_dataset(paths.data, world, seed)
    _write_model(paths.model, world.pretraining, recipe.base, seed)
    record = PocketRecord(
        seed=seed,
        recipe=asdict(recipe),
        data_sha256=folder_sha256(paths.data),
        model_sha256=folder_sha256(paths.model),
        seconds=round(time.monotonic() - start, 1),
    )
    (folder / _RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf8")


def _write_model(folder: Path, text: PretrainingText, recipe: BaseRecipe, seed: int) -> None:
    tokenizer: PreTrainedTokenizerFast = train_tokenizer(text.sentences(), recipe.vocab_size)
    model = pretrain_base(text, tokenizer, recipe, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _put(built: Path, folder: Path) -> None:
    """Moves what was built to its place; an old pocket steps aside into the temporary folder and goes with it."""
    if folder.exists():
        folder.rename(built.parent / "old")
    built.rename(folder)


def _paths(folder: Path) -> PocketPaths:
    return PocketPaths(folder / "data", folder / "model")
