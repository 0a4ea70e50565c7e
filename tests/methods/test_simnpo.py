"""SimNPO: by hand, against a slow float64 formula in value and gradient, beside NPO, and over micro-batches."""

import math

import pytest
import torch
from helpers_token_losses import (
    assert_a_saturated_row_stays_finite,
    assert_equals_the_slow_formula,
    assert_micro_batches_add_up,
    value_and_gradient,
)

from fedunlearn.methods.npo import NPO
from fedunlearn.methods.simnpo import SimNPO

LN2, LN3 = math.log(2.0), math.log(3.0)
MEMBERS = [
    pytest.param(SimNPO(), id="simnpo"),
    pytest.param(SimNPO(beta=1.0, delta=0.7), id="simnpo delta"),
]


def test_two_tokens_by_hand():
    """One row, nll 0 and ln 4, beta 2, delta 0: mean ln 2, sigmoid(2 ln 2) = 4/5, F = ln(5/4); gradient -(2/2) 2 (1/5) / T = -1/5 each."""
    value, gradient = value_and_gradient(SimNPO(beta=2.0), [[0.0, 2 * LN2]])
    assert value == pytest.approx(math.log(5 / 4), abs=1e-6)
    assert gradient == pytest.approx([-0.2, -0.2], abs=1e-6)


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


def slow_simnpo(method, rows, reference):
    total = 0.0
    for row in rows:
        margin = method.beta * (sum(row) / len(row) - method.delta)
        total = total - 2 / method.beta * torch.log(1 / (1 + torch.exp(-margin)))
    return total / len(rows)


@pytest.mark.parametrize("method", MEMBERS)
def test_value_and_gradient_equal_the_slow_formula(method):
    assert_equals_the_slow_formula(method, slow_simnpo)


@pytest.mark.parametrize("method", MEMBERS)
def test_micro_batches_add_up_to_the_step(method):
    assert_micro_batches_add_up(method)


@pytest.mark.parametrize("nats", [0.0, 500.0, 1e4])
def test_saturated_rows_stay_finite(nats):
    assert_a_saturated_row_stays_finite(SimNPO(), nats)
