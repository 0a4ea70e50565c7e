"""A client of rank 2 in a model of rank 4 trains as a model of rank 2 would by itself, and what lies beyond stays zero.

Not bit by bit: a matrix product over four places, two of which are zero, adds its terms in another order than one over two.
"""

import pytest
import torch
from helpers_adapters import apart
from helpers_training import GRADIENT, RATE, flat, made_model, train

from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.npo import NPO
from fedunlearn.models.lora import hold_reference
from fedunlearn.models.ranks import cut, padded, scaled_for
from fedunlearn.models.resident import Resident
from fedunlearn.records.adapter import Adapter, Weights
from fedunlearn.records.rounds import Trained
from fedunlearn.records.shape import ClientShape

SHAPE = ClientShape(rank=2, lora_alpha=6.0)
METHODS = [
    pytest.param(None, id="finetune"),
    pytest.param(GradAscent(), id="grad_ascent"),
    pytest.param(NPO(), id="npo"),
    pytest.param(NPO(retain="kl"), id="npo kl"),
]
OPTIMIZERS = [
    pytest.param({"learning_rate": 1e-2}, id="adamw"),
    pytest.param({"learning_rate": 1e-2, "optim": "adamw_torch_fused"}, id="fused adamw"),
    pytest.param({"learning_rate": 0.3, "optim": "sgd"}, id="sgd"),
]


@pytest.fixture(scope="module")
def models():
    """Rank 2 by itself, and the same values inside rank 4 at another alpha; dropout on, the reference half the start."""
    small, large = made_model(dropout=0.1, rank=2, alpha=6.0), made_model(dropout=0.1, rank=4, alpha=16.0)
    inside = padded(large.model, small.start.tensors)
    made = Resident(large.model, large.chat, "print", "large", large.device, Adapter(inside, {}, "print"))
    for one in (small, made):
        hold_reference(one.model, Weights({name: 0.5 * t for name, t in one.start.tensors.items()}))
    return small, made


def trained_inside(made, method, **args):
    with scaled_for(made.model, SHAPE):
        return train(made, method, **args)


def beyond(tensors):
    return [t[2:] if ".lora_A." in name else t[:, 2:] for name, t in tensors.items()]


@pytest.mark.parametrize("method", METHODS)
def test_the_first_gradient_is_that_of_the_rank_2_model(models, method):
    small, made = models
    wanted = flat(small.start.tensors) - flat(train(small, method, **GRADIENT).tensors)
    found = flat(small.start.tensors) - flat(cut(trained_inside(made, method, **GRADIENT).tensors, 2))
    assert wanted.abs().max() / RATE > 1e-3
    assert apart(found, wanted) < 1e-5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_three_epochs_with_decay_clipping_and_pull(models, method, optimizer):
    """Rounding grows a little with each step: 1e-5 of the largest entry."""
    small, made = models
    usual = {"epochs": 3, "weight_decay": 0.1, "mu": 0.3, "max_grad_norm": 0.5, **optimizer}
    wanted, found = train(small, method, **usual), trained_inside(made, method, **usual)
    assert apart(flat(wanted.tensors), flat(small.start.tensors)) > 1e-2
    assert apart(flat(cut(found.tensors, 2)), flat(wanted.tensors)) < 1e-5
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert not any(part.any() for part in beyond(found.tensors))


@pytest.mark.parametrize("trained", [Trained.A, Trained.B])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_under_a_mask_what_lies_beyond_stays_zero_too(models, optimizer, trained):
    small, made = models
    usual = {"epochs": 2, "weight_decay": 0.1, "trained": trained, **optimizer}
    wanted, found = train(small, NPO(), **usual), trained_inside(made, NPO(), **usual)
    assert apart(flat(cut(found.tensors, 2)), flat(wanted.tensors)) < 1e-5
    assert not any(part.any() for part in beyond(found.tensors))


def test_with_the_model_s_own_scale_it_would_be_another_update(models):
    """16 / 4 instead of 6 / 2: what the scale is for."""
    small, made = models
    wanted = train(small, NPO(), **GRADIENT)
    assert apart(flat(cut(train(made, NPO(), **GRADIENT).tensors, 2)), flat(wanted.tensors)) > 0.01


def test_the_whole_rank_at_its_own_scale_is_the_plain_round_bit_by_bit(models):
    _, made = models
    with scaled_for(made.model, ClientShape(rank=4, lora_alpha=16.0)):
        scaled = train(made, NPO(retain="kl"), epochs=2)
    assert torch.equal(flat(scaled.tensors), flat(train(made, NPO(retain="kl"), epochs=2).tensors))
