"""RMU: by hand, against a slow formula, its target, its block, over micro-batches, and beside the common implementation."""

import pytest
import torch
from helpers_losses import (
    LENGTHS,
    SEED,
    SIZE,
    apart_from_slow,
    apart_in_parts,
    batch_of,
    bounds,
    drawn,
    value_and_gradient,
)

from fedunlearn.errors import UserError
from fedunlearn.methods.retain import retain_loss
from fedunlearn.methods.rmu import RMU
from fedunlearn.methods.tokens import StepTotals


def slow(to):
    """mean_i (1 / T_i) sum_t (1 / d) sum_k (h_itk - c_k)^2; to: a row's dict and a place -> c."""

    def loss(rows):
        total = 0.0
        for row in rows:
            of_row = 0.0
            for place, hidden in enumerate(row["hidden"]):
                c = to(row, place)
                of_row = of_row + sum((h - c[k]) ** 2 for k, h in enumerate(hidden)) / len(hidden)
            total = total + of_row / len(row["hidden"])
        return total / len(rows)

    return loss


@pytest.mark.parametrize("steering", [0.5, 2.0, 20.0])
def test_value_and_gradient_equal_the_slow_formula(steering):
    method = RMU(steering=steering)
    target = method.target(SIZE, SEED).double()
    assert apart_from_slow(method, slow(lambda *_: target), "hidden") < 1e-5


def test_the_retain_term_equals_the_slow_formula():
    wanted = slow(lambda row, place: row["reference_hidden"][place])
    assert apart_from_slow(RMU(), wanted, "hidden", term="retain_loss") < 1e-5


