"""NPO: by hand, against a slow float64 formula in value and gradient, at its limits, and over micro-batches."""

import math

import pytest
import torch
from helpers_token_losses import (
    assert_a_saturated_row_stays_finite,
    assert_equals_the_slow_formula,
    assert_micro_batches_add_up,
    batch_of,
    value_and_gradient,
)

from fedunlearn.methods.npo import NPO
from fedunlearn.methods.tokens import StepTotals

LN2, LN3 = math.log(2.0), math.log(3.0)
MEMBERS = [pytest.param(NPO(), id="npo"), pytest.param(NPO(beta=1.5), id="npo beta 1.5")]


def test_two_tokens_by_hand():
    """One row of two tokens, nll ln 3 and 1, reference 1, beta 1: margin ln 3, sigmoid 3/4, F = -2 ln(3/4) = 2 ln(4/3); gradient -2 (1 - 3/4) = -1/2 each."""
    value, gradient = value_and_gradient(NPO(beta=1.0), [[LN3, 1.0]], [1.0])
    assert value == pytest.approx(2 * math.log(4 / 3), abs=1e-6)
    assert gradient == pytest.approx([-0.5, -0.5], abs=1e-6)


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


def slow_npo(method, rows, reference):
    total = 0.0
    for row, ref in zip(rows, reference, strict=True):
        total = total - 2 / method.beta * torch.log(1 / (1 + torch.exp(-method.beta * (sum(row) - ref))))
    return total / len(rows)


@pytest.mark.parametrize("method", MEMBERS)
def test_value_and_gradient_equal_the_slow_formula(method):
    assert_equals_the_slow_formula(method, slow_npo)


@pytest.mark.parametrize("method", MEMBERS)
def test_micro_batches_add_up_to_the_step(method):
    assert_micro_batches_add_up(method)


@pytest.mark.parametrize("nats", [0.0, 500.0, 1e4])
def test_saturated_rows_stay_finite(nats):
    assert_a_saturated_row_stays_finite(NPO(), nats)


def test_a_loss_changes_none_of_its_inputs():
    batch, nll = batch_of([[1.0, 2.0], [3.0]], [2.0, 2.0])
    before = nll.detach().clone(), batch.reference_sums.clone()
    NPO().forget(batch, StepTotals(num_labels=(2, 1))).backward()
    assert torch.equal(nll.detach(), before[0])
    assert torch.equal(batch.reference_sums, before[1])
