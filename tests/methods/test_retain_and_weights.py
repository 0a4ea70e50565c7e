"""Retain terms by hand and against a slow formula; weights that are refused; what each method declares."""

import dataclasses
import math

import pytest
import torch

from fedunlearn.errors import UserError
from fedunlearn.methods.base import Need, StepTotals, TokenLosses
from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.methods.npo import NPO
from fedunlearn.methods.retain import retain_loss, retain_needs
from fedunlearn.methods.simnpo import SimNPO


def kl_batch(logits, reference):
    """One row of N label tokens with these logits."""
    count = len(logits)
    return TokenLosses(
        nll=torch.zeros(count),
        row=torch.zeros(count, dtype=torch.int64),
        num_labels=torch.tensor([count]),
        logits=logits,
        reference_logits=reference,
    )


def test_nll_by_hand():
    """Tokens 1, 2, 3 of a step with 4 label tokens in all: this micro-batch's share is 6 / 4."""
    batch = TokenLosses(nll=torch.tensor([1.0, 2.0, 3.0]), row=torch.tensor([0, 0, 1]), num_labels=torch.tensor([2, 1]))
    assert retain_loss("nll", batch, StepTotals(num_rows=3, num_tokens=4)).item() == pytest.approx(1.5, abs=1e-6)


def test_kl_by_hand():
    """Reference 3/4, 1/4, model 1/2, 1/2: KL(ref || model) = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.13081.

    The other way round it would be 1/2 ln(2/3) + 1/2 ln 2 = 0.14384. Its gradient by logit is p - p_ref = -1/4, 1/4.
    """
    logits = torch.zeros(1, 2, requires_grad=True)
    reference = torch.tensor([[math.log(3.0), 0.0]])
    loss = retain_loss("kl", kl_batch(logits, reference), StepTotals(num_rows=1, num_tokens=1))
    loss.backward()
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert logits.grad.tolist()[0] == pytest.approx([-0.25, 0.25], abs=1e-6)


def test_kl_of_the_reference_itself_is_zero_without_gradient():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batch = kl_batch(logits, logits.detach() + 3.0)  # a constant added to all logits is the same distribution
    loss = retain_loss("kl", batch, StepTotals(num_rows=1, num_tokens=4))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert logits.grad.abs().max() < 1e-6


def slow_kl(logits, reference):
    total = 0.0
    for row, ref in zip(logits, reference, strict=True):
        p, q = torch.exp(row) / torch.exp(row).sum(), torch.exp(ref) / torch.exp(ref).sum()
        for v in range(len(p)):
            total = total + q[v] * (torch.log(q[v]) - torch.log(p[v]))
    return total / len(logits)


def test_kl_equals_the_slow_formula_and_adds_up_over_micro_batches():
    generator = torch.Generator().manual_seed(1)
    start = 2 * torch.randn(8, 11, generator=generator)
    reference = 2 * torch.randn(8, 11, generator=generator)
    exact = start.double().requires_grad_()
    wanted = slow_kl(exact, reference.double())
    wanted.backward()
    for size in (8, 4, 1):
        logits = start.clone().requires_grad_()
        totals = StepTotals(num_rows=8, num_tokens=8)
        parts = zip(logits.split(size), reference.split(size), strict=True)
        loss = sum(retain_loss("kl", kl_batch(*part), totals) for part in parts)
        loss.backward()
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
        assert (logits.grad - exact.grad).abs().max() < 1e-6 * exact.grad.abs().max() + 1e-7


def test_a_missing_input_is_named():
    bare = TokenLosses(nll=torch.ones(1), row=torch.zeros(1, dtype=torch.int64), num_labels=torch.ones(1))
    totals = StepTotals(num_rows=1, num_tokens=1)
    with pytest.raises(ValueError, match="kl retain term needs logits and reference_logits"):
        retain_loss("kl", bare, totals)
    with pytest.raises(ValueError, match="retain term 'none' has no loss"):
        retain_loss("none", bare, totals)
    with pytest.raises(ValueError, match="NPO needs reference_sums"):
        NPO().forget(bare, totals)


def test_each_method_declares_what_it_reads_and_no_more():
    assert NPO().needs == {Need.REFERENCE_SUMS}
    assert GradAscent().needs == GradDiff().needs == SimNPO().needs == frozenset()
    assert retain_needs("nll") == retain_needs("none") == frozenset()
    assert retain_needs("kl") == {Need.LOGITS, Need.REFERENCE_LOGITS}


def test_defaults_are_the_published_ones():
    """NPO: beta 0.1, gamma 1, alpha 1; SimNPO: beta 4.5, delta 0, gamma 0.125, alpha 1 (section 1 of the methods' table)."""
    assert dataclasses.asdict(NPO()) == {"beta": 0.1, "gamma": 1.0, "alpha": 1.0, "retain": "nll"}
    assert dataclasses.asdict(SimNPO()) == {"beta": 4.5, "delta": 0.0, "gamma": 0.125, "alpha": 1.0, "retain": "nll"}
    assert dataclasses.asdict(GradDiff()) == {"gamma": 1.0, "alpha": 1.0, "retain": "nll"}
    assert dataclasses.asdict(GradAscent()) == {"gamma": 1.0, "alpha": 0.0, "retain": "none"}


@pytest.mark.parametrize("member", [GradDiff, NPO, SimNPO])
class TestWeights:
    def test_gamma_must_be_above_0(self, member):
        for gamma in (0.0, -1.0):
            with pytest.raises(UserError, match=rf"{member.__name__}: gamma={gamma}"):
                member(gamma=gamma)

    def test_alpha_must_not_be_negative(self, member):
        with pytest.raises(UserError, match=r"alpha=-0\.5 not negative"):
            member(alpha=-0.5)

    @pytest.mark.parametrize("retain", ["nll", "kl"])
    def test_a_retain_term_without_weight_is_refused(self, member, retain):
        with pytest.raises(UserError, match=f"retain='{retain}' with alpha=0 would be computed and thrown away"):
            member(alpha=0.0, retain=retain)

    def test_no_retain_term_goes_without_weight(self, member):
        assert member(alpha=0.0, retain="none").retain == "none"

    def test_a_method_is_frozen(self, member):
        with pytest.raises(dataclasses.FrozenInstanceError, match="gamma"):
            member().gamma = 2.0


@pytest.mark.parametrize("beta", [0.0, -0.1])
@pytest.mark.parametrize("member", [NPO, SimNPO])
def test_beta_must_be_above_0(member, beta):
    with pytest.raises(UserError, match=rf"method\.beta={beta} of {member.__name__} must be above 0"):
        member(beta=beta)


def test_grad_ascent_has_no_weights_to_set():
    with pytest.raises(TypeError, match="alpha"):
        GradAscent(alpha=1.0)
