"""`adapter.py merge` and `unmerge`."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fedunlearn.config.model import Dtype
from fedunlearn.doors.adapter_named import (
    BaseArgs,
    few_logits,
    largest_difference,
    load,
    new_folder,
    on_base,
    read_adapter,
)
from fedunlearn.errors import UserError
from fedunlearn.models.belongs import check_whole, stored_dtype
from fedunlearn.models.merge import CastLoss, merged_base
from fedunlearn.models.merged_files import read_origin, save_merged, save_unmerged
from fedunlearn.models.switch import put_adapter

DTYPES: dict[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A merged model. loss: of the cast, see CastLoss. logits: the largest difference to the unmerged ones over the largest; kept: whether the base can be had back."""

    folder: str
    base: str
    dtype: str
    loss: CastLoss
    logits: float
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Unmerged:
    """A base that came out of a merged model, with its fingerprint."""

    folder: str
    fingerprint: str


def merge_into_folder(adapter: Path, to: Path, dtype: str | None, keep: bool, args: BaseArgs) -> Merged:
    """Merges an adapter into its base and writes the full model. dtype: fp32, bf16, or None for the base's own (fp32 where it is neither).

    keep: what is overwritten is kept beside it. Raises UserError, with nothing written, for a quantised base, another base, and a folder that exists.
    """
    place, named = new_folder(to), on_base(adapter, args)
    check_whole(named.base)
    own = stored_dtype(named.base)
    wanted = DTYPES[dtype] if dtype else own
    if keep and wanted != own:
        raise UserError(
            f"--keep with --dtype {dtype}: the base is {own}, so every tensor is overwritten, and what is kept would be the whole base: leave one of them out"
        )
    model = put_adapter(load(named.base, own, args.device), named.adapter)
    before = few_logits(model)
    plain, loss = merged_base(model, getattr(torch, wanted))
    logits = largest_difference(few_logits(plain), before)
    save_merged(place, plain, named.base, named.base_name, named.adapter, loss, keep)
    return Merged(folder=str(place), base=named.base_name, dtype=wanted, loss=loss, logits=logits, kept=keep)


def unmerge_into_folder(merged: Path, adapter: Path | None, to: Path) -> Unmerged:
    """Writes the base of a merged model. adapter: must be the one that was merged. Raises UserError, with nothing written, where the base cannot be had bit by bit."""
    place, origin = new_folder(to), read_origin(merged.expanduser())
    if adapter is not None:
        found = read_adapter(adapter)[1].tensor_hash
        if found != origin.adapter_hash:
            raise UserError(
                f"adapter={str(adapter)!r} is not what was merged into {str(merged)!r} (hash {found}; merged was {origin.adapter_hash})"
            )
    return Unmerged(folder=str(place), fingerprint=save_unmerged(place, merged.expanduser()))
