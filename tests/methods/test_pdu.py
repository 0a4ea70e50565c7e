"""PDU: by hand, against a slow formula, what it remembers, over micro-batches, and beside the common implementation."""

import pytest
import torch
from helpers_losses import PARTS, apart_from_slow, apart_in_parts, batch_of, drawn, value_and_gradient
from hypothesis import given
from hypothesis import strategies as st

from fedunlearn.methods.pdu import PDU
from fedunlearn.methods.retain import cross_entropy
from fedunlearn.methods.tokens import StepDone, StepTotals


def slow(rows):
    total, count = 0.0, 0
    for row in rows:
        for logits in row["logits"]:
            total, count = total + (max(logits) - sum(logits) / len(logits)) ** 2, count + 1
    return total / count


def slow_retain(eps):
    def loss(rows):
        return sum(nll for row in rows for nll in row["nll"]) / sum(len(row["nll"]) for row in rows) - eps

    return loss


def test_value_and_gradient_equal_the_slow_formula():
    assert apart_from_slow(PDU(eps=0.3), slow, "logits") < 1e-5


@pytest.mark.parametrize("eps", [0.0, 0.3, 4.0])
def test_the_retain_term_equals_the_slow_formula(eps):
    """CE - eps, which is negative where the retain rows are better than they need be."""
    assert apart_from_slow(PDU(eps=eps), slow_retain(eps), "nll", term="retain_loss") < 1e-5


def test_two_tokens_by_hand():
    """z = (2, 0) and (3, 1): ((2 - 1)^2 + (3 - 2)^2) / 2 = 1; gradient 2 (max - mean) (e_max - 1/2) / 2 = 1/2 and -1/2 in each."""
    values = {"logits": torch.tensor([[2.0, 0.0], [3.0, 1.0]])}
    value, gradient = value_and_gradient(PDU(eps=0.3), values, "logits", (2,))
    assert value.item() == pytest.approx(1.0, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([0.5, -0.5, 0.5, -0.5], abs=1e-6)


def test_the_labels_do_not_matter():
    values = drawn()
    found, other = (
        value_and_gradient(PDU(eps=0.3), {**values, "labels": y}, "logits")
        for y in (values["labels"], 0 * values["labels"])
    )
    assert torch.equal(found[1], other[1])


def test_flat_logits_are_0_wherever_they_lie():
    """A constant on all logits changes nothing; equal logits are the least there is."""
    found, moved = (
        value_and_gradient(PDU(eps=0.3), {"logits": drawn()["logits"] + c}, "logits")[0] for c in (0.0, 5.0)
    )
    assert moved.item() == pytest.approx(found.item(), rel=1e-5)
    assert value_and_gradient(PDU(eps=0.3), {"logits": torch.full((8, 7), -3.0)}, "logits")[0].item() == 0.0


def test_micro_batches_add_up_to_the_step():
    """eps too is taken once over the whole step, whichever way the 8 label tokens are cut."""
    assert apart_in_parts(PDU(eps=0.3), "logits") < 1e-5
    assert apart_in_parts(PDU(eps=2.5), "nll", term="retain_loss") < 1e-5


def remembered(method, steps, memory=None):
    """lam after each of these steps, given as (R, rows of the step), by a client with 4 forget rows."""
    memory, told = method.memory() if memory is None else memory, []
    for retain, num_rows in steps:
        memory = method.remember(memory, StepDone(retain=retain, num_rows=num_rows, num_forget=4))
        told.append(method.retain_weight(memory))
    return told, memory


def test_lam_by_hand():
    """4 forget rows by 2, warm-up 1 epoch, lam 1, eta 1/2: steps 1 and 2 are the warm-up.

    Step 3: 1 + 1/2 (-1) = 1/2. Step 4: 1/2 + 1/2 (-3) = -1, hence 0. Step 5: 0 + 1/2 (0.6) = 0.3. Step 6: 0.3 + 1/2 (2) = 1.3.
    """
    told, memory = remembered(
        PDU(eps=2.0, eta=0.5, warmup=1), [(-1.0, 2), (5.0, 2), (-1.0, 2), (-3.0, 2), (0.6, 2), (2.0, 2)]
    )
    assert told == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.3, 1.3], abs=1e-12)
    assert memory == pytest.approx({"lam": 1.3, "seen": 12.0}, abs=1e-12)


