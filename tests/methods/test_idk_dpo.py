"""IdkDPO: DPO's number with refusals as the alternates."""

import math

import pytest
import torch
from helpers_losses import PARTS
from helpers_preferences import both, slow, step

from fedunlearn.methods.dpo import DPO
from fedunlearn.methods.idk_dpo import IdkDPO


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_value_and_gradients_equal_the_slow_formula(beta):
    found, wanted = step(IdkDPO(beta=beta), *both()), slow(beta, *both())
    assert found[0].item() == pytest.approx(wanted[0], abs=1e-5)
    assert (found[1] - wanted[1]).abs().max() < 1e-5
    assert (found[2] - wanted[2]).abs().max() < 1e-5


def test_at_the_reference_by_hand():
    """Two answer tokens and a refusal of one, all as the reference has them: F = (2/0.1) ln 2, -1 a token of the answer, +1 of the refusal."""
    own = {"nll": torch.tensor([1.0, 2.0]), "reference_sums": torch.tensor([3.0])}
    refusal = {"nll": torch.tensor([5.0]), "reference_sums": torch.tensor([5.0])}
    value, mine, theirs = step(IdkDPO(), own, refusal, (2,), (1,))
    assert value.item() == pytest.approx(20 * math.log(2), abs=1e-5)
    assert [*mine.tolist(), *theirs.tolist()] == pytest.approx([-1.0, -1.0, 1.0], abs=1e-6)


def test_micro_batches_add_up_to_the_step():
    whole = step(IdkDPO(), *both(2))
    for parts in PARTS:
        for found, wanted in zip(step(IdkDPO(), *both(2), parts=parts), whole, strict=True):
            assert (found - wanted).abs().max() < 1e-5


def test_it_is_dpo_s_number_and_differs_in_where_the_alternates_come_from():
    found, wanted = step(IdkDPO(), *both()), step(DPO(), *both())
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert IdkDPO().alternates == "idk" != DPO().alternates
    assert IdkDPO().needs == DPO().needs
