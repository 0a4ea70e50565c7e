"""The gate: one update a reason code, the order in which faults are told, norms and shares by hand, and nothing touched."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedunlearn.aggregation.gate import (
    LARGEST_ENTRY,
    LARGEST_LOSS,
    Expected,
    Verdict,
    above_cap,
    cap_shares,
    check_loss,
    check_update,
    judge_change,
    judge_norms,
)
from fedunlearn.records.rounds import ClientUpdate

NAN, INF = float("nan"), float("inf")
EXPECTED = Expected(
    client_id=1,
    tensors={"a": torch.zeros(2, 3), "b": torch.zeros(3)},
    round=2,
    run_id="run",
    base_fingerprint="base",
    num_examples=20,
    max_trained=20,
)
GOOD = ClientUpdate(
    client_id=1,
    round=2,
    run_id="run",
    tensors={"a": torch.ones(2, 3), "b": torch.ones(3)},
    num_examples=20,
    num_trained=4,
    num_steps=1,
    num_tokens=9,
    seconds=0.1,
    loss=-3.0,
    base_fingerprint="base",
)


def with_tensors(**changed):
    tensors = {**GOOD.tensors, **changed}
    return replace(GOOD, tensors={name: tensor for name, tensor in tensors.items() if tensor is not None})


BAD = [
    ("stale_round", replace(GOOD, round=1), "round 1 of run run"),
    ("stale_round", replace(GOOD, round=3), "round 3 of run run"),
    ("stale_round", replace(GOOD, run_id="other"), "round 2 of run other"),
    ("stale_round", replace(GOOD, client_id=0), "client 0, round 2 of run run"),
    ("stale_round", replace(GOOD, client_id=7), "client 7, round 2 of run run"),
    ("base_mismatch", replace(GOOD, base_fingerprint="another"), "trained on the base 'another'"),
    ("base_mismatch", replace(GOOD, base_fingerprint=""), "trained on the base ''"),
    ("num_examples", replace(GOOD, num_examples=10**12), "1000000000000 owned"),
    ("num_examples", replace(GOOD, num_examples=19), "19 owned and 4 trained, 20 declared"),
    ("num_examples", replace(GOOD, num_examples=-20), "-20 owned"),
    ("num_examples", replace(GOOD, num_trained=0), "0 trained"),
    ("num_examples", replace(GOOD, num_trained=-4), "-4 trained"),
    ("num_examples", replace(GOOD, num_trained=21), "21 trained, 20 declared"),
    ("num_examples", replace(GOOD, num_examples=0), "0 owned"),
    ("num_examples", replace(GOOD, num_examples=20.0), "20.0 owned"),
    ("num_examples", replace(GOOD, num_trained=True), "True trained"),
    ("missing_key", with_tensors(b=None), "b"),
    ("missing_key", replace(GOOD, tensors={}), "a"),
    ("extra_key", with_tensors(c=torch.ones(1)), "c"),
    ("shape", with_tensors(b=torch.ones(1, 3)), "b: (1, 3) instead of (3,)"),
    ("shape", with_tensors(a=torch.ones(3, 2)), "a: (3, 2) instead of (2, 3)"),
    ("shape", with_tensors(b=torch.tensor(1.0)), "b: () instead of (3,)"),
    ("dtype", with_tensors(b=torch.ones(3).double()), "b: torch.float64 instead of torch.float32"),
    ("dtype", with_tensors(a=torch.ones(2, 3).bfloat16()), "a: torch.bfloat16 instead of torch.float32"),
    ("dtype", with_tensors(b=torch.ones(3).int()), "b: torch.int32 instead of torch.float32"),
    ("nan", with_tensors(b=torch.tensor([1.0, NAN, 1.0])), "b"),
    ("nan", with_tensors(a=torch.full((2, 3), INF)), "a"),
    ("nan", with_tensors(b=torch.tensor([1.0, -INF, 1.0])), "b"),
]


def test_a_good_update_passes():
    assert check_update(GOOD, EXPECTED) == Verdict()
    assert check_update(GOOD, EXPECTED).accepted


@pytest.mark.parametrize(("reason", "update", "detail"), BAD)
def test_a_bad_update_is_told_by_reason_and_first_offender(reason, update, detail):
    verdict = check_update(update, EXPECTED)
    assert verdict.reason == reason
    assert detail in verdict.detail
    assert not verdict.accepted


@pytest.mark.parametrize("trained", [1, 20])
def test_any_part_of_the_declared_rows_may_be_trained_on(trained):
    assert check_update(replace(GOOD, num_trained=trained), EXPECTED).accepted


def test_the_first_fault_in_order_is_told():
    """Everything at once: round, base, counts, names, values; missing before extra, shape before dtype before nan."""
    tensors = {"a": torch.full((1,), NAN).half(), "z": torch.ones(1)}
    worst = replace(GOOD, round=9, base_fingerprint="x", num_examples=0, tensors=tensors)
    reasons = [check_update(worst, EXPECTED).reason]
    worst = replace(worst, round=2)
    reasons.append(check_update(worst, EXPECTED).reason)
    worst = replace(worst, base_fingerprint="base")
    reasons.append(check_update(worst, EXPECTED).reason)
    worst = replace(worst, num_examples=20)
    reasons.append(check_update(worst, EXPECTED).reason)
    worst = replace(worst, tensors={**worst.tensors, "b": torch.ones(3)})
    reasons.append(check_update(worst, EXPECTED).reason)
    for a in (torch.full((1,), NAN).half(), torch.full((2, 3), NAN).half(), torch.full((2, 3), NAN)):
        reasons.append(check_update(replace(worst, tensors={"a": a, "b": torch.ones(3)}), EXPECTED).reason)
    told = ["stale_round", "base_mismatch", "num_examples", "missing_key", "extra_key", "shape", "dtype", "nan"]
    assert reasons == told


def test_what_a_client_says_is_told_in_short():
    """A fingerprint, a run id or a tensor name of a megabyte must not fill the history."""
    long = "x" * 10**6
    for bad in (
        replace(GOOD, base_fingerprint=long),
        replace(GOOD, run_id=long),
        with_tensors(**{long: torch.ones(1)}),
    ):
        verdict = check_update(bad, EXPECTED)
        assert not verdict.accepted
        assert len(verdict.detail) < 200


def test_one_factor_alone_is_all_that_is_expected_where_one_is_trained():
    half = replace(EXPECTED, tensors={"b": EXPECTED.tensors["b"]})
    assert check_update(with_tensors(a=None), half).accepted
    assert check_update(GOOD, half).reason == "extra_key"


def test_a_bfloat16_federation_takes_bfloat16():
    half = {name: tensor.bfloat16() for name, tensor in GOOD.tensors.items()}
    expected = replace(EXPECTED, tensors={name: tensor.bfloat16() for name, tensor in EXPECTED.tensors.items()})
    assert check_update(replace(GOOD, tensors=half), expected).accepted
    assert check_update(GOOD, expected).reason == "dtype"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_that_no_factor_of_use_has_are_told_as_a_norm(dtype):
    """Up to 1e15 whatever is multiplied, squared and summed later is still a number; beyond it is not looked into further."""
    expected = replace(EXPECTED, tensors={name: tensor.to(dtype) for name, tensor in EXPECTED.tensors.items()})

    def verdict(entry):
        tensors = {"a": torch.ones(2, 3, dtype=dtype), "b": torch.tensor([1.0, entry, 1.0]).to(dtype)}
        return check_update(replace(GOOD, tensors=tensors), expected)

    assert verdict(0.99 * LARGEST_ENTRY).accepted
    assert verdict(-0.99 * LARGEST_ENTRY).accepted
    for entry in (1.01 * LARGEST_ENTRY, -1.01 * LARGEST_ENTRY, float(torch.finfo(dtype).max)):
        assert verdict(entry).reason == "norm"
        assert verdict(entry).detail.startswith("b: an entry of ")


@pytest.mark.parametrize("update", [GOOD, *(bad for _, bad, _ in BAD)])
def test_nothing_is_modified(update):
    tensors = {name: tensor.clone() for name, tensor in update.tensors.items()}
    expected = {name: tensor.clone() for name, tensor in EXPECTED.tensors.items()}
    check_update(update, EXPECTED)
    assert update.tensors.keys() == tensors.keys()
    assert all(torch.equal(update.tensors[n].nan_to_num(), tensors[n].nan_to_num()) for n in tensors)
    assert all(torch.equal(EXPECTED.tensors[name], expected[name]) for name in expected)


# --- norms beside the others of the role


def test_a_norm_is_measured_against_the_median_of_the_others():
    """Of 40 the others are 1, 2, 3: median 2, so 40 is above 10 x 2; of 20 the bound is met, and what meets it stays."""
    odd = judge_norms({0: 1.0, 1: 2.0, 2: 3.0, 3: 40.0}, 10)
    assert odd == {3: Verdict("norm", "40 is above 10 x the others' median 2")}
    assert judge_norms({0: 1.0, 1: 2.0, 2: 3.0, 3: 20.0}, 10) == {}
    assert set(judge_norms({0: 1.0, 1: 2.0, 2: 3.0, 3: 20.001}, 10)) == {3}


def test_the_own_norm_is_not_in_the_median():
    """Three clients 1, 1, 30 at ratio 20: the others' median is 1. With its own norm in it it would be 1 too, but of 1, 30, 30 it is 15.5 and 30."""
    assert set(judge_norms({0: 1.0, 1: 1.0, 2: 30.0}, 20)) == {2}
    assert judge_norms({0: 1.0, 1: 30.0, 2: 30.0}, 20) == {}  # 30 over (1 + 30) / 2 = 15.5
    assert set(judge_norms({0: 1.0, 1: 30.0, 2: 32.0}, 2)) == {2}  # 32 over 15.5; 30 over 16.5 stays


