"""The server's ranks: the schedule and importance of PEFT's own allocator and of a loop written entry by entry, masks that are met, ranks that come back."""

import dataclasses
import itertools

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

from fedunlearn.aggregation.adalora import (
    AdaLora,
    Importance,
    allocate,
    as_pair,
    is_gone,
    pairs_in,
    scales_of_triplets,
    settle,
    triplets_of,
)

SIZES = {"base_model.model.one": (5, 7), "base_model.model.two": (6, 4), "base_model.model.up": (3, 8)}  # d_out, d_in
RANK = 4


def made(seed, rank=RANK, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (d_out, d_in) in SIZES.items():
        for end, shape in ((".lora_A", (rank, d_in)), (".lora_E", (rank, 1)), (".lora_B", (d_out, rank))):
            tensors[path + end] = torch.randn(shape, generator=generator, dtype=dtype)
    return tensors


def moved(tensors, seed, by=0.3):
    """What the clients' mean is after a round, float64."""
    return {name: tensors[name].double() + by * t for name, t in made(seed, dtype=torch.float64).items()}


def rounded(mean):
    return {name: tensor.float() for name, tensor in mean.items()}


def acting(tensors):
    return sum(int((tensors[m.e] != 0).sum()) for m in triplets_of(tensors))


class TestSchedule:
    def test_by_hand(self):
        """3 modules, 4 to 1, T = 8, t_i = 2, t_f = 1: 12, 12, then int(9 (1 - k/5)^3 + 3) for k = 1 to 4: 7, 4, 3, 3, and 3."""
        budget = AdaLora(init_r=4, target_r=1, tinit=2, tfinal=1)
        assert [budget.budget(t, 8, 3) for t in range(1, 9)] == [12, 12, 7, 4, 3, 3, 3, 3]

    def test_a_mask_every_so_often_and_at_the_end(self):
        budget = AdaLora(init_r=4, target_r=1, tinit=2, tfinal=2, deltaT=3)
        assert [t for t in range(1, 11) if budget.masks(t, 10)] == [3, 6, 8, 9, 10]
        assert [t for t in range(1, 11) if budget.settles(t, 10)] == [8, 9, 10]

    @pytest.mark.parametrize(("tinit", "tfinal", "every"), [(0, 0, 1), (1, 2, 1), (2, 1, 3)])
    def test_it_is_peft_s(self, tinit, tfinal, every):
        model, _config = peft_model(init_r=4, target_r=2, tinit=tinit, tfinal=tfinal, deltaT=every, total_step=9)
        budget = AdaLora(init_r=4, target_r=2, tinit=tinit, tfinal=tfinal, deltaT=every)
        for t in range(1, 10):
            wanted, masks = model.base_model.rankallocator.budget_schedule(t)
            assert budget.budget(t, 9, 2) == wanted
            assert budget.masks(t, 9) == masks or t == 9 - tfinal  # where PEFT masks whatever deltaT says


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(7, 5), nn.Linear(4, 6)
        self.config = {"model_type": "none"}


def peft_model(**said):
    config = AdaLoraConfig(target_modules=["one", "two"], **said)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(Two(), config), config


def test_importance_and_masks_are_those_of_peft_s_allocator():
    """Six rounds, its gradient our mean update, before the last mask (where PEFT no longer looks at the update)."""
    said = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 2, "beta1": 0.7, "beta2": 0.6}
    model, _ = peft_model(**said, total_step=9)
    settings, old = AdaLora(**said), Importance()
    live = {name.removesuffix(".default"): p for name, p in model.named_parameters() if p.requires_grad}
    before, masks = {name: p.detach().clone() for name, p in live.items()}, []
    for t in range(1, 8):
        generator = torch.Generator().manual_seed(t)
        mean = {
            n: x.double() + torch.randn(x.shape, generator=generator, dtype=torch.float64) for n, x in before.items()
        }
        after = rounded(mean)
        for name, parameter in live.items():
            parameter.data.copy_(after[name])
            parameter.grad = (mean[name] - before[name].double()).float()
        model.base_model.update_and_allocate(t)
        done = allocate(settings, before, mean, after, old, t, 9)
        for name, parameter in live.items():
            assert torch.equal(done.tensors[name], parameter.detach()), (t, name)
        before, old = done.tensors, done.importance
        masks.append(acting(before))
    assert masks == [8, settings.budget(2, 9, 2), 8, settings.budget(4, 9, 2), 8, settings.budget(6, 9, 2), 8]


