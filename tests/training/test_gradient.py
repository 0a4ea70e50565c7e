"""One optimiser step end to end: the loop's gradient against autograd, accumulation, checkpointing, bf16, FedProx."""

import math

import pytest
import torch
from helpers_methods import RetainOnly
from helpers_training import (
    FORGET,
    GRADIENT,
    RATE,
    RETAIN,
    SUMS,
    FixedSums,
    flat,
    gradient,
    made_model,
    train,
    train_args,
)

from fedunlearn.config.data import CollatorConfig
from fedunlearn.data.collator import collate
from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.methods.npo import NPO
from fedunlearn.methods.retain import retain_loss, retain_needs
from fedunlearn.methods.simnpo import SimNPO
from fedunlearn.methods.tokens import Need, StepTotals
from fedunlearn.models.adapter_tensors import live_parameters, live_tensors, read_tensors, write_tensors
from fedunlearn.models.lora import REFERENCE, check_trainable, hold_reference
from fedunlearn.records.adapter import Weights
from fedunlearn.training.forward import batch_logits, token_losses
from fedunlearn.training.local import LocalData
from fedunlearn.training.steps import Supply, plan_steps

CPU = torch.device("cpu")
NLL = frozenset({Need.NLL})
WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
METHODS = [
    pytest.param(None, id="finetune"),
    pytest.param(GradAscent(), id="grad_ascent"),
    pytest.param(GradDiff(gamma=0.5, alpha=2.0), id="grad_diff"),
    pytest.param(NPO(), id="npo nll"),
    pytest.param(NPO(retain="kl", alpha=3.0), id="npo kl"),
    pytest.param(SimNPO(beta=1.0, delta=6.0), id="simnpo"),
]


@pytest.fixture(scope="module")
def made():
    """No dropout; the reference differs from the adapter that training starts from."""
    model = made_model()
    generator = torch.Generator().manual_seed(8)
    values = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in read_tensors(model.model).items()}
    hold_reference(model.model, Weights(values))
    return model


def totals(rows):
    return StepTotals(num_labels=tuple(row.num_labels for row in rows))


def by_autograd(made, method):
    """L = gamma F + alpha R over the whole step in one batch and one backward, outside the loop; value and gradient."""
    num_rows = len(RETAIN if method is None else FORGET)
    per_row = 1 if method is not None and method.retain != "none" else 0
    (part,) = next(
        plan_steps(
            Supply(rows=num_rows, retain=len(RETAIN), per_row=per_row), 1, train_args(**{**GRADIENT, **WHOLE}), 7
        )
    )
    rows = [(RETAIN if method is None else FORGET)[index] for index in part.rows]

    def losses(chosen, needs, sums=None):
        return token_losses(made.model, collate(chosen, CollatorConfig(), 0, CPU), needs, reference_sums=sums)

    write_tensors(made.model, made.start.tensors)
    if method is None:
        loss = losses(rows, NLL).nll.sum() / totals(rows).num_tokens
    else:
        loss = method.gamma * method.forget(losses(rows, method.needs, SUMS[list(part.rows)]), totals(rows))
    if per_row:
        kept = [RETAIN[index] for index in part.retain]
        loss = loss + method.alpha * retain_loss(method.retain, losses(kept, retain_needs(method.retain)), totals(kept))
    live = live_parameters(made.model)
    found = torch.autograd.grad(loss, list(live.values()))
    return loss.item(), flat(dict(zip(live, found, strict=True)))


@pytest.mark.parametrize("method", METHODS)
def test_the_step_is_the_gradient_of_gamma_f_plus_alpha_r(made, method):
    value, wanted = by_autograd(made, method)
    result = train(made, method, **GRADIENT, **WHOLE)
    found = (flat(made.start.tensors) - flat(result.tensors)) / RATE
    assert result.loss == pytest.approx(value, abs=1e-5)
    assert wanted.abs().max() > 1e-3
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.fixture(scope="module")
def exact(made):
    """The same model in float64, where rounding does not hide what accumulation might change."""
    model = made_model(dtype=torch.float64)
    hold_reference(model.model, Weights({name: t.double() for name, t in live_tensors(made.model, REFERENCE).items()}))
    return model


