"""The gate every client update passes before it counts: names, shapes, dtypes, finite values, example count, round and run."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedunlearn.records.adapter import Tensors
from fedunlearn.records.rounds import ClientUpdate


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the server knows before a reply comes. num_examples: client id -> rows declared at the roll call."""

    adapter: Tensors
    round: int
    run_id: str
    num_examples: Mapping[int, int]


@dataclass(frozen=True)
class Verdict:
    """reason: empty where the update counts, else `stale_round`, `missing_key`, `extra_key`, `shape`, `dtype`, `nan` or `num_examples`.

    detail: the first offender, for the history.
    """

    reason: str = ""
    detail: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the update counts."""
        return not self.reason


def check_update(update: ClientUpdate, expected: Expected) -> Verdict:
    """Judges one update; the first fault found is told. Modifies nothing and raises nothing."""
    if (update.round, update.run_id) != (expected.round, expected.run_id):
        return Verdict("stale_round", f"round {update.round} of run {update.run_id[:40]}")
    declared = expected.num_examples.get(update.client_id, 0)
    whole = type(update.num_examples) is int and type(update.num_trained) is int
    if not whole or update.num_examples != declared or not 0 < update.num_trained <= declared:
        return Verdict(
            "num_examples", f"{update.num_examples} owned and {update.num_trained} trained, {declared} declared"
        )
    return (
        _check_names(update.tensors, expected.adapter) or _check_values(update.tensors, expected.adapter) or Verdict()
    )


def _check_names(tensors: Tensors, adapter: Tensors) -> Verdict | None:
    missing = sorted(set(adapter) - set(tensors))
    if missing:
        return Verdict("missing_key", missing[0])
    extra = sorted(set(tensors) - set(adapter))
    return Verdict("extra_key", extra[0]) if extra else None


def _check_values(tensors: Tensors, adapter: Tensors) -> Verdict | None:
    for name, want in adapter.items():
        got = tensors[name]
        if got.shape != want.shape:
            return Verdict("shape", f"{name}: {tuple(got.shape)} instead of {tuple(want.shape)}")
        if got.dtype != want.dtype:
            return Verdict("dtype", f"{name}: {got.dtype} instead of {want.dtype}")
        if not torch.isfinite(got).all():
            return Verdict("nan", name)
    return None
