"""Clients that go wrong in a whole run: dropped with a reason, asked again, or an error that leaves every good round on disk."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers_runs import adapter_bytes, adapter_tensors, finetune, history, unlearn

from fedunlearn.errors import UserError
from fedunlearn.federation import client_app, rounds, site
from fedunlearn.federation.checkpoint import latest_checkpoint
from fedunlearn.federation.part_store import PartStore
from fedunlearn.protocols.selection import select
from fedunlearn.records.adapter import hash_tensors
from fedunlearn.reporting.console import show_result

ALL = "trainer.federated.min_clients=4"


@pytest.fixture(scope="module")
def tuned(pocket, tmp_path_factory):
    """A finished fine-tuning run: 4 clients, round robin; clients 2 and 3 own the forget rows."""
    return finetune(pocket, tmp_path_factory.mktemp("tuned"))


@pytest.fixture
def trained(monkeypatch):
    """Gives a call that lets `spoil` change what client 0 is about to send, from its n-th task on."""

    def arm(spoil, start: int = 1) -> None:
        real, calls = site.Site.work, []

        def work(self, task, owned, weights, reference, charges, released=()):
            done = real(self, task, owned, weights, reference, charges, released)
            calls.extend([task] if task.client_id == 0 else [])
            return spoil(done) if task.client_id == 0 and len(calls) >= start else done

        monkeypatch.setattr(site.Site, "work", work)

    return arm


@pytest.fixture
def answered(monkeypatch):
    """Gives a call that changes fields of client 0's replies, the n-th by the n-th of `changes`."""

    def arm(changes) -> None:
        real, left = client_app._reply, list(changes)

        def reply(*arguments, **named):
            made = real(*arguments, **named)
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


def a_million_times(done):
    return replace(done, tensors={name: 1e6 * tensor for name, tensor in done.tensors.items()})


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
    (a_million_times, "norm"),
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
    ({"num_examples": True}, "num_examples"),
    ({"num_steps": -1}, "unreadable"),
    ({"base_fingerprint": "another"}, "base_mismatch"),
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


def test_a_client_that_asks_for_parts_for_ever_is_dropped(pocket, saves, answered):
    answered([{"missing": ("0" * 64,)}] * 4)  # asked twice a round
    assert reasons(finetune(pocket, saves)) == [[(0, "missing_part")]] * 2


def test_an_update_a_million_times_too_large_is_dropped_and_named_everywhere(pocket, saves, trained, caplog, capsys):
    """In the history, in the log while it runs, in done.json and in what the door prints at the end; the others' mean is the result."""
    trained(a_million_times)
    with caplog.at_level(logging.WARNING, "fedunlearn"):
        run = finetune(pocket, saves)
    assert reasons(run) == [[(0, "norm")]] * 2
    line = history(run)[0]["clients"][0]
    assert line["detail"].startswith(f"it changed the factors by {line['factor_norm']:.3g}, above 10 x the ")
    assert (line["weight"], line["update_norm"] > 1e5) == (0.0, True)
    assert all(0 < client["factor_norm"] < 10 for client in history(run)[0]["clients"][1:])
    assert "client 0 is dropped this round: norm" in caplog.text
    dropped = json.loads((run / "done.json").read_text())["account"]["dropped"]
    assert dropped == ["client 0: norm in rounds 1, 2"]
    show_result(run, None)
    assert "did not count: client 0: norm in rounds 1, 2\n" in capsys.readouterr().out
    trained(raises)
    assert adapter_bytes(run) == adapter_bytes(finetune(pocket, saves, "without"))


def test_where_nothing_was_dropped_nothing_is_said(pocket, tuned, capsys):
    assert json.loads((tuned / "done.json").read_text())["account"]["dropped"] == []
    show_result(tuned, None)
    assert "did not count" not in capsys.readouterr().out


def test_without_a_bound_the_same_update_counts(pocket, saves, trained):
    trained(a_million_times)
    run = finetune(
        pocket, saves, "ft", "gate.max_norm_ratio=null", "gate.max_update_ratio=null", "trainer.federated.num_rounds=1"
    )
    assert reasons(run) == [[]]
    assert history(run)[0]["metrics"]["product_norm"] > 1e5


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
    said = r"round 2: 3 usable updates after 1 retries, .*min_clients .* wants 4 \(client 0: nan .*resume=true"
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
        lost = list((saves / "cache" / "clients").rglob("part-*"))
        assert lost
        for kept in lost:
            kept.unlink()

    monkeypatch.setattr(rounds, "save_checkpoint", save_and_lose)
    lost = unlearn(pocket, saves, tuned, "lost", *method)
    assert adapter_bytes(lost) == adapter_bytes(whole)
    assert reasons(lost) == [[], [], []]
    sent = [{c["client_id"] for c in line["clients"] if c["bytes_down_reference"]} for line in history(lost)]
    assert sent == [set(), {2, 3}, {2, 3}]  # in round 1 the global adapter is the reference


UNFIT = [
    ({"client_id": 1}, "2 nodes say that they are client 1", [2, 3]),
    ({"partition_hash": "x"}, "client 0 has partition_hash='x', the server ", [1, 2, 3]),
    ({"base_fingerprint": "x"}, "client 0 has base_fingerprint='x', the server ", [1, 2, 3]),
    ({"version": "0"}, "client 0 has version='0', the server ", [1, 2, 3]),
    ({"rank": 2}, "client 0 has LoRA rank 2 and alpha", [1, 2, 3]),
]


