"""The plan of optimiser steps: counts by hand, epochs that see every row once, pairing that depends on nothing else."""

from collections import Counter

import pytest
from helpers_training import train_args

from fedunlearn.errors import UserError
from fedunlearn.records.rounds import Share
from fedunlearn.training.steps import MOST_STEPS, Supply, count_steps, plan_steps, warmup_of


def plan(num_rows=10, num_retain=30, per_row=1, num_steps=6, seed=0, **args):
    return list(
        plan_steps(Supply(rows=num_rows, retain=num_retain, per_row=per_row), num_steps, train_args(**args), seed)
    )


def flat_rows(steps):
    return [row for step in steps for part in step for row in part.rows]


def flat_retain(steps):
    return [row for step in steps for part in step for row in part.retain]


@pytest.mark.parametrize(
    ("num_rows", "epochs", "size", "accumulation", "steps"),
    [
        (8, 1, 4, 1, 2),
        (9, 1, 4, 1, 3),
        (9, 2, 4, 1, 6),
        (8, 5, 2, 4, 5),
        (3, 1, 8, 4, 1),
        (8, 0.5, 4, 1, 1),
        (8, 0.1, 4, 1, 1),
        (40, 0.3, 4, 1, 3),
        (40, 0.31, 4, 1, 4),
        (200, 0.07, 2, 1, 7),
    ],
)
def test_steps_by_hand(num_rows, epochs, size, accumulation, steps):
    """ceil(epochs x ceil(rows / (size x accumulation))): 9 rows by 4 are 3 steps; 0.3 x 10 = 3, 0.07 x 100 = 7 despite rounding."""
    args = train_args(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    assert count_steps(num_rows, epochs, args) == steps


def test_max_steps_wins():
    assert count_steps(8, 100, train_args(max_steps=3)) == 3
    assert count_steps(8, 0.1, train_args(max_steps=50)) == 50


@pytest.mark.parametrize(
    ("given", "warmup"),
    [
        ({}, 0),
        ({"warmup_steps": 7}, 7),
        ({"warmup_steps": 0.1}, 2),
        ({"warmup_steps": 0.01}, 1),
        ({"warmup_epochs": 1.0}, 5),
        ({"warmup_epochs": 0.5}, 3),
        ({"warmup_epochs": 0.0}, 0),
        ({"warmup_epochs": 1.0, "gradient_accumulation_steps": 2}, 3),
    ],
)
def test_warm_up_by_hand(given, warmup):
    """20 rows by 4 are 5 steps an epoch, 20 steps in all: 0.1 of them 2; half an epoch 2.5, rounded up 3. Devices do not count."""
    assert warmup_of(20, 20, train_args(**given)) == warmup


def test_every_epoch_is_a_fresh_shuffle_of_all_rows():
    seen = flat_rows(plan(num_rows=10, num_steps=9))
    epochs = [seen[:10], seen[10:20], seen[20:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(10))


def test_the_last_step_of_an_epoch_is_the_rest():
    """10 rows by 2 x 3: steps of 2 + 2 + 2 and 2 + 2 rows; by 4 x 2: 4 + 4 and 2."""
    sizes = [
        [len(part.rows) for part in step]
        for step in plan(num_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    ]
    assert sizes == [[2, 2, 2], [2, 2]] * 2
    sizes = [
        [len(part.rows) for part in step]
        for step in plan(num_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    ]
    assert sizes == [[4, 4], [2]]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_exactly_as_many_steps_as_asked_for(num_steps):
    assert len(plan(num_steps=num_steps)) == num_steps


@pytest.mark.parametrize("per_row", [0, 1, 3])
def test_each_row_meets_its_number_of_retain_rows_in_its_own_micro_batch(per_row):
    for step in plan(per_row=per_row):
        assert all(len(part.retain) == per_row * len(part.rows) for part in step)
        assert all(0 <= index < 30 for part in step for index in part.retain)


def test_retain_rows_are_drawn_uniformly_with_replacement():
    """400 draws from 4 rows: 100 each are expected, with a standard deviation of 9; one row can meet itself again in one step."""
    drawn = Counter(flat_retain(plan(num_rows=40, num_retain=4, num_steps=100)))
    assert set(drawn) == {0, 1, 2, 3}
    assert all(60 < count < 140 for count in drawn.values())


def test_the_plan_comes_from_its_seed_alone():
    assert plan(seed=4) == plan(seed=4)
    assert flat_rows(plan(seed=4)) != flat_rows(plan(seed=5))
    assert flat_retain(plan(seed=4)) != flat_retain(plan(seed=5))


def test_the_order_of_rows_does_not_depend_on_the_pairing():
    assert (
        flat_rows(plan(per_row=0))
        == flat_rows(plan(per_row=1))
        == flat_rows(plan(per_row=3))
        == flat_rows(plan(num_retain=2))
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 1.0, "optim": "sgd", "bf16": True},
        {"gradient_checkpointing": True, "max_grad_norm": 0.0},
        {"num_rows": 20, "num_steps": 3},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ],
)
def test_the_pairing_depends_on_nothing_but_its_seed(changed):
    """12 draws from 30 rows come out the same, one after the other, however rows are ordered, cut into micro-batches or trained on."""
    assert flat_retain(plan(**{"num_steps": 6, **changed}))[:12] == flat_retain(plan(num_steps=6))[:12]


def test_micro_batches_of_any_size_hold_the_same_rows_in_the_same_order():
    whole = plan(num_rows=16, num_steps=2, per_device_train_batch_size=8)
    for size in (4, 2, 1):
        parts = plan(num_rows=16, num_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        assert flat_rows(parts) == flat_rows(whole)
        assert flat_retain(parts) == flat_retain(whole)


def test_a_round_of_more_steps_than_a_plan_can_hold_is_refused():
    """8 rows in batches of 4 are two steps an epoch; the plan of a trillion would take the memory of the machine before the first step."""
    args = train_args(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    assert count_steps(8, MOST_STEPS / 2, args) == MOST_STEPS
    with pytest.raises(
        UserError, match="500001 epochs over 8 rows are 1000002 steps in one round, at most 1000000 are"
    ):
        count_steps(8, MOST_STEPS / 2 + 1, args)
    with pytest.raises(UserError, match="steps in one round"):
        count_steps(8, 1.0, args, Share(rounds=2**62, part=1, parts=1))
    assert count_steps(8, 1e300, train_args(max_steps=3)) == 3