def test_two_odd_ones_of_five_are_both_told_and_of_four_they_hide_each_other():
    """Of five each sees 1, 1, 1, 100: median 1. Of four each sees 1, 1, 100: median 1 too; of three 1, 100: median 50.5."""
    assert set(judge_norms({0: 1.0, 1: 1.0, 2: 1.0, 3: 100.0, 4: 100.0}, 10)) == {3, 4}
    assert set(judge_norms({0: 1.0, 1: 1.0, 2: 100.0, 3: 100.0}, 10)) == {2, 3}
    assert judge_norms({0: 1.0, 1: 100.0, 2: 100.0}, 10) == {}


@pytest.mark.parametrize("norms", [{}, {0: 1.0}, {0: 1.0, 1: 1e9}])
def test_below_three_nobody_is_judged(norms):
    assert judge_norms(norms, 10) == {}


def test_where_the_others_did_not_move_there_is_no_measure():
    assert judge_norms({0: 0.0, 1: 0.0, 2: 5.0}, 10) == {}
    assert judge_norms({0: 0.0, 1: 0.0, 2: 0.0}, 10) == {}


def test_an_infinite_norm_is_odd_and_makes_nobody_else_so():
    """Entries near the float32 limit are finite, their squares are summed in float64; should a norm overflow all the same it is told."""
    assert set(judge_norms({0: 1.0, 1: 1.0, 2: INF, 3: 1.0}, 10)) == {2}


