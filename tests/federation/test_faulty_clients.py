"""Clients that go wrong in a whole run: dropped with a reason, asked again, or an error that leaves every good round on disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers_runs import adapter_bytes, finetune, history, unlearn

from fedunlearn.errors import UserError
from fedunlearn.federation import client_app, rounds, site
from fedunlearn.federation.checkpoint import latest_checkpoint
from fedunlearn.federation.reference_store import ReferenceStore
from fedunlearn.protocols.selection import select
from fedunlearn.records.adapter import hash_tensors

ALL = "trainer.federated.min_clients=4"


@pytest.fixture(scope="module")
def tuned(pocket, tmp_path_factory):
    """A finished fine-tuning run: 4 clients, round robin; clients 2 and 3 own the forget rows."""
    return finetune(pocket, tmp_path_factory.mktemp("tuned"))


@pytest.fixture
def trained(monkeypatch):
    """Gives a call that lets `spoil` change what client 0's training gives, from round `start` on."""

    def arm(spoil, start: int = 1) -> None:
        real, calls = site.client_update, []

        def update(made, adapter, data, task, settings):
            done = real(made, adapter, data, task, settings)
            calls.extend([task] if task.client_id == 0 else [])
            return spoil(done) if task.client_id == 0 and len(calls) >= start else done

        monkeypatch.setattr(site, "client_update", update)

    return arm


@pytest.fixture
def answered(monkeypatch):
    """Gives a call that changes fields of client 0's replies, the n-th by the n-th of `changes`."""

    def arm(changes) -> None:
        real, left = client_app._reply, list(changes)

        def reply(request, num_owned, result):
            made = real(request, num_owned, result)
            return replace(made, **left.pop(0)) if made.client_id == 0 else made

        monkeypatch.setattr(client_app, "_reply", reply)

    return arm


def first(tensors):
    return min(tensors)


def with_nan(done):
    name = first(done.tensors)
    return replace(done, tensors={**done.tensors, name: torch.full_like(done.tensors[name], float("nan"))})


def with_shape(done):
    name = first(done.tensors)
    return replace(done, tensors={**done.tensors, name: done.tensors[name][:1].clone()})


def with_dtype(done):
    name = first(done.tensors)
    return replace(done, tensors={**done.tensors, name: done.tensors[name].half()})


def with_extra(done):
    return replace(done, tensors={**done.tensors, "extra": torch.zeros(1)})


def without_key(done):
    return replace(done, tensors={name: t for name, t in done.tensors.items() if name != first(done.tensors)})


def raises(done):
    raise RuntimeError("no memory left")


def reasons(run: Path) -> list[list[tuple[int, str]]]:
    """Of each round: the clients that were dropped, and why."""
    return [[(c["client_id"], c["reason"]) for c in line["clients"] if c["reason"]] for line in history(run)]


SPOILT = (
    (with_nan, "nan"),
    (with_shape, "shape"),
    (with_dtype, "dtype"),
    (with_extra, "extra_key"),
    (without_key, "missing_key"),
    (raises, "crashed"),
    (lambda done: replace(done, num_trained=0), "num_examples"),
    (lambda done: replace(done, num_trained=10**9), "num_examples"),
    (lambda done: replace(done, loss="low"), "unreadable"),
)
UNANSWERED = (
    ({"round": 99}, "stale_round"),
    ({"run_id": "another"}, "stale_round"),
    ({"client_id": 1}, "stale_round"),
    ({"num_examples": 10**9}, "num_examples"),
    ({"num_examples": -1}, "num_examples"),
    ({"num_examples": True}, "unreadable"),
)


def test_one_client_that_fails_is_dropped_with_its_reason_whatever_it_is(pocket, saves, trained):
    """Round n has the n-th fault, the last round none."""
    left = [spoil for spoil, _ in SPOILT]
    trained(lambda done: left.pop(0)(done) if left else done)
    run = finetune(pocket, saves, "ft", f"trainer.federated.num_rounds={len(SPOILT) + 1}")
    assert reasons(run) == [*([(0, reason)] for _, reason in SPOILT), []]
    weights = [{c["client_id"]: c["weight"] for c in line["clients"]} for line in history(run)]
    assert weights[:-1] == [{0: 0.0, 1: 1 / 3, 2: 1 / 3, 3: 1 / 3}] * len(SPOILT)  # 20 rows each, one of four gone
    assert set(weights[-1].values()) == {0.25}
    assert all(torch.isfinite(t).all() for t in latest_checkpoint(run).state.adapter.values())


def test_a_reply_that_does_not_answer_the_task_is_dropped(pocket, saves, answered):
    answered([changes for changes, _ in UNANSWERED])
    run = finetune(pocket, saves, "ft", f"trainer.federated.num_rounds={len(UNANSWERED)}")
    assert reasons(run) == [[(0, reason)] for _, reason in UNANSWERED]


def test_a_client_that_asks_for_a_reference_for_ever_is_dropped(pocket, saves, answered):
    answered([{"needs_reference": True}] * 4)  # asked twice a round
    assert reasons(finetune(pocket, saves)) == [[(0, "no_reference")]] * 2


def test_what_was_dropped_counts_for_nothing(pocket, saves, trained):
    """NaN and a crash of the same client leave the same global adapter: that of the three others."""
    adapters = []
    for spoil in (with_nan, raises):
        trained(spoil)
        adapters.append(adapter_bytes(finetune(pocket, saves, spoil.__name__)))
    assert adapters[0] == adapters[1]


