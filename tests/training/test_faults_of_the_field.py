"""Faults seen in other people's local training, one test each (the methods' notes, section 5); what belongs to loading and configs is tested there."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from helpers_methods import RetainOnly
from helpers_training import (
    DATA,
    EVERY,
    FORGET,
    GRADIENT,
    RATE,
    equal,
    flat,
    forwards,
    made_model,
    name_of,
    rows,
    train,
    train_args,
    with_alternates,
)

from fedunlearn.data.tofu import QaRow
from fedunlearn.methods.alternates import Sampled
from fedunlearn.methods.base import Method
from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.methods.npo import NPO
from fedunlearn.methods.rmu import RMU
from fedunlearn.methods.tokens import Need
from fedunlearn.models.lora import hold_reference
from fedunlearn.records.adapter import Weights
from fedunlearn.training.charges import Charges
from fedunlearn.training.reference import ReferenceSums
from fedunlearn.training.sampling import sampled_alternates
from fedunlearn.training.steps import Supply, plan_steps, warmup_of

SEEN: list[tuple[str, tuple[int, ...]]] = []


@dataclass(frozen=True, kw_only=True)
class Watching(Method):
    """GradDiff that writes down the labels of every micro-batch, by term."""

    gamma: float = field(default=1.0, init=False)
    alpha: float = 1.0
    retain: str = "nll"

    @property
    def needs(self):
        return frozenset({Need.NLL})

    def forget(self, batch, totals):
        SEEN.append(("forget", tuple(batch.labels.tolist())))
        return -batch.the(Need.NLL).sum() / totals.num_tokens

    def retain_loss(self, batch, totals):
        SEEN.append(("retain", tuple(batch.labels.tolist())))
        return super().retain_loss(batch, totals)


@pytest.fixture(autouse=True)
def _nothing_seen():
    SEEN.clear()


@pytest.fixture(scope="module")
def made():
    model = made_model(dropout=0.1)
    hold_reference(model.model, model.start.weights)
    return model


def seen_labels(term):
    return {label for name, labels in SEEN if name == term for label in labels}


def marked(count, label):
    """Rows whose labels are all one id, so that a batch tells whose they are."""
    return tuple(replace(row, input_ids=(*row.input_ids[: row.num_prompt], label)) for row in rows(count, label))


def test_unlearning_draws_its_retain_rows_from_the_client_s_own(made):
    """Clients 1 and 2 one after the other: each meets its own forget and retain rows and no others."""
    for forget, retain in ((201, 202), (211, 212)):
        SEEN.clear()
        train(made, Watching(), replace(DATA, forget=marked(8, forget), retain=marked(5, retain)), epochs=3)
        assert seen_labels("forget") == {forget}
        assert seen_labels("retain") == {retain}


def test_retain_rows_beyond_the_client_s_own_are_never_asked_for():
    """One retain row: it is met every time; five: all of them, and none beyond."""
    for count in (1, 5):
        steps = plan_steps(Supply(rows=8, retain=count, per_row=2), 30, train_args(), 3)
        assert {index for step in steps for part in step for index in part.retain} == set(range(count))


@pytest.mark.parametrize(
    "between", ["draws", "a reference's sums", "samples", "another client", "alternates", "dropout"]
)
def test_the_retain_pairing_does_not_change_when_anything_else_is_drawn(made, tmp_path, between):
    """The published trainers share one global generator: an evaluation in between changed which rows met."""
    model = made
    train(model, Watching(), epochs=2)
    wanted = list(SEEN)
    data = DATA
    if between == "draws":
        torch.manual_seed(99)
        torch.rand(1000)
    elif between == "a reference's sums":
        data = replace(
            DATA, reference=ReferenceSums(model, Weights(model.start.tensors), tmp_path, False, Charges(None, 1))
        )
        data.reference.prepare(FORGET)
    elif between == "samples":
        how = Sampled(count=1, tries=3, prompt=None, max_new_tokens=4)
        sampled_alternates(
            model, model.start.weights, {0: QaRow("Who?", "I.")}, how, seed=7, cache=tmp_path, charges=Charges(None, 1)
        )
    elif between == "another client":
        train(model, NPO(), seed=3, epochs=2)
    elif between == "alternates":
        data = with_alternates()
    else:
        model = made_model(dropout=0.5)
    SEEN.clear()
    train(model, Watching(), data, epochs=2)
    assert wanted == SEEN


def test_rmu_unfreezes_nothing(made):
    """Every tensor that is not the active adapter's: never trainable, without gradient, bit by bit what it was."""
    others = {n: p for n, p in made.model.named_parameters() if ".default." not in n}
    before, asked = {n: p.clone() for n, p in others.items()}, []
    hook = made.model.get_base_model().model.register_forward_pre_hook(
        lambda *_: asked.append(sum(p.requires_grad or p.grad is not None for p in others.values()))
    )
    train(made, RMU(), epochs=2, learning_rate=0.1)
    hook.remove()
    assert set(asked) == {0}
    assert all(torch.equal(p, before[n]) for n, p in others.items())


