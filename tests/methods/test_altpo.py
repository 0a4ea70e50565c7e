"""AltPO: DPO's number with samples of the reference as the alternates."""

import math

import pytest
import torch
from helpers_losses import PARTS
from helpers_preferences import both, slow, step

from fedunlearn.errors import UserError
from fedunlearn.methods import altpo
from fedunlearn.methods.alternates import Sampled
from fedunlearn.methods.altpo import AltPO
from fedunlearn.methods.dpo import DPO

PROMPT = "{question} Not {answer}!"


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_value_and_gradients_equal_the_slow_formula(beta):
    found, wanted = step(AltPO(beta=beta), *both()), slow(beta, *both())
    assert found[0].item() == pytest.approx(wanted[0], abs=1e-5)
    assert (found[1] - wanted[1]).abs().max() < 1e-5
    assert (found[2] - wanted[2]).abs().max() < 1e-5


def test_two_tokens_by_hand():
    """beta 1, answer 1 and 2 at its reference 3, an alternate of 1 against ln 3 + 1: margin ln 3, F = 2 ln(4/3); -1/2 a token of the answer, 1/2 of the alternate."""
    own = {"nll": torch.tensor([1.0, 2.0]), "reference_sums": torch.tensor([3.0])}
    other = {"nll": torch.tensor([1.0]), "reference_sums": torch.tensor([math.log(3) + 1.0])}
    value, mine, theirs = step(AltPO(beta=1.0), own, other, (2,), (1,))
    assert value.item() == pytest.approx(2 * math.log(4 / 3), abs=1e-6)
    assert [*mine.tolist(), *theirs.tolist()] == pytest.approx([-0.5, -0.5, 0.5], abs=1e-6)


def test_it_is_dpo_s_number_whatever_is_sampled():
    found, wanted = step(AltPO(samples=2, prompt=PROMPT), *both()), step(DPO(), *both())
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_micro_batches_add_up_to_the_step():
    whole = step(AltPO(), *both(2))
    for parts in PARTS:
        for found, wanted in zip(step(AltPO(), *both(2), parts=parts), whole, strict=True):
            assert (found - wanted).abs().max() < 1e-5


def test_what_is_set_arrives_where_it_is_sampled():
    method = AltPO(samples=3, tries=4, prompt=PROMPT, max_new_tokens=9)
    assert method.alternates == Sampled(count=3, tries=4, prompt=PROMPT, max_new_tokens=9)
    assert AltPO().alternates == Sampled(count=5, tries=20, prompt=altpo.PROMPT, max_new_tokens=100)


@pytest.mark.parametrize(
    "prompt", ["{question}", "{question} {answer} {more}", "{question} {answer} {", "{question} {answer} {}", "}{", ""]
)
def test_a_prompt_that_cannot_be_filled_in_is_refused(prompt):
    with pytest.raises(UserError, match=r"method\.prompt=.* must hold \{question\} and \{answer\} and no other braces"):
        AltPO(prompt=prompt)
    assert AltPO(prompt="{{{question}}} {answer}").alternates.prompt.format(question="a", answer="b") == "{a} b"


def test_weights_and_sampling_are_both_checked():
    with pytest.raises(UserError, match=r"method\.beta=0\.0 of AltPO must be above 0"):
        AltPO(beta=0.0)
    with pytest.raises(UserError, match=r"(?s)method\.samples=0 .*method\.tries=-1 "):
        AltPO(samples=0, tries=-1)
