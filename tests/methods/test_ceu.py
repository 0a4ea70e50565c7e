"""CE-U: by hand, against a slow formula, its skipped labels, and over micro-batches."""

import math

import pytest
import torch
from helpers_losses import LENGTHS, apart_from_slow, apart_in_parts, bounds, drawn, softmax, value_and_gradient

from fedunlearn.methods.ceu import CEU

LN2, LN3 = math.log(2.0), math.log(3.0)


def slow(skip):
    def loss(rows):
        total, count = 0.0, 0
        for row in rows:
            for place, (logits, label) in enumerate(zip(row["logits"], row["labels"], strict=True)):
                if place < skip:
                    continue
                p, fixed = softmax(logits), softmax(logits.detach())
                left = sum(fixed[v] for v in range(len(fixed)) if v != label)
                for v in range(len(p)):
                    if v != label:
                        total = total - fixed[v] / left * torch.log(p[v])
                count += 1
        return total / count

    return loss


@pytest.mark.parametrize("skip", [0, 1, 2, 3])
def test_value_and_gradient_equal_the_slow_formula(skip):
    """Rows of 3, 1 and 4 labels: 8, 5, 3 and 1 of them count."""
    assert apart_from_slow(CEU(skip=skip), slow(skip), "logits") < 1e-5


def two_words(count):
    return {"logits": torch.zeros(count, 2), "labels": torch.zeros(count, dtype=torch.int64)}


def test_two_words_by_hand():
    """z = (0, 0), y = 0: q = (0, 1), F = ln 2, gradient softmax(z) - q = (1/2, -1/2)."""
    value, gradient = value_and_gradient(CEU(skip=0), two_words(1), "logits", (1,))
    assert value.item() == pytest.approx(LN2, abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([0.5, -0.5], abs=1e-6)


def test_two_tokens_by_hand():
    """Of two tokens the first is skipped, at skip 1: the second alone, z = (ln 3, 0) with y = 0: p = (3/4, 1/4), F = ln 4, gradient (3/4, -3/4)."""
    values = {"logits": torch.tensor([[5.0, 1.0], [LN3, 0.0]]), "labels": torch.tensor([1, 0])}
    value, gradient = value_and_gradient(CEU(), values, "logits", (2,))
    assert value.item() == pytest.approx(2 * LN2, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([0.0, 0.0, 0.75, -0.75], abs=1e-6)


def test_the_target_carries_no_gradient():
    """softmax(z) - q, over 5 counted labels, and the label's own entry is p_y: were q not fixed, its entropy's gradient would be in it."""
    values = drawn()
    _, gradient = value_and_gradient(CEU(), values, "logits")
    label, p = values["labels"][:, None], values["logits"].double().softmax(-1)
    q = values["logits"].double().scatter(-1, label, float("-inf")).softmax(-1)
    kept = [place for begin, end in bounds(LENGTHS) for place in range(begin + 1, end)]
    assert kept == [1, 2, 5, 6, 7]
    assert (gradient[kept] - (p - q)[kept] / 5).abs().max() < 1e-6


def test_the_first_labels_of_each_row_have_no_gradient():
    for skip, silent in ((1, [0, 3, 4]), (2, [0, 1, 3, 4, 5]), (4, list(range(8)))):
        _, gradient = value_and_gradient(CEU(skip=skip), drawn(), "logits")
        assert (gradient.abs().sum(-1) == 0).nonzero().flatten().tolist() == silent


def test_a_row_of_no_more_labels_than_are_skipped_adds_nothing():
    """Rows of 3, 1 and 4 labels: without the one of 1 label the step is the same, in value and in the others' gradients."""
    values = drawn()
    without = {name: tensor[[0, 1, 2, 4, 5, 6, 7]] for name, tensor in values.items() if name != "reference_sums"}
    whole, part = (
        value_and_gradient(CEU(), values, "logits"),
        value_and_gradient(CEU(), without, "logits", (3, 4)),
    )
    assert whole[0].item() == pytest.approx(part[0].item(), abs=1e-7)
    assert torch.allclose(whole[1][[0, 1, 2, 4, 5, 6, 7]], part[1], atol=1e-8)


def test_a_step_of_such_rows_alone_is_zero_and_has_a_zero_gradient():
    value, gradient = value_and_gradient(CEU(), two_words(3), "logits", (1, 1, 1))
    assert value.item() == 0.0
    assert not gradient.any()


def test_micro_batches_add_up_to_the_step():
    """Also where one micro-batch is the row that adds nothing."""
    for skip in (0, 1, 3):
        assert apart_in_parts(CEU(skip=skip), "logits") < 1e-5