# --- a loss that the server averages by


@pytest.mark.parametrize("loss", [0.0, 14.0, LARGEST_LOSS])
def test_a_loss_that_can_be_right_passes(loss):
    assert check_loss(loss).accepted


@pytest.mark.parametrize(
    ("loss", "reason"),
    [(-1e-9, "loss"), (-1e300, "loss"), (1.001e4, "loss"), (1e308, "loss"), (NAN, "nan"), (INF, "nan"), (-INF, "nan")],
)
def test_a_loss_that_cannot_be_right_is_told(loss, reason):
    assert check_loss(loss).reason == reason
    assert check_loss(loss).detail.startswith("a training loss of ")


# --- how far one goes by itself


def test_a_change_is_measured_against_what_was_sent():
    """Sent 2: up to 10 x 2 = 20 it stays, above it is told, however few others there are."""
    assert judge_change(20.0, 2.0, 10) == Verdict()
    assert judge_change(20.001, 2.0, 10) == Verdict(
        "norm", "it changed the factors by 20, above 10 x the 2 it was sent"
    )
    assert judge_change(INF, 2.0, 10).reason == "norm"


@pytest.mark.parametrize(
    ("change", "start", "ratio"), [(1e15, 2.0, None), (1e15, 0.0, 10), (0.0, 0.0, 10), (0.0, 2.0, 1e-6)]
)
def test_without_a_bound_or_a_start_nobody_is_judged_by_itself(change, start, ratio):
    assert judge_change(change, start, ratio).accepted


# --- shares held down


def test_one_share_held_down_by_hand():
    """[.7, .2, .1] with cap .5: .7 -> .5, the other .5 in proportion 2 : 1, so 1/3 and 1/6."""
    shares, held = cap_shares({0: 0.7, 1: 0.2, 2: 0.1}, 0.5)
    assert shares == pytest.approx({0: 0.5, 1: 1 / 3, 2: 1 / 6}, abs=1e-15)
    assert held == {0}


