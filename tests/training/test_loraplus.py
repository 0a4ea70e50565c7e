"""LoRA+ in a client's round: B at a rate of its own, with masks, the proximal term and rounds that go on."""

import pytest
import torch
from helpers_training import GRADIENT, RATE, equal, flat, made_model, train

from fedunlearn.methods.npo import NPO
from fedunlearn.models.lora import hold_reference
from fedunlearn.records.adapter import A, B
from fedunlearn.records.rounds import Trained


@pytest.fixture(scope="module")
def made():
    model = made_model(dropout=0.1)
    hold_reference(model.model, model.start.weights)
    return model


def factor(made, tensors, end):
    """All entries of one factor, as they moved from the start."""
    return flat({name: tensors[name] - made.start.tensors[name] for name in tensors if name.endswith(end)})


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("method", [None, NPO(retain="kl")])
def test_ratio_1_is_plain_lora_bit_by_bit(made, optim, method):
    usual = {"optim": optim, "epochs": 2, "learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 1}
    plain, one = (train(made, method, loraplus_lr_ratio=ratio, **usual) for ratio in (None, 1.0))
    assert equal(plain, one)
    assert plain.loss_trace == one.loss_trace
    assert not equal(plain, train(made, method, loraplus_lr_ratio=2.0, **usual))


def test_the_first_step_of_b_is_ratio_times_as_long_and_a_s_is_the_same(made):
    """One step of SGD: the gradients are those of plain LoRA, so A ends where it would and B goes 16 times as far."""
    plain = train(made, **GRADIENT)
    plus = train(made, loraplus_lr_ratio=16.0, **{**GRADIENT, "learning_rate": RATE})
    assert torch.equal(factor(made, plus.tensors, A), factor(made, plain.tensors, A))
    moved, wanted = factor(made, plus.tensors, B), 16 * factor(made, plain.tensors, B)
    assert wanted.abs().max() > 1
    assert (moved - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_with_a_mask_only_the_trained_factor_moves(made):
    usual = {**GRADIENT, "learning_rate": 1.0}
    plain, plus = (train(made, trained=Trained.B, loraplus_lr_ratio=ratio, **usual) for ratio in (None, 4.0))
    assert not factor(made, plus.tensors, A).any()
    found, wanted = factor(made, plus.tensors, B), 4 * factor(made, plain.tensors, B)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    alone = [train(made, trained=Trained.A, loraplus_lr_ratio=ratio, **usual) for ratio in (None, 4.0)]
    assert equal(*alone), "A alone knows nothing of B's rate"


def test_the_proximal_term_is_part_of_the_gradient_that_b_s_rate_multiplies(made):
    """Second step of SGD: B differs from mu = 0 by ratio x rate x mu x (w_1 - start), A by rate x mu x (w_1 - start)."""
    rate, mu, ratio = 0.25, 2.0, 4.0
    usual = {**GRADIENT, "learning_rate": rate, "loraplus_lr_ratio": ratio}
    one = train(made, **usual)
    free, pulled = (train(made, mu=m, **{**usual, "max_steps": 2}) for m in (0.0, mu))
    for end, times in ((A, 1.0), (B, ratio)):
        pull = times * rate * mu * factor(made, one.tensors, end)
        found = factor(made, free.tensors, end) - factor(made, pulled.tensors, end)
        assert pull.abs().max() > 1e-3
        assert (found - pull).abs().max() < 1e-4 * pull.abs().max()


def test_a_round_begins_anew_whatever_was_trained_before(made):
    """A run that is resumed repeats its round from the adapter on disk: nothing of another round's two groups is left in the process."""
    usual = {"epochs": 2, "learning_rate": 1e-2, "loraplus_lr_ratio": 16.0}
    first = train(made, NPO(), **usual)
    train(made, seed=3, learning_rate=0.1)
    assert equal(train(made, NPO(), **usual), first)
