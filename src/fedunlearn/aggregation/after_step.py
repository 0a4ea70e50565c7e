"""What every server step is held to, whoever wrote it: the state it gives must be one that the next round can begin with."""

from collections.abc import Collection, Mapping

import torch

from fedunlearn.aggregation.base import ServerState
from fedunlearn.errors import UserError
from fedunlearn.records.adapter import Tensors


def checked_state(strategy: str, before: ServerState, after: object, moment_names: Collection[str]) -> ServerState:
    """Gives the state as it is stored: the adapter in the dtypes it had, moments float32, all entries finite after that cast.

    before: what the step was given. moment_names: what the strategy says that it keeps. Raises UserError naming strategy, round and what is
    wrong: another type or round number, a tensor's name or shape, an entry that is not finite.
    """
    try:
        return _stored(before, after, moment_names)
    except ValueError as fault:
        raise step_fault(strategy, before.round + 1, str(fault)) from fault


def step_fault(strategy: str, round: int, what: str) -> UserError:
    """The message of a step that cannot be gone on from."""
    kept = f"everything up to round {round - 1}" if round > 1 else "no round yet"
    return UserError(
        f"strategy {strategy}, round {round}: {what}. Nothing of this round is kept ({kept} is on disk): correct the strategy and go on with "
        "resume=true, or give strategy.* smaller values (server_lr) or choose another and start anew with overwrite=true"
    )


def not_finite(tensors: Tensors) -> str | None:
    """Gives the first tensor, by name, that has an entry which is not finite."""
    return next((name for name in sorted(tensors) if not bool(torch.isfinite(tensors[name]).all())), None)


def _stored(before: ServerState, after: object, moment_names: Collection[str]) -> ServerState:
    if not isinstance(after, ServerState):
        raise ValueError(f"its step gives a {type(after).__name__}; allowed: a ServerState")
    if after.round != before.round + 1:
        raise ValueError(f"its step counts round={after.round!r} after {before.round}; allowed: {before.round + 1}")
    odd = sorted(set(before.adapter) ^ set(after.adapter))
    if odd:
        raise ValueError(f"its adapter {'lacks' if odd[0] in before.adapter else 'has an unknown'} tensor {odd[0]!r}")
    adapter = _cast("its adapter", after.adapter, before.adapter, None)
    wrong = sorted(set(after.moments) ^ set(moment_names))
    if wrong:
        raise ValueError(
            f"its moments are {sorted(after.moments)}; allowed: {sorted(moment_names)}, as moment_names says"
        )
    empty = sorted(moment for moment, kept in after.moments.items() if not kept)
    if empty:
        raise ValueError(
            f"its moment {empty[0]!r} holds no tensor; allowed: those of the adapter that it was stepped over"
        )
    moments = {m: _cast(f"its moment {m!r}", kept, before.adapter, torch.float32) for m, kept in after.moments.items()}
    return ServerState(adapter=adapter, moments=moments, round=after.round)


def _cast(whose: str, tensors: Mapping[str, object], like: Tensors, dtype: torch.dtype | None) -> Tensors:
    """The tensors in `dtype` (None: in those of `like`). Raises ValueError naming the first that does not fit."""
    stored: dict[str, torch.Tensor] = {}
    for name in sorted(tensors):
        tensor, wanted = tensors[name], like.get(name)
        if wanted is None:
            raise ValueError(f"{whose} has an unknown tensor {name!r}")
        if not isinstance(tensor, torch.Tensor) or tensor.shape != wanted.shape:
            told = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(
                f"{whose} has {told} for tensor {name!r}; allowed: a tensor of shape {tuple(wanted.shape)}"
            )
        stored[name] = tensor.detach().to(dtype or wanted.dtype).contiguous()  # an SVD may give a view
    bad = not_finite(stored)
    if bad is not None:
        raise ValueError(f"{whose} has entries in tensor {bad!r} that are not finite as {stored[bad].dtype}")
    return stored
