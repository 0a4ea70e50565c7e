"""`adapter.py diff`, `add`, `scale`, `negate` and `export`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedunlearn.aggregation.arithmetic import Apart, added, apart, config_differences, pooled, scaled
from fedunlearn.doors.adapter_named import BaseArgs, new_folder, on_base, read_adapter
from fedunlearn.errors import UserError
from fedunlearn.models.adapter_files import save_adapter
from fedunlearn.models.fingerprint import fingerprint_base
from fedunlearn.models.lora_config import check_understood
from fedunlearn.models.soundness import not_finite
from fedunlearn.records.adapter import A, Adapter


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two adapters side by side. whole: all modules as one; config: what their configs say differently; same_base: None where a fingerprint is missing."""

    first: str
    second: str
    whole: Apart
    modules: tuple[Apart, ...]
    config: dict[str, tuple[object, object]]
    same_base: bool | None


@dataclass(frozen=True, kw_only=True)
class Written:
    """An adapter that was written. error: what a truncation lost, over the norm of the exact sum; None where nothing was truncated. rank: its largest.

    zero: every B, and whatever else acts, is zero: it changes nothing of the base.
    """

    folder: str
    rank: int
    parameters: int
    tensor_hash: str
    error: float | None = None
    zero: bool = False


def tell_difference(first: Path, second: Path) -> Difference:
    """Compares two adapters. Raises UserError where they do not fit each other."""
    one, two = (read_adapter(path)[1] for path in (first, second))
    modules = apart(one, two)
    prints = (one.base_fingerprint, two.base_fingerprint)
    return Difference(
        first=str(first),
        second=str(second),
        whole=pooled(modules, "all"),
        modules=modules,
        config=config_differences(one.peft_config, two.peft_config),
        same_base=None if None in prints else prints[0] == prints[1],
    )


def add_into_folder(adapters: Sequence[Path], weights: Sequence[float] | None, rank: int | None, to: Path) -> Written:
    """Writes the weighted sum of adapters. weights: None for 1 each. rank: None for the exact product."""
    place = new_folder(to)
    parts = [_own(path) for path in adapters]
    shares = weights or [1.0] * len(parts)
    whole = added(parts, shares)  # in any case: an SVD of what overflows ends in no message of ours
    _check_rank(rank, whole.rank)
    _check_finite(whole.adapter, f"--weights {' '.join(f'{share:g}' for share in shares)}: the sum")
    found = whole if rank is None else added(parts, shares, rank)
    return _write(place, found.adapter, None if rank is None else found.error)


def scale_into_folder(adapter: Path, factor: float, to: Path) -> Written:
    """Writes a multiple of an adapter."""
    place = new_folder(to)
    found = scaled(_own(adapter), factor)
    _check_finite(found, f"--by {factor:g}: the product")
    return _write(place, found)


def export_into_folder(adapter: Path, rank: int | None, to: Path, args: BaseArgs) -> Written:
    """Writes an adapter (a run's, a round's with its side-car, a foreign one) as one PEFT folder that carries its base's fingerprint; rank: its best approximation."""
    place, named = new_folder(to), on_base(adapter, args)
    check_understood(named.adapter)
    known = {**named.adapter.peft_config, "base_model_name_or_path": named.base_name}
    whole = Adapter(named.adapter.tensors, known, fingerprint_base(named.base))
    _check_rank(rank, _rank_of(whole))
    if rank is None:
        return _write(place, whole)
    found = added([whole], [1.0], rank)
    _check_finite(found.adapter, f"--rank {rank}: with its scale in the factors the adapter")
    return _write(place, found.adapter, found.error)


def _own(path: Path) -> Adapter:
    """An adapter of which there are sums and multiples."""
    found = read_adapter(path)[1]
    check_understood(found)
    return found


def _check_finite(adapter: Adapter, made: str) -> None:
    odd = not_finite(adapter.tensors)
    if odd:
        raise UserError(
            f"{made} is too large for {adapter.tensors[odd[0]].dtype} ({odd[0]} and {len(odd) - 1} tensors more would hold infinity): nothing was written; choose smaller numbers"
        )


def _check_rank(rank: int | None, largest: int) -> None:
    if rank is not None and not 1 <= rank <= largest:
        raise UserError(
            f"--rank {rank} is no rank of it: a whole number from 1 to {largest}, or leave it out for all of it"
        )


def _rank_of(adapter: Adapter) -> int:
    return max((int(t.shape[0]) for name, t in adapter.tensors.items() if name.endswith(A)), default=0)


def _write(place: Path, adapter: Adapter, error: float | None = None) -> Written:
    save_adapter(place, adapter)
    return Written(
        folder=str(place),
        rank=_rank_of(adapter),
        parameters=sum(t.numel() for t in adapter.tensors.values()),
        tensor_hash=adapter.tensor_hash,
        error=error,
        zero=not any(bool(t.any()) for name, t in adapter.tensors.items() if not name.endswith(A)),
    )
