"""Steps made of leaves: what a loss reads as tensors of one step, its gradient by leaf, and its slow float64 counterpart beside it."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch

from fedunlearn.methods.base import Method
from fedunlearn.methods.tokens import StepTotals, TokenLosses

LENGTHS = (3, 1, 4)
OTHER_LENGTHS = (2, 5, 1)
WORDS, SIZE, SEED = 7, 5, 11
PARTS = [((0,), (1,), (2,)), ((0, 1), (2,)), ((0,), (1, 2)), ((2,), (0, 1))]
Leaves = Mapping[str, torch.Tensor]
Rows = Mapping[str, list]


def drawn(seed: int = 0, lengths: Sequence[int] = LENGTHS) -> dict[str, torch.Tensor]:
    """Everything a loss may read of rows of these lengths, by its name in TokenLosses: [N], [N, V], [N, d] and [B]."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "labels": torch.randint(WORDS, (count,), generator=generator),
        "nll": 3 * torch.rand(count, generator=generator),
        "logits": 2 * normal(count, WORDS),
        "hidden": normal(count, SIZE),
        "reference_sums": torch.tensor([1.5 * length for length in lengths]) + normal(len(lengths)),
        "reference_logits": 2 * normal(count, WORDS),
        "reference_hidden": normal(count, SIZE),
    }


def batch_of(
    values: Leaves,
    lengths: Sequence[int],
    chosen: Sequence[int] | None = None,
    other: tuple[Leaves, Sequence[int]] | None = None,
) -> TokenLosses:
    """The chosen rows (all by default) of a step, as views of its leaves. other: values and lengths of the alternates."""
    chosen = range(len(lengths)) if chosen is None else chosen
    tokens = [place for row in chosen for place in _places(lengths, row)]
    read = {
        name: tensor[list(chosen)] if name == "reference_sums" else tensor[tokens] for name, tensor in values.items()
    }
    num_labels = torch.tensor([lengths[row] for row in chosen])
    row = torch.arange(len(num_labels)).repeat_interleave(num_labels)
    alternates = None if other is None else batch_of(*other, chosen)
    labels = read.pop("labels", torch.zeros(len(tokens), dtype=torch.int64))
    return TokenLosses(row=row, num_labels=num_labels, labels=labels, alternates=alternates, **read)


def _places(lengths: Sequence[int], row: int) -> range:
    return range(sum(lengths[:row]), sum(lengths[: row + 1]))


def by_row(values: Leaves, lengths: Sequence[int] = LENGTHS) -> list[dict]:
    """The same as one dict a row, float64, for slow formulas: token tensors as lists of a token's scalar or vector."""
    return [
        {
            name: tensor[row] if name == "reference_sums" else [tensor[place] for place in _places(lengths, row)]
            for name, tensor in values.items()
        }
        for row in range(len(lengths))
    ]


def value_and_gradient(
    method: Method,
    values: Leaves,
    leaf: str,
    lengths: Sequence[int] = LENGTHS,
    parts: Sequence[Sequence[int]] | None = None,
    term: str = "forget",
) -> tuple[torch.Tensor, torch.Tensor]:
    """A term over the step, cut into these micro-batches (one by default), and its gradient by that leaf."""
    leaves = {**values, leaf: values[leaf].detach().clone().requires_grad_()}
    totals = StepTotals(num_labels=tuple(lengths), seed=SEED)
    loss = sum(
        getattr(method, term)(batch_of(leaves, lengths, part), totals) for part in parts or [range(len(lengths))]
    )
    loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    return loss.detach(), leaves[leaf].grad


def apart_from_slow(
    method: Method,
    slow: Callable[[list[dict]], torch.Tensor],
    leaf: str,
    values: Leaves | None = None,
    lengths: Sequence[int] = LENGTHS,
    term: str = "forget",
) -> float:
    """The largest distance, in value or in any entry of the gradient, from a formula that gets rows in float64; neither gradient is zero."""
    values = drawn() if values is None else values
    value, gradient = value_and_gradient(method, values, leaf, lengths, term=term)
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in values.items()}
    exact[leaf] = exact[leaf].clone().requires_grad_()
    wanted = slow(by_row(exact, lengths))
    wanted.backward()
    assert exact[leaf].grad.abs().max() > 1e-3
    return max(abs(value.item() - wanted.item()), (gradient - exact[leaf].grad).abs().max().item())


def apart_in_parts(method: Method, leaf: str, lengths: Sequence[int] = LENGTHS, term: str = "forget") -> float:
    """The largest distance between the step in one batch and cut into micro-batches in every way of PARTS: in value, or in gradient over its largest entry."""
    value, gradient = value_and_gradient(method, drawn(1, lengths), leaf, lengths, term=term)
    size = gradient.abs().max()
    assert size > 1e-5
    cut = [value_and_gradient(method, drawn(1, lengths), leaf, lengths, parts, term) for parts in PARTS]
    return max(max(abs(part - value).item(), ((by - gradient).abs().max() / size).item()) for part, by in cut)


def softmax(logits: torch.Tensor) -> list[torch.Tensor]:
    """Probabilities of one token's logits, as a plain quotient."""
    powers = [torch.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def bounds(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Where each row's tokens begin and end."""
    ends = [sum(lengths[:row]) for row in range(len(lengths) + 1)]
    return list(pairwise(ends))
