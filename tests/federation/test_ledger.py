"""The ledger: what is kept reads back, what was changed is refused, what it may weigh, and what is left of it after a request."""

import itertools
import json
import re
import shutil

import pytest
import torch
from helpers_runs import adapter_bytes, finetune, history, unlearn
from safetensors.torch import load_file, save_file

from fedunlearn.errors import UserError
from fedunlearn.federation import rounds
from fedunlearn.federation.ledger import FIRST, Ledger, estimated_bytes
from fedunlearn.federation.site import Site
from fedunlearn.records.rounds import ClientOutcome, Role

THREE = ("trainer.federated.num_rounds=3", "trainer.federated.keep_rounds=all")
KEPT = (*THREE, "ledger.enabled=true")
ERASER = ("experiment=replay/tofu/pocket", *THREE, "method=federaser", "ledger.purge=false")


@pytest.fixture(scope="module")
def tuned(pocket, tmp_path_factory):
    """A fine-tuning run of three rounds with its ledger; read only."""
    return finetune(pocket, tmp_path_factory.mktemp("runs"), "tuned", *KEPT)


@pytest.fixture
def spoilt(tuned, tmp_path):
    """A copy of it."""
    return shutil.copytree(tuned, tmp_path / "tuned")


def lines_of(run):
    return (run / "ledger" / "ledger.jsonl").read_text().splitlines()


def write_lines(run, lines):
    (run / "ledger" / "ledger.jsonl").write_text("".join(f"{line}\n" for line in lines))


def weight_of(run):
    return sum(path.stat().st_size for path in (run / "ledger").rglob("*") if path.is_file())


# --- what is kept


def test_what_clients_sent_reads_back_bit_by_bit_and_says_what_it_weighed(pocket, saves, monkeypatch):
    sent, real = [], Site.work

    def work(self, *arguments):
        done = real(self, *arguments)
        sent.append({name: tensor.clone() for name, tensor in done.tensors.items()})
        return done

    monkeypatch.setattr(Site, "work", work)
    run = finetune(pocket, saves, "seen", *KEPT)
    ledger = Ledger(run)
    entries = ledger.entries()
    assert [(e.kind, e.round, e.client_id) for e in entries] == [
        (kind, number, client)
        for number in (1, 2, 3)
        for kind, client in (("global", -1), *(("update", k) for k in range(4)))
    ]
    updates = [e for e in entries if e.kind == "update"]
    assert len(sent) == len(updates) == 12
    for entry, tensors in zip(updates, sent, strict=True):
        kept = ledger.read(entry)
        assert kept.keys() == tensors.keys()
        assert all(torch.equal(kept[name], tensors[name]) and kept[name].dtype == tensors[name].dtype for name in kept)
    clients = [client for line in history(run) for client in line["clients"]]
    for entry, client in zip(updates, clients, strict=True):
        assert (entry.client_id, entry.role, entry.weight) == (client["client_id"], client["role"], client["weight"])
        assert entry.num_examples == client["num_examples"] == 20
        assert sum(norm**2 for norm in entry.norms.values()) ** 0.5 == pytest.approx(client["update_norm"], rel=1e-12)


def test_each_round_s_global_line_is_the_adapter_it_began_with(tuned):
    ledger = Ledger(tuned)
    folders = [tuned / "start", *(tuned / f"rounds/000{number}/adapter" for number in (1, 2))]
    for entry, folder in zip((e for e in ledger.entries() if e.kind == "global"), folders, strict=True):
        kept, there = ledger.read(entry), load_file(folder / "adapter_model.safetensors")
        assert kept.keys() == there.keys()
        assert all(torch.equal(kept[name], there[name]) for name in kept)


