"""FedOSD in whole runs: the step and the repair, measured on the tensors that clients sent as dense float64 products."""

import pytest
from helpers_runs import history
from helpers_server_methods import KEPT, ONE, apart, at_round, exported, minus, norm, products, roles, run_scales

OSD = ("method=fedosd", "trainer.federated.num_rounds=4", "trainer.federated.keep_rounds=all")


def inner(one, other):
    return sum(float((one[path] * other[path]).sum()) for path in one)


def test_fedosd_s_step_is_orthogonal_to_every_retain_update_and_as_long_as_the_forget_one(runs, works):
    """Measured on the tensors that clients sent, as dense float64 products: 4 retain updates in round 1, 2 forget updates in round 2, the step in between."""
    tuned = runs.tuned("always", *KEPT)
    works.clear()
    run = runs.unlearned("osd", tuned, *OSD)
    scales = run_scales(tuned)
    moved = [minus(products(came, scales), products(begun, scales)) for _, _, begun, came in works]
    retain, forget = moved[:4], moved[4:6]
    assert [role for _, role, _, _ in works[:6]] == ["finetune"] * 4 + ["unlearn"] * 2
    assert apart(at_round(run, 1), exported(tuned)) == 0  # held, nothing moved
    step = minus(at_round(run, 2), at_round(run, 1))
    g = {path: (forget[0][path] + forget[1][path]) / 2 for path in scales}
    assert norm(step) == pytest.approx(norm(g), rel=1e-5)
    cosines = [abs(inner(step, row)) / norm(step) / norm(row) for row in retain]
    assert max(cosines) < 1e-6
    assert max(abs(inner(g, row)) / norm(g) / norm(row) for row in retain) > 1e-3  # g itself is not
    assert inner(step, g) > 0
    said = history(run)[1]["metrics"]["fedosd/largest_cos"]
    assert said == pytest.approx(max(cosines), abs=1e-9)
    assert ["fedosd/largest_cos" in line["metrics"] for line in history(run)] == [False, True, False, False]


def test_fedosd_s_repair_uses_updates_without_their_part_along_the_way_unlearned(runs, works):
    """Round 3: each client's g loses its part along a = adapter now - adapter when unlearning began, is scaled back to ||g||, and their mean is the step."""
    tuned = runs.tuned("always", *KEPT)
    works.clear()
    run = runs.unlearned("osd_repair", tuned, *OSD)
    scales = run_scales(tuned)
    away = minus(at_round(run, 2), exported(tuned))
    wanted = dict.fromkeys(scales, 0.0)
    for _, _, begun, came in works[6:10]:
        g = minus(products(came, scales), products(begun, scales))
        left = minus(g, away, inner(g, away) / inner(away, away))
        used = {path: delta * norm(g) / norm(left) for path, delta in left.items()}
        assert abs(inner(used, away)) / norm(used) / norm(away) < 1e-10
        wanted = {path: wanted[path] + used[path] / 4 for path in scales}
    step = minus(at_round(run, 3), at_round(run, 2))
    assert apart(step, wanted) < 1e-5
    assert abs(inner(step, away)) / norm(step) / norm(away) < 1e-6


def test_fedosd_without_a_round_to_unlearn_in_is_refused(runs):
    (fault,) = runs.refused(runs.tuned("always", *KEPT), "method=fedosd", *ONE)
    assert (
        "FedOSD needs an owner of forget rows at work in round 2, and trainer.federated.num_rounds=1 ends before"
        in fault
    )


def test_fedosd_asks_everyone_before_repair_however_few_are_drawn(runs):
    """One client of four is drawn, yet the direction is orthogonal to an update of each; in repair the draw acts again."""
    tuned = runs.tuned("always", *KEPT)
    run = runs.unlearned(
        "osd_few", tuned, "method=fedosd", "trainer.federated.num_train_clients=1", "trainer.federated.num_rounds=3"
    )
    assert [len(roles(run, number)) for number in (1, 2, 3)] == [4, 4, 1]


def test_fedosd_goes_with_factors_trained_in_turn(runs):
    """Retain updates of round 1 are of B, forget updates of round 2 of A: both are products."""
    tuned = runs.tuned("always", *KEPT)
    run = runs.unlearned("osd_rolora", tuned, "method=fedosd", "aggregation=rolora", "trainer.federated.num_rounds=3")
    assert history(run)[1]["metrics"]["fedosd/largest_cos"] < 1e-6


@pytest.mark.parametrize(
    "setting", ["strategy=fedadam", "robust=norm_clipping", "aggregation=flora", "aggregation=fedrot"]
)
def test_what_would_have_no_effect_beside_fedosd_s_own_steps_is_refused(runs, setting):
    (fault,) = runs.refused(runs.tuned("always", *KEPT), "method=fedosd", setting)
    assert "beside method FedOSD, which makes every step itself" in fault
