"""Retain terms by hand and against a slow formula; weights that are refused; what each method declares."""

import dataclasses
import math

import pytest
import torch

from fedunlearn.errors import UserError
from fedunlearn.methods.altpo import AltPO
from fedunlearn.methods.ceu import CEU
from fedunlearn.methods.dpo import DPO
from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.methods.idk_dpo import IdkDPO
from fedunlearn.methods.ihl import IHL
from fedunlearn.methods.npo import NPO
from fedunlearn.methods.pdu import PDU
from fedunlearn.methods.retain import retain_loss, retain_needs
from fedunlearn.methods.rmu import RMU
from fedunlearn.methods.satimp import SatImp
from fedunlearn.methods.simnpo import SimNPO
from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses
from fedunlearn.methods.uce import UCE
from fedunlearn.methods.undial import UNDIAL
from fedunlearn.methods.wga import WGA


def kl_batch(logits, reference):
    """One row of N label tokens with these logits."""
    count = len(logits)
    return TokenLosses(
        nll=torch.zeros(count),
        row=torch.zeros(count, dtype=torch.int64),
        labels=torch.zeros(count, dtype=torch.int64),
        num_labels=torch.tensor([count]),
        logits=logits,
        reference_logits=reference,
    )


def test_nll_by_hand():
    """Tokens 1, 2, 3 of a step with 4 label tokens in all: this micro-batch's share is 6 / 4."""
    batch = TokenLosses(
        nll=torch.tensor([1.0, 2.0, 3.0]),
        row=torch.tensor([0, 0, 1]),
        labels=torch.tensor([0, 0, 0]),
        num_labels=torch.tensor([2, 1]),
    )
    assert retain_loss("nll", batch, StepTotals(num_labels=(2, 1, 1))).item() == pytest.approx(1.5, abs=1e-6)


def test_kl_by_hand():
    """Reference 3/4, 1/4, model 1/2, 1/2: KL(ref || model) = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.13081.

    The other way round it would be 1/2 ln(2/3) + 1/2 ln 2 = 0.14384. Its gradient by logit is p - p_ref = -1/4, 1/4.
    """
    logits = torch.zeros(1, 2, requires_grad=True)
    reference = torch.tensor([[math.log(3.0), 0.0]])
    loss = retain_loss("kl", kl_batch(logits, reference), StepTotals(num_labels=(1,)))
    loss.backward()
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert logits.grad.tolist()[0] == pytest.approx([-0.25, 0.25], abs=1e-6)


def test_kl_of_the_reference_itself_is_zero_without_gradient():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batch = kl_batch(logits, logits.detach() + 3.0)  # a constant added to all logits is the same distribution
    loss = retain_loss("kl", batch, StepTotals(num_labels=(4,)))
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
        totals = StepTotals(num_labels=(1,) * 8)
        parts = zip(logits.split(size), reference.split(size), strict=True)
        loss = sum(retain_loss("kl", kl_batch(*part), totals) for part in parts)
        loss.backward()
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
        assert (logits.grad - exact.grad).abs().max() < 1e-6 * exact.grad.abs().max() + 1e-7


def test_the_common_kl_averages_over_prompt_and_padding_and_the_last_position_too():
    """6 positions, labels at 3 and 4, predicted at 2 and 3. Ours: the mean of those two; the common one: of all six."""
    generator = torch.Generator().manual_seed(5)
    logits, reference = (2 * torch.randn(6, 11, generator=generator) for _ in range(2))
    at = [2, 3]
    ours = retain_loss("kl", kl_batch(logits[at], reference[at]), StepTotals(num_labels=(2,))).item()
    theirs = torch.nn.functional.kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1), reduction="batchmean", log_target=True
    ).item()
    each = [slow_kl(logits[place : place + 1].double(), reference[place : place + 1].double()) for place in range(6)]
    assert ours == pytest.approx(((each[2] + each[3]) / 2).item(), abs=1e-5)
    assert theirs == pytest.approx((sum(each) / 6).item(), abs=1e-5)
    assert abs(ours - theirs) > 0.1


