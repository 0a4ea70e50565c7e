"""The gate: one update a reason code, the order in which faults are told, and nothing touched."""

from dataclasses import replace

import pytest
import torch

from fedunlearn.aggregation.gate import Expected, Verdict, check_update
from fedunlearn.records.rounds import ClientUpdate

NAN, INF = float("nan"), float("inf")
EXPECTED = Expected(
    adapter={"a": torch.zeros(2, 3), "b": torch.zeros(3)}, round=2, run_id="run", num_examples={0: 10, 1: 20}
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
)


def with_tensors(**changed):
    tensors = {**GOOD.tensors, **changed}
    return replace(GOOD, tensors={name: tensor for name, tensor in tensors.items() if tensor is not None})


BAD = [
    ("stale_round", replace(GOOD, round=1), "round 1 of run run"),
    ("stale_round", replace(GOOD, round=3), "round 3 of run run"),
    ("stale_round", replace(GOOD, run_id="other"), "round 2 of run other"),
    ("num_examples", replace(GOOD, num_examples=10**12), "1000000000000 owned"),
    ("num_examples", replace(GOOD, num_examples=19), "19 owned and 4 trained, 20 declared"),
    ("num_examples", replace(GOOD, num_examples=-20), "-20 owned"),
    ("num_examples", replace(GOOD, num_trained=0), "0 trained"),
    ("num_examples", replace(GOOD, num_trained=-4), "-4 trained"),
    ("num_examples", replace(GOOD, num_trained=21), "21 trained, 20 declared"),
    ("num_examples", replace(GOOD, client_id=0), "20 owned and 4 trained, 10 declared"),
    ("num_examples", replace(GOOD, client_id=7), "20 owned and 4 trained, 0 declared"),
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
    """Everything at once: round before counts, counts before names, names before values; missing before extra."""
    worst = replace(GOOD, round=9, num_examples=0, tensors={"a": torch.full((1,), NAN), "z": torch.ones(1)})
    reasons = [check_update(worst, EXPECTED).reason]
    worst = replace(worst, round=2)
    reasons.append(check_update(worst, EXPECTED).reason)
    worst = replace(worst, num_examples=20)
    reasons.append(check_update(worst, EXPECTED).reason)
    worst = replace(worst, tensors={**worst.tensors, "b": torch.ones(3)})
    reasons.append(check_update(worst, EXPECTED).reason)
    worst = replace(worst, tensors={"a": torch.full((1,), NAN), "b": torch.ones(3)})
    reasons.append(check_update(worst, EXPECTED).reason)
    assert reasons == ["stale_round", "num_examples", "missing_key", "extra_key", "shape"]


def test_a_bfloat16_federation_takes_bfloat16():
    half = {name: tensor.bfloat16() for name, tensor in GOOD.tensors.items()}
    expected = replace(EXPECTED, adapter={name: tensor.bfloat16() for name, tensor in EXPECTED.adapter.items()})
    assert check_update(replace(GOOD, tensors=half), expected).accepted
    assert check_update(GOOD, expected).reason == "dtype"


def test_the_largest_finite_number_passes_for_the_gate_does_not_judge_size():
    assert check_update(with_tensors(b=torch.full((3,), torch.finfo(torch.float32).max)), EXPECTED).accepted


@pytest.mark.parametrize("update", [GOOD, *(bad for _, bad, _ in BAD)])
def test_nothing_is_modified(update):
    tensors = {name: tensor.clone() for name, tensor in update.tensors.items()}
    expected = {name: tensor.clone() for name, tensor in EXPECTED.adapter.items()}
    check_update(update, EXPECTED)
    assert update.tensors.keys() == tensors.keys()
    assert all(torch.equal(update.tensors[n].nan_to_num(), tensors[n].nan_to_num()) for n in tensors)
    assert all(torch.equal(EXPECTED.adapter[name], expected[name]) for name in expected)
