"""Gradient checkpointing over a frozen base: the same gradients, one for every factor, from less memory."""

import pytest
import torch
from helpers_training import (
    FORGET,
    GRADIENT,
    RETAIN,
    flat,
    made_model,
    train,
    with_alternates,
)

from fedunlearn.methods.npo import NPO
from fedunlearn.methods.rmu import RMU
from fedunlearn.models.adapter_tensors import live_parameters
from fedunlearn.models.lora import hold_reference
from fedunlearn.records.adapter import A, B
from fedunlearn.training import loop

DATA = with_alternates()
WHOLE = {"per_device_train_batch_size": 8}
METHODS = [
    pytest.param(None, id="finetune"),
    pytest.param(NPO(), id="npo"),
    pytest.param(NPO(retain="kl"), id="npo kl"),
    pytest.param(RMU(layer=1), id="rmu"),
    pytest.param(RMU(layer=0, retain="kl"), id="rmu kl"),
]


def ready(dtype):
    made = made_model(dtype=dtype, dropout=0.2)
    hold_reference(made.model, made.start.weights)
    return made


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def made(request):
    """Bases of both dtypes beneath float32 adapters, with dropout and a reference."""
    return ready(request.param)


def gradients(made, method, monkeypatch, **args):
    """The gradients of the first step by name, as the optimiser finds them; and the result."""
    found = {}

    def build(parameters, given, scale):
        optimizer = built(parameters, given, scale)
        optimizer.register_step_pre_hook(
            lambda *_: found.update({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})
        )
        return optimizer

    built = loop.build_optimizer
    with monkeypatch.context() as patch:
        patch.setattr(loop, "build_optimizer", build)
        result = train(made, method, DATA, **{**GRADIENT, **WHOLE, **args})
    return found, result


@pytest.mark.parametrize("method", METHODS)
def test_on_and_off_give_equal_gradients(made, method, monkeypatch):
    (plain, first), (saving, second) = (
        gradients(made, method, monkeypatch, gradient_checkpointing=on) for on in (False, True)
    )
    assert set(plain) == set(saving)
    assert {gradient.dtype for gradient in saving.values()} == {torch.float32}
    largest = flat(plain).abs().max()
    assert largest > 1e-3
    assert (flat(plain) - flat(saving)).abs().max() < 1e-5 * largest
    assert first.loss == pytest.approx(second.loss, rel=1e-6)


@pytest.mark.parametrize("method", [*METHODS[:3], METHODS[4]])
def test_every_factor_has_a_gradient(made, method, monkeypatch):
    """With the base frozen, a checkpoint's input carries no gradient unless the embeddings' output is made to."""
    found, _ = gradients(made, method, monkeypatch, gradient_checkpointing=True)
    assert set(found) == set(live_parameters(made.model))
    assert {name.endswith(A) for name in found} == {name.endswith(B) for name in found} == {True, False}
    assert all(gradient.any() for gradient in found.values())


def kept_bytes(made, method, *, saving):
    """Bytes that autograd keeps for the backward of one step, each storage once, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in made.model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[(storage.data_ptr(), storage.nbytes())] = storage.nbytes()
        held.append(tensor)  # alive, so that no address is given away twice
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        train(made, method, DATA, gradient_checkpointing=saving, **{**GRADIENT, **WHOLE})
    return sum(kept.values())


@pytest.mark.parametrize("method", [METHODS[0], METHODS[2]])
def test_less_is_kept_for_the_backward(made, method):
    """Of two blocks only what goes into them; the head, whose logits are kept either way, is most of what so small a model keeps."""
    plain, saving = (kept_bytes(made, method, saving=on) for on in (False, True))
    assert saving < 0.6 * plain


def test_two_epochs_end_where_they_would_without(made):
    """Eight rows by two: dropout's draws are made again as they were, step after step."""
    args = {"epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    plain, saving = (train(made, NPO(), DATA, gradient_checkpointing=on, **args) for on in (False, True))
    assert (flat(plain.tensors) - flat(saving.tensors)).abs().max() < 1e-5
    assert saving.num_steps == 8
    assert len(FORGET) == 8 > len(RETAIN)