def slowly(settings, before, mean, after, s, u, keep_count):
    """Entry by entry: the E's that stay, as {(module, rank)}; s and u are written to."""
    scores = {}
    for path, (d_out, d_in) in SIZES.items():

        def smoothed(name, i, j):
            sensed = abs(float(after[name][i, j]) * (float(mean[name][i, j]) - float(before[name][i, j])))
            at = (name, i, j)
            s[at] = settings.beta1 * s.get(at, 0.0) + (1 - settings.beta1) * sensed
            u[at] = settings.beta2 * u.get(at, 0.0) + (1 - settings.beta2) * abs(sensed - s[at])
            return s[at] * u[at]

        for i in range(RANK):
            of_a = sum(smoothed(path + ".lora_A", i, j) for j in range(d_in)) / d_in
            of_b = sum(smoothed(path + ".lora_B", j, i) for j in range(d_out)) / d_out
            scores[path, i] = smoothed(path + ".lora_E", i, 0) + of_a + of_b
    return set(sorted(scores, key=scores.get, reverse=True)[:keep_count])


def test_the_loop_written_plainly_keeps_the_same():
    settings, rounds = AdaLora(init_r=RANK, target_r=2, tinit=1), 4
    before, old, s, u = made(0), Importance(), {}, {}
    for t in range(1, rounds + 1):
        mean = moved(before, 10 + t)
        after = {n: (0.5 * x + 0.5 * before[n].double()).float() for n, x in mean.items()}  # a server optimiser's step
        # the memory of the fast way is float32: entries are read as it stores them
        s = {at: float(torch.tensor(x)) for at, x in s.items()}
        u = {at: float(torch.tensor(x)) for at, x in u.items()}
        wanted = slowly(settings, before, mean, after, s, u, settings.budget(t, rounds, len(SIZES)))
        done = allocate(settings, before, mean, after, old, t, rounds)
        stays = {(m.path, i) for m in triplets_of(done.tensors) for i in range(RANK) if done.tensors[m.e][i] != 0}
        assert stays == wanted
        assert done.kept == len(wanted)
        for kept, slow in ((done.importance.sensitivity, s), (done.importance.uncertainty, u)):
            assert all(abs(float(kept[n][i, j]) - x) <= 1e-7 * abs(x) for (n, i, j), x in slow.items())
        before, old = done.tensors, done.importance
    assert acting(before) == 2 * len(SIZES)


def run(settings, rounds, step=lambda before, mean: rounded(mean)):
    """All rounds; the adapter after each."""
    before, old, seen = made(0), Importance(), []
    for t in range(1, rounds + 1):
        mean = moved(before, 20 + t)
        done = allocate(settings, before, mean, step(before, mean), old, t, rounds)
        before, old = done.tensors, done.importance
        seen.append(before)
    return seen


def masked(tensors):
    return {(m.path, i) for m in triplets_of(tensors) for i in range(RANK) if tensors[m.e][i] == 0}


def test_a_masked_rank_may_come_back_until_ranks_are_settled_and_then_stays_away():
    """From round 6 of 8 on (tfinal 2) the same are gone, B's column with them, though clients and momentum go on moving everything."""
    seen = run(AdaLora(init_r=RANK, target_r=1, tfinal=2), 8)
    early = [masked(tensors) for tensors in seen[:5]]
    assert any(before - after for before, after in itertools.pairwise(early))
    assert masked(seen[5]) == masked(seen[6]) == masked(seen[7])
    for tensors in seen[5:]:
        gone = {
            (m.path, i) for m in triplets_of(tensors) for i in range(RANK) if is_gone(tensors[m.e], tensors[m.b])[i]
        }
        assert gone == masked(tensors)
        assert acting(tensors) == len(SIZES)
        assert all(tensors[m.a].any(1).all() for m in triplets_of(tensors))  # a row of A is left to whoever takes it up
    assert not any(is_gone(t[m.e], t[m.b]).any() for t in seen[:5] for m in triplets_of(t))


def test_a_settling_round_that_was_missed_is_made_up_for():
    """Nobody worked in round 2 of 3, so no step was made there."""
    settings, before = AdaLora(init_r=RANK, target_r=2, tfinal=1), made(0)
    first = allocate(settings, before, moved(before, 1), rounded(moved(before, 1)), Importance(), 1, 3)
    last = allocate(
        settings, first.tensors, moved(first.tensors, 2), rounded(moved(first.tensors, 2)), first.importance, 3, 3
    )
    assert last.kept == acting(last.tensors) == 2 * len(SIZES)


def test_where_the_budget_is_the_beginning_nothing_is_masked():
    for t, tensors in enumerate(run(AdaLora(init_r=RANK, target_r=RANK), 3), 1):
        assert not masked(tensors), t


def test_of_equal_importance_the_first_stay():
    """No update at all: every importance is 0, and the budget is met nevertheless."""
    before = made(0)
    mean = {name: tensor.double() for name, tensor in before.items()}
    done = allocate(AdaLora(init_r=RANK, target_r=1), before, mean, before, Importance(), 1, 1)
    stays = [(m.path, i) for m in triplets_of(before) for i in range(RANK)][: len(SIZES)]
    assert {(m.path, i) for m in triplets_of(before) for i in range(RANK)} - masked(done.tensors) == set(stays)