def test_a_missing_input_is_named():
    bare = TokenLosses(
        nll=torch.ones(1),
        row=torch.zeros(1, dtype=torch.int64),
        labels=torch.zeros(1, dtype=torch.int64),
        num_labels=torch.ones(1),
    )
    totals = StepTotals(num_labels=(1,))
    with pytest.raises(ValueError, match="logits was not computed"):
        retain_loss("kl", bare, totals)
    with pytest.raises(ValueError, match="retain term 'none' has no loss"):
        retain_loss("none", bare, totals)
    with pytest.raises(ValueError, match="reference_sums was not computed"):
        NPO().forget(bare, totals)


N, S, LOGITS, H = Need.NLL, Need.REFERENCE_SUMS, Need.LOGITS, Need.HIDDEN
NEEDS = [
    (GradAscent(), {N}),
    (GradDiff(), {N}),
    (SimNPO(), {N}),
    (WGA(), {N}),
    (SatImp(), {N}),
    (UCE(), {N}),
    (NPO(), {N, S}),
    (DPO(), {N, S, Need.ALTERNATES}),
    (IdkDPO(), {N, S, Need.ALTERNATES}),
    (AltPO(), {N, S, Need.ALTERNATES}),
    (CEU(), {LOGITS}),
    (IHL(), {LOGITS}),
    (PDU(eps=0.3), {LOGITS}),
    (UNDIAL(), {LOGITS, Need.REFERENCE_LOGITS}),
    (RMU(), {H}),
]


@pytest.mark.parametrize(("method", "needs"), NEEDS)
def test_each_method_declares_what_it_reads_and_no_more(method, needs):
    assert method.needs == needs


def test_each_retain_term_declares_what_it_reads_and_no_more():
    assert retain_needs("nll") == {Need.NLL}
    assert retain_needs("none") == frozenset()
    assert retain_needs("kl") == {Need.LOGITS, Need.REFERENCE_LOGITS}
    assert RMU().retain_needs == {Need.HIDDEN, Need.REFERENCE_HIDDEN}
    assert RMU(retain="kl").retain_needs == retain_needs("kl")
    with pytest.raises(ValueError, match="retain term 'activations' is none of nll, kl, none"):
        retain_needs("activations")


def test_defaults_are_the_published_ones():
    """Section 1 of the methods' table, row by row."""
    usual = {"gamma": 1.0, "alpha": 1.0, "retain": "nll"}
    none = {"gamma": 1.0, "alpha": 0.0, "retain": "none"}
    assert dataclasses.asdict(NPO()) == {"beta": 0.1, "gamma": 1.0, "alpha": 1.0, "retain": "nll"}
    assert dataclasses.asdict(SimNPO()) == {"beta": 4.5, "delta": 0.0, "gamma": 0.125, "alpha": 1.0, "retain": "nll"}
    assert dataclasses.asdict(GradDiff()) == {"gamma": 1.0, "alpha": 1.0, "retain": "nll"}
    assert dataclasses.asdict(GradAscent()) == none
    assert dataclasses.asdict(DPO()) == dataclasses.asdict(IdkDPO()) == {"beta": 0.1, **usual}
    assert dataclasses.asdict(AltPO()).items() >= {"beta": 0.1, **usual}.items()
    assert dataclasses.asdict(RMU()) == {"layer": None, "steering": 2.0, **usual, "retain": "activations"}
    assert dataclasses.asdict(UNDIAL()) == {"beta": 10.0, **none}
    assert dataclasses.asdict(CEU()) == {"skip": 1, **none}
    assert dataclasses.asdict(WGA()) == {"beta": 1.0, **usual}
    assert dataclasses.asdict(SatImp()) == {"beta1": 5.0, "beta2": 1.0, **usual, "gamma": 0.1}
    assert dataclasses.asdict(PDU(eps=0.3)) == {"eps": 0.3, "lam": 1.0, "eta": 1.0, "warmup": 5, **usual}
    assert dataclasses.asdict(IHL()) == dataclasses.asdict(UCE()) == usual


