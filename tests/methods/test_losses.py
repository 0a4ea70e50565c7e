"""Forget losses by hand, against slow float64 formulas in value and gradient, and over micro-batches."""

import math

import pytest
import torch

from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.methods.npo import NPO
from fedunlearn.methods.simnpo import SimNPO
from fedunlearn.methods.tokens import StepTotals, TokenLosses

LN2, LN3 = math.log(2.0), math.log(3.0)
LENGTHS = (3, 1, 4, 2, 5, 2, 1, 3)


def batch_of(rows, reference=None):
    """Token losses of rows given as lists of numbers, and the leaf their gradient reaches."""
    nll = torch.tensor([value for row in rows for value in row], dtype=torch.float32, requires_grad=True)
    return tokens_of(nll, [len(row) for row in rows], reference), nll


def tokens_of(nll, lengths, reference=None):
    """Token losses over a leaf of the step's nll, row after row."""
    num_labels = torch.tensor(lengths)
    return TokenLosses(
        nll=nll,
        row=torch.arange(len(lengths)).repeat_interleave(num_labels),
        labels=torch.zeros(sum(lengths), dtype=torch.int64),
        num_labels=num_labels,
        reference_sums=None if reference is None else torch.as_tensor(reference, dtype=torch.float32),
    )


def value_and_gradient(method, rows, reference=None):
    """F of the rows as one step, and its gradient by token."""
    batch, nll = batch_of(rows, reference)
    loss = method.forget(batch, StepTotals(num_labels=tuple(map(len, rows))))
    loss.backward()
    return loss.item(), nll.grad.tolist()


@pytest.mark.parametrize("method", [GradAscent(), GradDiff()])
def test_ascent_by_hand(method):
    """Tokens 1, 2 | 3: CE = (1 + 2 + 3) / 3 = 2, not the mean of the row means (1.5 + 3) / 2; F = -2, each token's gradient -1/3."""
    value, gradient = value_and_gradient(method, [[1.0, 2.0], [3.0]])
    assert value == pytest.approx(-2.0, abs=1e-6)
    assert gradient == pytest.approx([-1 / 3] * 3, abs=1e-7)


def test_npo_at_the_reference_by_hand():
    """NLL = ref: sigmoid(0) = 1/2, so F = (2/beta) ln 2 = 4 ln 2 at beta 1/2; gradient -(2/beta) beta (1 - 1/2) / 2 rows = -1/2."""
    value, gradient = value_and_gradient(NPO(beta=0.5), [[1.0, 2.0], [4.0]], [3.0, 4.0])
    assert value == pytest.approx(4 * LN2, abs=1e-6)
    assert gradient == pytest.approx([-0.5] * 3, abs=1e-6)


def test_npo_away_from_the_reference_by_hand():
    """beta 1: margins ln 3 and -ln 3 give sigmoids 3/4 and 1/4; F = -(2/1) (ln 3/4 + ln 1/4) / 2 = ln(16/3).

    Gradient of row i: -2 (1 - sigmoid_i) / 2 rows = -1/4 and -3/4: the row that is forgotten already is left alone.
    """
    value, gradient = value_and_gradient(NPO(beta=1.0), [[LN3, 1.0], [1.0]], [1.0, 1.0 + LN3])
    assert value == pytest.approx(math.log(16 / 3), abs=1e-6)
    assert gradient == pytest.approx([-0.25, -0.25, -0.75], abs=1e-6)


def test_npo_with_small_beta_is_ascent_on_sequence_sums():
    """As beta goes to 0 the gradient of token t of row i becomes -1 / rows, whatever the length of the row."""
    _, gradient = value_and_gradient(NPO(beta=1e-6), [[5.0, 1.0, 2.0], [0.1]], [2.0, 7.0])
    assert gradient == pytest.approx([-0.5] * 4, abs=1e-4)


def test_simnpo_by_hand():
    """Tokens 1, 3: mean 2 = delta, so F = (2/beta) ln 2 = ln 2 at beta 2; gradient -(2/2) 2 (1/2) / T = -1/2 a token."""
    value, gradient = value_and_gradient(SimNPO(beta=2.0, delta=2.0), [[1.0, 3.0]])
    assert value == pytest.approx(LN2, abs=1e-6)
    assert gradient == pytest.approx([-0.5, -0.5], abs=1e-6)


def test_simnpo_keeps_delta_inside_beta():
    """Mean ln 3, delta ln 3 - ln 2: beta (mean - delta) = ln 4 at beta 2, sigmoid 4/5, F = -ln(4/5).

    With delta outside beta it would be 2 ln 3 - (ln 3 - ln 2) = ln 6, sigmoid 6/7.
    """
    value, _ = value_and_gradient(SimNPO(beta=2.0, delta=LN3 - LN2), [[LN3]])
    assert value == pytest.approx(-math.log(4 / 5), abs=1e-6)


