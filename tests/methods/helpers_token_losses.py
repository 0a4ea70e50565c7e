"""Losses of token losses alone (ascent and its kin): steps as lists of numbers, and the two laws that each of them is held to."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from fedunlearn.methods.base import Method
from fedunlearn.methods.tokens import StepTotals, TokenLosses

LENGTHS = (3, 1, 4, 2, 5, 2, 1, 3)
Rows = Sequence[Sequence[float]]


def batch_of(rows: Rows, reference: Sequence[float] | None = None) -> tuple[TokenLosses, torch.Tensor]:
    """Token losses of rows given as lists of numbers, and the leaf their gradient reaches."""
    nll = torch.tensor([value for row in rows for value in row], dtype=torch.float32, requires_grad=True)
    return tokens_of(nll, [len(row) for row in rows], reference), nll


def tokens_of(
    nll: torch.Tensor, lengths: Sequence[int], reference: Sequence[float] | torch.Tensor | None = None
) -> TokenLosses:
    """Token losses over a leaf of the step's nll, row after row."""
    num_labels = torch.tensor(lengths)
    return TokenLosses(
        nll=nll,
        row=torch.arange(len(lengths)).repeat_interleave(num_labels),
        labels=torch.zeros(sum(lengths), dtype=torch.int64),
        num_labels=num_labels,
        reference_sums=None if reference is None else torch.as_tensor(reference, dtype=torch.float32),
    )


def value_and_gradient(
    method: Method, rows: Rows, reference: Sequence[float] | None = None
) -> tuple[float, list[float]]:
    """F of the rows as one step, and its gradient by token."""
    batch, nll = batch_of(rows, reference)
    loss = method.forget(batch, StepTotals(num_labels=tuple(map(len, rows))))
    loss.backward()
    return loss.item(), nll.grad.tolist()


def slow_ascent(method, rows, reference):
    """-CE, token by token."""
    return -sum(value for row in rows for value in row) / sum(map(len, rows))


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight rows of 1 to 5 tokens with losses of 0 to 3 nats, and reference sums near theirs."""
    generator = torch.Generator().manual_seed(4)
    nll = 3 * torch.rand(sum(LENGTHS), generator=generator)
    reference = torch.stack([part.sum() for part in nll.split(LENGTHS)]) + torch.randn(8, generator=generator)
    return nll, reference


def assert_equals_the_slow_formula(method: Method, slow: Callable[..., torch.Tensor]) -> None:
    """In value and gradient. slow: (method, rows as lists of float64 scalars, reference sums) -> F."""
    nll, reference = drawn()
    leaf = nll.clone().requires_grad_()
    loss = method.forget(tokens_of(leaf, LENGTHS, reference), StepTotals(num_labels=LENGTHS))
    loss.backward()
    exact = nll.double().requires_grad_()
    wanted = slow(method, [list(part) for part in exact.split(LENGTHS)], reference.double())
    wanted.backward()
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert (leaf.grad - exact.grad).abs().max() < 1e-5
    assert leaf.grad.abs().max() > 1e-3


def assert_micro_batches_add_up(method: Method) -> None:
    """8 x 1, 2 x 4, 4 x 2 and 1 x 8 rows under the same totals: one gradient, to 1e-6 of its largest entry, and one value."""
    nll, reference = drawn()
    totals = StepTotals(num_labels=LENGTHS)
    results = {}
    for size in (8, 4, 2, 1):
        leaf = nll.clone().requires_grad_()
        parts, value = leaf.split(LENGTHS), 0.0
        for start in range(0, 8, size):
            chosen = slice(start, start + size)
            batch = tokens_of(torch.cat(parts[chosen]), LENGTHS[chosen], reference[chosen])
            value += method.forget(batch, totals)
        value.backward()
        results[size] = value.item(), leaf.grad
    whole, gradient = results[8]
    for size in (4, 2, 1):
        assert results[size][0] == pytest.approx(whole, rel=1e-6)
        assert (results[size][1] - gradient).abs().max() <= 1e-6 * gradient.abs().max()


def assert_a_saturated_row_stays_finite(method: Method, nats: float) -> None:
    """A collapsed row (10 000 nats) has no gradient left; a perfectly known one has the full one. Neither overflows."""
    value, gradient = value_and_gradient(method, [[nats]], [0.0])
    known = 2 * 0.5 if nats == 0 else 0.0
    assert math.isfinite(value)
    assert abs(gradient[0]) == pytest.approx(known, abs=1e-6)