WEIGHED = [GradDiff, NPO, SimNPO, DPO, IdkDPO, AltPO, RMU, UNDIAL, WGA, SatImp, IHL, UCE]


@pytest.mark.parametrize("member", WEIGHED)
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
@pytest.mark.parametrize("member", [NPO, SimNPO, DPO, IdkDPO, AltPO])
def test_beta_must_be_above_0(member, beta):
    with pytest.raises(UserError, match=rf"method\.beta={beta} of {member.__name__} must be above 0"):
        member(beta=beta)


@pytest.mark.parametrize(
    ("member", "key"), [(GradAscent, "alpha"), (GradAscent, "gamma"), (CEU, "gamma"), (CEU, "retain"), (PDU, "alpha")]
)
def test_what_a_method_fixes_cannot_be_set(member, key):
    with pytest.raises(TypeError, match=key):
        member(**{key: 1.0})


@pytest.mark.parametrize("retain", ["nll", "kl"])
@pytest.mark.parametrize("member", WEIGHED)
def test_a_weight_without_retain_term_is_refused(member, retain):
    with pytest.raises(UserError, match=r"alpha=0\.5 weighs a retain term, and retain='none' has none"):
        member(alpha=0.5, retain="none")
    assert member(alpha=0.5, retain=retain).retain == retain


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WGA(beta=-0.1), r"method\.beta=-0\.1 of WGA must not be negative \(0 is gradient ascent\)"),
        (lambda: SatImp(beta1=-1.0), r"method\.beta1=-1\.0 of SatImp must not be negative"),
        (lambda: SatImp(beta2=-1.0), r"method\.beta2=-1\.0 of SatImp must not be negative"),
        (lambda: UNDIAL(beta=-1.0), r"method\.beta=-1\.0 of UNDIAL must not be negative"),
        (lambda: CEU(skip=-1), r"method\.skip=-1 of CE-U must not be negative"),
        (lambda: RMU(layer=-1), r"method\.layer=-1 of RMU must not be negative"),
        (lambda: RMU(steering=0.0), r"method\.steering=0\.0 of RMU must be above 0"),
        (lambda: PDU(eps=-0.1), r"method\.eps=-0\.1 of PDU must not be negative"),
        (lambda: PDU(eps=0.3, lam=-1.0), r"method\.lam=-1\.0 of PDU must not be negative"),
        (lambda: PDU(eps=0.3, eta=-1.0), r"method\.eta=-1\.0 of PDU must not be negative"),
        (lambda: PDU(eps=0.3, warmup=-1), r"method\.warmup=-1 of PDU must not be negative"),
        (lambda: PDU(eps=0.3, gamma=0.0), r"method\.gamma=0\.0 of PDU must be above 0"),
        (lambda: AltPO(samples=0), r"method\.samples=0 must be at least 1"),
        (lambda: AltPO(tries=0), r"method\.tries=0 must be at least 1"),
        (lambda: AltPO(max_new_tokens=0), r"method\.max_new_tokens=0 must be at least 1"),
        (
            lambda: AltPO(prompt="Another answer to {question}"),
            r"must hold \{question\} and \{answer\} and no other braces",
        ),
    ],
)
def test_values_without_sense_are_refused_by_key(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_all_faults_of_a_method_are_told_at_once():
    with pytest.raises(UserError, match=r"(?s)method\.layer=-2.*method\.steering=-1\.0"):
        RMU(layer=-2, steering=-1.0)
    with pytest.raises(UserError, match=r"(?s)method\.eps=-1\.0.*method\.lam=-2\.0.*method\.warmup=-3"):
        PDU(eps=-1.0, lam=-2.0, warmup=-3)
    with pytest.raises(TypeError, match="eps"):
        PDU()  # eps has no default
