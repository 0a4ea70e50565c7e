"""A merged model as a folder, what it says of its origin, and the base taken out of it again.

Nothing is subtracted on the way back: either what merging overwrote was kept beside the model, or the base does not come back.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

import fedunlearn
from fedunlearn.errors import UserError
from fedunlearn.files import read_object, whole_folder, write_json
from fedunlearn.models.fingerprint import fingerprint_base
from fedunlearn.models.merge import CastLoss
from fedunlearn.records.adapter import Adapter, Tensors

RECORD, KEPT, INDEX = "merged.json", "replaced.safetensors", "model.safetensors.index.json"
BESIDE = (".json", ".model", ".txt", ".jinja", ".tiktoken")
"""Files of a base that belong to its tokenizer and its generation, by their ends."""
OURS = ("config.json", INDEX, RECORD, "adapter_config.json", "fedunlearn.json")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a merged folder was made of. loss: of the cast. base_config: the base's config.json where its tensors are kept, else None; added: tensors it has and the base has not."""

    base: str
    base_fingerprint: str
    adapter_hash: str
    dtype: str
    loss: CastLoss
    version: str = fedunlearn.__version__
    base_config: Mapping[str, object] | None = None
    added: tuple[str, ...] = ()


def save_merged(
    folder: Path, plain: PreTrainedModel, base: Path, base_name: str, adapter: Adapter, loss: CastLoss, keep: bool
) -> Origin:
    """Writes a full model: weights, config, the base's tokenizer, and where it is from; keep: the tensors of the base that differ, too. All in one rename.

    Raises UserError where the folder exists, and where the disk is full.
    """
    if folder.exists():
        raise UserError(f"{str(folder)!r} is there already: name a folder that is to be made")
    with whole_folder(folder) as place:
        try:
            plain.save_pretrained(place)
        except SafetensorError as error:
            raise UserError(
                f"the merged model cannot be written to {str(folder)!r} ({error}): free some space, or choose another --to"
            ) from error
        except ValueError as error:  # its generation settings contradict each other
            raise UserError(
                f"the merged model cannot be saved: {error}; mend generation_config.json in {str(base)!r}"
            ) from error
        _copy_beside(base, place)
        origin = Origin(
            base=base_name,
            base_fingerprint=fingerprint_base(base),
            adapter_hash=adapter.tensor_hash,
            dtype=str(plain.dtype).removeprefix("torch."),
            loss=loss,
        )
        if keep:
            kept, added = _replaced(base, place)
            safetensors.torch.save_file(kept, place / KEPT, metadata={"format": "pt"})
            config = read_object(base / "config.json")
            origin = Origin(**{**vars(origin), "base_config": config, "added": added})
        write_json(place / RECORD, asdict(origin))
    return origin


def read_origin(folder: Path) -> Origin:
    """Reads what a merged folder says of itself. Raises UserError where it is none, or is damaged."""
    if not (folder / RECORD).is_file():
        raise UserError(f"{str(folder)!r} holds no {RECORD}: only what `adapter.py merge` made is taken apart again")
    try:
        saved = read_object(folder / RECORD)
        return Origin(**{**saved, "loss": CastLoss(**saved["loss"]), "added": tuple(saved["added"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{str(folder / RECORD)!r} is damaged ({error}): merge again") from error


def save_unmerged(folder: Path, merged: Path) -> str:
    """Writes the base that a model was merged from, and gives its fingerprint, which is that of the base or nothing is written.

    Raises UserError where its tensors were not kept, a file is damaged, or the folder exists.
    """
    origin = read_origin(merged)
    if folder.exists():
        raise UserError(f"{str(folder)!r} is there already: name a folder that is to be made")
    if origin.base_config is None or not (merged / KEPT).is_file():
        raise UserError(
            f"{str(merged)!r} was merged without --keep, and subtracting the adapter again does not give the base bit by bit: take the base itself, {origin.base!r} "
            f"(fingerprint {origin.base_fingerprint}), or merge again with --keep"
        )
    with whole_folder(folder) as place:
        try:
            _write_back(merged, place, origin.added)
        except SafetensorError as error:
            raise UserError(f"{str(merged)!r} is corrupt or truncated ({error}): merge again") from error
        _copy_beside(merged, place)
        write_json(place / "config.json", origin.base_config)
        found = fingerprint_base(place)
        if found != origin.base_fingerprint:
            raise UserError(
                f"what comes out of {str(merged)!r} is not its base (fingerprint {found}, that of the base is {origin.base_fingerprint}): the folder was changed after it was merged"
            )
    return found


def _copy_beside(source: Path, place: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in BESIDE and file.name not in OURS:
            shutil.copyfile(file, place / file.name)


def _replaced(base: Path, merged: Path) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Gives the base's tensors that the merged files do not hold bit by bit, and the names that the merged files have beyond the base's."""
    after = {name: file for file in _files(merged) for name in _names(file)}
    kept: dict[str, torch.Tensor] = {}
    for file in _files(base):
        for name, before in _tensors(file):
            if name not in after or not _same(before, _tensor(after.pop(name), name)):
                kept[name] = before
    return kept, tuple(sorted(set(after) - set(kept)))


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    alike = (first.dtype, first.shape) == (second.dtype, second.shape)
    return alike and torch.equal(
        *(t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second))
    )  # -0 is not 0 here


def _write_back(merged: Path, place: Path, added: tuple[str, ...]) -> None:
    """Writes the files anew with the kept tensors in place, one file at a time; what fits into none goes into the first."""
    kept, files = dict(_tensors(merged / KEPT)), _files(merged)
    homes = {name: file.name for file in files for name in _names(file) if name not in added}
    homes |= {name: files[0].name for name in kept if name not in homes}
    for file in files:
        held: Tensors = dict(_tensors(file))
        tensors = {
            name: kept[name] if name in kept else held[name] for name, home in homes.items() if home == file.name
        }
        safetensors.torch.save_file(tensors, place / file.name, metadata={"format": "pt"})
    if (merged / INDEX).is_file():
        size = sum((place / file.name).stat().st_size for file in files)
        write_json(place / INDEX, {"metadata": {"total_size": size}, "weight_map": homes})


def _files(folder: Path) -> list[Path]:
    """The files transformers would load."""
    if (folder / INDEX).is_file():
        return sorted(
            {folder / name for name in json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()}
        )
    return [folder / "model.safetensors"]


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as found:
        return list(found.keys())


def _tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as found:
        tensor: torch.Tensor = found.get_tensor(name)
        return tensor


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as found:
        for name in found.keys():  # noqa: SIM118
            yield name, found.get_tensor(name)
