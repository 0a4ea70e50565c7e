"""DPO: by hand, against a slow formula, at its limits, and over micro-batches."""

import math

import pytest
import torch
from helpers_losses import LENGTHS, OTHER_LENGTHS, PARTS, batch_of
from helpers_preferences import both, slow, step
from hypothesis import given
from hypothesis import strategies as st

from fedunlearn.methods.dpo import DPO
from fedunlearn.methods.npo import NPO
from fedunlearn.methods.tokens import Need, StepTotals

LN2, LN3 = math.log(2.0), math.log(3.0)


def rows(nll, sums):
    return {"nll": torch.tensor(nll), "reference_sums": torch.tensor(sums)}


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_value_and_gradients_equal_the_slow_formula(beta):
    own, other = both()
    value, mine, theirs = step(DPO(beta=beta), own, other)
    wanted = slow(beta, own, other)
    assert value.item() == pytest.approx(wanted[0], abs=1e-5)
    assert (mine - wanted[1]).abs().max() < 1e-5
    assert (theirs - wanted[2]).abs().max() < 1e-5
    assert min(wanted[1].abs().max(), wanted[2].abs().max()) > 1e-3


def test_two_tokens_by_hand():
    """beta 1, original ln 3 and 1 against 1, alternate 2 and 1 against 3: margin ln 3, F = 2 ln(4/3); -1/2 a token of the original, 1/2 of the alternate."""
    value, mine, theirs = step(DPO(beta=1.0), rows([LN3, 1.0], [1.0]), rows([2.0, 1.0], [3.0]), (2,), (2,))
    assert value.item() == pytest.approx(2 * math.log(4 / 3), abs=1e-6)
    assert mine.tolist() == pytest.approx([-0.5, -0.5], abs=1e-6)
    assert theirs.tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_at_the_reference_by_hand():
    """Original 1 + 2, alternate 4, both as in the reference, beta 1/2: F = (2/beta) ln 2 = 4 ln 2; one row: -1 a token of the original, +1 of the alternate."""
    value, mine, theirs = step(DPO(beta=0.5), rows([1.0, 2.0], [3.0]), rows([4.0], [4.0]), (2,), (1,))
    assert value.item() == pytest.approx(4 * LN2, abs=1e-6)
    assert mine.tolist() == pytest.approx([-1.0, -1.0], abs=1e-6)
    assert theirs.tolist() == pytest.approx([1.0], abs=1e-6)


def test_away_from_it_by_hand():
    """beta 1. Row 1: original ln 3 above its reference, alternate at its own: sigmoid 3/4. Row 2: alternate ln 3 above: 1/4.

    F = -2 (ln 3/4 + ln 1/4) / 2 = ln(16/3); gradients -+2 (1 - sigmoid) / 2 rows: 1/4 in row 1, 3/4 in row 2.
    """
    own, other = rows([LN3, 1.0], [0.0, 1.0]), rows([2.0, LN3 + 1.0], [2.0, 1.0])
    value, mine, theirs = step(DPO(beta=1.0), own, other, (1, 1), (1, 1))
    assert value.item() == pytest.approx(math.log(16 / 3), abs=1e-6)
    assert mine.tolist() == pytest.approx([-0.25, -0.75], abs=1e-6)
    assert theirs.tolist() == pytest.approx([0.25, 0.75], abs=1e-6)


def test_it_raises_the_original_and_lowers_the_alternate():
    own, other = both(4)
    _, mine, theirs = step(DPO(), own, other)
    assert (mine < 0).all()
    assert (theirs > 0).all()


def test_a_small_beta_is_ascent_on_the_original_and_descent_on_the_alternate():
    """-1/3 a token of the three originals and 1/3 a token of the alternates, whatever the losses, lengths and references."""
    own, other = both()
    _, mine, theirs = step(DPO(beta=1e-6), own, other)
    assert mine.tolist() == pytest.approx([-1 / 3] * 8, abs=1e-4)
    assert theirs.tolist() == pytest.approx([1 / 3] * 8, abs=1e-4)


def test_an_alternate_that_stays_at_its_reference_makes_it_npo():
    own, other = both()
    other["reference_sums"] = torch.stack([part.sum() for part in other["nll"].split(OTHER_LENGTHS)])
    value, mine, _ = step(DPO(), own, other)
    leaf = own["nll"].clone().requires_grad_()
    wanted = NPO().forget(batch_of({**own, "nll": leaf}, LENGTHS), StepTotals(num_labels=LENGTHS))
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert torch.allclose(mine, leaf.grad, atol=1e-6)


def test_the_same_answer_twice_cancels():
    """Original = alternate: F = (2/beta) ln 2 and the two gradients are opposites."""
    own, _ = both()
    value, mine, theirs = step(DPO(), own, own, other_lengths=LENGTHS)
    assert value.item() == pytest.approx(20 * LN2, abs=1e-4)
    assert torch.allclose(mine, -theirs, atol=1e-7)


@given(st.floats(0.05, 3), st.floats(-200, 200), st.floats(-200, 200))
def test_the_reference_s_own_level_does_not_matter_only_the_distance_to_it(beta, shift, other_shift):
    """A constant on a row's sum and on its reference's: nothing changes, and no size overflows."""
    plain = step(DPO(beta=beta), rows([3.0], [2.0]), rows([1.0], [4.0]), (1,), (1,))
    moved = step(
        DPO(beta=beta),
        rows([3.0 + shift], [2.0 + shift]),
        rows([1.0 + other_shift], [4.0 + other_shift]),
        (1,),
        (1,),
    )
    assert moved[0].item() == pytest.approx(plain[0].item(), rel=1e-3, abs=1e-4)
    assert moved[1].item() == pytest.approx(plain[1].item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("nats", [500.0, 1e4])
def test_saturated_rows_stay_finite(nats):
    """Original forgotten: nothing left to do. Alternate forgotten: the full -2 and 2 of one row."""
    done = step(DPO(), rows([nats], [0.0]), rows([0.0], [0.0]), (1,), (1,))
    ahead = step(DPO(), rows([0.0], [0.0]), rows([nats], [0.0]), (1,), (1,))
    assert [part.item() for part in done] == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    assert [part.item() for part in ahead] == pytest.approx([2 * nats, -2.0, 2.0], rel=1e-6)


def test_micro_batches_add_up_to_the_step():
    own, other = both(2)
    whole = step(DPO(), own, other)
    for parts in PARTS:
        for found, wanted in zip(step(DPO(), own, other, parts=parts), whole, strict=True):
            assert (found - wanted).abs().max() < 1e-5


def test_without_alternates_it_says_so():
    own, _ = both()
    with pytest.raises(ValueError, match=r"alternates were not computed: the method must declare Need\.ALTERNATES"):
        DPO().forget(batch_of(own, LENGTHS), StepTotals(num_labels=LENGTHS))


def test_its_alternates_are_the_user_s_pairs():
    assert DPO().alternates == "pairs"
    assert DPO().needs == {Need.NLL, Need.REFERENCE_SUMS, Need.ALTERNATES}
