"""Going on: what a finished run, a later version, another run's checkpoint, a history that was changed, a full or read-only disk and a wrong clock come to."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_runs import adapter_bytes, finetune, history

import fedunlearn
from fedunlearn.errors import UserError
from fedunlearn.federation import rounds
from fedunlearn.federation.checkpoint import FORMAT, HISTORY, read_checkpoint, round_folder
from fedunlearn.federation.ledger import Ledger

KEPT = ("ledger.enabled=true", "strategy=fedadam", "strategy.server_lr=0.1", "trainer.federated.num_rounds=3")


def stop_after(monkeypatch, number):
    """Every run is stopped behind a round from now on; gives what undoes it."""
    real = rounds.save_checkpoint

    def stop(folder, checkpoint, *rest):
        real(folder, checkpoint, *rest)
        if checkpoint.state.round == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "save_checkpoint", stop)
    return lambda: monkeypatch.setattr(rounds, "save_checkpoint", real)


@pytest.fixture(scope="module")
def whole(pocket, tmp_path_factory):
    return finetune(pocket, tmp_path_factory.mktemp("whole"), "x", *KEPT)


@pytest.fixture(scope="module")
def half(pocket, tmp_path_factory):
    """A saves folder whose run was stopped after round 2."""
    saves = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            finetune(pocket, saves, "x", *KEPT)
    return saves


@pytest.fixture
def stopped(half, saves):
    """A copy of it; paths do not count."""
    shutil.copytree(half, saves)
    return saves / "finetune" / "x"


def edited(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_stopped_run_goes_on_bit_equal_with_the_same_ledger_and_lines(pocket, saves, stopped, whole):
    assert adapter_bytes(finetune(pocket, saves, "x", *KEPT, "resume=true")) == adapter_bytes(whole)
    assert Ledger(stopped).head == Ledger(whole).head
    assert [line["adapter_hash"] for line in history(stopped)] == [line["adapter_hash"] for line in history(whole)]


def test_a_finished_run_that_is_resumed_stays_as_it_is(pocket, saves, whole, caplog):
    run = Path(shutil.copytree(whole, saves / "finetune" / "x"))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in run.rglob("*")}
    with caplog.at_level("INFO"):
        finetune(pocket, saves, "x", *KEPT, "resume=true")
    assert "holds a finished run of this config: there is nothing to go on with" in caplog.text
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in run.rglob("*")} == before
    with pytest.raises(UserError, match=r"was made with another config \(differs in trainer\.args\.learning_rate\)"):
        finetune(pocket, saves, "x", *KEPT, "resume=true", "trainer.args.learning_rate=1e-4")


def test_a_finished_run_gives_the_evaluation_it_ended_with(pocket, saves):
    from helpers_runs import tiny

    from fedunlearn.doors.stages import run_federated

    words = ("eval.at_end=true", "eval.max_rows=2", "eval.max_new_tokens=4", "trainer.federated.num_rounds=1")
    first = run_federated(tiny(pocket, saves, "finetune", "x", *words))
    again = run_federated(tiny(pocket, saves, "finetune", "x", *words, "resume=true"))
    assert again.provenance == first.provenance


@pytest.mark.parametrize("later", [FORMAT + 1, 99])
def test_a_checkpoint_of_a_later_version_is_refused_by_both_versions(pocket, saves, stopped, later):
    path = round_folder(stopped, 2) / "checkpoint.json"
    edited(path, format=later, version="9.8.7", something_new=True)
    before = contents(stopped)
    with pytest.raises(
        UserError,
        match=rf"0002' has format {later}, written by fedunlearn 9\.8\.7; this is fedunlearn {fedunlearn.__version__}, which reads formats up to "
        rf"{FORMAT}: go on with that version, or start anew with overwrite=true",
    ):
        finetune(pocket, saves, "x", *KEPT, "resume=true")
    assert contents(stopped) == before


@pytest.mark.parametrize("value", [0, -1, None, "1", True, 1.0])
def test_a_format_that_never_was_is_damage(stopped, value):
    edited(round_folder(stopped, 2) / "checkpoint.json", format=value)
    with pytest.raises(UserError, match=r"0002' is damaged \(checkpoint\.json holds format="):
        read_checkpoint(round_folder(stopped, 2))


@pytest.mark.parametrize(
    "standing",
    [
        {},
        [],
        "x",
        {"run_id": "a", "request": "b", "history": -1, "ledger": ""},
        {"run_id": "a", "request": "b", "history": True, "ledger": ""},
        {"run_id": 1, "request": "b", "history": 0, "ledger": ""},
        {"run_id": "a", "request": "b", "history": 0, "ledger": "", "more": 1},
    ],
)
def test_a_standing_that_no_round_writes_is_damage(stopped, standing):
    edited(round_folder(stopped, 2) / "checkpoint.json", standing=standing)
    with pytest.raises(UserError, match=r"0002' is damaged \("):
        read_checkpoint(round_folder(stopped, 2))


def test_another_run_s_checkpoint_is_refused(pocket, saves, stopped):
    """Of another seed and learning rate, laid into this run's folder: whole in itself, and not this run's."""
    other = finetune(pocket, saves, "other", *KEPT, "trainer.args.seed=3")
    shutil.rmtree(round_folder(stopped, 2))
    shutil.copytree(round_folder(other, 2), round_folder(stopped, 2))
    with pytest.raises(
        UserError,
        match=r"0002' is of another run \(\w+; this one is \w+\), and with another config: delete that folder",
    ):
        finetune(pocket, saves, "x", *KEPT, "resume=true")


def test_a_checkpoint_of_another_request_is_refused(pocket, saves, stopped):
    path = round_folder(stopped, 2) / "checkpoint.json"
    edited(path, standing={**json.loads(path.read_text())["standing"], "request": "ab"})
    with pytest.raises(UserError, match=r"0002' is of another request \(ab; this one is \w+\)"):
        finetune(pocket, saves, "x", *KEPT, "resume=true")


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [],
        lambda lines: lines[:1],
        lambda lines: lines[1:],
        lambda lines: [lines[1], lines[0]],
        lambda lines: [lines[0].replace('"attempt": 1', '"attempt": 11'), lines[1]],
    ],
    ids=["empty", "the last is gone", "the first is gone", "swapped", "changed"],
)
def test_a_history_that_does_not_lead_up_to_the_checkpoint_is_refused(pocket, saves, stopped, change):
    path = stopped / HISTORY
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    before = contents(stopped)
    with pytest.raises(UserError, match=r"history\.jsonl' is not what round 2 left: it was changed or cut"):
        finetune(pocket, saves, "x", *KEPT, "resume=true")
    assert contents(stopped) == before


def test_a_ledger_that_does_not_lead_up_to_the_checkpoint_is_refused(pocket, saves, stopped):
    path = stopped / "ledger" / "ledger.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"the ledger in .* is not the one that round 2 left"):
        finetune(pocket, saves, "x", *KEPT, "resume=true")
    shutil.rmtree(path.parent)
    with pytest.raises(UserError, match=r"the ledger in .* is not the one that round 2 left"):
        finetune(pocket, saves, "x", *KEPT, "resume=true")


def test_what_was_half_written_is_not_read_and_goes(pocket, saves, stopped, whole):
    """As a kill leaves it: the third round under its temporary name, a line and a ledger line cut in two."""
    shutil.copytree(round_folder(stopped, 2), stopped / "rounds" / ".0003.tmp123")
    (stopped / "rounds" / ".spool").mkdir(exist_ok=True)
    (stopped / "ledger" / ".ledger.jsonl.tmp123").write_text("{")
    for path in (stopped / HISTORY, stopped / "ledger" / "ledger.jsonl"):
        with path.open("a") as file:
            file.write('{"round": 3, "cli')
    assert adapter_bytes(finetune(pocket, saves, "x", *KEPT, "resume=true")) == adapter_bytes(whole)
    assert [path.name for path in stopped.rglob(".*")] == []
    assert Ledger(stopped).head == Ledger(whole).head


@pytest.mark.parametrize("file", ["partition.json", "request.json", "began.json", "start"])
def test_what_the_run_began_with_is_gone(pocket, saves, stopped, file):
    path = stopped / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match="overwrite=true") as caught:
        finetune(pocket, saves, "x", *KEPT, "resume=true")
    assert len(caught.value.faults) == 1
    assert str(stopped) in str(caught.value)
    assert "partition.path" not in str(caught.value)


@pytest.mark.parametrize("shift", [-3600.0, 3600.0])
def test_a_clock_an_hour_away_changes_nothing(pocket, saves, stopped, whole, monkeypatch, shift):
    """The clock of who goes on is an hour before, or after, that of who began; files and lines are ordered by rounds alone."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift)
    for path in stopped.rglob("*"):
        os.utime(path, (real() - shift, real() - shift))
    assert adapter_bytes(finetune(pocket, saves, "x", *KEPT, "resume=true")) == adapter_bytes(whole)