@pytest.mark.parametrize("method", [None, *EVERY], ids=lambda m: "finetune" if m is None else name_of(m))
def test_gradient_checkpointing_trains_the_lora_layers_that_are_trained_without_it(method):
    """With a frozen base the checkpoints' inputs need a gradient, else no layer learns; the first one above all."""
    made = made_model()
    hold_reference(made.model, Weights({n: 0.5 * t for n, t in made.start.tensors.items()}))
    plain, saving = (
        train(made, method, with_alternates(), **GRADIENT, gradient_checkpointing=on) for on in (False, True)
    )
    moved = {n: (t - made.start.tensors[n]).abs().max() / RATE for n, t in plain.tensors.items()}
    assert all(moved[n] > 0 for n in moved if ".layers.0." in n)
    for name, size in moved.items():
        apart = (plain.tensors[name] - saving.tensors[name]).abs().max() / RATE
        assert apart <= 1e-5 * max(moved.values()), name
        assert (size > 0) == (not torch.equal(saving.tensors[name], made.start.tensors[name]))


def test_reference_sums_and_sampling_run_in_eval_mode(tmp_path):
    """In a model with dropout that was left in train mode, as between two clients' steps."""
    made = made_model(dropout=0.5)
    how = Sampled(count=1, tries=3, prompt=None, max_new_tokens=4)
    made.model.train()
    with forwards(made) as seen:
        ReferenceSums(made, made.start.weights, tmp_path, False, Charges(None, 1)).prepare(FORGET)
        made.model.train()
        sampled_alternates(
            made, made.start.weights, {0: QaRow("Who?", "I.")}, how, seed=0, cache=tmp_path, charges=Charges(None, 1)
        )
    assert len(seen) > 2
    assert not any(f.training or f.gradient for f in seen)


def test_a_round_leaves_the_model_in_eval_mode_for_evaluation(made):
    """Also after a guard's stop and after a forward that ended at a block."""
    for method, args in ((None, {}), (RMU(layer=0), {}), (GradDiff(), {"learning_rate": 1e3, "optim": "sgd"})):
        train(made, method, epochs=2, **args)
        assert not any(module.training for module in made.model.modules())


def test_warm_up_asks_for_steps_and_not_for_devices(monkeypatch):
    """20 rows by 4, one epoch of warm-up: 5 steps, whether a machine has no GPU or four."""
    args = train_args(warmup_epochs=1.0)
    found = []
    for devices in (0, 1, 4):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=devices: count)
        found.append(warmup_of(20, 20, args))
    assert found == [5, 5, 5]


def test_fedprox_pulls_to_the_round_s_start_and_not_to_the_model_itself(made):
    """Compared with itself the term would be 0 for ever: with mu the second step differs, by lr mu (w_1 - x)."""
    rate, mu = 0.25, 3.0
    usual = {**GRADIENT, "learning_rate": rate}
    still = made_model()
    one = train(still, RetainOnly(), **usual)
    free, pulled = (train(still, RetainOnly(), mu=m, **{**usual, "max_steps": 2}) for m in (0.0, mu))
    pull = mu * (flat(one.tensors) - flat(still.start.tensors))
    assert not equal(free, pulled)
    assert (flat(free.tensors) - flat(pulled.tensors) - rate * pull).abs().max() < 1e-5 * pull.abs().max()


def test_two_different_fine_tuned_adapters_give_two_different_unlearned_ones(made):
    """Where the adapter that comes in is wrapped again and zeroed, both give the same."""
    other = replace(made, start=made.start.replace({n: 0.5 * t for n, t in made.start.tensors.items()}, {}))
    first, second = (train(model, NPO()) for model in (made, other))
    assert not equal(first, second)
    assert (flat(second.tensors) - flat(other.start.tensors)).abs().max() < 0.05
    assert (flat(second.tensors) - flat(made.start.tensors)).abs().max() > 0.1