def test_simnpo_gives_every_row_the_same_say_and_npo_the_long_one_more():
    """Rows 2, 2 | 2: SimNPO's gradient is halved by T in the first row; NPO's is the same for each token at equal margins."""
    _, simnpo = value_and_gradient(SimNPO(), [[2.0, 2.0], [2.0]])
    _, npo = value_and_gradient(NPO(), [[2.0, 2.0], [2.0]], [4.0, 2.0])
    assert simnpo[0] == pytest.approx(simnpo[2] / 2, rel=1e-6)
    assert npo[0] == pytest.approx(npo[2], rel=1e-6)


def slow_ascent(method, rows, reference):
    return -sum(value for row in rows for value in row) / sum(map(len, rows))


def slow_npo(method, rows, reference):
    total = 0.0
    for row, ref in zip(rows, reference, strict=True):
        total = total - 2 / method.beta * torch.log(1 / (1 + torch.exp(-method.beta * (sum(row) - ref))))
    return total / len(rows)


def slow_simnpo(method, rows, reference):
    total = 0.0
    for row in rows:
        margin = method.beta * (sum(row) / len(row) - method.delta)
        total = total - 2 / method.beta * torch.log(1 / (1 + torch.exp(-margin)))
    return total / len(rows)


MEMBERS = [
    pytest.param(GradAscent(), slow_ascent, id="grad_ascent"),
    pytest.param(GradDiff(gamma=2.0), slow_ascent, id="grad_diff"),
    pytest.param(NPO(), slow_npo, id="npo"),
    pytest.param(NPO(beta=1.5), slow_npo, id="npo beta 1.5"),
    pytest.param(SimNPO(), slow_simnpo, id="simnpo"),
    pytest.param(SimNPO(beta=1.0, delta=0.7), slow_simnpo, id="simnpo delta"),
]


def drawn():
    """Eight rows of 1 to 5 tokens with losses of 0 to 3 nats, and reference sums near theirs."""
    generator = torch.Generator().manual_seed(4)
    nll = 3 * torch.rand(sum(LENGTHS), generator=generator)
    reference = torch.stack([part.sum() for part in nll.split(LENGTHS)]) + torch.randn(8, generator=generator)
    return nll, reference


@pytest.mark.parametrize(("method", "slow"), MEMBERS)
def test_value_and_gradient_equal_the_slow_formula(method, slow):
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


@pytest.mark.parametrize(("method", "slow"), MEMBERS)
def test_micro_batches_add_up_to_the_step(method, slow):
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


def test_the_mean_of_micro_batch_means_would_be_another_number():
    """Tokens 1, 2 | 3 in two micro-batches: shares -1 and -1 of the step's CE; their own means are -1.5 and -3."""
    totals = StepTotals(num_labels=(2, 1))
    first, second = batch_of([[1.0, 2.0]])[0], batch_of([[3.0]])[0]
    shares = [GradAscent().forget(batch, totals).item() for batch in (first, second)]
    assert shares == pytest.approx([-1.0, -1.0], abs=1e-6)


@pytest.mark.parametrize("method", [NPO(), SimNPO()])
@pytest.mark.parametrize("nats", [0.0, 500.0, 1e4])
def test_saturated_rows_stay_finite(method, nats):
    """A collapsed row (10 000 nats) has no gradient left; a perfectly known one has the full one. Neither overflows."""
    value, gradient = value_and_gradient(method, [[nats]], [0.0])
    known = 2 * 0.5 if nats == 0 else 0.0
    assert math.isfinite(value)
    assert abs(gradient[0]) == pytest.approx(known, abs=1e-6)


def test_row_sums_carry_the_gradient_back_to_their_tokens():
    """Rows 1, 2 | 3 sum to 3 and 3; the gradient of 2 S_0 + 5 S_1 is 2, 2, 5."""
    batch, nll = batch_of([[1.0, 2.0], [3.0]])
    sums = batch.row_sums()
    (sums * torch.tensor([2.0, 5.0])).sum().backward()
    assert sums.tolist() == [3.0, 3.0]
    assert nll.grad.tolist() == [2.0, 2.0, 5.0]


def test_a_loss_changes_none_of_its_inputs():
    batch, nll = batch_of([[1.0, 2.0], [3.0]], [2.0, 2.0])
    before = nll.detach().clone(), batch.reference_sums.clone()
    NPO().forget(batch, StepTotals(num_labels=(2, 1))).backward()
    assert torch.equal(nll.detach(), before[0])
    assert torch.equal(batch.reference_sums, before[1])
