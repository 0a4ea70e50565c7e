"""SatImp: by hand, against a slow formula, at its limits, and over micro-batches."""

import math

import pytest
import torch
from helpers_losses import apart_from_slow, apart_in_parts, drawn, value_and_gradient
from hypothesis import given
from hypothesis import strategies as st

from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.satimp import SatImp
from fedunlearn.methods.wga import WGA

LN2 = math.log(2.0)


def slow(beta1, beta2):
    def loss(rows):
        total, count = 0.0, 0
        for row in rows:
            for nll in row["nll"]:
                p = math.exp(-nll.item())  # a number: the weight carries no gradient
                total, count = total - p**beta1 * (1 - p) ** beta2 * nll, count + 1
        return total / count

    return loss


@pytest.mark.parametrize(("beta1", "beta2"), [(5.0, 1.0), (1.0, 1.0), (0.5, 2.0), (0.0, 3.0)])
def test_value_and_gradient_equal_the_slow_formula(beta1, beta2):
    assert apart_from_slow(SatImp(beta1=beta1, beta2=beta2), slow(beta1, beta2), "nll") < 1e-5


def test_two_tokens_by_hand():
    """p = 1/2 and 1/4, beta1 = beta2 = 1: weights 1/4 and 3/16, F = -(ln 2 / 4 + 3/16 2 ln 2) / 2 = -5 ln(2) / 16; gradient -1/8 and -3/32."""
    method = SatImp(beta1=1.0, beta2=1.0)
    value, gradient = value_and_gradient(method, {"nll": torch.tensor([LN2, 2 * LN2])}, "nll", (2,))
    assert value.item() == pytest.approx(-5 * LN2 / 16, abs=1e-6)
    assert gradient.tolist() == pytest.approx([-1 / 8, -3 / 32], abs=1e-6)


@pytest.mark.parametrize(
    ("method", "like"),
    [
        (SatImp(beta1=0.0, beta2=0.0), GradAscent()),
        (SatImp(beta1=2.0, beta2=0.0), WGA(beta=2.0)),
        (SatImp(beta1=0.3, beta2=0.0), WGA(beta=0.3)),
    ],
)
def test_without_beta2_it_is_wga_and_without_both_gradient_ascent(method, like):
    found, wanted = (value_and_gradient(one, drawn(), "nll") for one in (method, like))
    assert found[0].item() == pytest.approx(wanted[0].item(), abs=1e-6)
    assert torch.allclose(found[1], wanted[1], atol=1e-7)


def test_a_token_that_is_known_for_certain_or_not_at_all_is_left_alone():
    """p (1 - p) is 0 at both ends: no gradient at nll 0, nor at 100 nats; 1/4 in between, at p = 1/2."""
    method = SatImp(beta1=1.0, beta2=1.0)
    _, gradient = value_and_gradient(method, {"nll": torch.tensor([0.0, LN2, 100.0])}, "nll", (3,))
    assert gradient.tolist() == pytest.approx([0.0, -1 / 12, 0.0], abs=1e-7)


def test_1_minus_p_near_p_1_is_no_rounding_error():
    """nll 1e-6: 1 - exp(-1e-6) in float32 is 9.54e-7 or 1.01e-6, five parts in a hundred off; the weight here is right to 1e-5."""
    nll = 1e-6
    _, gradient = value_and_gradient(SatImp(beta1=0.0, beta2=1.0), {"nll": torch.tensor([nll])}, "nll", (1,))
    naive = 1 - torch.exp(-torch.tensor(nll)).item()
    assert -gradient.item() == pytest.approx(-math.expm1(-nll), rel=1e-5)
    assert abs(naive / nll - 1) > 0.01


@given(beta1=st.floats(0, 6), beta2=st.floats(0, 6), nll=st.floats(0, 80))
def test_no_token_ever_counts_more_than_under_ascent(beta1, beta2, nll):
    """0 <= p^b1 (1 - p)^b2 <= 1, also where p or 1 - p is 0 to the power 0."""
    _, gradient = value_and_gradient(SatImp(beta1=beta1, beta2=beta2), {"nll": torch.tensor([nll])}, "nll", (1,))
    assert -1 - 1e-6 <= gradient.item() <= 0


def test_micro_batches_add_up_to_the_step():
    assert apart_in_parts(SatImp(), "nll") < 1e-5
    assert apart_in_parts(SatImp(beta1=1.0, beta2=1.0), "nll") < 1e-5
