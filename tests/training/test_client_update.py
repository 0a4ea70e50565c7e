"""A client's round: what it reads, what it leaves behind, and what it counts."""

import random
from dataclasses import dataclass, replace

import pytest
import torch
from helpers_methods import RetainOnly
from helpers_training import DATA, FORGET, RETAIN, SUMS, FixedSums, equal, flat, made_model, rows, train

from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.methods.npo import NPO
from fedunlearn.models.adapter_tensors import read_tensors
from fedunlearn.models.lora import check_trainable, hold_reference
from fedunlearn.records.rounds import Role
from fedunlearn.training.local import LocalData

METHODS = [
    pytest.param(None, id="finetune"),
    pytest.param(NPO(), id="npo"),
    pytest.param(NPO(retain="kl"), id="npo kl"),
]


@pytest.fixture(scope="module")
def made():
    """A model with dropout, and the start as its reference."""
    model = made_model(dropout=0.1)
    hold_reference(model.model, model.start.weights)
    return model


@pytest.mark.parametrize("method", METHODS)
class TestLaws:
    def test_the_same_seed_gives_the_same_bits_and_another_seed_others(self, made, method):
        torch.manual_seed(1)
        first = train(made, method)
        torch.manual_seed(2)
        assert equal(train(made, method), first)
        assert not equal(train(made, method, seed=8), first)

    def test_another_client_before_it_changes_nothing(self, made, method):
        """A fresh optimiser each time: AdamW's moments of client 1 must not reach client 2."""
        alone = train(made, method, epochs=2)
        other = LocalData(forget=rows(6, 11), retain=rows(6, 12), reference=FixedSums(SUMS[:6], rows(6, 11)))
        before = train(made, method, other, seed=99, epochs=3, learning_rate=0.1)
        again = train(made, method, epochs=2)
        assert not equal(before, alone)
        assert equal(again, alone)
        assert again.loss == alone.loss

    def test_it_starts_from_what_is_handed_in_and_not_from_what_the_model_holds(self, made, method):
        first = train(made, method)
        with torch.no_grad():
            for parameter in made.model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(5.0)
        assert equal(train(made, method), first)

    def test_global_random_states_stay(self, made, method):
        torch.manual_seed(5)
        random.seed(5)
        states = torch.get_rng_state(), random.getstate()
        train(made, method)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]

    def test_the_model_is_left_in_eval_mode_without_gradients_and_trainable(self, made, method):
        result = train(made, method)
        assert not any(module.training for module in made.model.modules())
        assert all(parameter.grad is None for parameter in made.model.parameters())
        check_trainable(made.model)
        assert all(torch.equal(t, result.tensors[name]) for name, t in read_tensors(made.model).items())

    def test_learning_rate_0_leaves_the_adapter(self, made, method):
        result = train(made, method, learning_rate=0.0, weight_decay=0.1, epochs=2)
        assert torch.equal(flat(result.tensors), flat(made.start.tensors))

    def test_inputs_are_not_modified(self, made, method):
        start, sums = flat(made.start.tensors), SUMS.clone()
        train(made, method, learning_rate=1.0)
        assert torch.equal(flat(made.start.tensors), start)
        assert torch.equal(sums, SUMS)

    def test_the_base_is_not_trained(self, made, method):
        base = [p for name, p in made.model.named_parameters() if ".lora_" not in name]
        before = [p.clone() for p in base]
        train(made, method, learning_rate=1.0)
        assert all(torch.equal(p, b) for p, b in zip(base, before, strict=True))

    def test_dropout_acts_in_training(self, made, method):
        still = made_model(dropout=0.0)
        hold_reference(still.model, still.start.weights)
        assert not equal(train(made, method), train(still, method))


class TestRows:
    def test_fine_tuning_sees_retain_rows_alone(self, made):
        other = replace(DATA, forget=rows(3, 40), reference=None)
        assert equal(train(made, None, other), train(made))

    def test_ascent_sees_forget_rows_alone(self, made):
        other = replace(DATA, retain=())
        assert equal(train(made, GradAscent(), other), train(made, GradAscent()))

    def test_a_retain_term_sees_the_client_s_own_retain_rows(self, made):
        other = replace(DATA, retain=rows(5, 41))
        assert not equal(train(made, RetainOnly(), other), train(made, RetainOnly()))

    def test_unlearning_raises_the_loss_of_forget_rows_and_fine_tuning_lowers_it(self, made):
        """GradAscent tells -CE: over 5 epochs it falls; fine-tuning on the same rows tells CE, which falls too."""
        up = train(made, GradAscent(), epochs=5, learning_rate=1e-2, logging_steps=2)
        down = train(made, None, LocalData(forget=(), retain=FORGET), epochs=5, learning_rate=1e-2, logging_steps=2)
        assert up.loss_trace[-1] < up.loss_trace[0] - 0.5 < 0
        assert 0 < down.loss_trace[-1] < down.loss_trace[0] - 0.5

    def test_a_fine_tuning_role_trains_even_where_the_run_has_a_method(self, made):
        assert equal(train(made, NPO(), role=Role.FINETUNE), train(made))

    def test_a_client_with_forget_rows_alone_can_ascend(self, made):
        assert train(made, GradDiff(alpha=0.0, retain="none"), replace(DATA, retain=())).num_trained == 8