def test_who_is_pushed_above_the_cap_is_held_down_too():
    """[.6, .25, .1, .05] with cap .3: .6 -> .3, then the rest .7 : .25 / .4 is .4375, so it is held down as well; .4 left in 2 : 1."""
    shares, held = cap_shares({0: 0.6, 1: 0.25, 2: 0.1, 3: 0.05}, 0.3)
    assert shares == pytest.approx({0: 0.3, 1: 0.3, 2: 4 / 15, 3: 2 / 15}, abs=1e-15)
    assert held == {0, 1}


@pytest.mark.parametrize("weights", [{0: 1.0}, {0: 0.9, 1: 0.1}])
def test_below_three_clients_no_share_is_touched(weights):
    assert cap_shares(weights, 0.5) == (weights, frozenset())


def test_where_equal_shares_are_above_the_cap_all_become_equal():
    """Three clients, cap .2: below 1/3, which no three shares can all keep."""
    shares, held = cap_shares({0: 0.6, 1: 0.3, 2: 0.1}, 0.2)
    assert shares == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3}, abs=1e-15)
    assert held  # it acted, and says so


def test_what_is_left_over_is_shared_equally_where_nobody_else_has_a_share():
    """Weights by product norm, and only one client moved at all: .5 for it, and .25 for each of those that have 0."""
    assert cap_shares({0: 1.0, 1: 0.0, 2: 0.0}, 0.5) == ({0: 0.5, 1: 0.25, 2: 0.25}, {0})
    assert cap_shares({0: 0.6, 1: 0.4, 2: 0.0, 3: 0.0}, 0.3)[0] == pytest.approx({0: 0.3, 1: 0.3, 2: 0.2, 3: 0.2})


def test_who_counts_for_more_than_the_cap_after_all_is_named():
    """Of three, one half is the cap, of four with cap .1 a quarter is; what rounding adds is nothing."""
    assert above_cap({0: 0.0, 1: 1.0, 2: 0.0}, 0.5) == (1,)
    assert above_cap({0: 0.5 * (1 + 1e-15), 1: 0.3, 2: 0.2}, 0.5) == ()
    assert above_cap({0: 0.25, 1: 0.25, 2: 0.3, 3: 0.2}, 0.1) == (2,)
    assert above_cap({0: 1.0, 1: 0.0}, 0.5) == ()  # below three there is no cap
    assert above_cap({0: 0.0, 1: 1.0, 2: 0.0}, None) == ()


def test_what_keeps_the_cap_stays_bit_by_bit():
    weights = {0: 0.5, 1: 0.3, 2: 0.2}
    assert cap_shares(weights, 0.5) == (weights, frozenset())
    assert cap_shares(dict.fromkeys(range(3), 1 / 3), 0.2)[1] == frozenset()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    rows=st.lists(st.integers(1, 10**6), min_size=3, max_size=9),
    cap=st.floats(0.01, 1.0),
    scale=st.integers(2, 1000),
)
def test_capped_shares_sum_to_1_keep_the_order_and_know_no_scale(rows, cap, scale):
    def of(numbers):
        total = sum(numbers)
        return cap_shares({k: n / total for k, n in enumerate(numbers)}, cap)

    shares, held = of(rows)
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-12)
    assert max(shares.values()) <= max(cap, 1 / len(rows)) * (1 + 1e-9)
    ordered = [shares[k] for k in sorted(shares, key=lambda k: rows[k])]
    assert all(small <= large * (1 + 1e-9) for small, large in pairwise(ordered))
    free = [k for k in shares if k not in held]
    if free:  # those that are not held down keep their proportion
        assert all(shares[k] / shares[free[0]] == pytest.approx(rows[k] / rows[free[0]]) for k in free)
    again, still = of([scale * n for n in rows])
    assert (again, still) == (shares, held)


@pytest.mark.parametrize("cap", [0.05, 0.2, 0.5])
def test_inputs_of_norms_and_shares_are_not_modified(cap):
    weights, norms = {0: 0.7, 1: 0.2, 2: 0.1}, {0: 1.0, 1: 1.0, 2: 99.0}
    cap_shares(weights, cap)
    judge_norms(norms, 10)
    assert weights == {0: 0.7, 1: 0.2, 2: 0.1}
    assert norms == {0: 1.0, 1: 1.0, 2: 99.0}
