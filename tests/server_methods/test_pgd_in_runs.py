"""PGD in whole runs: where the targets begin, and the ball that no step of theirs leaves."""

import pytest
import torch
from helpers_server_methods import KEPT, ONE, apart, exported, minus, norm, products, roles, run_scales, whole

from fedunlearn.federation.checkpoint import read_checkpoint
from fedunlearn.federation.ledger import Ledger
from fedunlearn.training import loop


def test_pgd_begins_at_the_others_mean_and_no_step_leaves_the_ball(runs, works, monkeypatch):
    """Each owner's start is (sum p_k x_k - p_u x_u) / (1 - p_u) of round 4, factor by factor; after each of its steps the product is within the radius, and was pulled
    there at least once."""
    radius, lengths, real = 0.05, [], loop.pull_inside
    tuned = runs.tuned("always", *KEPT)
    works.clear()
    own = run_scales(tuned)

    def measured(live, start, scales, bound):
        pulled = {name: tensor.clone() for name, tensor in live.items()}
        real(live, start, scales, bound)
        before, now, then = ({n: t.detach() for n, t in tensors.items()} for tensors in (start, live, pulled))
        lengths.append([norm(minus(products(x, own), products(before, own))) for x in (then, now)])
        assert bound == radius

    monkeypatch.setattr(loop, "pull_inside", measured)
    runs.unlearned(
        "pgd", tuned, *ONE, "method=pgd", f"method.radius={radius}", "trainer.args.per_device_train_batch_size=2"
    )
    ledger = Ledger(tuned)
    last = {e.client_id: ledger.read(e) for e in ledger.entries() if e.kind == "update" and e.round == 4}
    assert [(client, role) for client, role, _, _ in works] == [(2, "unlearn"), (3, "unlearn")]
    for _, _, begun, _ in works:
        for name, tensor in begun.items():
            mean = (last[0][name].double() + last[1][name].double()) / 2
            assert torch.equal(tensor, mean.float())
    assert len(lengths) >= 4
    assert all(now <= radius * (1 + 1e-6) for _, now in lengths)
    assert any(then > 1.01 * radius for then, _ in lengths)
    assert max(now for _, now in lengths) > 0.99 * radius


def test_pgd_has_no_ball_in_repair(runs, works):
    tuned = runs.tuned("always", *KEPT)
    works.clear()
    run = runs.unlearned("pgd_repair", tuned, "method=pgd", "method.radius=1e-6")
    assert list(roles(run, 2).values()) == ["finetune"] * 4
    scales = run_scales(tuned)
    moved = [norm(minus(products(came, scales), products(begun, scales))) for _, _, begun, came in works]
    assert max(moved[:2]) <= 1e-6 * (1 + 1e-6)
    assert min(moved[2:]) > 1e-3


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_pgd_after_a_side_car_begins_at_the_others_mean_too(runs, name):
    """Round 4's clients stand upon the side-car of round 3, which the run's last one is not any more."""
    tuned = runs.tuned(f"exact_{name}", *KEPT, f"aggregation={name}")
    ledger, scales = Ledger(tuned), run_scales(tuned)
    begun = read_checkpoint(tuned / "rounds" / "0003")
    mean = minus(whole(tuned, begun), products(begun.state.adapter, scales))
    for entry in (e for e in ledger.entries() if e.kind == "update" and e.round == 4 and e.client_id in (0, 1)):
        mean = minus(mean, products(ledger.read(entry), scales), -0.5)
    run = runs.unlearned(f"pgd_{name}", tuned, f"aggregation={name}", *ONE, "method=pgd", "method.radius=1e-7")
    assert apart(exported(run), mean) < 1e-4


def test_pgd_after_flexlora_begins_at_the_best_rank_of_the_others_product(runs):
    tuned = runs.tuned("flex", *KEPT, "aggregation=flexlora")
    ledger, scales = Ledger(tuned), run_scales(tuned)
    last = [e for e in ledger.entries() if e.kind == "update" and e.round == 4 and e.client_id in (0, 1)]
    first, second = (products(ledger.read(entry), scales) for entry in last)
    run = runs.unlearned("pgd_flex", tuned, "aggregation=flexlora", *ONE, "method=pgd", "method.radius=1e-7")
    for path, got in exported(run).items():
        u, s, vt = torch.linalg.svd((first[path] + second[path]) / 2)
        best = u[:, :4] * s[:4] @ vt[:4]
        assert float((got - best).norm() / best.norm()) < 1e-4


def test_pgd_after_another_request_is_refused(runs):
    """It begins at fine-tuning's last round, in which what the first request took is still there."""
    tuned = runs.tuned("always", *KEPT)
    first = runs.unlearned("npo_first", tuned, *ONE, "method=npo", "requests=[{authors: [18]}]")
    (fault,) = runs.refused(first, "method=pgd", "requests=[{authors: [19]}]")
    assert "npo_first', from which the adapter comes, has forgotten something since: choose another method" in fault
