"""One run, one folder, one process: who holds a folder's lock, when it is let go of, and what a killed holder left."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_runs import CONFIGS, finetune, tiny

from fedunlearn.doors.evaluation import run_evaluation
from fedunlearn.doors.stages import run_central
from fedunlearn.errors import UserError
from fedunlearn.reporting.run_lock import held_locks, lock_path, run_lock

HOLDER = """
import sys, time
from pathlib import Path
from fedunlearn.reporting.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of <tmp_path>/saves/finetune/x."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "saves" / "finetune" / "x")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def contents(folder):
    return {path: (path.stat().st_ino, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_another_process_is_told_who_holds_it_and_nothing_is_made(tmp_path, holder):
    folder = tmp_path / "saves" / "finetune" / "x"
    since = json.loads(lock_path(folder).read_text())["since"]
    said = (
        f"{str(folder)!r} is in use by process {holder.pid} on {socket.gethostname()}, since {since}: wait until that run has ended, or end it, or choose "
        "another task_name (neither resume=true nor overwrite=true takes a folder from a run that is going on)"
    )
    with pytest.raises(UserError) as caught, run_lock(folder):
        raise AssertionError("the block must not run")
    assert caught.value.faults == (said,)
    assert not folder.exists()


def test_the_kernel_lets_go_of_it_when_the_process_is_killed(tmp_path, holder):
    folder = tmp_path / "saves" / "finetune" / "x"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert lock_path(folder).is_file()
    with run_lock(folder):
        assert json.loads(lock_path(folder).read_text())["pid"] == os.getpid()


def test_no_trace_stays_of_a_lock_whose_folder_was_not_made(tmp_path):
    with pytest.raises(RuntimeError, match="refused"), run_lock(tmp_path / "saves" / "finetune" / "x"):
        raise RuntimeError("refused")
    assert list(tmp_path.iterdir()) == []


def test_the_same_process_does_not_get_it_twice_however_the_folder_is_spelt(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with (
        run_lock(tmp_path / "x"),
        pytest.raises(UserError, match=f"in use by process {os.getpid()}"),
        run_lock(tmp_path / "link" / "x"),
    ):
        raise AssertionError("the block must not run")
    with run_lock(tmp_path / "x"):
        assert len(held_locks()) == 1
    assert held_locks() == ()


def test_a_lock_that_does_not_say_who_holds_it_is_held_all_the_same(tmp_path):
    with run_lock(tmp_path / "x"):
        lock_path(tmp_path / "x").write_text("")
        with pytest.raises(UserError, match="in use by another process: wait"), run_lock(tmp_path / "x"):
            raise AssertionError("the block must not run")


def test_it_is_held_for_as_long_as_a_child_that_inherited_it_lives(tmp_path):
    """As Ray's engine does, when the process that started it is killed."""
    with run_lock(tmp_path / "x"):
        child = subprocess.Popen(["sleep", "60"], pass_fds=held_locks())
        other = subprocess.Popen(["sleep", "60"])
        path = lock_path(tmp_path / "x")
        kept = path.with_name("kept")
        os.link(path, kept)
    os.rename(kept, path)  # as if it had not been let go of in order
    try:
        with pytest.raises(UserError, match="is in use"), run_lock(tmp_path / "x"):
            raise AssertionError("the block must not run")
        child.kill()
        child.wait()
        with run_lock(tmp_path / "x"):
            assert other.poll() is None
    finally:
        for process in (child, other):
            process.kill()
            process.wait()


def test_what_a_killed_holder_put_aside_comes_back_and_its_temporaries_go(tmp_path):
    """Killed between the two renames of a new folder: the old one is there again, as it was before."""
    (tmp_path / ".x.old99").mkdir()
    (tmp_path / ".x.old99" / "history.jsonl").write_text("old")
    (tmp_path / ".x.tmp99").mkdir()
    (tmp_path / ".y.tmp99").mkdir()  # another's, who may live
    with run_lock(tmp_path / "x"):
        assert (tmp_path / "x" / "history.jsonl").read_text() == "old"
        assert not (tmp_path / ".x.tmp99").exists()
    (tmp_path / ".x.old98").mkdir()
    with run_lock(tmp_path / "x"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".x.lock", ".y.tmp99", "x"]


@pytest.mark.parametrize(
    "how", ["overwrite=true", "resume=true", "task_name=x"], ids=["overwrite", "resume", "neither"]
)
def test_a_run_does_not_touch_a_folder_that_is_held(pocket, saves, how):
    run = finetune(pocket, saves, "x")
    before = contents(run)
    with run_lock(run), pytest.raises(UserError, match=f"is in use by process {os.getpid()}") as caught:
        finetune(pocket, saves, "x", how)
    assert len(caught.value.faults) == 1
    assert contents(run) == before


def test_the_real_door_ends_with_code_2_and_one_line(pocket, tmp_path, holder):
    door = [sys.executable, str(CONFIGS.parent / "src" / "fed_train.py"), "experiment=finetune/tofu/pocket"]
    words = [f"tofu_path={pocket.data}", f"paths.saves_dir={tmp_path / 'saves'}", "task_name=x", "overwrite=true"]
    done = subprocess.run([*door, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == done.stderr.splitlines()[-1:]
    assert f"in use by process {holder.pid} on " in done.stderr
    assert "Traceback" not in done.stderr


def test_central_training_and_evaluations_hold_theirs_too(pocket, saves):
    central = tiny(pocket, saves, "finetune", "x")
    with run_lock(saves / "finetune" / "x"), pytest.raises(UserError, match="is in use"):
        run_central(central)
    from fedunlearn.doors.compose import compose

    places = (f"tofu_path={pocket.data}", f"paths.saves_dir={saves}", "task_name=e", "overwrite=true")
    base = f"model.model_args.pretrained_model_name_or_path={pocket.model}"
    evaluation = compose(CONFIGS, "eval.yaml", ["experiment=eval/tofu/pocket", base, *places])
    with run_lock(saves / "eval" / "e"), pytest.raises(UserError, match="is in use"):
        run_evaluation(evaluation)


def test_two_commands_at_once_make_one_run(pocket, tmp_path):
    """Whoever comes second is refused, even while the first has not yet made the folder."""
    saves = tmp_path / "saves"
    door = [sys.executable, str(Path(CONFIGS.parent) / "src" / "fed_train.py"), "experiment=finetune/tofu/pocket"]
    words = [
        f"tofu_path={pocket.data}", f"model.model_args.pretrained_model_name_or_path={pocket.model}", f"paths.saves_dir={saves}",
        f"paths.cache_dir={saves}/cache", "task_name=x", "trainer.federated.num_clients=4", "trainer.federated.num_rounds=2", "eval.at_end=false",
    ]  # fmt: skip
    both = [subprocess.Popen([*door, *words], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], said
    assert "is in use by process " in said[codes.index(2)]
    assert (saves / "finetune" / "x" / "done.json").is_file()
