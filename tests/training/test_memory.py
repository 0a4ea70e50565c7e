"""What a method remembers goes through a client's round: in with the task, moved by its steps, out with the result."""

from dataclasses import replace

import pytest
import torch
from helpers_training import DATA, FORGET, GRADIENT, RATE, flat, made_model, train

from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.npo import NPO
from fedunlearn.methods.pdu import PDU
from fedunlearn.records.rounds import Role

PDU_0 = PDU(eps=0.3, eta=0.5, warmup=0)
STEP = {**GRADIENT, "per_device_train_batch_size": 8}


@pytest.fixture(scope="module")
def made():
    return made_model()


def moved(made, result):
    return (flat(made.start.tensors) - flat(result.tensors)) / RATE


def of_retain(made, **args):
    """CE of the step's retain rows: the told loss with lam = 1 less the one with lam = 0 is CE - eps."""
    told = [train(made, PDU_0, memory={"lam": lam, "seen": 0.0}, **args).loss for lam in (0.0, 1.0)]
    return told[1] - told[0] + 0.3


def test_lam_moves_by_the_step_s_retain_loss(made):
    """lam 2 -> max(0, 2 + 1/2 (CE - 0.3)) after one step, and 8 rows were seen."""
    retain = of_retain(made, **STEP)
    result = train(made, PDU_0, memory={"lam": 2.0, "seen": 0.0}, **STEP)
    assert retain > 1
    assert result.memory == pytest.approx({"lam": 2 + 0.5 * (retain - 0.3), "seen": 8.0}, rel=1e-5)


def test_once_a_step_and_not_once_a_micro_batch(made):
    """8 micro-batches of one row: the same lam as one of 8, where 8 moves, each cut off at 0, would be others."""
    method = replace(PDU_0, eps=20.0, eta=3.0)
    whole = train(made, method, memory={"lam": 1.0, "seen": 0.0}, **STEP)
    cut = train(
        made,
        method,
        memory={"lam": 1.0, "seen": 0.0},
        **{**STEP, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    )
    assert whole.memory == pytest.approx({"lam": 0.0, "seen": 8.0})
    assert cut.memory == whole.memory
    gentle = [
        train(made, PDU_0, **{**STEP, "per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size})
        for size in (8, 1)
    ]
    assert gentle[0].memory == pytest.approx(gentle[1].memory, rel=1e-6)


def test_the_step_weighs_its_retain_term_with_the_lam_it_began_with(made):
    """The gradient is linear in the lam that came in: g(3) = g(0) + 3 (g(1) - g(0)); told is gamma F + lam (CE - eps)."""
    results = {lam: train(made, PDU_0, memory={"lam": lam, "seen": 0.0}, **STEP) for lam in (0.0, 1.0, 3.0)}
    grads = {lam: moved(made, result) for lam, result in results.items()}
    wanted = grads[0.0] + 3 * (grads[1.0] - grads[0.0])
    assert (grads[1.0] - grads[0.0]).abs().max() > 1e-2 * grads[1.0].abs().max()
    assert (grads[3.0] - wanted).abs().max() < 1e-4 * wanted.abs().max()
    loss = {lam: result.loss for lam, result in results.items()}
    assert loss[3.0] == pytest.approx(loss[0.0] + 3 * (loss[1.0] - loss[0.0]), rel=1e-5)


def test_the_second_step_has_the_lam_that_the_first_left(made):
    """Learning rate 0: the model stays, so lam alone tells the steps' losses apart."""
    args = {"max_steps": 2, "learning_rate": 0.0, "per_device_train_batch_size": 8, "logging_steps": 1}
    result = train(made, PDU_0, replace(DATA, retain=DATA.retain[:1]), **args)
    first, second = result.loss_trace
    retain = (result.memory["lam"] - 1.0) / (2 * 0.5)
    assert second - first == pytest.approx(0.5 * retain * retain, rel=1e-4)


def test_the_warm_up_counts_over_rounds(made):
    """8 rows by 4, warm-up 3 epochs, one epoch a round: lam first moves in round 4, with its first step, and twice there."""
    method, memory, told = PDU(eps=0.3, warmup=3), None, []
    for seed in range(5):
        memory = train(made, method, memory=memory, seed=seed, learning_rate=0.0).memory
        told.append((memory["lam"] == 1.0, memory["seen"]))
    assert told == [(True, 8.0), (True, 16.0), (True, 24.0), (False, 32.0), (False, 40.0)]


def test_two_rounds_of_one_epoch_remember_as_one_of_two_would(made):
    """At learning rate 0 and with one retain row nothing but the count of steps matters."""
    data = replace(DATA, retain=DATA.retain[:1])
    once = train(made, PDU_0, data, epochs=2, learning_rate=0.0).memory
    first = train(made, PDU_0, data, learning_rate=0.0).memory
    second = train(made, PDU_0, data, memory=first, learning_rate=0.0).memory
    assert second == pytest.approx(once, rel=1e-6)
    assert first["lam"] != second["lam"]


def test_an_eps_out_of_reach_brings_lam_to_0_and_not_below(made):
    result = train(made, PDU(eps=1e3, warmup=0), epochs=2, learning_rate=0.0)
    assert result.memory == {"lam": 0.0, "seen": 16.0}


@pytest.mark.parametrize(("method", "role"), [(None, Role.FINETUNE), (PDU_0, Role.FINETUNE), (NPO(), Role.UNLEARN)])
def test_who_remembers_nothing_hands_back_what_came_in(made, method, role):
    given = {"lam": 4.0, "seen": 3.0}
    assert train(made, method, role=role, memory=given).memory == given
    assert train(made, GradAscent()).memory == {}


def test_what_came_in_is_not_changed(made):
    given = {"lam": 1.0, "seen": 0.0}
    result = train(made, PDU_0, memory=given)
    assert given == {"lam": 1.0, "seen": 0.0}
    assert result.memory["seen"] == len(FORGET)
    assert torch.isfinite(torch.tensor(result.memory["lam"]))
