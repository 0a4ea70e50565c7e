"""A client's round beside a side-car: the steps of a base that has it in its weights."""

import pytest
import torch
from helpers_adapters import add_dense_beneath, apart, factors_like
from helpers_training import FORGET, GRADIENT, RATE, flat, gradient, made_model, train

from fedunlearn.methods.npo import NPO
from fedunlearn.models.adapter_tensors import ACTIVE
from fedunlearn.models.lora import check_trainable, hold_reference
from fedunlearn.models.sidecar import put_sidecar
from fedunlearn.records.adapter import Weights
from fedunlearn.training.charges import Charges
from fedunlearn.training.reference import ReferenceSums

METHODS = [
    pytest.param(None, id="finetune"),
    pytest.param(NPO(), id="npo"),
    pytest.param(NPO(retain="kl"), id="npo kl"),
]


@pytest.fixture(scope="module")
def models():
    """The same twice: with the side-car in hooks, and with its dense product in the base's weights; the reference is what training starts from."""
    made, beneath = made_model(), made_model()
    beside = factors_like(made.start.tensors, (3, 1, 5))
    put_sidecar(made.model, beside, ACTIVE)
    add_dense_beneath(beneath.model, beside)
    hold_reference(made.model, Weights(made.start.tensors, beside))
    hold_reference(beneath.model, beneath.start.weights)
    return made, beneath, beside


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_a_step(models, method, checkpointing):
    made, beneath, _ = models
    found = gradient(made, method, gradient_checkpointing=checkpointing)
    wanted = gradient(beneath, method)
    assert wanted.abs().max() > 1e-3
    assert apart(found, wanted) < 2e-5
    assert apart(gradient(made_model(), None), gradient(made, None)) > 0.1


def test_several_steps_under_adamw_end_near_each_other(models):
    """Entries whose gradient is next to nothing go either way by lr a step under AdamW: eps of the gradients' size takes that away."""
    made, beneath, _ = models
    usual = {"epochs": 3, "learning_rate": 1e-2, "adam_epsilon": 1e-2, "weight_decay": 0.1}
    first, second = train(made, NPO(retain="kl"), **usual), train(beneath, NPO(retain="kl"), **usual)
    moved = (flat(second.tensors) - flat(beneath.start.tensors)).abs().max()
    assert moved > 1e-3
    assert (flat(first.tensors) - flat(second.tensors)).abs().max() < 1e-4 * moved
    assert first.loss == pytest.approx(second.loss, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_changes_nothing_and_leaves_nothing(models, method):
    made, _, _ = models
    plain = train(made, method, **GRADIENT)
    saving = train(made, method, gradient_checkpointing=True, **GRADIENT)
    again = train(made, method, **GRADIENT)
    assert (flat(saving.tensors) - flat(plain.tensors)).abs().max() / RATE < 1e-5
    assert torch.equal(flat(again.tensors), flat(plain.tensors))
    check_trainable(made.model)


def test_bf16_runs_near_float32(models):
    made, _, beside = models
    coarse = made_model(dtype=torch.bfloat16)
    put_sidecar(coarse.model, beside, ACTIVE)
    found = gradient(coarse, None, bf16=True)
    assert torch.cosine_similarity(found, gradient(made, None), dim=0) > 0.98


def reference_sums(made, reference, cache):
    sums = ReferenceSums(made, reference, cache, False, Charges(None, 1))
    sums.prepare(FORGET)
    return sums.of(FORGET)


def test_reference_sums_are_those_of_the_dense_base(models, tmp_path):
    made, beneath, beside = models
    found = reference_sums(made, Weights(made.start.tensors, beside), tmp_path / "a")
    wanted = reference_sums(beneath, beneath.start.weights, tmp_path / "b")
    bare = reference_sums(made, made.start.weights, tmp_path / "a")
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert (found - bare).abs().max() > 0.01
    assert len(list((tmp_path / "a" / "reference_sums").iterdir())) == 2
