"""The guard: which step was the last, what stands in `stopped`, and that null lets everything run."""

import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
from helpers_training import DATA, equal, flat, made_model, train
from hypothesis import given
from hypothesis import strategies as st

from fedunlearn.config.trainer import GuardArgs
from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.methods.pdu import PDU
from fedunlearn.training.guard import Guard

OFF = GuardArgs(max_loss=None, max_update_ratio=None)
SGD = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def made():
    return made_model()


def guarded(made, method, max_loss=None, max_update_ratio=None, **args):
    guard = GuardArgs(max_loss=max_loss, max_update_ratio=max_update_ratio)
    return train(made, method, settings={"guard": guard}, **args)


@dataclass(frozen=True, kw_only=True)
class Scripted(GradAscent):
    """Ascent whose loss at optimiser step n (one micro-batch each) is the n-th number, with ascent's own gradient."""

    values: tuple[float, ...]

    def memory(self):
        return {"step": 0.0}

    def remember(self, memory, done):
        return {"step": memory["step"] + 1}

    def forget(self, batch, totals):
        CALLS.append(1)
        real = super().forget(batch, totals)
        return real - real.detach() + self.values[len(CALLS) - 1]


CALLS: list[int] = []


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


class TestLoss:
    @pytest.mark.parametrize("value", [50.5, -50.5, math.inf, -math.inf, math.nan])
    def test_a_loss_beyond_its_bound_stops_before_the_step(self, made, value):
        """Third of five steps: the adapter is that after two steps, bit by bit, and two are told."""
        result = guarded(made, Scripted(values=(1.0, -50.0, value, 1.0, 1.0)), max_loss=50.0, max_steps=5)
        CALLS.clear()
        two = guarded(made, Scripted(values=(1.0, -50.0)), max_steps=2, lr_scheduler_type="constant_with_warmup")
        assert equal(result, two)
        assert result.num_steps == 2
        assert result.loss == pytest.approx(-24.5)
        assert result.memory == {"step": 2.0}
        assert result.stopped == f"loss {value:.4g} beyond trainer.guard.max_loss=50, at step 3 of 5"

    def test_a_loss_at_the_bound_is_within_it(self, made):
        result = guarded(made, Scripted(values=(50.0, -50.0)), max_loss=50.0, max_steps=2)
        assert (result.stopped, result.num_steps) == ("", 2)

    def test_the_first_step_may_be_the_last(self, made):
        """Nothing was trained: the adapter that came in goes back as it is, and no step is told."""
        result = guarded(made, Scripted(values=(math.nan,)), max_loss=1e4, max_steps=3)
        assert torch.equal(flat(result.tensors), flat(made.start.tensors))
        assert (result.num_steps, result.loss_trace) == (0, ())
        assert result.stopped == "loss nan beyond trainer.guard.max_loss=10000, at step 1 of 3"

    @pytest.mark.parametrize("value", [1e30, math.nan])
    def test_null_lets_any_loss_run(self, made, value):
        result = guarded(made, Scripted(values=(value,) * 3), max_steps=3)
        assert (result.stopped, result.num_steps) == ("", 3)

    def test_the_loss_of_the_whole_step_is_judged_and_not_a_micro_batch_s(self, made):
        """Shares 40 and 40 of one step are 80: beyond 50, though neither is; 90 and -60 are 30: within."""
        shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
        over = guarded(made, Scripted(values=(40.0, 40.0)), max_loss=50.0, **shape)
        CALLS.clear()
        under = guarded(made, Scripted(values=(90.0, -60.0)), max_loss=50.0, **shape)
        assert over.stopped.startswith("loss 80 beyond")
        assert under.stopped == ""

    def test_the_retain_term_is_in_it_with_its_weight(self, made):
        """PDU's lam 1e6 on CE - 0.3, above 1 here: past 1e4."""
        result = train(made, PDU(eps=0.3, lam=1e6), max_steps=2)
        assert re.match(r"loss \d\.\d+e\+06 beyond trainer\.guard\.max_loss=10000, at step 1 of 2", result.stopped)
        assert result.memory == {"lam": 1e6, "seen": 0.0}

    def test_what_was_stopped_leaves_no_gradient_for_the_next_client(self, made):
        plain = train(made, GradDiff())
        guarded(made, Scripted(values=(math.nan,)), max_loss=1.0, max_steps=1)
        assert all(p.grad is None for p in made.model.parameters())
        assert equal(train(made, GradDiff()), plain)


