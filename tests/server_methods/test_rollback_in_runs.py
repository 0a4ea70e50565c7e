"""Rollback in whole runs: bit equal to the federation that never had the target, or to the retrain."""

import pytest
from helpers_runs import adapter_bytes, history
from helpers_server_methods import FOUR, KEPT, LATE, REPLAY, hashes, roles

ORACLE = ("data=retain",)
STRATEGIES = {
    "fedavg": (),
    "fedadam": ("strategy=fedadam",),
    "flora": ("aggregation=flora",),
    "rolora": ("aggregation=rolora",),
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("target", ["stays", "gone"])
def test_rollback_of_a_late_client_is_a_federation_that_never_had_it(runs, name, target):
    """Client 3 joins in round 3 and is forgotten: rounds 1 and 2 are the run's own, 3 and 4 those of the oracle, bit by bit, moments and side-car too."""
    overrides = (*STRATEGIES[name], *LATE)
    tuned = runs.tuned(f"late_{name}", *KEPT, *overrides)
    without = runs.tuned(f"late_{name}_without", *FOUR, *overrides, *ORACLE, "requests=[{client: 3}]")
    back = runs.unlearned(
        f"back_{name}_{target}",
        tuned,
        *REPLAY,
        *overrides,
        "method=rollback",
        f"requests=[{{client: 3, target: {target}}}]",
    )
    assert list(hashes(back)) == [3, 4]
    assert hashes(back) == {number: hashes(without)[number] for number in (3, 4)}
    assert hashes(tuned)[2] == hashes(without)[2]
    assert hashes(tuned)[3] != hashes(without)[3]
    assert adapter_bytes(back) == adapter_bytes(without)
    assert roles(back, 3).get(3) is None


def test_rollback_of_one_that_was_there_from_round_1_is_the_retrain_and_says_so(runs, caplog):
    tuned = runs.tuned("always", *KEPT)
    oracle = runs.tuned("always_without", *FOUR, *ORACLE, "requests=[{client: 3}]")
    caplog.clear()
    back = runs.unlearned("back_always", tuned, *REPLAY, "method=rollback", "requests=[{client: 3}]")
    assert "the targets were there from round 1: this rollback is the retrain" in caplog.text
    assert hashes(back) == hashes(oracle)
    assert adapter_bytes(back) == adapter_bytes(oracle)


def test_rollback_of_a_late_client_says_nothing_of_a_retrain(runs, caplog):
    tuned = runs.tuned("late_fedavg", *KEPT, *LATE)
    caplog.clear()
    runs.unlearned("back_quiet", tuned, *REPLAY, *LATE, "method=rollback", "requests=[{client: 3}]")
    assert "retrain" not in caplog.text


def test_rollback_of_some_of_a_client_s_rows_is_the_retrain_too(runs):
    """Owners come back with their retain rows: they weigh what they weigh in the oracle."""
    tuned = runs.tuned("always", *KEPT)
    oracle = runs.tuned("oracle", *FOUR, *ORACLE)
    back = runs.unlearned("back_rows", tuned, *REPLAY, "method=rollback")
    weights = [
        {c["client_id"]: c["weight"] for c in line["clients"]} for run in (oracle, back) for line in history(run)
    ]
    assert weights[:4] == weights[4:]
    assert hashes(back) == hashes(oracle)


def test_a_replay_without_the_joins_of_fine_tuning_is_refused(runs):
    """Client 2 joins in round 4: without its joins the replay would have it in round 3."""
    joins = "partition.joins={2: 4, 3: 3}"
    tuned = runs.tuned("two_late", *KEPT, joins)
    faults = runs.refused(tuned, *REPLAY, "method=rollback", "requests=[{client: 3}]")
    assert any("partition.joins" in fault for fault in faults)


def test_rollback_to_a_pruned_round_is_refused_with_the_way_out_and_nothing_is_written(runs):
    """keep_rounds=2 leaves rounds 3 and 4; round 2 is wanted."""
    few = ("trainer.federated.keep_rounds=2",)
    tuned = runs.tuned("pruned", *KEPT, *LATE, *few)
    (fault,) = runs.refused(tuned, *REPLAY, *LATE, *few, "method=rollback", "requests=[{client: 3}]")
    assert f"round 2 of '{tuned.resolve()}' is wanted and was pruned" in fault
    assert "trainer.federated.keep_rounds=all" in fault


def test_rollback_of_a_whole_client_draws_as_the_oracle_does(runs):
    """Half of the clients are drawn: a client without a retain row is not there to be drawn, in the replay as in the oracle."""
    few = (*LATE, "trainer.federated.fraction_train=0.5")
    tuned = runs.tuned("late_few", *KEPT, *few)
    without = runs.tuned("late_few_without", *FOUR, *few, *ORACLE, "requests=[{client: 3}]")
    back = runs.unlearned("back_few", tuned, *REPLAY, *few, "method=rollback", "requests=[{client: 3}]")
    assert list(roles(back, 4)) == list(roles(without, 4))
    assert hashes(back)[4] == hashes(without)[4]