def test_lam_goes_on_from_round_to_round_and_so_does_the_warm_up():
    """Cut after every step of the sequence above: what is remembered carries all there is."""
    method = PDU(eps=2.0, eta=0.5, warmup=1)
    steps = [(-1.0, 2), (5.0, 2), (-1.0, 2), (-3.0, 2), (0.6, 2), (2.0, 2)]
    whole, _ = remembered(method, steps)
    told, memory = [], None
    for step in steps:
        more, memory = remembered(method, [step], memory)
        told += more
    assert told == whole


@pytest.mark.parametrize(
    ("warmup", "rows", "first"),
    [(0, 2, 1), (1, 2, 3), (1, 4, 2), (5, 4, 6), (5, 2, 11), (2, 3, 3)],
)
def test_lam_first_moves_with_the_first_step_after_the_warm_up(warmup, rows, first):
    """4 forget rows: 5 epochs are 5 steps of 4, or 10 of 2; the step after them moves lam. 2 epochs by 3: 3 + 3 + 3 = 9 > 8."""
    told, _ = remembered(PDU(eps=0.3, warmup=warmup), [(1.0, rows)] * 12)
    assert told.index(2.0) + 1 == first
    assert told[:first] == [1.0] * (first - 1) + [2.0]


def test_a_step_without_retain_rows_and_eta_0_move_nothing():
    told, memory = remembered(PDU(eps=0.3, warmup=0, lam=3.0), [(None, 4)])
    assert told == [3.0]
    assert memory["seen"] == 4.0
    assert remembered(PDU(eps=0.3, warmup=0, eta=0.0), [(9.0, 4)] * 3)[0] == [1.0] * 3


@given(
    st.floats(0, 100),
    st.floats(0, 10),
    st.integers(0, 2),
    st.lists(st.tuples(st.floats(-50, 50), st.integers(1, 4)), max_size=20),
)
def test_lam_is_never_negative_and_what_was_remembered_is_not_changed(lam, eta, warmup, steps):
    method = PDU(eps=0.3, lam=lam, eta=eta, warmup=warmup)
    before = method.memory()
    told, memory = remembered(method, steps, before)
    assert all(value >= 0 for value in told)
    assert set(memory) == set(before) == {"lam", "seen"}
    assert before == {"lam": lam, "seen": 0.0}
    assert memory["seen"] == sum(rows for _, rows in steps)


def test_the_common_implementation_takes_the_positions_one_later():
    """A row of 6 places with labels at 3 and 4: ours are the logits at 2 and 3, which predict them; theirs those at 3 and 4."""
    logits = torch.randn(6, 7, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([-100, -100, -100, 5, 1, -100])
    at = (labels != -100).nonzero().flatten()
    ours = value_and_gradient(PDU(eps=0.3), {"logits": logits[at - 1]}, "logits", (2,))[0].item()
    theirs = (logits[at].amax(-1) - logits[at].mean(-1)).square().mean().item()
    one_by_one = [((max(z) - sum(z) / 7) ** 2).item() for z in logits]
    assert ours == pytest.approx((one_by_one[2] + one_by_one[3]) / 2, abs=1e-5)
    assert theirs == pytest.approx((one_by_one[3] + one_by_one[4]) / 2, abs=1e-5)
    assert abs(ours - theirs) > 0.1


def test_the_common_implementation_moves_lam_with_each_micro_batch():
    """Retain losses 1 and 3 in two micro-batches, eps 2, lam 1, eta 2. Ours: R = 0, lam stays 1. Theirs: max(0, 1 - 2) = 0, then 0 + 2 = 2."""
    method = PDU(eps=2.0, eta=2.0, warmup=0)
    totals = StepTotals(num_labels=(1, 1))
    nll = {"nll": torch.tensor([1.0, 3.0])}
    shares = [method.retain_loss(batch_of(nll, (1, 1), part), totals).item() for part in PARTS[0][:2]]
    ours, _ = remembered(method, [(sum(shares), 2)])
    theirs = 1.0
    for part in PARTS[0][:2]:
        alone = StepTotals(num_labels=(1,))
        theirs = max(0.0, theirs + 2.0 * (cross_entropy(batch_of(nll, (1, 1), part), alone).item() - 2.0))
    assert ours == pytest.approx([1.0], abs=1e-6)
    assert theirs == pytest.approx(2.0, abs=1e-6)
