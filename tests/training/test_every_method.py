"""What holds for every method in the loop: the declared objective, accumulation, checkpointing, seeds, and a base that is not trained."""

from dataclasses import replace

import pytest
import torch
from helpers_training import (
    EVERY,
    FORGET,
    GRADIENT,
    RATE,
    RETAIN,
    equal,
    flat,
    forwards,
    made_model,
    name_of,
    train,
    train_args,
    with_alternates,
)

from fedunlearn.config.data import CollatorConfig
from fedunlearn.data.collator import collate
from fedunlearn.methods.pdu import PDU
from fedunlearn.methods.rmu import RMU
from fedunlearn.methods.tokens import Need, StepTotals
from fedunlearn.models.adapter_tensors import live_parameters, read_tensors, write_tensors
from fedunlearn.models.lora import check_trainable, hold_reference
from fedunlearn.records.adapter import Weights
from fedunlearn.records.rounds import Trained
from fedunlearn.training.forward import token_losses
from fedunlearn.training.steps import Supply, plan_steps

CPU = torch.device("cpu")
DATA = with_alternates()
WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
METHODS = [pytest.param(method, id=name_of(method)) for method in EVERY]
OFF = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def changed(made, seed=8):
    generator = torch.Generator().manual_seed(seed)
    return {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in read_tensors(made.model).items()}


@pytest.fixture(scope="module")
def made():
    """No dropout; the reference differs from the adapter that training starts from."""
    model = made_model()
    hold_reference(model.model, Weights(changed(model)))
    return model


@pytest.fixture(scope="module")
def exact():
    """The same on a float64 base, where rounding does not hide what accumulation might change."""
    model = made_model(dtype=torch.float64)
    hold_reference(model.model, Weights(changed(model)))
    return model


def moved(made, method, **args):
    result = train(made, method, DATA, **{**GRADIENT, **args})
    return result, (flat(made.start.tensors) - flat(result.tensors)) / RATE


def by_autograd(made, method):
    """L = gamma F + alpha R (PDU: lam R) of the whole step as one batch and one backward, outside the loop."""
    args = train_args(**{**GRADIENT, **WHOLE})
    per_row = int(method.retain != "none")
    supply = Supply(rows=8, retain=len(RETAIN), per_row=per_row, alternates=(3,) * 8)
    (part,) = next(plan_steps(supply, 1, args, 7))
    layer = method.layer if isinstance(method, RMU) else None

    def losses(chosen, needs, other=None):
        batch = collate(chosen, CollatorConfig(), 0, CPU)
        sums = DATA.reference.of(chosen) if Need.REFERENCE_SUMS in needs else None
        return token_losses(made.model, batch, needs, layer=layer, reference_sums=sums, alternates=other)

    def totals(chosen):
        return StepTotals(num_labels=tuple(row.num_labels for row in chosen), seed=args.seed)

    write_tensors(made.model, made.start.tensors)
    rows = [FORGET[index] for index in part.rows]
    other = None
    if Need.ALTERNATES in method.needs:
        chosen = [DATA.alternates.encode(*pair) for pair in zip(part.rows, part.alternates, strict=True)]
        other = losses(chosen, method.needs)
    loss = method.gamma * method.forget(losses(rows, method.needs, other), totals(rows))
    if per_row:
        kept = [RETAIN[index] for index in part.retain]
        weight = method.lam if isinstance(method, PDU) else method.alpha
        loss = loss + weight * method.retain_loss(losses(kept, method.retain_needs), totals(kept))
    live = live_parameters(made.model)
    found = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
    grads = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(live.items(), found, strict=True)}
    return loss.item(), flat(grads)


@pytest.mark.parametrize("method", METHODS)
class TestOneStep:
    def test_it_is_the_gradient_of_the_declared_objective(self, made, method):
        value, wanted = by_autograd(made, method)
        result, found = moved(made, method, **WHOLE)
        assert result.loss == pytest.approx(value, rel=1e-5, abs=1e-5)
        assert wanted.abs().max() > 1e-3
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()

    def test_accumulation_does_not_change_it(self, made, exact, method):
        """8 x 1 = 4 x 2 = 2 x 4 = 1 x 8: the same gradient, loss and tokens; on a float64 base to 1e-6 of its largest entry."""
        for model, tolerance in ((exact, 2e-6), (made, 1e-5)):
            whole, wanted = moved(model, method, **WHOLE)
            for size in (4, 2, 1):
                shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
                result, found = moved(model, method, **shape)
                assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
                assert result.loss == pytest.approx(whole.loss, rel=1e-5, abs=1e-5)
                assert (result.num_steps, result.num_tokens) == (1, whole.num_tokens)
                assert result.num_reference_tokens == whole.num_reference_tokens
                assert result.memory == pytest.approx(whole.memory, rel=1e-5)

    def test_gradient_checkpointing_does_not_change_it(self, made, method):
        """With the base frozen, LoRA layers stay untrained unless the checkpoints' inputs carry a gradient."""
        (plain, wanted), (saving, found) = (
            moved(made, method, gradient_checkpointing=on, **WHOLE) for on in (False, True)
        )
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
        assert saving.loss == pytest.approx(plain.loss, rel=1e-6)
        assert not made.model.get_base_model().is_gradient_checkpointing


