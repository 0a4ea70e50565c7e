"""What the server's weights make of whole runs: who counts, who is told to count for more than the cap, and where nobody unlearned."""

import re
from dataclasses import replace

import pytest
from helpers_components import HERE
from helpers_runs import finetune, history, tiny, unlearn
from helpers_strategies import HERE as STRATEGIES

from fedunlearn.doors.prepare import prepare
from fedunlearn.errors import UserError
from fedunlearn.federation import site

ONE = "trainer.federated.num_rounds=1"
ROBIN = "partition=round_robin"  # clients 2 and 3 own the forget rows


def test_weights_by_norm_where_only_one_client_moves_end_no_run(pocket, saves, monkeypatch):
    """HetLoRA from a fresh adapter, B = 0: three that send back what they were sent hold a product of 0 and share what the cap leaves."""
    real = site.Site.work

    def work(self, task, owned, weights, reference, charges, released=()):
        done = real(self, task, owned, weights, reference, charges, released)
        same = {name: weights.factors[name] for name in done.tensors}
        return done if task.client_id == 0 else replace(done, tensors=same)

    monkeypatch.setattr(site.Site, "work", work)
    (line,) = history(finetune(pocket, saves, "ft", "aggregation=hetlora", ONE))
    assert [client["weight"] for client in line["clients"]] == pytest.approx([0.5, 1 / 6, 1 / 6, 1 / 6])
    assert line["notes"] == ["gate.max_client_share=0.5 holds down clients 0"]


def test_a_note_says_who_counts_for_more_than_the_cap(pocket, saves, caplog):
    run = finetune(pocket, saves, "ft", f"robust._target_={HERE}.First", ONE)
    (line,) = history(run)
    assert [client["weight"] for client in line["clients"]] == [1, 0, 0, 0]
    note = "gate.max_client_share=0.5 is passed by clients 0 (1): it acts before robust First, which weighs them anew"
    assert line["notes"] == [note]
    assert f"round 1: {note}" in caplog.text
    free = finetune(pocket, saves, "free", f"robust._target_={HERE}.First", "gate.max_client_share=null", ONE)
    assert history(free)[0]["notes"] == []


def test_owners_that_worked_and_never_counted_are_told_apart_from_owners_that_were_never_drawn(pocket, saves):
    said = (
        "nobody unlearned: owners of forget rows were drawn and gave usable updates, but robust First gave none of them any weight in any round. "
        "Choose robust=off or one that keeps more updates, or raise trainer.federated.num_rounds, and start anew with overwrite=true"
    )
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        unlearn(pocket, saves, None, "un", ROBIN, f"robust._target_={HERE}.First")
    assert {client["reason"] for line in history(saves / "unlearn" / "un") for client in line["clients"]} == {""}


def test_owners_that_a_flower_strategy_leaves_out_are_told_apart_too(pocket, saves):
    said = rf"nobody unlearned: owners of forget rows were drawn, but strategy {STRATEGIES}\.Leaving left them out of every round"
    with pytest.raises(UserError, match=said):
        unlearn(pocket, saves, None, "un", ROBIN, f"strategy._target_={STRATEGIES}.Leaving")


def test_a_strategy_that_averages_by_losses_is_refused_for_unlearning_before_anything_is_written(pocket, saves):
    q = ("strategy._target_=flwr.serverapp.strategy.QFedAvg", "strategy.client_learning_rate=0.1")
    said = r"strategy flwr\.serverapp\.strategy\.QFedAvg averages by training losses, which unlearning may drive below 0: choose another"
    with pytest.raises(UserError, match=said):
        tiny(pocket, saves, "unlearn", "un", *q)
    assert not saves.exists()
    assert tiny(pocket, saves, "finetune", "ft", *q).run.strategy.reads_losses
    assert not tiny(
        pocket, saves, "unlearn", "un", "strategy._target_=flwr.serverapp.strategy.FedAvg"
    ).run.strategy.reads_losses


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("few", "reweigh gives 3 weights for 4 updates; allowed: one each"),
        (
            "not_a_number",
            r"reweigh gives the weights nan, 0\.25, 0\.25, 0\.25 and 0 for the old adapter; allowed: finite numbers of sum 1",
        ),
        ("endless", "reweigh gives the weights inf"),
        ("sum", r"reweigh gives the weights 0\.5, 0\.5, 0\.5, 0\.5 and 0 for"),
        ("old", r"reweigh gives the weights 0\.25, 0\.25, 0\.25, 0\.25 and 0\.5 for"),
        ("list", "reweigh gives a list; allowed: a Weighting"),
        ("raises", r"RuntimeError\('out of ideas'\)"),
    ],
)
def test_robust_weights_that_are_none_end_the_run_with_the_reason(pocket, saves, how, said):
    with pytest.raises(
        UserError, match=rf"^robust OddRobust, round 1: {said}.*; correct it, or choose another \(robust=off\)$"
    ):
        finetune(pocket, saves, "ft", f"robust._target_={HERE}.OddRobust", f"robust.how={how}")
    assert not list((saves / "finetune" / "ft" / "rounds").glob("0*"))
    assert history(saves / "finetune" / "ft") == []


def test_weights_that_are_numbers_of_another_kind_count(pocket, saves):
    run = finetune(pocket, saves, "ft", f"robust._target_={HERE}.OddRobust", "robust.how=tensors", ONE)
    assert [client["weight"] for client in history(run)[0]["clients"]] == [0.25] * 4


def test_a_launcher_that_nobody_can_start_is_refused_before_anything_is_written(pocket, saves):
    with pytest.raises(
        UserError, match=rf"launcher\._target_='{HERE}\.Nowhere' is a record without a launcher: choose launcher=local"
    ):
        prepare(tiny(pocket, saves, "finetune", "ft", f"launcher={{_target_: {HERE}.Nowhere}}"))
    assert not saves.exists()


def test_a_trimmed_mean_of_too_few_says_that_it_is_a_plain_one(pocket, saves, monkeypatch):
    """A quarter of four is one at each end; one that crashes leaves three, of which it is none."""
    real = site.Site.work

    def work(self, task, owned, weights, reference, charges, released=()):
        if task.client_id == 0 and len(calls) == 1:
            raise RuntimeError("no memory left")
        calls.extend([task] if task.client_id == 0 else [])
        return real(self, task, owned, weights, reference, charges, released)

    calls = []
    monkeypatch.setattr(site.Site, "work", work)
    trimmed = (
        "aggregation=ffa",
        "aggregation.reducer=trimmed_mean",
        "aggregation.trim=0.25",
        "aggregation.weights=uniform",
    )
    first, second = history(finetune(pocket, saves, "ft", *trimmed))
    assert first["notes"] == []
    assert second["notes"] == ["aggregation.trim=0.25 leaves out nobody of 3 updates: the mean is a plain one"]


@pytest.mark.parametrize("lost", [3, None])
def test_an_owner_that_never_counted_while_another_did_is_told(pocket, saves, monkeypatch, caplog, lost):
    real = site.Site.work

    def work(self, task, *rest):
        if task.client_id == lost:
            raise RuntimeError("no")
        return real(self, task, *rest)

    monkeypatch.setattr(site.Site, "work", work)
    few = (
        ROBIN,
        "trainer.federated.num_rounds=2",
        "trainer.federated.min_clients=2",
        "trainer.federated.max_retries=0",
    )
    assert history(unlearn(pocket, saves, None, "un", *few))
    told = "clients [3] own forget rows and counted in no round: nothing of theirs was unlearned"
    assert (told in caplog.text) == (lost == 3)
    assert ("counted in no round" in caplog.text) == (lost == 3)
