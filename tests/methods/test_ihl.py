"""IHL: by hand, against a slow formula, at its bounds, and over micro-batches."""

import math

import pytest
import torch
from helpers_losses import WORDS, apart_from_slow, apart_in_parts, softmax, value_and_gradient
from hypothesis import given
from hypothesis import strategies as st

from fedunlearn.methods.ihl import IHL


def slow(rows):
    total, count = 0.0, 0
    for row in rows:
        for logits, label in zip(row["logits"], row["labels"], strict=True):
            p = softmax(logits)
            runner_up = max(p[v] for v in range(len(p)) if v != label)
            total, count = total + 1 + p[label] - runner_up, count + 1
    return total / count


def of(logits, labels):
    values = {"logits": torch.tensor(logits), "labels": torch.tensor(labels)}
    return value_and_gradient(IHL(), values, "logits", (len(labels),))


def test_value_and_gradient_equal_the_slow_formula():
    assert apart_from_slow(IHL(), slow, "logits") < 1e-5


def test_two_tokens_by_hand():
    """(1/2, 1/4, 1/4) with y = 0 gives 5/4, (1/2, 3/8, 1/8) with y = 2 gives 5/8: F = 15/16."""
    value, _ = of(
        [[math.log(2.0), 0.0, 0.0], [math.log(4.0), math.log(3.0), 0.0]],
        [0, 2],
    )
    assert value.item() == pytest.approx(15 / 16, abs=1e-6)


def test_the_gradient_by_hand():
    """(1/2, 3/8, 1/8), y = 2, runner-up 0: d(p_2 - p_0)/dz = p_2 (e_2 - p) - p_0 (e_0 - p) = (-5/16, 9/64, 11/64)."""
    p = (1 / 2, 3 / 8, 1 / 8)
    wanted = [p[2] * ((v == 2) - p[v]) - p[0] * ((v == 0) - p[v]) for v in range(3)]
    _, gradient = of([[math.log(4.0), math.log(3.0), 0.0]], [2])
    assert wanted == pytest.approx([-5 / 16, 9 / 64, 11 / 64], abs=1e-12)
    assert gradient[0].tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_label_itself_is_never_its_own_runner_up():
    """Label certain: 1 + 1 - 0 = 2. Were it among the others, it would be 1 + 1 - 1."""
    value, _ = of([[40.0, 0.0, 0.0]], [0])
    assert value.item() == pytest.approx(2.0, abs=1e-6)


def test_another_word_certain_is_0_and_all_alike_is_1():
    assert of([[40.0, 0.0, 0.0]], [1])[0].item() == pytest.approx(0.0, abs=1e-6)
    assert of([[3.0, 3.0, 3.0]], [1])[0].item() == pytest.approx(1.0, abs=1e-6)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=9), st.data())
def test_it_lies_between_0_and_2(logits, data):
    label = data.draw(st.integers(0, len(logits) - 1))
    assert -1e-6 <= of([logits], [label])[0].item() <= 2 + 1e-6


@given(st.floats(-30, 30))
def test_a_constant_on_all_logits_changes_nothing(shift):
    logits = torch.linspace(-2, 3, WORDS)
    first, second = (of([(logits + c).tolist()], [2]) for c in (0.0, shift))
    assert first[0].item() == pytest.approx(second[0].item(), abs=1e-5)
    assert torch.allclose(first[1], second[1], atol=1e-5)


def test_micro_batches_add_up_to_the_step():
    assert apart_in_parts(IHL(), "logits") < 1e-5
