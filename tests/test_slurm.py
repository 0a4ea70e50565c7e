"""scripts/slurm: the words it gives to Ray and Slurm are theirs, and its logic with an srun that runs here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_ray import HEAD
from helpers_runs import SMALL

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "slurm" / "fed_train.sbatch"
TEXT = SCRIPT.read_text()
SRUN = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    assert words[0].split("=")[0] in ("--overlap", "--nodes", "--ntasks", "--nodelist", "--cpus-per-task"), words[0]
    words.pop(0)
os.environ["SLURM_GPUS_ON_NODE"] = "0"
os.execvp(words[0], words)
"""
FAKES = {
    "srun": SRUN,
    "scontrol": '#!/bin/sh\n[ "$1 $2 $3" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n',
    "hostname": f'#!/bin/sh\n[ "$1" = --ip-address ] && echo "fe80::1 {HEAD}"\n',
}


def on_slurm(tmp_path, *words, commands=FAKES, **variables):
    """Runs the script as Slurm would on two nodes, both of them this machine."""
    (tmp_path / "bin").mkdir(parents=True, exist_ok=True)
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "1"}
    path = os.pathsep.join((str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, **slurm, "PATH": path, "FEDUNLEARN_RAY_TMP": f"/tmp/t{os.getpid()}", **variables}
    return subprocess.run(
        ["bash", str(SCRIPT), *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def test_bash_reads_it():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True).stderr == ""


def test_ray_knows_the_options_it_is_started_with():
    pytest.importorskip("ray")
    known = subprocess.run(
        [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--help"],
        capture_output=True,
        text=True,
    )
    started = "".join(re.findall(r"ray start .*|start_ray .*", TEXT.replace("\\\n", "")))
    given = set(re.findall(r"--[a-z-]+", started))
    assert given == {"--address", "--block", "--head", "--include-dashboard", "--node-ip-address", "--num-cpus", "--num-gpus", "--port", "--ray-client-server-port", "--temp-dir"}  # fmt: skip
    assert given <= set(re.findall(r"--[a-z-]+", known.stdout))


def test_it_says_what_is_missing(tmp_path):
    bare = {name: text for name, text in FAKES.items() if name != "scontrol"}
    done = on_slurm(tmp_path, commands=bare)
    assert (done.returncode, done.stderr.splitlines()[-1][:45]) == (2, "fed_train.sbatch: scontrol is not on the PATH")
    assert "is set by Slurm" in on_slurm(tmp_path, SLURM_JOB_ID="").stderr


@pytest.mark.slow
def test_a_job_of_two_nodes_gives_its_run_and_its_exit_code_and_leaves_nothing(tmp_path, pocket):
    saves = tmp_path / "saves"
    places = (f"tofu_path={pocket.data}", f"model.model_args.pretrained_model_name_or_path={pocket.model}")
    places += tuple(f"paths.{key}={saves / folder}" for key, folder in (("saves_dir", ""), ("cache_dir", "cache"), ("pocket_dir", "pocket")))  # fmt: skip
    words = ("--config-name=train-lora.yaml", "experiment=finetune/tofu/pocket", "task_name=job", *places, *SMALL)
    done = on_slurm(tmp_path, *words, "launcher.client_cpus=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (saves / "finetune" / "job" / "done.json").is_file()
    assert re.search(rf"Ray at {HEAD}:\d+, 2 nodes with 1 CPUs each", done.stderr)
    again = on_slurm(tmp_path, *words, "overwrite=true", "launcher.client_cpus=2")
    assert again.returncode == 2
    assert "fit on no node of the cluster" in again.stderr
    folder = f"/tmp/t{os.getpid()}"
    assert not [one for one in subprocess.check_output(["ps", "-eo", "args"], text=True).splitlines() if folder in one]
    assert not list(ROOT.glob(".ray-token-*"))
