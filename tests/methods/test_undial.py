"""UNDIAL: by hand, against a slow formula, at its limits, over micro-batches, and beside the common implementation."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers_losses import LENGTHS, apart_from_slow, apart_in_parts, drawn, softmax, value_and_gradient

from fedunlearn.methods.undial import UNDIAL

LN2, LN3 = math.log(2.0), math.log(3.0)


def slow(beta):
    def loss(rows):
        total, count = 0.0, 0
        for row in rows:
            for logits, reference, label in zip(row["logits"], row["reference_logits"], row["labels"], strict=True):
                p = softmax(logits)
                q = softmax([z - beta * (v == label) for v, z in enumerate(reference)])
                total, count = total - sum(q[v] * torch.log(p[v]) for v in range(len(p))), count + 1
        return total / count

    return loss


@pytest.mark.parametrize("beta", [0.0, 1.5, 10.0])
def test_value_and_gradient_equal_the_slow_formula(beta):
    assert apart_from_slow(UNDIAL(beta=beta), slow(beta), "logits") < 1e-5


def test_two_words_by_hand():
    """z = z_ref = (0, 0), y = 0, beta = ln 3: q = (1/4, 3/4), F = ln 2, gradient softmax(z) - q = (1/4, -1/4)."""
    values = {"logits": torch.zeros(1, 2), "reference_logits": torch.zeros(1, 2), "labels": torch.tensor([0])}
    value, gradient = value_and_gradient(UNDIAL(beta=LN3), values, "logits", (1,))
    assert value.item() == pytest.approx(LN2, abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([0.25, -0.25], abs=1e-6)


def test_two_tokens_share_the_step_s_mean():
    """Token 1 as above with ln 2; token 2 at z = z_ref = (0, ln 3), y = 1, beta = ln 3: q = (1/2, 1/2), -(ln 1/4 + ln 3/4) / 2 = ln(16/3) / 2."""
    logits = torch.tensor([[0.0, 0.0], [0.0, LN3]])
    values = {"logits": logits, "reference_logits": logits, "labels": torch.tensor([0, 1])}
    value, gradient = value_and_gradient(UNDIAL(beta=LN3), values, "logits", (2,))
    assert value.item() == pytest.approx((LN2 + math.log(16 / 3) / 2) / 2, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([1 / 8, -1 / 8, -1 / 8, 1 / 8], abs=1e-6)


def test_beta_0_at_the_reference_has_no_gradient():
    """F is the reference's own entropy there, and as low as it gets."""
    values = {**drawn(), "logits": drawn()["reference_logits"]}
    value, gradient = value_and_gradient(UNDIAL(beta=0.0), values, "logits")
    p = values["logits"].double().softmax(-1)
    assert gradient.abs().max() < 1e-7
    assert value.item() == pytest.approx(-(p * p.log()).sum(-1).mean().item(), abs=1e-5)
    assert value_and_gradient(UNDIAL(beta=1.0), values, "logits")[1].abs().max() > 1e-3


def test_a_large_beta_leaves_the_label_out():
    """q is the reference without the label, the rest scaled up."""
    values = drawn()
    _, gradient = value_and_gradient(UNDIAL(beta=200.0), values, "logits")
    label = values["labels"][:, None]
    q = values["reference_logits"].double().scatter(-1, label, float("-inf")).softmax(-1)
    wanted = (values["logits"].double().softmax(-1) - q) / sum(LENGTHS)
    assert (gradient - wanted).abs().max() < 1e-6
    assert (gradient.gather(-1, label) > 0).all()


def test_the_reference_is_not_modified_and_has_no_say_beyond_its_distribution():
    values = drawn()
    before = values["reference_logits"].clone()
    first = value_and_gradient(UNDIAL(), values, "logits")
    assert torch.equal(values["reference_logits"], before)
    second = value_and_gradient(UNDIAL(), {**values, "reference_logits": before + 4.0}, "logits")
    assert torch.allclose(first[1], second[1], atol=1e-6)


def test_micro_batches_add_up_to_the_step():
    assert apart_in_parts(UNDIAL(), "logits") < 1e-5
    assert apart_in_parts(UNDIAL(beta=1.0), "logits") < 1e-5


def common(logits, reference, labels, beta):
    """The common implementation: mean over all B S positions, label -100 lowers the word V - 100 (negative indices count from the end)."""
    mask = torch.zeros_like(reference)
    rows, places = (torch.arange(count) for count in labels.shape)
    mask[rows[:, None], places[None], labels] = 1.0
    soft = (reference - mask * beta).softmax(-1)
    each = F.cross_entropy(logits.flatten(0, 1), soft.flatten(0, 1), reduction="none")
    return each.mean(), soft


@pytest.fixture
def padded():
    """Two rows of 5 positions over 103 words: row 1 has 2 labels after 2 prompt positions, row 2 has 1 after 3; the others are -100."""
    generator = torch.Generator().manual_seed(3)
    logits, reference = (3 * torch.randn(2, 5, 103, generator=generator) for _ in range(2))
    labels = torch.tensor([[-100, -100, 7, 9, -100], [-100, -100, -100, 4, -100]])
    return logits, reference, labels


def ours(logits, reference, labels, beta):
    kept = labels != -100
    values = {"logits": logits[kept], "reference_logits": reference[kept], "labels": labels[kept]}
    value, gradient = value_and_gradient(UNDIAL(beta=beta), values, "logits", tuple(kept.sum(-1).tolist()))
    full = torch.zeros_like(logits)
    full[kept] = gradient
    return value, full


def test_the_common_implementation_s_mean_over_prompt_and_padding_is_another_number(padded):
    logits, reference, labels = padded
    leaf = logits.clone().requires_grad_()
    theirs, soft = common(leaf, reference, labels, 10.0)
    theirs.backward()
    value, gradient = ours(logits, reference, labels, 10.0)
    assert abs(theirs.item() - value.item()) > 0.05
    assert leaf.grad[labels == -100].abs().max() > 1e-3
    assert gradient[labels == -100].abs().max() == 0
    assert (
        soft[0, 0, 3] < 1e-4 * reference[0, 0].softmax(-1)[3] * 10
    )  # word 103 - 100 of a prompt position is unlearned


def test_where_every_position_is_a_label_both_are_the_same_number(padded):
    logits, reference, _ = padded
    labels = torch.randint(103, (2, 5), generator=torch.Generator().manual_seed(4))
    leaf = logits.clone().requires_grad_()
    theirs, _ = common(leaf, reference, labels, 10.0)
    theirs.backward()
    value, gradient = ours(logits, reference, labels, 10.0)
    assert theirs.item() == pytest.approx(value.item(), abs=1e-5)
    assert (leaf.grad - gradient).abs().max() < 1e-6
