"""Alternates: one is drawn at every access, by the task's seed, from a generator that nothing else draws from."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers_training import FORGET, OTHERS, RETAIN, equal, made_model, rows, train, train_args, with_alternates

from fedunlearn.methods.dpo import DPO
from fedunlearn.methods.idk_dpo import IdkDPO
from fedunlearn.training.local import LocalData
from fedunlearn.training.steps import Supply, plan_steps


class Anything:
    """The same sum for every row, in the reference's place."""

    tokens = 0

    def prepare(self, chosen):
        """Nothing is computed."""

    def of(self, chosen):
        return torch.full((len(chosen),), 20.0)


@pytest.fixture(scope="module")
def made():
    return made_model()


def plan(counts=(3,) * 8, num_steps=40, seed=0, retain=30, per_row=1, **args):
    supply = Supply(rows=8, retain=retain, per_row=per_row, alternates=counts)
    return list(plan_steps(supply, num_steps, train_args(**args), seed))


def parts(steps):
    return [part for step in steps for part in step]


def order(steps):
    return [part.rows for part in parts(steps)]


def pairing(steps):
    return [index for part in parts(steps) for index in part.retain]


def choices(steps):
    return [pair for part in parts(steps) for pair in zip(part.rows, part.alternates, strict=True)]


def test_each_row_meets_one_of_its_own_alternates():
    """Rows with 1, 2, 3 ... 8 of them: each choice is one that the row has, and over 20 epochs all are met."""
    met = choices(plan(counts=tuple(range(1, 9)), num_steps=160))
    assert all(choice <= row for row, choice in met)
    assert {row: len({c for r, c in met if r == row}) for row in range(8)} == {row: row + 1 for row in range(8)}


def test_they_are_drawn_anew_at_every_access_and_uniformly():
    """20 epochs: a row meets all of its three, and not in a fixed turn; of 160 draws each of the three has 53 on average."""
    met = choices(plan())
    of_row = [[choice for row, choice in met if row == one] for one in range(8)]
    assert all(set(one) == {0, 1, 2} for one in of_row)
    assert len({tuple(one) for one in of_row}) == 8
    assert all(30 < count < 77 for count in Counter(choice for _, choice in met).values())


def test_they_come_from_the_seed_alone():
    assert choices(plan(seed=4)) == choices(plan(seed=4))
    assert choices(plan(seed=4)) != choices(plan(seed=5))


@pytest.mark.parametrize("counts", [(), (1,) * 8, (3,) * 8, (100,) * 8, tuple(range(1, 9))])
def test_they_change_neither_the_order_of_rows_nor_the_retain_pairing(counts):
    assert order(plan(counts=counts)) == order(plan(counts=()))
    assert pairing(plan(counts=counts)) == pairing(plan(counts=()))


@pytest.mark.parametrize("changed", [{"retain": 2}, {"per_row": 3}, {"per_row": 0}, {"bf16": True}])
def test_what_is_drawn_beside_them_does_not_change_them(changed):
    assert choices(plan(**changed)) == choices(plan())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_of_any_size_meet_the_same_ones(size):
    whole = plan(num_steps=4, per_device_train_batch_size=8)
    cut = plan(num_steps=4, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
    assert choices(cut) == choices(whole)


def test_they_are_not_the_retain_pairing_s_own_draws():
    """Three retain rows and three alternates: from one stream, or two of one seed, both would be the same numbers."""
    steps = plan(retain=3)
    assert [choice for _, choice in choices(steps)] != pairing(steps)
    assert [row for row, _ in choices(steps)][:8] != pairing(plan(retain=8))[:8]


def test_without_alternates_there_is_nothing_to_draw():
    assert all(part.alternates == () for part in parts(plan(counts=())))


class TestInARound:
    def accesses(self, made, seed=7, epochs=3.0, method=None, **settings):
        """Rows and alternates in the order of the forwards; the reference's sums ask for them first, all at once."""
        met = []

        def encode(place, choice):
            met.append((place, choice))
            return OTHERS[place][choice]

        train(made, method or IdkDPO(), with_alternates(encode), seed=seed, epochs=epochs, **settings)
        planned, trained = met[: len(met) // 2], met[len(met) // 2 :]
        assert planned == trained
        return trained

    def test_every_epoch_draws_anew_what_the_plan_says(self, made):
        met = self.accesses(made)
        supply = Supply(rows=8, retain=5, per_row=1, alternates=(3,) * 8)
        assert met == choices(plan_steps(supply, 6, train_args(), 7))
        epochs = [dict(met[start : start + 8]) for start in (0, 8, 16)]
        assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
        assert len({tuple(sorted(epoch.items())) for epoch in epochs}) == 3

    def test_another_round_meets_others_and_the_same_seed_the_same(self, made):
        assert self.accesses(made) == self.accesses(made)
        assert self.accesses(made, seed=8) != self.accesses(made)

    def test_the_alternate_s_tokens_reach_the_loss(self, made):
        other = tuple(tuple(rows(3, 90 + place)) for place in range(8))
        data = with_alternates()
        changed = replace(data, alternates=replace(data.alternates, encode=lambda place, choice: other[place][choice]))
        known = replace(changed, reference=Anything())
        assert not equal(train(made, DPO(), known), train(made, DPO(), replace(data, reference=Anything())))

    def test_one_alternate_a_row_is_met_every_time(self, made):
        met = []

        def encode(place, choice):
            met.append(choice)
            return OTHERS[place][0]

        train(made, DPO(), with_alternates(encode, counts=(1,) * 8), epochs=2)
        assert set(met) == {0}

    def test_a_method_that_wants_some_says_where_there_are_none(self, made):
        data = LocalData(forget=FORGET, retain=RETAIN, reference=Anything())
        with pytest.raises(ValueError, match="client 1 has no alternates"):
            train(made, DPO(), data)
