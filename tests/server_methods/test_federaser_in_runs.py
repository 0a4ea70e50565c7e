"""FedEraser in whole runs: which rounds it replays, with what, and how long the new updates are, measured as products."""

import pytest
import torch
from helpers_runs import adapter_tensors, history, tiny
from helpers_server_methods import KEPT, LATE, REPLAY, apart, at_round, hashes, minus, norm, products, roles, run_scales

from fedunlearn.aggregation.factors import modules_of
from fedunlearn.data.ownership import FILE, owned_rows, read_partition
from fedunlearn.data.requests import write_request
from fedunlearn.doors.prepare import prepare
from fedunlearn.federation.launchers import launch
from fedunlearn.federation.ledger import Ledger
from fedunlearn.federation.start import save_start
from fedunlearn.records.requests import Request

OWN = ("ledger.enabled=true", "ledger.purge=false")


def replay_for_nobody(runs, name, tuned, *overrides):
    """FedEraser's run with its request taken out of the folder before the rounds begin: all clients keep all rows, there is no target."""
    named = f"model.model_args.pretrained_model_name_or_path={tuned}"
    composed = tiny(runs.pocket, runs.saves, "unlearn", name, *REPLAY, named, "method=federaser", *overrides)
    prepared = prepare(composed)
    write_request(prepared.folder, Request())
    nobody = owned_rows("forget_and_retain", read_partition(prepared.folder / FILE), Request())
    save_start(prepared.folder, prepared.start, nobody)
    launch(prepared.run.launcher, composed.plain)
    return prepared.folder


@pytest.mark.parametrize("joins", [(), LATE], ids=["always", "late"])
def test_federaser_of_nobody_at_ratio_1_and_interval_1_is_the_run_itself(runs, joins):
    """Where the reducer is exact: new directions are the old ones, so are the lengths, round after round."""
    name = f"flex{len(joins)}"
    tuned = runs.tuned(name, *KEPT, "aggregation=flexlora", *joins)
    again = replay_for_nobody(
        runs, f"again_{name}", tuned, "aggregation=flexlora", "method.ratio=1", "method.interval=1", *joins
    )
    for number in range(1, 5):
        assert apart(at_round(again, number), at_round(tuned, number)) < 1e-6
    assert apart(at_round(again, 4), at_round(tuned, 3)) > 1e-2


def test_federaser_of_nobody_at_another_ratio_or_after_fedit_is_not(runs):
    """The test above can fail: half of two epochs is another update, and FedIT's mean of factors is no best rank r."""
    two = ("aggregation=flexlora", "trainer.args.num_train_epochs=2")
    flex = runs.tuned("flex_two", *KEPT, *two)
    half = replay_for_nobody(runs, "half", flex, *two, "method.ratio=0.5", "method.interval=1")
    assert apart(at_round(half, 1), at_round(flex, 1)) < 1e-6  # as they were
    assert apart(at_round(half, 2), at_round(flex, 2)) > 1e-3
    fedit = replay_for_nobody(runs, "fedit", runs.tuned("always", *KEPT), "method.ratio=1", "method.interval=1")
    assert apart(at_round(fedit, 1), at_round(runs.tuned("always"), 1)) > 1e-4


def test_federaser_s_first_round_is_the_others_old_updates_and_later_ones_are_as_long_as_the_old(runs):
    """interval 2 of 4 rounds: rounds 1 and 3 again. Round 1: the mean of clients 0, 1, 2's old products, cut to rank 4, nobody works. The other
    has ||U_old|| of round 3: what it moves by is no longer than the mean of these lengths."""
    tuned = runs.tuned("always", *KEPT)
    again = runs.unlearned("eraser", tuned, *REPLAY, "method=federaser", "requests=[{client: 3}]")
    assert list(hashes(again)) == [1, 2]
    assert set(roles(again, 1).values()) == {"idle"}
    assert [c["weight"] for c in history(again)[0]["clients"]] == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert {k for k, role in roles(again, 2).items() if role == "finetune"} == {0, 1, 2}
    ledger, scales = Ledger(tuned), run_scales(tuned)
    first = [e for e in ledger.entries() if e.kind == "update" and e.round == 1 and e.client_id != 3]
    mean = dict.fromkeys(scales, 0.0)
    for entry in first:
        mean = {path: mean[path] + delta / 3 for path, delta in products(ledger.read(entry), scales).items()}
    for path, got in at_round(again, 1).items():
        u, s, vt = torch.linalg.svd(mean[path])
        best = u[:, :4] * s[:4] @ vt[:4]
        assert float((got - best).norm() / best.norm()) < 1e-6
    third = [e for e in ledger.entries() if e.kind == "update" and e.round == 3 and e.client_id != 3]
    step, exact = minus(at_round(again, 2), at_round(again, 1)), history(again)[1]["aggregation_error"]
    for path, moved in step.items():
        assert float(moved.norm()) < sum(e.norms[path] / 3 for e in third) + exact * norm(at_round(again, 2))


def test_federaser_s_own_ledger_keeps_what_was_trained_in_the_round_that_is_replayed(runs):
    """RoLoRA trains B in odd rounds: the replay's second round is round 3 again, and trains B as that did."""
    tuned = runs.tuned("rolora", *KEPT, "aggregation=rolora")
    again = runs.unlearned(
        "eraser_rolora", tuned, *REPLAY, "aggregation=rolora", "ledger.enabled=true", "method=federaser"
    )
    ledger, names = Ledger(again), {}
    for entry in (e for e in ledger.entries() if e.kind == "update" and e.weight > 0):
        names.setdefault(entry.round, set()).update(ledger.read(entry))
    assert names[2] == {m.b for m in modules_of(adapter_tensors(again))}


def test_federaser_replays_an_owner_with_its_retain_rows_at_its_old_length(runs):
    tuned = runs.tuned("always", *KEPT)
    again = runs.unlearned("eraser_rows", tuned, *REPLAY, "method=federaser", "requests=[{authors: [19]}]")
    assert {k: c["weight"] > 0 for c in history(again)[0]["clients"] for k in [c["client_id"]]} == {
        0: True,
        1: True,
        2: True,
        3: False,
    }
    second = {c["client_id"]: c for c in history(again)[1]["clients"]}
    assert second[3]["role"] == "finetune"
    assert second[3]["num_trained"] == 16
    assert second[0]["num_trained"] == 20


def test_federaser_s_ratio_rounds_up_to_whole_epochs(runs):
    """Half of one epoch is one; half of three is two: 20 rows at 8 a step are 3 steps an epoch."""
    for epochs, steps in ((1, 3), (3, 6)):
        args = (f"trainer.args.num_train_epochs={epochs}",)
        tuned = runs.tuned(f"epochs{epochs}", *KEPT, *args)
        again = runs.unlearned(f"eraser{epochs}", tuned, *REPLAY, *args, "method=federaser", "requests=[{client: 3}]")
        assert {c["num_steps"] for c in history(again)[1]["clients"] if c["role"] == "finetune"} == {steps}


def test_federaser_keeps_a_ledger_of_its_own(runs):
    tuned = runs.tuned("always", *KEPT)
    again = runs.unlearned("eraser_kept", tuned, *REPLAY, *OWN, "method=federaser", "requests=[{client: 3}]")
    assert [e.kind for e in Ledger(again).entries()][:2] == ["parent", "global"]
