"""WGA: by hand, against a slow formula, at its limits, and over micro-batches."""

import math

import pytest
import torch
from helpers_losses import LENGTHS, apart_from_slow, apart_in_parts, drawn, value_and_gradient

from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.wga import WGA

LN2 = math.log(2.0)


def slow(beta):
    def loss(rows):
        total, count = 0.0, 0
        for row in rows:
            for nll in row["nll"]:
                p = math.exp(-nll.item())  # a number: the weight carries no gradient
                total, count = total - p**beta * nll, count + 1
        return total / count

    return loss


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_value_and_gradient_equal_the_slow_formula(beta):
    assert apart_from_slow(WGA(beta=beta), slow(beta), "nll") < 1e-5


def test_two_tokens_by_hand():
    """p = 1/2 and 1/4, beta 1: F = -(ln 2 / 2 + 2 ln 2 / 4) / 2 = -ln(2) / 2; gradient -p / 2 = -1/4 and -1/8, for the weight is fixed."""
    value, gradient = value_and_gradient(WGA(), {"nll": torch.tensor([LN2, 2 * LN2])}, "nll", (2,))
    assert value.item() == pytest.approx(-LN2 / 2, abs=1e-6)
    assert gradient.tolist() == pytest.approx([-0.25, -0.125], abs=1e-6)


def test_were_the_weight_not_fixed_the_gradient_would_be_another():
    """d(-p nll)/d nll = -p (1 - nll): at p = 1/2 that is -0.153, and above 1 nat it turns round; here it is -p everywhere."""
    nll = torch.tensor([LN2, 2.0])
    _, gradient = value_and_gradient(WGA(), {"nll": nll}, "nll", (2,))
    p = (-nll).exp()
    assert gradient.tolist() == pytest.approx((-p / 2).tolist(), abs=1e-6)
    assert (gradient + p * (1 - nll) / 2).abs().max() > 0.1


def test_beta_0_is_gradient_ascent():
    found, wanted = (value_and_gradient(method, drawn(), "nll") for method in (WGA(beta=0.0), GradAscent()))
    assert found[0].item() == pytest.approx(wanted[0].item(), abs=1e-6)
    assert torch.allclose(found[1], wanted[1], atol=1e-7)


def test_as_p_goes_to_1_it_is_gradient_ascent_and_as_p_goes_to_0_it_is_still():
    """Gradient -p / N: -1/2 at nll 1e-6, and below 1e-20 at 50 nats."""
    _, known = value_and_gradient(WGA(), {"nll": torch.full((2,), 1e-6)}, "nll", (2,))
    _, forgotten = value_and_gradient(WGA(), {"nll": torch.full((2,), 50.0)}, "nll", (2,))
    assert known.tolist() == pytest.approx([-0.5, -0.5], abs=1e-5)
    assert 0 < forgotten.abs().max() < 1e-20


def test_a_larger_beta_leaves_forgotten_tokens_more_alone():
    """Against the best known token of the step, each other one's say p^beta falls with beta."""
    nll = torch.tensor([0.1, 1.0, 2.0])
    shares = [value_and_gradient(WGA(beta=beta), {"nll": nll}, "nll", (3,))[1] for beta in (0.5, 1.0, 4.0)]
    says = [(gradient / gradient[0]).tolist() for gradient in shares]
    assert says[0][1] > says[1][1] > says[2][1]
    assert says[1][2] == pytest.approx(math.exp(-1.9), rel=1e-5)


def test_micro_batches_add_up_to_the_step():
    assert apart_in_parts(WGA(), "nll") < 1e-5
    assert apart_in_parts(WGA(beta=2.0), "nll", (*LENGTHS[1:], 2)) < 1e-5