def spread(made, method):
    """By micro-batch size: the distance to the gradient of the whole step, in parts of its largest entry; and the results."""
    results = {}
    for size in (8, 4, 2, 1):
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        results[size] = train(made, method, **GRADIENT, **shape)
    found = {size: (flat(made.start.tensors) - flat(result.tensors)) / RATE for size, result in results.items()}
    return {size: (found[size] - found[8]).abs().max() / found[8].abs().max() for size in (4, 2, 1)}, results


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_does_not_change_the_gradient(made, exact, method):
    """8 x 1 = 4 x 2 = 2 x 4 = 1 x 8 to 1e-6 of the largest entry on a float64 base, to 1e-5 on a float32 one; the same loss and tokens."""
    for model, tolerance in ((exact, 1e-6), (made, 1e-5)):
        distances, results = spread(model, method)
        assert max(distances.values()) <= tolerance
        for result in results.values():
            assert result.loss == pytest.approx(results[8].loss, abs=1e-5)
            assert (result.num_steps, result.num_tokens) == (1, results[8].num_tokens)


def test_npo_at_the_reference_by_hand(made):
    """Reference sums of the start itself: F = (2/beta) ln 2 = 20 ln 2 whatever the rows, and the gradient is -1/8 of that of the sums."""
    write_tensors(made.model, made.start.tensors)
    with torch.no_grad():
        sums = token_losses(made.model, collate(FORGET, CollatorConfig(), 0, CPU), NLL).row_sums()
    data = LocalData(forget=FORGET, retain=RETAIN, reference=FixedSums(sums))
    result = train(made, NPO(alpha=0.0, retain="none"), data, **GRADIENT, **WHOLE)
    ascent = gradient(made, GradAscent(), **WHOLE)
    found = (flat(made.start.tensors) - flat(result.tensors)) / RATE
    num_tokens = sum(row.num_labels for row in FORGET)
    assert result.loss == pytest.approx(20 * math.log(2), abs=1e-4)
    assert (found - ascent * num_tokens / 8).abs().max() < 1e-4 * found.abs().max()


def test_kl_to_the_reference_itself_is_zero_where_dropout_is_off():
    made = made_model()
    hold_reference(made.model, made.start.weights)
    result = train(made, RetainOnly(retain="kl"), **GRADIENT)
    assert abs(result.loss) < 1e-6
    assert (flat(made.start.tensors) - flat(result.tensors)).abs().max() / RATE < 1e-6