def test_too_few_updates_are_asked_for_again_and_then_end_the_run_with_all_good_rounds_on_disk(
    pocket, saves, trained, monkeypatch
):
    whole = finetune(pocket, saves, "whole", ALL)
    trained(with_nan, start=2)
    said = r"round 2: 3 usable updates after 1 retries, .*min_clients wants 4 \(client 0: nan .*resume=true"
    with pytest.raises(UserError, match=said):
        finetune(pocket, saves, "stopped", ALL)
    monkeypatch.undo()
    stopped = saves / "finetune" / "stopped"
    assert latest_checkpoint(stopped).state.round == 1
    assert [line["round"] for line in history(stopped)] == [1]
    assert not (stopped / "adapter").exists()
    assert adapter_bytes(finetune(pocket, saves, "stopped", ALL, "resume=true")) == adapter_bytes(whole)


def test_a_client_that_fails_once_is_asked_again_and_nothing_is_lost(pocket, saves, trained):
    whole = finetune(pocket, saves, "whole", ALL)
    failed = []

    def fails_once(done):
        if not failed:
            failed.append(True)
            raise RuntimeError("once")
        return done

    trained(fails_once)
    again = finetune(pocket, saves, "again", ALL)
    assert adapter_bytes(again) == adapter_bytes(whole)
    assert [line["attempt"] for line in history(again)] == [2, 1]
    assert reasons(again) == [[], []]


@pytest.mark.parametrize("retain", ["nll", "kl"])
def test_a_client_that_lost_its_reference_asks_for_it_and_the_result_is_bit_equal(
    pocket, saves, tuned, monkeypatch, retain
):
    method = (f"method.retain={retain}", "trainer.federated.num_rounds=3")
    whole = unlearn(pocket, saves, tuned, "whole", *method)
    real = rounds.save_checkpoint

    def save_and_lose(folder, checkpoint, *rest):
        real(folder, checkpoint, *rest)
        for kept in (saves / "cache" / "clients").rglob("reference-*"):
            kept.unlink()

    monkeypatch.setattr(rounds, "save_checkpoint", save_and_lose)
    lost = unlearn(pocket, saves, tuned, "lost", *method)
    assert adapter_bytes(lost) == adapter_bytes(whole)
    assert reasons(lost) == [[], [], []]
    sent = [{c["client_id"] for c in line["clients"] if c["bytes_down_reference"]} for line in history(lost)]
    assert sent == [set(), {2, 3}, {2, 3}]  # in round 1 the global adapter is the reference


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"client_id": 1}, "two nodes say that they are client 1"),
        ({"partition_hash": "x"}, "client 0 has partition_hash='x', the server "),
        ({"base_fingerprint": "x"}, "client 0 has base_fingerprint='x', the server "),
        ({"version": "0"}, "client 0 has version='0', the server "),
    ],
)
def test_a_client_that_does_not_fit_the_run_ends_it_at_the_roll_call(pocket, saves, monkeypatch, changes, said):
    real = client_app._roll_call

    def declares(at, client):
        return replace(real(at, client), **changes) if client == 0 else real(at, client)

    monkeypatch.setattr(client_app, "_roll_call", declares)
    with pytest.raises(UserError, match=f"roll call: {said}"):
        finetune(pocket, saves)
    assert history(saves / "finetune" / "ft") == []


def test_a_loss_that_is_not_finite_never_reaches_the_history(pocket, saves, trained):
    trained(lambda done: replace(done, loss=float("nan"), loss_trace=(float("inf"), 1.0)))
    run = finetune(pocket, saves)
    assert "NaN" not in (run / "history.jsonl").read_text()
    line = history(run)[0]["clients"][0]
    assert (line["loss"], line["loss_trace"]) == (None, [1.0])
    assert json.loads((run / "done.json").read_text())["adapter_hash"]


def test_a_round_in_which_no_owner_unlearns_ends_the_run(pocket, saves):
    """The others would go on and the run would end well, with nothing forgotten: here the owners cannot keep their reference."""
    saves.mkdir()
    (saves / "cache").write_text("a file where a folder is wanted")
    with pytest.raises(UserError, match=r"round 1: no client that unlearns gave a usable update \(client 2: crashed"):
        unlearn(pocket, saves, None, "un", "trainer.federated.num_rounds=1", "partition=round_robin")


def test_a_run_that_never_drew_an_owner_is_no_unlearning(pocket, saves):
    """One client a round of four, and the owner of the last authors is not among those drawn with this seed."""
    few = ("partition=by_author", "trainer.federated.fraction_train=0.25", "trainer.federated.num_rounds=1")
    seed = next(s for s in range(50) if select(range(4), seed=s, round=1, fraction=0.25, at_least=1) != (3,))
    with pytest.raises(UserError, match=r"nobody unlearned: no owner of forget rows is drawn in any round"):
        unlearn(pocket, saves, None, "un", *few, f"trainer.args.seed={seed}")


@pytest.mark.parametrize("damage", [b"", b"no tensors here", None])
def test_a_damaged_reference_is_asked_for_anew(tmp_path, damage):
    tensors = {"a.lora_A.weight": torch.ones(2, 3)}
    blob, name = safetensors.torch.save(tensors), hash_tensors(tensors)
    store = ReferenceStore(tmp_path)
    assert store.obtain(name, []) is None
    assert store.obtain(name, [blob]).keys() == tensors.keys()
    file = tmp_path / f"reference-{name}.safetensors"
    file.write_bytes(safetensors.torch.save({"a.lora_A.weight": torch.zeros(2, 3)}) if damage is None else damage)
    assert store.obtain(name, []) is None
    assert torch.equal(store.obtain(name, [blob])["a.lora_A.weight"], torch.ones(2, 3))
    assert torch.equal(store.obtain(name, [])["a.lora_A.weight"], torch.ones(2, 3))
