"""UCE: by hand, against a slow formula, at its limits, and over micro-batches."""

import math

import pytest
import torch
from helpers_losses import apart_from_slow, apart_in_parts, drawn, value_and_gradient
from hypothesis import given
from hypothesis import strategies as st

from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.uce import UCE

LN2, LN3 = math.log(2.0), math.log(3.0)


def slow(rows):
    total, count = 0.0, 0
    for row in rows:
        for nll in row["nll"]:
            total, count = total - torch.log(1 - torch.exp(-nll) / 2), count + 1
    return total / count


def test_value_and_gradient_equal_the_slow_formula():
    assert apart_from_slow(UCE(), slow, "nll") < 1e-5


def test_two_tokens_by_hand():
    """p = 1 and 2/3: -ln(1/2) and -ln(2/3), F = ln(3) / 2. Gradient -(p/2) / (1 - p/2) / 2: -1/2 and -(1/3) / (2/3) / 2 = -1/4."""
    value, gradient = value_and_gradient(UCE(), {"nll": torch.tensor([0.0, LN3 - LN2])}, "nll", (2,))
    assert value.item() == pytest.approx(LN3 / 2, abs=1e-6)
    assert gradient.tolist() == pytest.approx([-0.5, -0.25], abs=1e-6)


def test_as_p_goes_to_1_its_gradient_is_that_of_ascent():
    nll = {"nll": 1e-6 * torch.rand(8, generator=torch.Generator().manual_seed(1))}
    found, wanted = (value_and_gradient(method, nll, "nll")[1] for method in (UCE(), GradAscent()))
    assert torch.allclose(found, wanted, rtol=1e-5)


def test_as_p_goes_to_0_it_is_flat_where_ascent_is_not():
    """At 30 nats: F = p/2 = 4.7e-14 and a gradient as small, which 1 - p/2 in float32 would have made 0."""
    value, gradient = value_and_gradient(UCE(), {"nll": torch.tensor([30.0])}, "nll", (1,))
    assert value.item() == pytest.approx(math.exp(-30) / 2, rel=1e-4)
    assert gradient.item() == pytest.approx(-math.exp(-30) / 2, rel=1e-4)


@given(st.lists(st.floats(0, 200), min_size=1, max_size=8))
def test_it_lies_between_0_and_ln_2_and_never_descends(nll):
    value, gradient = value_and_gradient(UCE(), {"nll": torch.tensor(nll)}, "nll", (len(nll),))
    assert 0 <= value.item() <= LN2 + 1e-6
    assert gradient.max() <= 0
    assert gradient.min() >= -1 / len(nll) - 1e-6


def test_micro_batches_add_up_to_the_step():
    assert apart_in_parts(UCE(), "nll") < 1e-5
    assert value_and_gradient(UCE(), drawn(), "nll")[0].item() > 0
