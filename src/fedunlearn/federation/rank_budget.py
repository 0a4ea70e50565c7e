"""AdaLoRA's part of the server's step: the mask after the optimiser, and what the mean of the factors missed."""

from dataclasses import replace

import torch

from fedunlearn.aggregation.adalora import A, AdaLora, Allocated, B, E, allocate, as_pair, pairs_in, settle
from fedunlearn.aggregation.reduce import Cohort, Reduced, aggregation_error
from fedunlearn.federation.checkpoint import Checkpoint
from fedunlearn.records.adapter import A as PAIR_A
from fedunlearn.records.adapter import B as PAIR_B


def with_mask(
    budget: AdaLora, rounds: int, before: Checkpoint, after: Checkpoint, mean: Reduced
) -> tuple[Checkpoint, int]:
    """Gives a round's checkpoint with the mask of its ranks and the importance to go on with, and how many ranks of all modules are left.

    before: what the round began with; after: what the server's optimiser made of it. rounds: of the whole run.
    """
    old, state = before.state.adapter, after.state
    return _with(after, allocate(budget, old, mean.mean, state.adapter, before.importance, state.round, rounds))


def without_update(budget: AdaLora, rounds: int, after: Checkpoint) -> tuple[Checkpoint, int]:
    """Gives the checkpoint of a round in which nothing counted, its ranks settled where they are to be by then, and how many ranks of all modules are left."""
    state = after.state
    return _with(after, settle(budget, state.adapter, after.importance, state.round, rounds))


def _with(after: Checkpoint, done: Allocated) -> tuple[Checkpoint, int]:
    masked = replace(after.state, adapter={**after.state.adapter, **done.tensors})
    return replace(after, state=masked, importance=done.importance), done.kept


def error_of_triplets(cohort: Cohort, mean: Reduced) -> tuple[float, float]:
    """Gives error and norm (see aggregation.reduce.Reduced) of the mean of A, E and B apart, against the mean of the products."""

    def read(client: int, name: str) -> torch.Tensor:
        path = name.removesuffix(PAIR_A).removesuffix(PAIR_B)
        a, b = as_pair(*(cohort.read(client, path + end) for end in (A, E, B)))
        return a if name.endswith(PAIR_A) else b

    pairs = replace(cohort, weights=mean.weights, adapter=pairs_in(cohort.adapter), read=read)
    return aggregation_error(pairs, pairs_in(mean.mean))