def test_seconds_are_told_by_part_and_add_up(whole):
    for line in history(whole):
        assert set(line["parts"]) == {"collecting", "averaging", "evaluating", "writing"}
        assert sum(line["parts"].values()) == pytest.approx(line["seconds"], rel=1e-9)
        assert line["parts"]["collecting"] >= sum(client["seconds"] for client in line["clients"])
        assert line["parts"]["writing"] > 0


def in_namespace(script, *arguments):
    """Runs a shell script as root of a user and mount namespace of its own; skips where that is not allowed."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user and mount namespaces here")
    return subprocess.run(
        ["unshare", "-rm", "sh", "-ec", script, "sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare here")
def test_a_disk_that_is_really_full_leaves_the_last_good_round(pocket, tmp_path):
    """A tmpfs that is full at the spool, at the ledger, at the checkpoint and at the result; with room again each run goes on to the same bytes."""
    done = in_namespace(
        'mount -t tmpfs -o size=8m tmpfs "$5"; exec "$1" "$2" "$3" "$4" "$5" 0 120 200 240',
        sys.executable,
        Path(__file__).with_name("full_disk.py"),
        pocket.data,
        pocket.model,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4
    for one in found:
        assert one["said"].startswith("disk full while saving "), one
        assert one["said"].endswith("give the same command again (with resume=true where the run's folder exists)")
        assert (one["left"], one["same"], one["rounds"]) == ([], True, [1, 2])
    assert {one["round"] for one in found[:2]} == {1}
    places = {one["said"].split("/x/")[1].split("/")[0].split(":")[0] for one in found}
    assert {"rounds", "ledger"} <= places


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare here")
def test_a_folder_that_may_not_be_written_is_told_in_one_line(pocket, saves, stopped):
    door = Path(__file__).resolve().parents[2] / "src" / "fed_train.py"
    config = json.loads((stopped / "config.json").read_text())
    words = [
        "experiment=finetune/tofu/pocket", f"tofu_path={pocket.data}", f"model.model_args.pretrained_model_name_or_path={pocket.model}",
        f"paths.saves_dir={saves}", f"paths.cache_dir={saves}/cache", "task_name=x", "trainer.federated.num_clients=4",
        "trainer.args.num_train_epochs=1", "trainer.args.per_device_train_batch_size=8", "model.model_args.lora_config.r=4", "eval.at_end=false",
        f"paths.pocket_dir={saves}/pocket", *KEPT, "resume=true",
    ]  # fmt: skip
    assert config["task_name"] == "x"
    done = in_namespace(
        'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; shift; exec "$@"', stopped, sys.executable, door, *words
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(told)) == (2, 1), done.stderr
    assert str(stopped) in told[0]
    assert "may not be written" in told[0]
    assert "Traceback" not in done.stderr
