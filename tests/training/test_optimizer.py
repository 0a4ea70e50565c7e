"""Optimiser and schedule of one round: the yaml's values arrive, one step of each by hand."""

import pytest
import torch
from helpers_training import train_args

from fedunlearn.training.optimizer import build_optimizer, build_schedule


def stepped(gradients, **args):
    """A weight of 2 after these gradients."""
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer([weight], train_args(**args), 1.0)
    for value in gradients:
        weight.grad = torch.tensor([value])
        optimizer.step()
    return weight.item()


def test_sgd_by_hand():
    """2 - 0.1 x 3 = 1.7; with decay 0.5 the gradient is 3 + 0.5 x 2 = 4, so 1.6; no momentum: 1.7 - 0.1 = 1.6 after 3 and 1."""
    assert stepped([3.0], optim="sgd", learning_rate=0.1) == pytest.approx(1.7, abs=1e-6)
    assert stepped([3.0], optim="sgd", learning_rate=0.1, weight_decay=0.5) == pytest.approx(1.6, abs=1e-6)
    assert stepped([3.0, 1.0], optim="sgd", learning_rate=0.1) == pytest.approx(1.6, abs=1e-6)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_adamw_by_hand(optim):
    """First step: m and v are bias-corrected to g and g^2, so 2 - 0.1 x sign(g) = 1.9; decay 0.5 takes 0.1 x 0.5 x 2 = 0.1 first.

    Second step with g = 1 after g = 3, betas 0.5 and 0.75: m = (0.5 x 1.5 + 0.5) / 0.75 = 5/3, v = (0.75 x 2.25 + 0.25) / 0.4375
    = 31/7; the step is 0.1 x (5/3) / sqrt(31/7) = 0.0791982.
    """
    usual = {"optim": optim, "learning_rate": 0.1}
    assert stepped([3.0], **usual) == pytest.approx(1.9, abs=1e-6)
    assert stepped([3.0], weight_decay=0.5, **usual) == pytest.approx(1.8, abs=1e-6)
    two = stepped([3.0, 1.0], adam_beta1=0.5, adam_beta2=0.75, **usual)
    assert two == pytest.approx(1.9 - 0.1 * (5 / 3) / (31 / 7) ** 0.5, abs=1e-6)


def test_epsilon_arrives():
    """g = 1, eps = 1: the step is 0.1 x 1 / (1 + 1) = 0.05."""
    assert stepped([1.0], learning_rate=0.1, adam_epsilon=1.0) == pytest.approx(1.95, abs=1e-6)


@pytest.mark.parametrize(("optim", "fused"), [("adamw_torch", False), ("adamw_torch_fused", True)])
def test_fused_is_what_was_asked_for(optim, fused):
    optimizer = build_optimizer([torch.nn.Parameter(torch.ones(1))], train_args(optim=optim), 1.0)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"] is fused


@pytest.mark.parametrize(
    ("kind", "warmup", "rates"),
    [
        ("linear", 2, [0.0, 0.2, 0.4, 0.2]),
        ("linear", 0, [0.4, 0.3, 0.2, 0.1]),
        ("constant", 0, [0.4, 0.4, 0.4, 0.4]),
        ("constant_with_warmup", 1, [0.0, 0.4, 0.4, 0.4]),
        ("cosine", 0, [0.4, 0.4 * 0.8535534, 0.2, 0.4 * 0.1464466]),
    ],
)
def test_rates_by_hand(kind, warmup, rates):
    """Rate 0.4 (0.8 at lr_scale 1/2) over 4 steps; cosine: (1 + cos(pi k / 4)) / 2."""
    args = train_args(learning_rate=0.8, lr_scheduler_type=kind)
    optimizer = build_optimizer([torch.nn.Parameter(torch.ones(1))], args, 0.5)
    schedule = build_schedule(optimizer, args, 4, warmup)
    found = []
    for _ in range(4):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(rates, abs=1e-6)


@pytest.mark.parametrize("kind", ["polynomial", "inverse_sqrt", "cosine_with_restarts"])
def test_the_other_schedules_can_be_built(kind):
    args = train_args(lr_scheduler_type=kind)
    optimizer = build_optimizer([torch.nn.Parameter(torch.ones(1))], args, 1.0)
    schedule = build_schedule(optimizer, args, 4, 1)
    optimizer.step()
    schedule.step()
    assert 0 < optimizer.param_groups[0]["lr"] <= 1e-3
