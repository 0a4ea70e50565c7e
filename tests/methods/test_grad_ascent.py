"""GradAscent: by hand, against a slow float64 formula in value and gradient, and over micro-batches."""

import pytest
from helpers_token_losses import (
    assert_equals_the_slow_formula,
    assert_micro_batches_add_up,
    batch_of,
    slow_ascent,
    value_and_gradient,
)

from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.tokens import StepTotals


def test_two_tokens_by_hand():
    """nll 1 and 3: F = -(1 + 3) / 2 = -2, gradient -1/2 each; there is no retain term."""
    value, gradient = value_and_gradient(GradAscent(), [[1.0, 3.0]])
    assert value == pytest.approx(-2.0, abs=1e-6)
    assert gradient == pytest.approx([-0.5, -0.5], abs=1e-7)
    assert (GradAscent().alpha, GradAscent().retain) == (0.0, "none")


def test_ascent_by_hand():
    """Tokens 1, 2 | 3: CE = (1 + 2 + 3) / 3 = 2, not the mean of the row means (1.5 + 3) / 2; F = -2, each token's gradient -1/3."""
    value, gradient = value_and_gradient(GradAscent(), [[1.0, 2.0], [3.0]])
    assert value == pytest.approx(-2.0, abs=1e-6)
    assert gradient == pytest.approx([-1 / 3] * 3, abs=1e-7)


def test_value_and_gradient_equal_the_slow_formula():
    assert_equals_the_slow_formula(GradAscent(), slow_ascent)


def test_micro_batches_add_up_to_the_step():
    assert_micro_batches_add_up(GradAscent())


def test_the_mean_of_micro_batch_means_would_be_another_number():
    """Tokens 1, 2 | 3 in two micro-batches: shares -1 and -1 of the step's CE; their own means are -1.5 and -3."""
    totals = StepTotals(num_labels=(2, 1))
    first, second = batch_of([[1.0, 2.0]])[0], batch_of([[3.0]])[0]
    shares = [GradAscent().forget(batch, totals).item() for batch in (first, second)]
    assert shares == pytest.approx([-1.0, -1.0], abs=1e-6)
