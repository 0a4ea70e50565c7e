"""Optimiser and schedule of one round: the yaml's values arrive, one step of each by hand."""

import pytest
import torch
from helpers_training import train_args

from fedunlearn.training.optimizer import PACKAGES, build_optimizer, build_schedule

A_NAME, B_NAME, PLAIN_NAME = "q.lora_A.weight", "q.lora_B.weight", "q.lora_magnitude_vector"


def stepped(gradients, **args):
    """A weight of 2 after these gradients."""
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer({A_NAME: weight}, train_args(**args), 1.0)
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
    optimizer = build_optimizer({A_NAME: torch.nn.Parameter(torch.ones(1))}, train_args(optim=optim), 1.0)
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
    optimizer = build_optimizer({A_NAME: torch.nn.Parameter(torch.ones(1))}, args, 0.5)
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
    optimizer = build_optimizer({A_NAME: torch.nn.Parameter(torch.ones(1))}, args, 1.0)
    schedule = build_schedule(optimizer, args, 4, 1)
    optimizer.step()
    schedule.step()
    assert 0 < optimizer.param_groups[0]["lr"] <= 1e-3


def three():
    return {name: torch.nn.Parameter(torch.tensor([2.0])) for name in (A_NAME, B_NAME, PLAIN_NAME, "q.lora_B.bias")}


def after(names, **args):
    """What each of these parameters of 2 is after one step of SGD with gradient 1."""
    parameters = {name: parameter for name, parameter in three().items() if name in names}
    optimizer = build_optimizer(parameters, train_args(optim="sgd", **args), 0.5)
    for parameter in parameters.values():
        parameter.grad = torch.ones(1)
    optimizer.step()
    return {name: parameter.item() for name, parameter in parameters.items()}


def test_lora_plus_by_hand():
    """Rate 0.2 at lr_scale 1/2: A and plain tensors go by 0.1, B by 8 x 0.1; with decay 1/2 the gradient is 1 + 0.5 x 2 = 2 for both."""
    everything = (A_NAME, B_NAME, PLAIN_NAME, "q.lora_B.bias")
    found = after(everything, learning_rate=0.2, loraplus_lr_ratio=8.0)
    assert found == pytest.approx({A_NAME: 1.9, B_NAME: 1.2, PLAIN_NAME: 1.9, "q.lora_B.bias": 1.9})
    decayed = after(everything, learning_rate=0.2, loraplus_lr_ratio=8.0, weight_decay=0.5)
    assert decayed[B_NAME] == pytest.approx(0.4)
    assert decayed[A_NAME] == pytest.approx(1.8)


@pytest.mark.parametrize(("name", "value"), [(A_NAME, 1.9), (B_NAME, 1.2)])
def test_lora_plus_with_one_factor_alone(name, value):
    assert after((name,), learning_rate=0.2, loraplus_lr_ratio=8.0) == pytest.approx({name: value})


@pytest.mark.parametrize("ratio", [None, 1.0])
def test_lora_plus_off_is_one_group(ratio):
    optimizer = build_optimizer(three(), train_args(loraplus_lr_ratio=ratio), 1.0)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "constant_with_warmup", "inverse_sqrt"])
def test_schedules_act_on_both_groups(kind):
    """At every step B's rate is 4 times A's, through warm-up and decay."""
    args = train_args(learning_rate=0.1, lr_scheduler_type=kind, loraplus_lr_ratio=4.0)
    optimizer = build_optimizer(three(), args, 1.0)
    schedule = build_schedule(optimizer, args, 6, 2)
    seen = []
    for _ in range(5):
        optimizer.step()
        schedule.step()
        rate_a, rate_b = (group["lr"] for group in optimizer.param_groups)
        assert rate_b == pytest.approx(4 * rate_a)
        seen.append(rate_a)
    assert len(set(seen)) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("optim", list(PACKAGES))
@pytest.mark.parametrize("ratio", [None, 4.0])
def test_optimisers_of_other_packages_step_near_adamw(optim, ratio):
    """8192 entries, so that moments are truly held in 8 bits: ten steps end within a tenth of what AdamW moved."""
    pytest.importorskip(PACKAGES[optim])
    ends = []
    for name in ("adamw_torch", optim):
        generator = torch.Generator(device="cuda").manual_seed(0)
        start = {key: torch.ones(64, 128, device="cuda") for key in (A_NAME, B_NAME)}
        parameters = {key: torch.nn.Parameter(value.clone()) for key, value in start.items()}
        args = train_args(optim=name, learning_rate=1e-2, loraplus_lr_ratio=ratio, lr_scheduler_type="linear")
        optimizer = build_optimizer(parameters, args, 1.0)
        schedule = build_schedule(optimizer, args, 10, 0)
        for _ in range(10):
            for parameter in parameters.values():
                parameter.grad = torch.randn(64, 128, device="cuda", generator=generator) + 1
            optimizer.step()
            schedule.step()
        ends.append({key: parameters[key].detach() - start[key] for key in start})
    for key in ends[0]:
        assert (ends[1][key] - ends[0][key]).norm() < 0.1 * ends[0][key].norm()
