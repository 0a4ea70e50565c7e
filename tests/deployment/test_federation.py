"""A federation of real processes on loopback, with TLS and node keys: fine-tuning, unlearning, and what dies on the way."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers_deployed import MODEL
from helpers_runs import adapter_tensors, finetune, history, unlearn
from helpers_sites import SCRIPTS, Running, free_port, start_node, start_server, trial

pytestmark = pytest.mark.deployment
DOOR = SCRIPTS.parent / "src" / "fed_train.py"
CLIENTS = 3
THREE = f"trainer.federated.num_clients={CLIENTS}"
SECONDS = 300


class Federation:
    """A SuperLink and its nodes. folder: of the trial's files."""

    def __init__(self, folder, pocket):
        self.folder = trial(folder, clients=CLIENTS, models={MODEL: str(pocket.model)}, data=str(pocket.data))
        self.server = start_server(self.folder)
        self.nodes = {}
        for client in range(CLIENTS):
            self.start(client)

    def start(self, client):
        """Starts a client's node, or starts it again."""
        self.nodes[client] = start_node(self.folder / f"client{client}" / f"client{client}.yaml")
        self.nodes[client].wait_for("SuperNode ID")

    @property
    def saves(self):
        """Where runs lie."""
        return self.folder / "server" / "saves"

    def overrides(self):
        """The launcher of this SuperLink."""
        port = self.server_port()
        return (
            "launcher=superlink", f"launcher.address=127.0.0.1:{port}", "launcher.threads=1",
            f"launcher.root_certificates={self.folder}/server/ca.crt", f"model.model_args.pretrained_model_name_or_path={MODEL}", THREE,
        )  # fmt: skip

    def server_port(self):
        return next(
            line.split(":")[-1].strip()
            for line in (self.folder / "server" / "server.yaml").read_text().splitlines()
            if line.startswith("listen")
        )

    def submit(self, pocket, kind, task, *more):
        """Starts the door's command and gives it, running."""
        name = "unlearn-lora.yaml" if kind == "unlearn" else "train-lora.yaml"
        small = [
            "trainer.federated.num_rounds=2", "trainer.args.num_train_epochs=1", "trainer.args.per_device_train_batch_size=8",
            "model.model_args.lora_config.r=4", "eval.at_end=false", f"task_name={task}",
        ]  # fmt: skip
        words = [DOOR, f"--config-name={name}", f"experiment={kind}/tofu/pocket", *small, *self.overrides(), *more]
        return Running(self.folder / f"{task}.log", *words)

    def worker_of(self, client):
        """The worker's process of a client."""
        site = str(self.folder / f"client{client}" / f"client{client}.yaml")
        return next(
            process
            for process in psutil.process_iter(["cmdline"])
            if "fedunlearn.federation.deployed.worker" in (line := process.info["cmdline"] or ()) and site in line
        )

    def end(self):
        """Ends it all; nothing may be left."""
        for node in self.nodes.values():
            node.end()
        return self.server.end()


@pytest.fixture(scope="module")
def federation(tmp_path_factory, pocket):
    made = Federation(tmp_path_factory.mktemp("federation"), pocket)
    yield made
    assert made.end() == 0


def done(running, seconds=SECONDS):
    """Waits for a submitted run; its text."""
    assert running.process.wait(seconds) == 0, running.text()
    return running.text()


@pytest.fixture(scope="module")
def tuned(federation, pocket):
    text = done(federation.submit(pocket, "finetune", "ft"))
    assert "result: finetune/ft under the server's saves_root" in text
    return text


def largest_difference(mine, its):
    mine, its = adapter_tensors(mine), adapter_tensors(its)
    assert mine.keys() == its.keys()
    return max(float((mine[name] - its[name]).abs().max()) for name in mine)


def test_the_whole_story_is_launcher_locals(federation, tuned, pocket, saves):
    ours = finetune(pocket, saves, "ft", "launcher.threads=1", THREE)
    assert largest_difference(ours, federation.saves / "finetune" / "ft") <= 1e-6
    start = "model.model_args.pretrained_model_name_or_path=saves/finetune/ft"
    text = done(federation.submit(pocket, "unlearn", "un", start))
    assert "round 2: clients [0, 1, 2]" in text
    ours = unlearn(pocket, saves, ours, "un", "launcher.threads=1", THREE)
    theirs = federation.saves / "unlearn" / "un"
    assert largest_difference(ours, theirs) <= 1e-6
    assert [client["seconds_loading"] for client in history(theirs)[1]["clients"]] == [0.0] * CLIENTS