class TestAccount:
    def test_steps_tokens_and_rows_by_hand(self, made):
        """8 forget rows in micro-batches of 4: 2 steps an epoch; each epoch sees every forget token, and 8 retain rows of its own."""
        once, twice = train(made, GradAscent()), train(made, GradAscent(), epochs=2)
        tokens = sum(len(row.input_ids) for row in FORGET)
        assert (once.num_steps, once.num_tokens, once.num_trained) == (2, tokens, 8)
        assert (twice.num_steps, twice.num_tokens, twice.num_trained) == (4, 2 * tokens, 8)

    def test_retain_rows_are_counted_as_tokens_seen(self, made):
        kept = replace(DATA, retain=RETAIN[:1])
        tokens = sum(len(row.input_ids) for row in FORGET)
        for per_row in (1, 3):
            result = train(made, GradDiff(), kept, settings={"retain_per_forget": per_row})
            assert result.num_tokens == tokens + 8 * per_row * len(RETAIN[0].input_ids)

    def test_max_steps_wins_over_epochs_and_only_rows_trained_on_count(self, made):
        result = train(made, GradAscent(), epochs=50, max_steps=1)
        assert (result.num_steps, result.num_trained) == (1, 4)
        assert train(made, GradAscent(), epochs=0.5).num_trained == 4
        assert train(made, GradAscent(), max_steps=3).num_trained == 8

    def test_an_epoch_of_unlearning_is_one_pass_over_forget_rows(self, made):
        assert train(made, NPO(), replace(DATA, retain=rows(40, 3))).num_steps == 2
        assert train(made, None, LocalData(forget=FORGET, retain=rows(40, 3))).num_steps == 10

    def test_the_loss_is_the_mean_over_steps_and_its_trace_by_logging_steps(self, made):
        """5 steps told every 2: means of steps 1-2, 3-4 and 5."""
        each = train(made, GradAscent(), max_steps=5, logging_steps=1).loss_trace
        result = train(made, GradAscent(), max_steps=5, logging_steps=2)
        wanted = [(each[0] + each[1]) / 2, (each[2] + each[3]) / 2, each[4]]
        assert len(each) == 5
        assert result.loss_trace == pytest.approx(wanted, abs=1e-12)
        assert result.loss == pytest.approx(sum(each) / 5, abs=1e-12)
        assert result.seconds > 0

    def test_lr_scale_scales_the_rate(self, made):
        assert equal(train(made, NPO(), lr_scale=0.5), train(made, NPO(), learning_rate=5e-4))

    def test_warm_up_begins_at_rate_0(self, made):
        """Linear warm-up over 2 steps: rates 0, lr/2, lr ...; after one step nothing has moved, after two something has."""
        warm = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
        still, moved = (train(made, GradAscent(), max_steps=steps, **warm) for steps in (1, 2))
        assert torch.equal(flat(still.tensors), flat(made.start.tensors))
        assert not equal(moved, still)


class TestRefused:
    @pytest.mark.parametrize(
        ("role", "data"),
        [
            (Role.IDLE, DATA),
            (Role.FINETUNE, LocalData(forget=FORGET, retain=())),
            (Role.UNLEARN, LocalData(forget=(), retain=RETAIN)),
        ],
    )
    def test_a_task_without_work(self, made, role, data):
        with pytest.raises(ValueError, match=f"client 1 has nothing to do as {role.value}"):
            train(made, NPO(), data, role=role)

    def test_unlearning_without_a_method_does_not_train_on_the_forget_rows(self, made):
        with pytest.raises(ValueError, match="client 1 is to unlearn without a method"):
            train(made, None, role=Role.UNLEARN)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_an_error_inside_leaves_the_model_ready_for_the_next_client(self, made, checkpointing):
        @dataclass(frozen=True, kw_only=True)
        class Broken(GradDiff):
            def forget(self, batch, totals):
                raise RuntimeError("broken loss")

        good = train(made, NPO())
        torch.manual_seed(5)
        state = torch.get_rng_state()
        with pytest.raises(RuntimeError, match="broken loss"):
            train(made, Broken(), gradient_checkpointing=checkpointing)
        assert torch.equal(torch.get_rng_state(), state)
        assert not made.model.training
        assert not made.model.get_base_model().is_gradient_checkpointing
        assert equal(train(made, NPO()), good)