def test_the_reference_of_kl_knows_no_dropout():
    """One retain row, so that the pairing is known: the KL that is told is that of the model without dropout to the one with it.

    Dropout's draws are made again by hand: first the forward of the forget rows, then that of the retain rows.
    """
    made, still = made_model(dropout=0.4), made_model()
    hold_reference(made.model, made.start.weights)
    data = LocalData(forget=FORGET, retain=RETAIN[:1])
    told = train(made, RetainOnly(retain="kl"), data, **GRADIENT, **WHOLE).loss
    write_tensors(made.model, made.start.tensors)
    (part,) = next(plan_steps(Supply(rows=8, retain=1, per_row=1), 1, train_args(**GRADIENT, **WHOLE), 7))
    batches = [
        collate([FORGET[i] for i in part.rows], CollatorConfig(), 0, CPU),
        collate(RETAIN[:1] * 8, CollatorConfig(), 0, CPU),
    ]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        made.model.train()
        dropped = [batch_logits(made.model, batch) for batch in batches][1].log_softmax(-1)
        made.model.eval()
        kept = batch_logits(still.model, batches[1]).log_softmax(-1)
    assert told > 1e-3
    assert told == pytest.approx((kept.exp() * (kept - dropped)).sum(-1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("method", [None, NPO(), NPO(retain="kl")])
def test_gradient_checkpointing_gives_the_same_gradient(made, method):
    """With the base frozen, LoRA layers stay untrained unless the checkpoints' inputs carry a gradient."""
    plain, saving = gradient(made, method), gradient(made, method, gradient_checkpointing=True)
    assert plain.abs().max() > 1e-3
    assert (plain - saving).abs().max() < 1e-5 * plain.abs().max()
    first_layer = [n for n in made.start.tensors if ".layers.0." in n]
    result = train(made, method, gradient_checkpointing=True, **{**GRADIENT, "learning_rate": 1.0})
    assert all(not torch.equal(result.tensors[n], made.start.tensors[n]) for n in first_layer)


@pytest.mark.parametrize(("saving", "passes"), [(False, 2), (True, 4)])
def test_gradient_checkpointing_computes_each_layer_again(made, saving, passes):
    """8 forget rows and their 8 retain rows in one micro-batch each: 2 forwards of a layer, 4 where backward repeats them."""
    seen = []
    layer = made.model.get_base_model().model.layers[0].mlp
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(1))
    gradient(made, GradDiff(), **WHOLE, gradient_checkpointing=saving)
    handle.remove()
    assert len(seen) == passes


def test_gradient_checkpointing_is_switched_off_again(made):
    """Two rounds leave no hook behind: each would make every later forward slower."""
    for _ in range(2):
        train(made, gradient_checkpointing=True)
    base = made.model.get_base_model()
    assert not base.is_gradient_checkpointing
    assert not base.get_input_embeddings()._forward_hooks
    check_trainable(made.model)


def test_gradient_checkpointing_keeps_dropout_s_draws():
    """Recomputed layers must drop what the first pass dropped."""
    plain, saving = (gradient(made_model(dropout=0.3), NPO(), gradient_checkpointing=on) for on in (False, True))
    assert (plain - saving).abs().max() < 1e-5 * plain.abs().max()


@pytest.mark.parametrize("method", [None, NPO(), NPO(retain="kl")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_runs_near_float32_and_the_adapter_stays_float32(made, method, dtype):
    """bf16=true computes in bfloat16, on a base of either dtype; the direction is the same, the digits are not."""
    coarse = made_model(dtype=dtype)
    hold_reference(coarse.model, Weights({n: t.clone() for n, t in live_tensors(made.model, REFERENCE).items()}))
    result = train(coarse, method, bf16=True, **{**GRADIENT, "learning_rate": 1.0})
    found, wanted = flat(made.start.tensors) - flat(result.tensors), gradient(made, method)
    assert {t.dtype for t in result.tensors.values()} == {torch.float32}
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.99
    assert 1e-6 < (found - wanted).abs().max() / wanted.abs().max() < 0.2
    check_trainable(coarse.model)


def test_fedprox_adds_the_gradient_of_half_mu_the_squared_distance_to_the_start(made):
    """Two steps of SGD: the first is the same (w = x), the second differs by lr times autograd of (mu/2) ||w - x||^2 at w_1."""
    mu, rate = 3.0, 0.25
    usual = {**GRADIENT, "learning_rate": rate}
    one = train(made, GradDiff(), **usual)
    pulled_one = train(made, GradDiff(), mu=mu, **usual)
    free, pulled = (train(made, GradDiff(), mu=m, **{**usual, "max_steps": 2}) for m in (0.0, mu))
    w, x = flat(one.tensors).requires_grad_(), flat(made.start.tensors)
    (pull,) = torch.autograd.grad(mu / 2 * (w - x).square().sum(), w)
    assert torch.equal(flat(pulled_one.tensors), flat(one.tensors))
    assert pull.abs().max() > 1e-2
    assert (flat(free.tensors) - flat(pulled.tensors) - rate * pull).abs().max() < 1e-5 * pull.abs().max()
    assert pulled.loss == pytest.approx(free.loss, abs=1e-6), "the told loss is without the proximal term"


def test_the_gradient_is_clipped_to_max_grad_norm_over_the_whole_step(made):
    free = gradient(made, GradDiff())
    clipped = gradient(made, GradDiff(), max_grad_norm=0.01)
    assert free.norm() > 0.1
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert torch.cosine_similarity(free, clipped, dim=0) > 0.99999
    assert (gradient(made, GradDiff(), max_grad_norm=1e6) - free).abs().max() < 1e-6 * free.abs().max()