def test_a_masked_factor_is_not_kept_and_bfloat16_stays_so(pocket, saves):
    run = finetune(pocket, saves, "rolora", *KEPT, "aggregation=rolora", "trainer.federated.wire_dtype=bfloat16")
    ledger = Ledger(run)
    for entry in (e for e in ledger.entries() if e.kind == "update"):
        tensors = ledger.read(entry)
        wanted = ".lora_B." if entry.round % 2 else ".lora_A."
        assert all(wanted in name and tensor.dtype == torch.bfloat16 for name, tensor in tensors.items())


def test_the_chain_begins_at_nothing_and_done_json_has_its_head(tuned):
    entries = Ledger(tuned).entries()
    assert entries[0].previous == FIRST
    assert all(after.previous == before.hash for before, after in itertools.pairwise(entries))
    assert json.loads((tuned / "done.json").read_text())["ledger_head"] == Ledger(tuned).head == entries[-1].hash


def test_a_ledger_changes_nothing_of_the_run_and_none_is_kept_unasked(pocket, saves, tuned):
    plain = finetune(pocket, saves, "plain", *THREE)
    assert adapter_bytes(plain) == adapter_bytes(tuned)
    assert not (plain / "ledger").exists()
    assert "ledger_head" not in json.loads((plain / "done.json").read_text())


# --- what was changed


def changed_byte(run):
    path = run / "ledger" / "round0002" / "client00001.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-3] ^= 1
    path.write_bytes(bytes(blob))


def other_client_s_file(run):
    folder = run / "ledger" / "round0002"
    shutil.copy(folder / "client00000.safetensors", folder / "client00001.safetensors")


def changed_weight(run):
    lines = lines_of(run)
    entry = json.loads(lines[3])
    lines[3] = json.dumps({**entry, "weight": entry["weight"] + 0.1})
    write_lines(run, lines)


def resealed(run):
    """Whoever changes a line and seals it anew has still to seal every line after it."""
    lines, entries = lines_of(run), Ledger(run).entries()
    from dataclasses import asdict, replace

    lines[3] = json.dumps(asdict(replace(entries[3], weight=0.5).sealed()))
    write_lines(run, lines)


def swapped(run):
    lines = lines_of(run)
    write_lines(run, [*lines[:2], lines[3], lines[2], *lines[4:]])


def cut_tail(run):
    write_lines(run, lines_of(run)[:-1])


def emptied(run):
    write_lines(run, [])


def one_gone(run):
    lines = lines_of(run)
    write_lines(run, [*lines[:5], *lines[6:]])


def half_a_line(run):
    path = run / "ledger" / "ledger.jsonl"
    path.write_text(path.read_text()[:-40])


CHAIN = r"it is not what the chain says; the ledger was changed after it was written"
TAMPERED = [
    (changed_byte, r"client00001.safetensors' is damaged \(other tensors than the chain says\)"),
    (other_client_s_file, r"client00001.safetensors' is damaged \(other tensors than the chain says\)"),
    (changed_weight, rf"ledger.jsonl', line 4: {CHAIN}"),
    (resealed, rf"ledger.jsonl', line 5: {CHAIN}"),
    (swapped, rf"ledger.jsonl', line 3: {CHAIN}"),
    (one_gone, rf"ledger.jsonl', line 6: {CHAIN}"),
    (half_a_line, r"ledger.jsonl', line 15: it cannot be read"),
    (cut_tail, r"is not the one that this run ended with \(it was cut, or is another run's\)"),
    (emptied, r"is not the one that this run ended with"),
]


@pytest.mark.parametrize(("tamper", "said"), TAMPERED, ids=[tamper.__name__ for tamper, _ in TAMPERED])
def test_a_changed_ledger_is_refused_before_anything_is_written(pocket, saves, spoilt, tamper, said):
    tamper(spoilt)
    with pytest.raises(UserError, match=said):
        unlearn(pocket, saves, spoilt, "un", *ERASER)
    assert not (saves / "unlearn").exists()


