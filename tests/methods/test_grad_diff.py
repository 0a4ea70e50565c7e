"""GradDiff: by hand, against a slow float64 formula in value and gradient, and over micro-batches."""

import pytest
from helpers_token_losses import (
    assert_equals_the_slow_formula,
    assert_micro_batches_add_up,
    batch_of,
    slow_ascent,
    value_and_gradient,
)

from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.methods.tokens import StepTotals


def test_two_tokens_by_hand():
    """Two forget tokens, nll 1 and 3: F = -2, gradient -1/2 each. Two retain tokens, nll 1 and 2: R = 3/2. gamma 2, alpha 1: L = -4 + 3/2 = -5/2."""
    method = GradDiff(gamma=2.0)
    value, gradient = value_and_gradient(method, [[1.0, 3.0]])
    retain = method.retain_loss(batch_of([[1.0, 2.0]])[0], StepTotals(num_labels=(2,))).item()
    assert value == pytest.approx(-2.0, abs=1e-6)
    assert gradient == pytest.approx([-0.5, -0.5], abs=1e-7)
    assert retain == pytest.approx(1.5, abs=1e-6)
    assert method.gamma * value + method.alpha * retain == pytest.approx(-2.5, abs=1e-6)


def test_ascent_by_hand():
    """Tokens 1, 2 | 3: CE = (1 + 2 + 3) / 3 = 2, not the mean of the row means (1.5 + 3) / 2; F = -2, each token's gradient -1/3."""
    value, gradient = value_and_gradient(GradDiff(), [[1.0, 2.0], [3.0]])
    assert value == pytest.approx(-2.0, abs=1e-6)
    assert gradient == pytest.approx([-1 / 3] * 3, abs=1e-7)


def test_value_and_gradient_equal_the_slow_formula():
    assert_equals_the_slow_formula(GradDiff(gamma=2.0), slow_ascent)


def test_micro_batches_add_up_to_the_step():
    assert_micro_batches_add_up(GradDiff(gamma=2.0))