class TestWithoutAnyUpdate:
    """Rounds in which nobody worked, or nobody's update was usable."""

    settings = AdaLora(init_r=RANK, target_r=1, deltaT=5)

    def remembered(self):
        before, mean = made(0), moved(made(0), 1)
        return allocate(self.settings, before, mean, rounded(mean), Importance(), 1, 4)

    def test_the_last_round_settles_by_what_is_remembered(self):
        """The three of most s * u, as they are added up entry by entry; nothing is smoothed."""
        first = self.remembered()
        assert (first.kept, acting(first.tensors)) == (RANK * len(SIZES),) * 2
        done = settle(self.settings, first.tensors, first.importance, 4, 4)
        scores = {}
        for path in SIZES:
            a, e, b = (
                first.importance.sensitivity[n].double() * first.importance.uncertainty[n].double()
                for n in (path + ".lora_A", path + ".lora_E", path + ".lora_B")
            )
            scores |= {(path, i): float(e[i, 0] + a[i].mean() + b[:, i].mean()) for i in range(RANK)}
        wanted = set(sorted(scores, key=scores.get, reverse=True)[: len(SIZES)])
        everything = {(path, i) for path in SIZES for i in range(RANK)}
        assert everything - masked(done.tensors) == wanted
        assert done.kept == len(SIZES)
        assert sum(int(is_gone(done.tensors[m.e], done.tensors[m.b]).sum()) for m in triplets_of(done.tensors)) == (
            RANK - 1
        ) * len(SIZES)
        assert done.importance is first.importance
        again = settle(self.settings, done.tensors, done.importance, 4, 4)
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in done.tensors.items())

    def test_before_ranks_settle_nothing_changes(self):
        first = self.remembered()
        done = settle(AdaLora(init_r=RANK, target_r=1), first.tensors, first.importance, 3, 4)
        assert all(torch.equal(done.tensors[name], tensor) for name, tensor in first.tensors.items())
        assert (done.kept, done.importance) == (RANK * len(SIZES), first.importance)

    def test_where_no_round_ever_had_one_the_first_stay(self):
        before = made(0)
        done = settle(self.settings, before, Importance(), 4, 4)
        everything = [(m.path, i) for m in triplets_of(before) for i in range(RANK)]
        assert set(everything) - masked(done.tensors) == set(everything[: len(SIZES)])
        assert done.kept == len(SIZES)


def test_inputs_stay_as_they_are_and_memory_is_float32():
    before, mean = made(0), moved(made(0), 1)
    after, copies = rounded(mean), [made(0), moved(made(0), 1), rounded(mean)]
    done = allocate(AdaLora(init_r=RANK, target_r=1), before, mean, after, Importance(), 1, 1)
    for given, copy in zip((before, mean, after), copies, strict=True):
        assert all(torch.equal(given[name], copy[name]) for name in copy)
    assert {t.dtype for t in (*done.importance.sensitivity.values(), *done.tensors.values())} == {torch.float32}


def test_a_pair_has_the_product_of_its_triplets():
    tensors = made(3)
    pairs = pairs_in(tensors | {"base_model.model.head.weight": torch.ones(2)})
    assert len(pairs) == 2 * len(SIZES)
    for m in triplets_of(tensors):
        a, e, b = (tensors[name].double() for name in (m.a, m.e, m.b))
        wanted = b @ torch.diag(e[:, 0]) @ a
        found_a, found_b = as_pair(a, e, b)
        assert torch.allclose(found_b @ found_a, wanted, rtol=0, atol=1e-14)
        assert torch.equal(pairs[m.path + ".lora_A.weight"], found_a)


def test_the_scale_is_peft_s():
    tensors = made(0)
    assert set(scales_of_triplets({"init_r": 4, "lora_alpha": 8}, tensors)) == {"one", "two", "up"}
    model, _ = peft_model(init_r=4, target_r=2, total_step=3, lora_alpha=8)
    layer = model.get_base_model().one
    wanted = float(layer.scaling["default"] / (layer.ranknum["default"] + 1e-5))
    assert scales_of_triplets({"init_r": 4, "lora_alpha": 8}, tensors)["one"] == pytest.approx(wanted, rel=1e-7)
    assert scales_of_triplets({}, {"base_model.model.q.lora_A.weight": torch.ones(1)}) == {}


def test_half_a_triplet_is_refused_by_name():
    tensors = made(0)
    del tensors["base_model.model.two.lora_B"]
    with pytest.raises(
        ValueError, match=r"'base_model\.model\.two\.lora_E' stands without 'base_model\.model\.two\.lora_B'"
    ):
        triplets_of(tensors)


def test_the_defaults_are_peft_s():
    theirs = AdaLoraConfig(total_step=1)
    for field in dataclasses.fields(AdaLora):
        assert getattr(AdaLora(), field.name) == getattr(theirs, field.name)
