"""What a server step is held to: each fault by itself, and what comes out as it is stored."""

import re

import pytest
import torch
from helpers_components import OddStep

from fedunlearn.aggregation.after_step import checked_state, not_finite
from fedunlearn.aggregation.base import ServerState
from fedunlearn.errors import UserError

BEFORE = ServerState(adapter={"a": torch.ones(2, 3), "b": torch.ones(3)}, round=4)
MEAN = {"a": torch.full((2, 3), 2.0, dtype=torch.float64), "b": torch.full((3,), 3.0, dtype=torch.float64)}
AFTER = r"Nothing of this round is kept \(everything up to round 4 is on disk\): correct the strategy and go on with resume=true, or give "


def after(how):
    return OddStep(how=how).step(BEFORE, MEAN)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("nan", "its adapter has entries in tensor 'a' that are not finite as torch.float32"),
        ("overflow", "its adapter has entries in tensor 'a' that are not finite as torch.float32"),
        ("shape", "its adapter has (1, 3) for tensor 'a'; allowed: a tensor of shape (2, 3)"),
        ("numpy", "its adapter has ndarray for tensor 'a'; allowed: a tensor of shape (2, 3)"),
        ("lacks", "its adapter lacks tensor 'a'"),
        ("extra", "its adapter has an unknown tensor 'more'"),
        ("same_round", "its step counts round=4 after 4; allowed: 5"),
        ("skips", "its step counts round=6 after 4; allowed: 5"),
        ("moment_nan", "its moment 'm' has entries in tensor 'a' that are not finite as torch.float32"),
        ("moment_shape", "its moment 'm' has (1, 3) for tensor 'a'"),
        ("moment_tensor", "its moment 'm' has an unknown tensor 'more'"),
        ("moment_other", "its moments are ['n']; allowed: ['m'], as moment_names says"),
        ("moment_empty", "its moment 'm' holds no tensor"),
        ("moment_none", "its moments are []; allowed: ['m']"),
        ("adapter_alone", "its step gives a dict; allowed: a ServerState"),
    ],
)
def test_a_state_that_cannot_be_gone_on_from_is_told_by_strategy_round_and_tensor(how, said):
    with pytest.raises(UserError, match=rf"^strategy mine\.Odd, round 5: {re.escape(said)}.*{AFTER}"):
        checked_state("mine.Odd", BEFORE, after(how), ("m",))


@pytest.mark.parametrize("how", ["", "double"])
def test_what_comes_out_is_what_is_stored(how):
    """Float64 that fits is cast; a moment of a tensor that was not trained yet may be missing."""
    state = checked_state("mine.Odd", BEFORE, after(how), ("m",))
    assert {t.dtype for t in (*state.adapter.values(), *state.moments["m"].values())} == {torch.float32}
    assert torch.equal(state.adapter["b"], torch.full((3,), 3.0))
    assert state.round == 5
    bare = ServerState(adapter=BEFORE.adapter, moments={"m": {"b": torch.ones(3)}}, round=5)
    assert set(checked_state("mine.Odd", BEFORE, bare, ("m",)).moments["m"]) == {"b"}


def test_the_first_that_is_not_finite_by_name():
    assert not_finite({"b": torch.tensor([1.0, float("inf")]), "a": torch.tensor([float("nan")])}) == "a"
    assert not_finite({"b": torch.tensor([1.0]), "n": torch.tensor([3])}) is None