class TestUpdate:
    def test_the_step_that_passed_the_bound_was_the_last(self, made):
        """Bound: 1.5 times what two free steps moved. Steps made are those up to the first one beyond it, which is kept."""
        free = [guarded(made, GradAscent(), max_steps=n, learning_rate=0.05, **SGD) for n in range(1, 7)]
        start = flat(made.start.tensors)
        ways = [((flat(result.tensors) - start).norm() / start.norm()).item() for result in free]
        bound = 1.5 * ways[1]
        last = next(number for number, way in enumerate(ways, 1) if way > bound)
        result = guarded(made, GradAscent(), max_update_ratio=bound, max_steps=6, learning_rate=0.05, **SGD)
        assert 2 < last < 6
        assert result.num_steps == last
        assert equal(result, free[last - 1])
        ratio, way = ways[last - 1], ways[last - 1] * start.norm().item()
        assert result.stopped == (
            f"an update of norm {way:.4g}, {ratio:.3g} times the adapter's own, beyond "
            f"trainer.guard.max_update_ratio={bound:g}, at step {last} of 6"
        )

    def test_null_lets_any_update_run(self, made):
        result = guarded(made, GradAscent(), max_steps=3, learning_rate=100.0, **SGD)
        assert (result.stopped, result.num_steps) == ("", 3)
        assert (flat(result.tensors) - flat(made.start.tensors)).norm() > 5 * flat(made.start.tensors).norm()

    def test_the_bound_is_on_the_way_from_the_start_and_not_on_the_adapter_s_own_size(self, made):
        """A start 100 times as large moves by as little as 1 % of it."""
        large = replace(made, start=made.start.replace({n: 100 * t for n, t in made.start.tensors.items()}, {}))
        result = guarded(large, GradAscent(), max_update_ratio=0.5, max_steps=2, learning_rate=1e-3)
        assert result.stopped == ""

    def test_it_stops_an_update_that_is_no_number(self, made):
        """Without a bound on the loss a NaN gradient makes a NaN step, which is the last."""
        method = Broken()
        result = guarded(made, method, max_update_ratio=5.0, max_steps=4, max_grad_norm=0.0)
        assert result.num_steps == 1
        assert result.stopped.startswith("an update of norm nan, nan times")


@dataclass(frozen=True, kw_only=True)
class Broken(GradAscent):
    """A finite loss with a gradient that is no number."""

    def forget(self, batch, totals):
        return super().forget(batch, totals) + (0.0 * batch.nll.sum()).sqrt()


class TestDefaults:
    def test_the_usual_bounds_stop_nothing_of_a_usual_round(self, made):
        for method in (None, GradDiff(), GradAscent()):
            assert train(made, method, DATA, epochs=3).stopped == ""
            assert equal(train(made, method, epochs=3), train(made, method, epochs=3, settings={"guard": OFF}))

    def test_it_watches_fine_tuning_too(self, made):
        result = train(made, None, learning_rate=50.0, max_steps=4, **SGD)
        assert 0 < result.num_steps < 4
        assert "beyond trainer.guard.max_" in result.stopped


@given(st.floats(1e-3, 1e6), st.floats(allow_nan=True, allow_infinity=True))
def test_a_loss_is_let_through_if_and_only_if_its_size_is_within_the_bound(bound, loss):
    guard = Guard(GuardArgs(max_loss=bound, max_update_ratio=None), {})
    assert (guard.judge_loss(loss) == "") == (abs(loss) <= bound)
    assert Guard(OFF, {}).judge_loss(loss) == ""


class TestByHand:
    """start (3, 4), norm 5, in two tensors of which one trains."""

    start = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}

    def judged(self, b, bound, start=None):
        guard = Guard(GuardArgs(max_loss=None, max_update_ratio=bound), start or self.start)
        return guard.judge_update({"b": torch.nn.Parameter(torch.tensor([b]))})

    def test_the_ratio_is_over_both_factors_whatever_trains(self):
        """b from 4 to 14: ||w - start|| = 10, over 5 is 2; over b's own 4 it would be 2.5."""
        assert self.judged(14.0, 2.0) == ""
        assert self.judged(14.0, 1.99) == (
            "an update of norm 10, 2 times the adapter's own, beyond trainer.guard.max_update_ratio=1.99"
        )

    def test_what_a_round_began_with_is_summed_once(self):
        class Counted(dict):
            asked = 0

            def values(self):
                self.asked += 1
                return super().values()

        start = Counted(self.start)
        guard = Guard(GuardArgs(max_loss=None, max_update_ratio=1.0), start)
        assert [guard.judge_update({"b": torch.tensor([b])}) == "" for b in (5.0, 9.0, 9.5)] == [True, True, False]
        assert start.asked == 1

    def test_a_start_of_zeros_is_not_judged(self):
        assert self.judged(1e9, 0.1, {"a": torch.zeros(1), "b": torch.zeros(1)}) == ""

    def test_large_numbers_do_not_overflow(self):
        """1e30 squared is no float32."""
        assert self.judged(1e30, 5.0).startswith("an update of norm 1e+30, 2e+29 times")