def test_two_tokens_by_hand():
    """d = 1: u / ||u|| = 1, c = 2; h = 1 and 3: S = 1 + 1, F = 2 / 2 = 1; gradient 2 (h - c) / T = -1 and 1."""
    value, gradient = value_and_gradient(RMU(), {"hidden": torch.tensor([[1.0], [3.0]])}, "hidden", (2,))
    assert value.item() == pytest.approx(1.0, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([-1.0, 1.0], abs=1e-6)


def test_the_mean_is_over_a_row_s_labels_then_over_rows_and_dimensions():
    """d = 2, c = 0 through the retain term. Row 1: one token (2, 0), S/T = 4/2 = 2. Row 2: (2, 2) and (0, 0): (4 + 0) / 2 = 2. F = 2, not (2 + 4 + 0) / 3.

    Gradient 2 h / (d T B): 1 for row 1's 2, and 1/2 for those of row 2.
    """
    hidden = torch.tensor([[2.0, 0.0], [2.0, 2.0], [0.0, 0.0]])
    values = {"hidden": hidden, "reference_hidden": torch.zeros(3, 2)}
    value, gradient = value_and_gradient(RMU(), values, "hidden", (1, 2), term="retain_loss")
    assert value.item() == pytest.approx(2.0, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([1.0, 0.0, 0.5, 0.5, 0.0, 0.0], abs=1e-6)


def test_at_its_target_it_is_0_without_gradient():
    target = RMU().target(SIZE, SEED).expand(8, SIZE)
    value, gradient = value_and_gradient(RMU(), {"hidden": target}, "hidden")
    assert value.item() == 0.0
    assert not gradient.any()


def test_at_the_reference_the_retain_term_is_0_without_gradient():
    hidden = drawn()["hidden"]
    values = {"hidden": hidden, "reference_hidden": hidden.clone()}
    value, gradient = value_and_gradient(RMU(), values, "hidden", term="retain_loss")
    assert value.item() == 0.0
    assert not gradient.any()


class TestTarget:
    def test_it_is_steering_long_and_its_entries_are_not_negative(self):
        """u is uniform on [0, 1): no entry is below 0, and with 4096 of them some are near 0 and near the largest."""
        target = RMU(steering=3.0).target(4096, 0)
        assert target.norm().item() == pytest.approx(3.0, rel=1e-5)
        assert (target >= 0).all()
        u = target / target.max()
        assert u.min() < 0.01
        assert u.mean().item() == pytest.approx(0.5, abs=0.03)
        assert target.dtype == torch.float32

    def test_it_comes_from_the_run_s_seed_alone(self):
        torch.manual_seed(1)
        first = RMU().target(SIZE, 4)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        assert torch.equal(RMU().target(SIZE, 4), first)
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(RMU().target(SIZE, 5), first)

    def test_it_is_the_same_at_every_call_of_the_loss(self):
        """Two steps of other rows are drawn to one and the same c: the gradient tells it, c = h - gradient d T B / 2."""
        found = []
        for seed in (0, 1):
            values = drawn(seed, (1,))
            _, gradient = value_and_gradient(RMU(), values, "hidden", (1,))
            found.append(values["hidden"] - gradient * SIZE / 2)
        assert torch.allclose(found[0], found[1], atol=1e-6)
        assert torch.allclose(found[0][0], RMU().target(SIZE, SEED), atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "blocks", "chosen"),
    [(None, 16, 7), (None, 32, 7), (None, 14, 7), (None, 5, 2), (None, 1, 0), (3, 4, 3), (0, 4, 0)],
)
def test_which_block(layer, blocks, chosen):
    """null: the smaller of 7 and half the blocks; else the block itself, the last one included."""
    assert RMU(layer=layer).hidden_layer(blocks) == chosen


@pytest.mark.parametrize("layer", [4, 7])
def test_a_block_the_model_lacks_is_refused(layer):
    with pytest.raises(UserError, match=rf"method\.layer={layer} of RMU: the model has blocks 0 to 3"):
        RMU(layer=layer).hidden_layer(4)


@pytest.mark.parametrize("term", ["nll", "kl"])
def test_a_retain_term_at_the_model_s_end_is_the_usual_one(term):
    values = drawn()
    leaf = "nll" if term == "nll" else "logits"
    found = value_and_gradient(RMU(retain=term), values, leaf, term="retain_loss")

    class Usual:
        def retain_loss(self, batch, totals):
            return retain_loss(term, batch, totals)

    wanted = value_and_gradient(Usual(), values, leaf, term="retain_loss")
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_micro_batches_add_up_to_the_step():
    assert apart_in_parts(RMU(), "hidden") < 1e-5
    assert apart_in_parts(RMU(), "hidden", term="retain_loss") < 1e-5


def common(hidden, target, lengths):
    """The common implementation: S of shape [B] over T of shape [B, 1] is a B x B table, of which the mean is taken."""
    sums = torch.stack([(hidden[begin:end] - target).square().mean(-1).sum() for begin, end in bounds(lengths)])  # [B]
    counts = torch.tensor(lengths)[:, None]  # [B, 1]
    return (sums / counts).mean()


def test_the_common_implementation_divides_every_row_by_every_row_s_length():
    """d = 1, c = 2. Row 1: h = 4, S = 4, T = 1. Row 2: h = 1, 3, S = 2, T = 2. Ours: (4 + 1) / 2 = 5/2.

    Theirs: mean of 4/1, 2/1, 4/2, 2/2 = 9/4; gradient of row 1 is 2 (h - c) (1/1 + 1/2) / 4 = 3/2 there, 2 here.
    """
    hidden = torch.tensor([[4.0], [1.0], [3.0]])
    value, gradient = value_and_gradient(RMU(), {"hidden": hidden}, "hidden", (1, 2))
    leaf = hidden.clone().requires_grad_()
    theirs = common(leaf, torch.tensor([2.0]), (1, 2))
    theirs.backward()
    assert value.item() == pytest.approx(5 / 2, abs=1e-6)
    assert theirs.item() == pytest.approx(9 / 4, abs=1e-6)
    assert gradient[0].item() == pytest.approx(2.0, abs=1e-6)
    assert leaf.grad[0].item() == pytest.approx(1.5, abs=1e-6)


def test_both_are_one_at_a_single_row_and_where_all_rows_are_as_long():
    for lengths in ((4,), (2, 2, 2)):
        hidden = drawn(3, lengths)["hidden"]
        value, _ = value_and_gradient(RMU(), {"hidden": hidden}, "hidden", lengths)
        theirs = common(hidden, RMU().target(SIZE, SEED), lengths)
        assert value.item() == pytest.approx(theirs.item(), abs=1e-6)
    whole = value_and_gradient(RMU(), {"hidden": drawn()["hidden"]}, "hidden")[0].item()
    assert abs(whole - common(drawn()["hidden"], RMU().target(SIZE, SEED), LENGTHS).item()) > 1e-2


def test_the_totals_seed_is_the_run_s():
    """The loss reads the seed from the step's totals: another run, another direction."""
    values, found = drawn(), []
    for seed in (0, 1):
        found.append(RMU().forget(batch_of(values, LENGTHS), StepTotals(num_labels=LENGTHS, seed=seed)).item())
    assert found[0] != found[1]