@pytest.mark.parametrize("method", METHODS)
class TestRound:
    def test_nothing_of_the_base_or_the_reference_moves_or_asks_for_a_gradient(self, made, method):
        frozen = {n: p for n, p in made.model.named_parameters() if ".default." not in n}
        before, asked = {n: p.clone() for n, p in frozen.items()}, []
        hook = made.model.get_base_model().model.register_forward_pre_hook(
            lambda *_: asked.extend(n for n, p in frozen.items() if p.requires_grad)
        )
        train(made, method, DATA, epochs=2, learning_rate=0.1)
        hook.remove()
        assert len(frozen) > 30
        assert not asked
        assert all(torch.equal(p, before[n]) for n, p in frozen.items())
        assert all(p.grad is None for p in made.model.parameters())
        check_trainable(made.model)

    def test_the_same_seed_gives_the_same_bits(self, made, method):
        """Whatever the process drew before it, and whatever client was there in between."""
        torch.manual_seed(1)
        first = train(made, method, DATA, epochs=2)
        torch.manual_seed(2)
        train(made, method, DATA, seed=8, learning_rate=0.1)
        again = train(made, method, DATA, epochs=2)
        assert equal(again, first)
        assert (again.loss_trace, again.memory) == (first.loss_trace, first.memory)
        assert not equal(train(made, method, DATA, seed=8, epochs=2), first)

    @pytest.mark.parametrize("trained", [Trained.A, Trained.B])
    def test_a_mask_holds(self, made, method, trained):
        result = train(made, method, DATA, trained=trained, learning_rate=0.1, weight_decay=0.1)
        rest = {n for n in result.tensors if not trained.covers(n)}
        still = {n for n, t in result.tensors.items() if torch.equal(t, made.start.tensors[n])}
        assert rest <= still
        assert still < set(result.tensors)

    def test_it_runs_in_bf16_near_float32(self, made, method):
        found, wanted = (moved(made, method, bf16=bf16, **WHOLE)[1] for bf16 in (True, False))
        assert torch.cosine_similarity(found, wanted, dim=0) > 0.98
        assert not torch.equal(found, wanted)

    def test_dropout_acts_on_what_trains_and_never_on_the_reference(self, method):
        """Forwards with gradient are in train mode, those without in eval mode, and by the reference's adapter."""
        made = made_model(dropout=0.3)
        hold_reference(made.model, made.start.weights)
        with forwards(made) as seen:
            train(made, method, DATA)
        assert {(f.gradient, f.training, f.adapter) for f in seen} <= {
            (True, True, "default"),
            (False, False, "reference"),
        }
        assert any(f.gradient for f in seen)
        assert not equal(train(made, method, DATA), train(still_of(made), method, DATA))


def still_of(dropping):
    made = made_model()
    hold_reference(made.model, dropping.start.weights)
    return made


@pytest.mark.parametrize("method", [m for m in EVERY if m.retain != "none"], ids=name_of)
def test_the_retain_weight_weighs_the_retain_term(made, method):
    """A step's gradient is linear in it: twice the weight adds the term's own gradient once more."""
    if isinstance(method, PDU):
        once, twice, none = (replace(method, lam=lam) for lam in (1.0, 2.0, 0.0))
    else:
        once, twice = method, replace(method, alpha=2 * method.alpha)
        none = replace(method, alpha=0.0, retain="none")
    grads = [moved(made, member, **WHOLE)[1] for member in (none, once, twice)]
    assert (grads[1] - grads[0]).abs().max() > 1e-3 * grads[1].abs().max()
    assert (grads[2] - 2 * grads[1] + grads[0]).abs().max() < 1e-4 * grads[2].abs().max()