def test_the_result_is_fetched(federation, tuned, tmp_path):
    site = federation.folder / "server" / "server.yaml"
    words = [sys.executable, SCRIPTS / "superlink.py", "fetch", site, "ft", "--to", tmp_path]
    subprocess.run([*map(str, words)], check=True, timeout=60, capture_output=True)
    (fetched,) = [path for path in tmp_path.rglob("adapter_model.safetensors") if path.parent.name == "adapter"]
    there = federation.saves / "finetune" / "ft"
    assert fetched.read_bytes() == (there / "adapter" / "adapter_model.safetensors").read_bytes()
    assert next(tmp_path.rglob("history.jsonl")).read_bytes() == (there / "history.jsonl").read_bytes()


def test_a_task_name_with_a_separator_is_refused_before_anything_is_sent(federation, pocket):
    running = federation.submit(pocket, "finetune", "x", "task_name=../x")
    assert running.process.wait(SECONDS) == 2
    assert "task_name='../x' must be a plain folder name" in running.text()


def test_a_model_that_the_server_does_not_know_is_refused(federation, pocket):
    running = federation.submit(pocket, "finetune", "y", "model.model_args.pretrained_model_name_or_path=/etc")
    assert running.process.wait(SECONDS) == 2
    assert "'/etc' names nothing on the server" in running.text()
    assert not (federation.saves / "finetune" / "y").exists()


def after_round(federation, task, kind="finetune", number=1):
    """Waits until a round is on the server's disk."""
    path = federation.saves / kind / task / "rounds" / f"{number:04d}"
    end = time.monotonic() + SECONDS
    while not path.is_dir():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_worker_killed_in_the_middle_costs_no_round(federation, tuned, pocket):
    running = federation.submit(
        pocket, "finetune", "killed", "trainer.federated.num_rounds=4", "trainer.federated.min_clients=3"
    )
    after_round(federation, "killed")
    federation.worker_of(1).kill()
    done(running)
    lines = history(federation.saves / "finetune" / "killed")
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert all(len([c for c in line["clients"] if c["weight"] > 0]) == 3 for line in lines)


def test_a_node_that_is_killed_and_comes_back_takes_part_again(federation, tuned, pocket):
    rounds = "trainer.federated.num_rounds=8"
    running = federation.submit(pocket, "finetune", "back", rounds, "trainer.federated.round_timeout=20")
    after_round(federation, "back")
    old = federation.nodes[2]
    for process in [*psutil.Process(old.process.pid).children(recursive=True), psutil.Process(old.process.pid)]:
        process.kill()
    old.process.wait()
    site = federation.folder / "client2" / "client2.yaml"
    end = time.monotonic() + 150
    while True:  # the SuperLink takes the old node for alive until its heartbeat is missed
        federation.nodes[2] = start_node(site)
        try:
            federation.nodes[2].wait_for("SuperNode ID", 30)
            break
        except AssertionError:
            assert time.monotonic() < end, federation.nodes[2].text()
            time.sleep(2)
    done(running, 600)
    lines = history(federation.saves / "finetune" / "back")
    assert [line["round"] for line in lines] == list(range(1, 9))


def test_the_superlink_is_killed_and_the_run_ends_right(federation, tuned, pocket, saves):
    running = federation.submit(pocket, "finetune", "link", "trainer.federated.num_rounds=4")
    after_round(federation, "link")
    superlink = next(
        process
        for process in psutil.Process(federation.server.process.pid).children()
        if any("flower-superlink" in word for word in process.cmdline())
    )
    superlink.kill()
    done(running, 600)
    ours = finetune(pocket, saves, "link", "launcher.threads=1", THREE, "trainer.federated.num_rounds=4")
    assert largest_difference(ours, federation.saves / "finetune" / "link") <= 1e-6


def test_a_submitter_that_is_interrupted_stops_the_run_and_resume_goes_on(federation, tuned, pocket, saves):
    running = federation.submit(pocket, "finetune", "stopped", "trainer.federated.num_rounds=6")
    after_round(federation, "stopped")
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(60) == 130
    assert "was stopped at the server" in running.text()
    time.sleep(5)
    done(federation.submit(pocket, "finetune", "stopped", "trainer.federated.num_rounds=6", "resume=true"))
    ours = finetune(pocket, saves, "stopped", "launcher.threads=1", THREE, "trainer.federated.num_rounds=6")
    assert largest_difference(ours, federation.saves / "finetune" / "stopped") <= 1e-6


def test_no_superlink_at_the_address(tmp_path, pocket):
    port = free_port()
    words = [
        DOOR, "--config-name=train-lora.yaml", "experiment=finetune/tofu/pocket", "task_name=n", "launcher=superlink",
        f"launcher.address=127.0.0.1:{port}", "launcher.insecure=true",
    ]  # fmt: skip
    running = Running(tmp_path / "log", *words)
    assert running.process.wait(60) == 2
    assert f"launcher.address='127.0.0.1:{port}': no SuperLink answers there" in running.text()