def test_another_run_s_ledger_is_refused(pocket, saves, spoilt):
    """A whole chain, but not the one this run ended with: the same config with another seed."""
    other = finetune(pocket, saves, "other", *KEPT, "trainer.args.seed=5")
    Ledger(other).entries()
    shutil.rmtree(spoilt / "ledger")
    shutil.copytree(other / "ledger", spoilt / "ledger")
    with pytest.raises(
        UserError,
        match=r"is not the one that this run ended with \(it was cut, or is another run's\): make the run anew",
    ):
        unlearn(pocket, saves, spoilt, "un", *ERASER)


@pytest.mark.parametrize("method", ["federaser", "negation", "pgd"])
def test_a_missing_ledger_is_refused_with_the_way_out_where_the_method_needs_it(pocket, saves, spoilt, method):
    if method == "negation":  # which is not defined after fedit
        spoilt = finetune(pocket, saves, "exact", *KEPT, "aggregation=ffa")
    shutil.rmtree(spoilt / "ledger")
    replay = ERASER if method == "federaser" else (f"method={method}",)
    with pytest.raises(
        UserError,
        match=r"has no ledger \(.*\): make that run anew with ledger.enabled=true, or choose a method that needs none",
    ):
        unlearn(pocket, saves, spoilt, "un", *replay)
    assert not (saves / "unlearn").exists()


@pytest.mark.parametrize("method", ["rollback", "fedosd", "fused", "msa", "npo"])
def test_and_is_not_missed_where_none_is_needed(pocket, saves, spoilt, method):
    shutil.rmtree(spoilt / "ledger")
    replay = ("experiment=replay/tofu/pocket", *THREE) if method == "rollback" else ()
    assert unlearn(pocket, saves, spoilt, "un", *replay, "ledger.purge=false", f"method={method}").is_dir()


# --- what it weighs


def needed(call):
    """The bytes that a refusal for max_bytes=1 names."""
    with pytest.raises(
        UserError, match=r"ledger.max_bytes=1: .* need up to \d+ bytes: raise it, lower num_rounds"
    ) as caught:
        call()
    return int(re.search(r"need up to (\d+) bytes", str(caught.value)).group(1))


