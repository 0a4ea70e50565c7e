"""Clients' own scores of the global adapter: what they are, how they are weighed, that training never sees them, and what a bad one costs."""

import pytest
from helpers_runs import adapter_bytes, finetune, history, tiny, unlearn

from fedunlearn.doors.stages import run_federated
from fedunlearn.errors import UserError
from fedunlearn.federation import client_app
from fedunlearn.federation.site import OwnScores, Site

EVERY = ("eval.clients_every_n_rounds=1", "eval.client_rows=3", "trainer.federated.num_rounds=3")
ALL = ("eval.clients_every_n_rounds=1", "eval.client_rows=null")


@pytest.mark.parametrize(
    "more",
    [(), ("launcher.isolate=true",), ("aggregation=flora",), ("aggregation=rolora",), ("aggregation=hetlora", "partition.ranks=[4,2,2,1]")],
    ids=["local", "isolate", "sidecar", "halves", "ranks"],
)  # fmt: skip
def test_it_changes_no_byte_of_the_result_and_stands_in_history(pocket, saves, more):
    plain = finetune(pocket, saves, "plain", "trainer.federated.num_rounds=3", *more)
    seen = finetune(pocket, saves, "seen", *EVERY, *more)
    assert adapter_bytes(seen) == adapter_bytes(plain)
    for line in history(seen):
        told = line["by_clients"]
        assert [one["client_id"] for one in told["clients"]] == [0, 1, 2, 3]
        assert all(one["num_retain"] == 3 and not one["reason"] and one["bytes_up"] > 0 for one in told["clients"])
        assert told["figures"]["forget_prob"] is None
        assert 0 < told["figures"]["retain_prob"] < 1
    assert {line["by_clients"] for line in history(plain)} == {None}
    apart = ("by_clients", "seconds", "parts", "clients")
    seen_lines, plain_lines = (
        [{k: v for k, v in line.items() if k not in apart} for line in history(run)] for run in (seen, plain)
    )
    assert seen_lines == plain_lines


def test_the_mean_by_examples_is_that_of_the_evaluation_of_all_rows(pocket, saves):
    """Every row of full belongs to somebody: the clients' mean over all of them is the mean over full, forget and retain apart."""
    tuned = finetune(pocket, saves, "ft")
    run = unlearn(pocket, saves, tuned, "un", *ALL, "eval.every_n_rounds=1", "eval.round_rows=null")
    for line in history(run):
        assert line["by_clients"]["figures"]["forget_prob"] == pytest.approx(
            line["evaluation"]["forget_Q_A_Prob"], abs=1e-5
        )
        counts = [one["num_forget"] for one in line["by_clients"]["clients"]]
        assert sum(counts) == len(set(range(8)))  # two of twenty authors, four rows each
        clients = line["by_clients"]["clients"]
        mean = sum(one["num_retain"] * one["retain_prob"] for one in clients) / sum(
            one["num_retain"] for one in clients
        )
        assert line["by_clients"]["figures"]["retain_prob"] == pytest.approx(mean, rel=1e-12)


def test_only_clients_that_are_there_are_asked(pocket, saves):
    run = finetune(pocket, saves, "ft", *EVERY, "partition.joins={3: 3}")
    asked = [[one["client_id"] for one in line["by_clients"]["clients"]] for line in history(run)]
    assert asked == [[0, 1, 2], [0, 1, 2], [0, 1, 2, 3]]


LIES = {
    "nan": ({"retain_prob": float("nan")}, "nan"),
    "more than 1": ({"retain_prob": 1.5}, "loss"),
    "below 0": ({"retain_loss": -1.0}, "loss"),
    "other rows": ({"num_retain": 1000}, "num_examples"),
    "a loss of no rows": ({"forget_loss": 1.0}, "loss"),
    "a probability of no rows": ({"forget_prob": 0.5}, "loss"),
}


@pytest.mark.parametrize("name", LIES)
def test_an_impossible_score_is_told_and_left_out_of_the_mean(pocket, saves, monkeypatch, name):
    lie, reason = LIES[name]
    real = Site.scores

    def scores(self, client, *rest):
        said = real(self, client, *rest)
        return OwnScores(**{**vars(said), **lie}) if client == 2 else said

    monkeypatch.setattr(Site, "scores", scores)
    run = finetune(pocket, saves, "lied", *EVERY)
    monkeypatch.setattr(Site, "scores", real)
    for line in history(run):
        told = line["by_clients"]
        assert [one["reason"] for one in told["clients"]] == ["", "", reason, ""]
        others = [one for one in told["clients"] if not one["reason"]]
        mean = sum(one["num_retain"] * one["retain_prob"] for one in others) / sum(one["num_retain"] for one in others)
        assert told["figures"]["retain_prob"] == pytest.approx(mean)
    assert adapter_bytes(run) == adapter_bytes(finetune(pocket, saves, "plain", "trainer.federated.num_rounds=3"))


def test_one_that_raises_costs_its_own_score(pocket, saves, monkeypatch):
    real = client_app._evaluate

    def evaluate(site, client, content):
        if client == 1:
            raise RuntimeError("no")
        return real(site, client, content)

    monkeypatch.setattr(client_app, "_evaluate", evaluate)
    run = finetune(pocket, saves, "ft", *EVERY)
    assert [one["reason"] for one in history(run)[0]["by_clients"]["clients"]] == ["", "crashed", "", ""]


def test_parts_that_a_client_lost_are_sent_again(pocket, saves, monkeypatch):
    """flora's side-car blocks are kept by clients; in round 2 client 0 has lost them."""
    import shutil

    real, lost = client_app._evaluate, []

    def evaluate(site, client, content):
        if client == 0 and not lost:
            shutil.rmtree(saves / "cache" / "clients" / "0", ignore_errors=True)
            lost.append(1)
        return real(site, client, content)

    monkeypatch.setattr(client_app, "_evaluate", evaluate)
    run = finetune(pocket, saves, "ft", *EVERY, "aggregation=flora")
    assert all(not one["reason"] for line in history(run) for one in line["by_clients"]["clients"])


@pytest.mark.parametrize("key", ["clients_every_n_rounds", "client_rows"])
def test_numbers_without_sense_are_refused(pocket, saves, key):
    with pytest.raises(UserError, match=f"eval.{key}=0 must be at least 1 or null"):
        run_federated(tiny(pocket, saves, "finetune", "x", f"eval.{key}=0"))
