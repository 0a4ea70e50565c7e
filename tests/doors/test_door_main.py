"""The door: exit codes, what is printed where, sweeps, and what is left to Hydra."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedunlearn.doors.command_line import jobs, read_command_line
from fedunlearn.doors.environment import DEFAULTS, set_environment
from fedunlearn.doors.main import hydra_door
from fedunlearn.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def door(monkeypatch, tmp_path):
    """Gives a door that notes its runs in `door.runs`, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fed_train.py"])

    def call(*argv, run=None):
        return hydra_door(CONFIGS, "train-lora.yaml", run or (lambda config: call.runs.append(config.run)), argv)

    call.runs = []
    yield call
    assert list(tmp_path.iterdir()) == []  # whatever was asked for: no folder of Hydra's


def test_one_run(door):
    assert door("task_name=t", "trainer.args.seed=4") == 0
    assert [(run.task_name, run.trainer.args.seed) for run in door.runs] == [("t", 4)]


def test_faults_go_to_stderr_one_a_line_with_code_2(door, capsys):
    assert door("trainer.args.lr=1") == 2
    said = capsys.readouterr()
    assert said.out == ""
    told = sorted(line.split("=")[0].split(" is ")[0] for line in said.err.splitlines())
    assert told == ["error: task_name", "error: trainer.args.lr"]
    assert "Traceback" not in said.err


def test_a_user_error_of_the_run_itself_is_told_alike(door, capsys):
    def run(config):
        raise UserError("the folder is full", "and read-only")

    assert door("task_name=t", run=run) == 2
    assert capsys.readouterr().err == "error: the folder is full\nerror: and read-only\n"


def test_an_interruption_is_one_line_and_130(door, capsys):
    def run(config):
        raise KeyboardInterrupt

    assert door("task_name=t", run=run) == 130
    assert capsys.readouterr().err.startswith("interrupted: the same command with resume=true")


def test_any_other_error_keeps_its_traceback(door):
    def run(config):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        door("task_name=t", run=run)


def test_a_sweep_runs_every_job(door):
    assert (
        door(
            "--multirun", "task_name=a_${trainer.args.seed}_${strategy.mu}", "strategy=fedprox", "trainer.args.seed=1,2"
        )
        == 0
    )
    assert [run.task_name for run in door.runs] == ["a_1_0.01", "a_2_0.01"]


def test_a_sweep_runs_nothing_where_one_job_is_faulty_or_two_share_a_name(door, capsys):
    assert door("--multirun", "task_name=a", "trainer.args.seed=1,2") == 2
    assert door("--multirun", "task_name=a,b", "trainer.args.learning_rate=1,-1") == 2
    said = capsys.readouterr().err
    assert "task_name='a' is shared by jobs of this sweep" in said
    assert "trainer.args.learning_rate=-1" in said
    assert door.runs == []


def test_jobs_are_the_product_of_the_sweeps():
    assert jobs(["a=1,2", "b=x", "c=range(0,2)"]) == [
        ("a=1", "b=x", "c=0"),
        ("a=1", "b=x", "c=1"),
        ("a=2", "b=x", "c=0"),
        ("a=2", "b=x", "c=1"),
    ]
    with pytest.raises(
        UserError, match=r"'m=glob\(\*\)' cannot be swept over: write the values.*\n'a=\[' is no override"
    ):
        jobs(["m=glob(*)", "a=["])
    with pytest.raises(UserError, match="more than 1000 jobs"):
        jobs(["a=range(0,40)", "b=range(0,40)"])


def test_options_and_overrides_may_come_in_any_order():
    line = read_command_line(["a=1", "--config-name=x", "b=2", "-cn", "y", "c=3", "-m"], CONFIGS, "z")
    assert (line.config_name, line.overrides, line.multirun, line.informs) == ("y", ("a=1", "b=2", "c=3"), True, False)


def test_an_unknown_option_is_refused():
    with pytest.raises(SystemExit, match="2"):
        read_command_line(["--cofnig-name=x"], CONFIGS, "z")


def test_cfg_shows_the_composed_job_and_runs_nothing(door, capsys):
    assert (
        door("trainer.args.seed=7", "--cfg", "job", "experiment=finetune/tofu/pocket", "--package", "trainer.args") == 0
    )
    assert "seed: 7\n" in capsys.readouterr().out
    assert door.runs == []


def test_cfg_of_a_faulty_line_is_told_our_way(door, capsys):
    assert door("--cfg", "job", "strategy=fedprx", "model=lama") == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_help_lists_the_groups(door, capsys):
    with pytest.raises(SystemExit, match="0"):
        door("--help")
    said = capsys.readouterr().out
    assert said.startswith("fed_train is powered by Hydra")
    assert (
        "method: altpo, ceu, dpo, federaser, fedosd, fused, grad_ascent, grad_diff, idk_dpo, ihl, msa, negation, npo, pdu, pgd, rmu, rollback, satimp, simnpo, uce, undial, wga"
        in said
    )
    assert "strategy: fedadagrad, fedadam, fedavg, fedavgm, fedprox, fedyogi" in said
    assert "aggregation: fedex, fedit, fedrot, fedsvd, ffa, flexlora, flora, hetlora, rolora" in said
    assert "robust: geometric_median, krum, multi_krum, norm_clipping, off" in said


def test_the_environment_is_set_but_never_overruled(monkeypatch):
    for name in DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    set_environment()
    assert {name: os.environ[name] for name in DEFAULTS} == {**DEFAULTS, "OMP_WAIT_POLICY": "ACTIVE"}


def test_the_door_is_imported_without_torch():
    code = "import sys, fedunlearn.doors.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