SIZES = {
    "plain": (),
    "large": ("model.model_args.lora_config.r=32", "model.model_args.lora_config.lora_alpha=32"),
    "bfloat16": ("trainer.federated.wire_dtype=bfloat16", "model.model_args.lora_config.r=32"),
    "rolora": ("aggregation=rolora", "model.model_args.lora_config.r=32"),
    "few": ("trainer.federated.fraction_train=0.5",),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_estimate_is_an_upper_bound_and_no_wild_one(pocket, saves, name):
    most = needed(lambda: finetune(pocket, saves, "x", *KEPT, *SIZES[name], "ledger.max_bytes=1"))
    assert not (saves / "finetune").exists()
    run = finetune(pocket, saves, "ft", *KEPT, *SIZES[name], f"ledger.max_bytes={most}")
    written = weight_of(run)
    assert written <= most
    assert most - written < 20_000 * len(list((run / "ledger").rglob("*.safetensors")))
    with pytest.raises(
        UserError, match=rf"ledger.max_bytes={most - 1}: 3 rounds of \d clients need up to {most} bytes"
    ):
        finetune(pocket, saves, "y", *KEPT, *SIZES[name], f"ledger.max_bytes={most - 1}")
    assert not (saves / "finetune" / "y").exists()


def keep_one_round(folder, modules):
    """A ledger of one round of one client with that many tiny modules; gives bytes of its tensors and of its files."""
    paths = [f"base_model.model.model.layers.{i // 7}.self_attn.q_proj{i % 7}" for i in range(modules)]
    tensors = {f"{path}.lora_{x}.weight": torch.ones(1, 2) for path in paths for x in "AB"}
    norms = {path.removeprefix("base_model.model."): 0.12345678901234567 for path in paths}
    outcome = ClientOutcome(client_id=0, role=Role.FINETUNE, weight=1 / 3)
    ledger = Ledger(folder)
    ledger.begin(None)
    ledger.keep_round(1, tensors, {0: outcome}, {0: norms}, iter([(0, tensors)]))
    ledger.entries()
    return 8 * len(tensors), weight_of(folder)


@pytest.mark.parametrize(
    "modules",
    [
        14,
        112,  # Llama-3.2-1B, all linear layers: 16 x 7

        224,
    ],
)  # fmt: skip
def test_the_estimate_bounds_models_with_many_modules(tmp_path, modules):
    size, written = keep_one_round(tmp_path, modules)
    assert written <= estimated_bytes(size, size, 2 * modules, 1, 1)


def test_the_estimate_counts_owners_that_are_forced_into_the_cohort(pocket, saves):
    """One of four is drawn, three own forget rows and are in every cohort: three updates a round."""
    forced = (
        "trainer.federated.fraction_train=0.25",
        "trainer.federated.force_owners=true",
        "partition=round_robin",
        "requests=[{authors: [17, 18, 19]}]",
    )
    large = (
        "model.model_args.lora_config.r=32",
        "trainer.federated.num_rounds=1",
        "ledger.enabled=true",
        "ledger.purge=false",
    )
    most = needed(lambda: unlearn(pocket, saves, None, "x", *forced, *large, "ledger.max_bytes=1"))
    assert weight_of(unlearn(pocket, saves, None, "un", *forced, *large)) <= most


# --- stopped and resumed


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_kill_between_a_round_s_ledger_and_its_checkpoint_gives_the_same_chain(
    pocket, saves, tuned, monkeypatch, after
):
    real = rounds.append_history

    def stop(folder, line):
        if line["round"] == after:
            raise KeyboardInterrupt("stopped by the test")
        real(folder, line)

    monkeypatch.setattr(rounds, "append_history", stop)
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        finetune(pocket, saves, "ft", *KEPT)
    stopped = saves / "finetune" / "ft"
    assert Ledger(stopped).entries()[-1].round == after
    assert not (stopped / f"rounds/000{after}").exists()
    monkeypatch.setattr(rounds, "append_history", real)
    resumed = finetune(pocket, saves, "ft", *KEPT, "resume=true")
    assert lines_of(resumed) == lines_of(tuned)
    ledger = Ledger(resumed)
    assert all(ledger.read(entry) for entry in ledger.entries())


def test_half_a_line_that_a_kill_left_is_cut_off(pocket, saves, tuned, monkeypatch):
    real = Ledger._append

    def torn(self, entry, tensors):
        if (entry.round, entry.client_id) == (2, 2):
            with self._lines_path.open("a") as file:
                file.write('{"client_id": 2, "hash": "ab')
            raise KeyboardInterrupt("stopped by the test")
        return real(self, entry, tensors)

    monkeypatch.setattr(Ledger, "_append", torn)
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        finetune(pocket, saves, "ft", *KEPT)
    monkeypatch.setattr(Ledger, "_append", real)
    assert lines_of(finetune(pocket, saves, "ft", *KEPT, "resume=true")) == lines_of(tuned)


def test_and_where_the_run_goes_on_from_another_ledger(pocket, saves, tuned, monkeypatch):
    """Killed in round 1, before any checkpoint: the parent line must not be written behind what is there."""
    own = ("ledger.enabled=true", "ledger.purge=false")
    whole = unlearn(pocket, saves, tuned, "whole", *own)
    real = rounds.append_history

    def stop(folder, line):
        raise KeyboardInterrupt("stopped by the test")

    monkeypatch.setattr(rounds, "append_history", stop)
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        unlearn(pocket, saves, tuned, "un", *own)
    monkeypatch.setattr(rounds, "append_history", real)
    assert lines_of(unlearn(pocket, saves, tuned, "un", *own, "resume=true")) == lines_of(whole)


# --- from run to run, and what a request leaves


def test_the_first_line_of_a_run_that_goes_on_names_its_parent_s_head(pocket, saves, tuned):
    run = unlearn(pocket, saves, tuned, "un", "ledger.enabled=true", "ledger.purge=false")
    first, second = Ledger(run).entries()[:2]
    assert (first.kind, first.round, first.tensors, first.previous) == ("parent", 0, Ledger(tuned).head, FIRST)
    assert (second.kind, second.round, second.previous) == ("global", 1, first.hash)
    assert not [path for path in Ledger(tuned).entries() if path.kind == "parent"]


def test_a_done_request_purges_its_owners_tensors_in_both_ledgers_and_leaves_hashes_and_norms(pocket, saves, spoilt):
    before = lines_of(spoilt)
    run = unlearn(pocket, saves, spoilt, "un", "ledger.enabled=true")
    assert lines_of(spoilt) == before
    for folder in (spoilt, run):
        ledger = Ledger(folder)
        for entry in (e for e in ledger.entries() if e.kind == "update"):
            assert ledger.path(entry).is_file() == (entry.client_id in (0, 1))
            assert len(entry.norms) == 14
            if entry.client_id in (2, 3):
                with pytest.raises(UserError, match=r"is not there: purged after client \d was forgotten"):
                    ledger.read(entry)


def test_a_request_purges_fine_tuning_s_ledger_whether_or_not_it_keeps_its_own(pocket, saves, spoilt):
    unlearn(pocket, saves, spoilt, "un")
    ledger = Ledger(spoilt)
    assert not any(ledger.path(e).is_file() for e in ledger.entries() if e.kind == "update" and e.client_id in (2, 3))


def test_an_owner_that_is_gone_is_purged_like_one_that_stayed(pocket, saves, spoilt):
    unlearn(pocket, saves, spoilt, "un", "method=fused", "requests=[{client: 3, target: gone}]")
    ledger = Ledger(spoilt)
    kept = {e.client_id for e in ledger.entries() if e.kind == "update" and ledger.path(e).is_file()}
    assert kept == {0, 1, 2}


def test_ledger_purge_false_purges_nothing(pocket, saves, spoilt):
    unlearn(pocket, saves, spoilt, "un", "ledger.purge=false")
    ledger = Ledger(spoilt)
    assert all(ledger.path(e).is_file() for e in ledger.entries() if e.kind != "parent")


def test_federaser_works_on_a_purged_ledger_and_gives_the_same(pocket, saves, tuned, spoilt):
    """It never reads the targets' tensors; their lengths stay, for those who come back with their retain rows."""
    assert Ledger(spoilt).purge({2, 3}) == 6
    assert Ledger(spoilt).purge({2, 3}) == 0
    whole, purged = (unlearn(pocket, saves, run, name, *ERASER) for run, name in ((tuned, "whole"), (spoilt, "purged")))
    assert adapter_bytes(whole) == adapter_bytes(purged)


def test_a_method_that_reads_purged_tensors_says_what_became_of_them(pocket, saves):
    flora = ("aggregation=flora",)
    run = finetune(pocket, saves, "flora", *KEPT, *flora)
    Ledger(run).purge({3})
    with pytest.raises(
        UserError, match=r"is not there: purged after client 3 was forgotten, or lost; its norms are all that is left"
    ):
        unlearn(pocket, saves, run, "un", *flora, "method=negation", "requests=[{client: 3}]")


def test_a_whole_ledger_whose_files_are_others_is_refused_by_name(spoilt):
    """Ledger alone, without a run: the same tensors under other names are other tensors."""
    ledger = Ledger(spoilt)
    entry = ledger.entries()[1]
    tensors = ledger.read(entry)
    save_file({f"{name}x": tensor for name, tensor in tensors.items()}, ledger.path(entry))
    with pytest.raises(UserError, match=r"is damaged \(other tensors than the chain says\)"):
        ledger.read(entry)
    ledger.path(entry).write_bytes(b"no safetensors")
    with pytest.raises(UserError, match=r"is damaged \("):
        ledger.read(entry)