@pytest.fixture
def declared(monkeypatch):
    """Gives a call that changes what client 0 says of itself at the roll call."""

    def arm(changes) -> None:
        real = client_app._roll_call

        def declares(at, client):
            return replace(real(at, client), **changes) if client == 0 else real(at, client)

        monkeypatch.setattr(client_app, "_roll_call", declares)

    return arm


@pytest.mark.parametrize(("changes", "said", "members"), UNFIT)
def test_a_client_that_does_not_fit_the_run_is_left_out_of_it_and_named(
    pocket, saves, declared, capsys, changes, said, members
):
    """It is asked in no round and counts for nothing; roll_call.json, done.json and the end of the run name it."""
    declared(changes)
    run = finetune(pocket, saves, "ft", "trainer.federated.num_rounds=1")
    assert [client["client_id"] for client in history(run)[0]["clients"]] == members
    weights = [client["weight"] for client in history(run)[0]["clients"]]
    assert weights == pytest.approx([1 / len(members)] * len(members))
    saved = json.loads((run / "roll_call.json").read_text())
    assert list(saved["members"]) == [str(client) for client in members]
    assert any(said in fault for fault in saved["refused"])
    assert json.loads((run / "done.json").read_text())["account"]["dropped"] == saved["refused"]
    show_result(run, None)
    assert f"did not count: roll call: {said}" in capsys.readouterr().out


@pytest.mark.parametrize(("changes", "said"), [UNFIT[0][:2], UNFIT[2][:2]])
def test_it_ends_the_run_at_the_roll_call_where_all_are_wanted(pocket, saves, declared, changes, said):
    declared(changes)
    with pytest.raises(UserError, match=f"roll call: {said}") as caught:
        finetune(pocket, saves, "ft", ALL)
    assert "trainer.federated.min_clients=4 are wanted" in caught.value.faults[-1]
    assert history(saves / "finetune" / "ft") == []


def test_an_owner_of_forget_rows_that_does_not_fit_ends_the_run_at_the_roll_call(pocket, saves, tuned, monkeypatch):
    real = client_app._roll_call
    monkeypatch.setattr(client_app, "_roll_call", lambda at, k: replace(real(at, k), version="0" if k == 3 else "1"))
    monkeypatch.setattr("fedunlearn.__version__", "1")
    with pytest.raises(UserError, match=r"clients \[3\] own forget rows and cannot take part"):
        unlearn(pocket, saves, tuned)
    assert history(saves / "unlearn" / "un") == []


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
    seed = next(s for s in range(50) if select(range(4), seed=s, round=1, count=1) != (3,))
    with pytest.raises(UserError, match=r"nobody unlearned: no owner of forget rows is drawn in any round"):
        unlearn(pocket, saves, None, "un", *few, f"trainer.args.seed={seed}")
    assert not (saves / "unlearn").exists()


def test_a_round_in_which_all_who_were_drawn_stand_idle_leaves_the_adapter_as_it_is(pocket, saves, tuned):
    """One client a round, owners first: with this seed round 1 draws one that owns nothing to forget, round 2 an owner."""
    drawn = [[select(range(4), seed=s, round=n, count=1)[0] for n in (1, 2)] for s in range(50)]
    seed = next(s for s, (first_round, second_round) in enumerate(drawn) if first_round < 2 <= second_round)
    lone = (
        "trainer.federated.num_train_clients=1",
        "protocol=target_then_repair",
        "protocol.unlearn_rounds=2",
        "protocol.repair_epochs=null",
    )
    run = unlearn(pocket, saves, tuned, "un", *lone, f"trainer.args.seed={seed}")
    lines = history(run)
    assert [(c["role"], c["weight"]) for line in lines for c in line["clients"]] == [("idle", 0.0), ("unlearn", 1.0)]
    assert lines[0]["adapter_hash"] == hash_tensors(adapter_tensors(tuned)) != lines[1]["adapter_hash"]
    assert (lines[0]["averaged"], lines[0]["aggregation_error"]) == ("", None)


@pytest.mark.parametrize("damage", [b"", b"no tensors here", None])
def test_a_damaged_part_is_asked_for_anew(tmp_path, damage):
    tensors = {"a.lora_A.weight": torch.ones(2, 3)}
    blob, name = safetensors.torch.save(tensors), hash_tensors(tensors)
    store = PartStore(tmp_path)
    assert store.obtain([name], {}, [name]) == ({}, (name,))
    assert store.obtain([name], {name: blob}, [name])[0][name].keys() == tensors.keys()
    file = tmp_path / f"part-{name}.safetensors"
    file.write_bytes(safetensors.torch.save({"a.lora_A.weight": torch.zeros(2, 3)}) if damage is None else damage)
    assert store.obtain([name], {}, [name]) == ({}, (name,))
    for received in ({name: blob}, {}):
        found, missing = store.obtain([name], received, [name])
        assert torch.equal(found[name]["a.lora_A.weight"], torch.ones(2, 3))
        assert missing == ()
