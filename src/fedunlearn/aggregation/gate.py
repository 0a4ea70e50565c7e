"""The gate every client update passes before it counts: what it is, then how far it goes beside the others of its role."""

import math
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from statistics import median

from fedunlearn.records.adapter import Tensors
from fedunlearn.records.rounds import ClientUpdate

NORM = "norm"
LARGEST_LOSS = 1e4
"""No mean negative log-likelihood of a language model comes near: a uniform guess over a million words costs 14."""
MIN_FOR_NORMS = 3
MIN_FOR_SHARES = 3
ROUNDED = 1 + 1e-12
LARGEST_ENTRY = 1e15
"""No factor of use comes near; what is below can be multiplied, squared and summed, and still be a number."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the server knows of one client's reply before it comes.

    tensors: those it was sent that it was to train, in the dtype and shapes they must come back in. num_examples: rows it declared at
    the roll call; max_trained: distinct rows it can have trained on. memory: names of what its method remembers.
    """

    client_id: int
    tensors: Tensors
    round: int
    run_id: str
    base_fingerprint: str
    num_examples: int
    max_trained: int
    memory: Collection[str] = ()


@dataclass(frozen=True)
class Verdict:
    """reason: empty where the update counts, else the gate's code: `stale_round`, `base_mismatch`, `num_examples`, `missing_key`,
    `extra_key`, `shape`, `dtype`, `nan`, `memory`, `norm`, `loss`; before the gate `wire_size`, `unreadable`, `extra_metric`, `missing_part`, `crashed`, `timeout`.

    detail: the first offender, for the history.
    """

    reason: str = ""
    detail: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the update counts."""
        return not self.reason


def check_update(update: ClientUpdate, expected: Expected) -> Verdict:
    """Judges one update by itself; the first fault found is told. Modifies nothing and raises nothing."""
    if (update.client_id, update.round, update.run_id) != (expected.client_id, expected.round, expected.run_id):
        return Verdict("stale_round", f"client {update.client_id}, round {update.round} of run {update.run_id[:40]}")
    if update.base_fingerprint != expected.base_fingerprint:
        return Verdict("base_mismatch", f"trained on the base {update.base_fingerprint[:40]!r}")
    whole = type(update.num_examples) is int and type(update.num_trained) is int
    if not whole or update.num_examples != expected.num_examples or not 0 < update.num_trained <= expected.max_trained:
        return Verdict(
            "num_examples",
            f"{update.num_examples} owned and {update.num_trained} trained, {expected.num_examples} declared, {expected.max_trained} to train on",
        )
    return (
        _check_names(update.tensors, expected.tensors)
        or _check_values(update.tensors, expected.tensors)
        or _check_memory(update.memory, expected.memory)
        or Verdict()
    )


def _check_memory(memory: Mapping[str, float], names: Collection[str]) -> Verdict | None:
    if set(memory) != set(names):
        return Verdict("memory", f"remembers {sorted(memory)}, its method {sorted(names)}")
    odd = [name for name, value in memory.items() if not abs(value) < LARGEST_ENTRY]
    return Verdict("memory", f"{odd[0]}={memory[odd[0]]}") if odd else None


def judge_norms(norms: Mapping[int, float], max_ratio: float) -> dict[int, Verdict]:
    """Gives the clients of one role whose update goes too far beside the others': above max_ratio times the others' median norm.

    norms: client id -> norm of the product update. With fewer than three there is no telling who is odd, and where the others did not move
    at all (median 0) there is no measure: then nobody is judged.
    """
    if len(norms) < MIN_FOR_NORMS:
        return {}
    odd = {}
    for client, norm in norms.items():
        usual = median(other for key, other in norms.items() if key != client)
        if 0 < usual * max_ratio < norm:
            odd[client] = Verdict(NORM, f"{norm:.3g} is above {max_ratio:g} x the others' median {usual:.3g}")
    return odd


def check_loss(loss: float) -> Verdict:
    """Judges the training loss of a client where the server averages by losses: a number from 0 to 1e4."""
    if not math.isfinite(loss):
        return Verdict("nan", f"a training loss of {loss}")
    return (
        Verdict()
        if 0 <= loss <= LARGEST_LOSS
        else Verdict("loss", f"a training loss of {loss:.3g}, allowed: 0 to {LARGEST_LOSS:g}")
    )


def judge_change(change: float, start: float, max_ratio: float | None) -> Verdict:
    """Judges one client by itself: how far it moved the factors it was sent, at most max_ratio times their own norm.

    change, start: norms over all factors A and B, pooled over modules, also where only one of the two is trained. Needs nobody beside it, so
    it holds where a role has too few updates for judge_norms. None: no bound; where the start is 0 there is no measure.
    """
    if max_ratio is None or not 0 < start * max_ratio < change:
        return Verdict()
    return Verdict(NORM, f"it changed the factors by {change:.3g}, above {max_ratio:g} x the {start:.3g} it was sent")


def cap_shares(weights: Mapping[int, float], max_share: float) -> tuple[dict[int, float], frozenset[int]]:
    """Gives weights (sum 1) of which none is above max_share, the rest in proportion, and the clients that were held down.

    Acts from three clients on; where 1/K is above max_share the shares become equal, and where all that are not held down have share 0
    they count equally.
    """
    if len(weights) < MIN_FOR_SHARES:
        return dict(weights), frozenset()
    cap = max(max_share, 1 / len(weights))
    held: set[int] = set()
    shares = dict(weights)
    while over := {client for client, share in shares.items() if share > cap * ROUNDED} - held:
        held |= over
        shares = {**dict.fromkeys(weights, cap), **_left_over(weights, held, 1 - cap * len(held))}
    return shares, frozenset(held)


def above_cap(weights: Mapping[int, float], max_share: float | None) -> tuple[int, ...]:
    """Gives the clients that count for more than cap_shares would let them: what came after it weighed them anew. None: no cap."""
    if max_share is None or len(weights) < MIN_FOR_SHARES:
        return ()
    cap = max(max_share, 1 / len(weights))
    return tuple(client for client in sorted(weights) if weights[client] > cap * ROUNDED)


def _left_over(weights: Mapping[int, float], held: Set[int], left: float) -> dict[int, float]:
    """Gives those that are not held down their part of what is left, in proportion."""
    free = {client: weight for client, weight in weights.items() if client not in held}
    total = sum(free.values())
    return {client: left * (weight / total if total > 0 else 1 / len(free)) for client, weight in free.items()}


def _check_names(tensors: Tensors, adapter: Tensors) -> Verdict | None:
    missing = sorted(set(adapter) - set(tensors))
    if missing:
        return Verdict("missing_key", missing[0])
    extra = sorted(set(tensors) - set(adapter))
    return Verdict("extra_key", extra[0][:120]) if extra else None


def _check_values(tensors: Tensors, adapter: Tensors) -> Verdict | None:
    for name, want in adapter.items():
        got = tensors[name]
        if got.shape != want.shape:
            return Verdict("shape", f"{name}: {tuple(got.shape)} instead of {tuple(want.shape)}")
        if got.dtype != want.dtype:
            return Verdict("dtype", f"{name}: {got.dtype} instead of {want.dtype}")
        largest = float(got.abs().max())
        if not math.isfinite(largest):
            return Verdict("nan", name)
        if largest >= LARGEST_ENTRY:
            return Verdict(NORM, f"{name}: an entry of {largest:.3g}")
    return None
