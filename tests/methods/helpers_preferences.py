"""Preference losses: a step of originals and alternates, and the slow formula that DPO and its kin share."""

from collections.abc import Sequence

import torch
from helpers_losses import LENGTHS, OTHER_LENGTHS, Leaves, batch_of, drawn

from fedunlearn.methods.base import Method
from fedunlearn.methods.tokens import StepTotals


def step(
    method: Method,
    own: Leaves,
    other: Leaves,
    lengths: Sequence[int] = LENGTHS,
    other_lengths: Sequence[int] = OTHER_LENGTHS,
    parts: Sequence[Sequence[int]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """F over the step's micro-batches, and its gradients by the originals' and the alternates' tokens."""
    own, other = ({**values, "nll": values["nll"].clone().requires_grad_()} for values in (own, other))
    totals = StepTotals(num_labels=tuple(lengths))
    loss = sum(
        method.forget(batch_of(own, lengths, part, (other, other_lengths)), totals)
        for part in parts or [range(len(lengths))]
    )
    loss.backward()
    return loss.detach(), own["nll"].grad, other["nll"].grad


def slow(beta: float, own: Leaves, other: Leaves) -> tuple[float, torch.Tensor, torch.Tensor]:
    """-(2/beta) mean_i log sigmoid(beta [(NLL_i - NLL_i^ref)(original) - (NLL_i - NLL_i^ref)(alternate)]), row by row in float64."""
    own, other = (
        {name: tensor.double().requires_grad_(name == "nll") for name, tensor in values.items()}
        for values in (own, other)
    )
    total, at, other_at = 0.0, 0, 0
    for row, (length, other_length) in enumerate(zip(LENGTHS, OTHER_LENGTHS, strict=True)):
        mine = sum(own["nll"][at + t] for t in range(length)) - own["reference_sums"][row]
        theirs = sum(other["nll"][other_at + t] for t in range(other_length)) - other["reference_sums"][row]
        total = total - 2 / beta * torch.log(1 / (1 + torch.exp(-beta * (mine - theirs))))
        at, other_at = at + length, other_at + other_length
    loss = total / len(LENGTHS)
    loss.backward()
    return loss.item(), own["nll"].grad, other["nll"].grad


def both(seed: int = 0) -> list[Leaves]:
    """Originals and alternates of three rows, of other lengths each."""
    kept = ("nll", "reference_sums")
    return [{k: drawn(seed + n, lengths)[k] for k in kept} for n, lengths in enumerate((LENGTHS, OTHER_LENGTHS))]
