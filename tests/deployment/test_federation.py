"""A federation of real processes on loopback, with TLS and node keys: fine-tuning, unlearning, and what dies on the way."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
from differences import largest_difference
from federation_here import (
    DOOR,
    MODEL,
    SCRIPTS,
    SERVER_APP,
    SUPERLINK,
    FederationHere,
    Running,
    edit,
    free_port,
    start_node,
    until,
)
from helpers_runs import SMALL, finetune, history, unlearn
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.deployment
CLIENTS = 3
THREE = f"trainer.federated.num_clients={CLIENTS}"
SECONDS = 300


def rounds(number):
    return f"trainer.federated.num_rounds={number}"


@pytest.fixture(scope="module")
def federation(tmp_path_factory, pocket):
    folder = tmp_path_factory.mktemp("federation")
    made = FederationHere(folder, clients=CLIENTS, spare=1, data=pocket.data, model=pocket.model)
    yield made
    assert made.end() == 0


def submit(federation, kind, task, *more):
    """Starts the door's command for a run of two quick rounds and gives it, running."""
    return federation.submit(kind, task, *SMALL, THREE, *more)


def done(running, seconds=SECONDS):
    """Waits for a submitted run; its text."""
    return running.done(seconds)


def after_round(federation, task, number=1):
    """Waits until a round of a fine-tuning run is on the server's disk."""
    path = federation.run_folder("finetune", task) / "rounds" / f"{number:04d}"
    until(path.is_dir, SECONDS, f"round {number} of {task}")


@pytest.fixture(scope="module")
def tuned(federation, pocket):
    text = done(submit(federation, "finetune", "ft"))
    assert "result: finetune/ft under the server's saves_root" in text
    assert re.search(r"^cost: \d+ optimiser steps, .* MB down", text, re.MULTILINE)
    return text


def test_the_whole_story_is_launcher_locals(federation, tuned, pocket, saves):
    ours = finetune(pocket, saves, "ft", "launcher.threads=1", THREE)
    assert largest_difference(ours, federation.saves / "finetune" / "ft") <= 1e-6
    start = "model.model_args.pretrained_model_name_or_path=saves/finetune/ft"
    text = done(submit(federation, "unlearn", "un", start))
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
    running = submit(federation, "finetune", "x", "task_name=../x")
    assert running.process.wait(SECONDS) == 2
    assert "task_name='../x' must be a plain folder name" in running.text()


def test_a_model_that_the_server_does_not_know_is_refused(federation, pocket):
    running = submit(federation, "finetune", "y", "model.model_args.pretrained_model_name_or_path=/etc")
    assert running.process.wait(SECONDS) == 2
    assert "'/etc' names nothing on the server" in running.text()
    assert not (federation.saves / "finetune" / "y").exists()


def test_a_worker_killed_in_the_middle_costs_no_round(federation, tuned, pocket):
    running = submit(federation, "finetune", "killed", rounds(4), "trainer.federated.min_clients=3")
    after_round(federation, "killed")
    federation.worker_of(1).kill()
    done(running)
    lines = history(federation.saves / "finetune" / "killed")
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert all(len([c for c in line["clients"] if c["weight"] > 0]) == 3 for line in lines)


def test_a_node_that_is_killed_and_comes_back_takes_part_again(federation, tuned, pocket):
    running = submit(federation, "finetune", "back", rounds(8), "trainer.federated.round_timeout=20")
    after_round(federation, "back")
    federation.nodes[2].kill()
    federation.start_again(2)
    done(running, 600)
    lines = history(federation.run_folder("finetune", "back"))
    assert [line["round"] for line in lines] == list(range(1, 9))


def test_the_superlink_is_killed_and_the_run_ends_right(federation, tuned, pocket, saves):
    running = submit(federation, "finetune", "link", rounds(4))
    after_round(federation, "link")
    federation.of_server(SUPERLINK).kill()
    done(running, 600)
    ours = finetune(pocket, saves, "link", "launcher.threads=1", THREE, rounds(4))
    assert largest_difference(ours, federation.saves / "finetune" / "link") <= 1e-6


def test_a_submitter_that_is_interrupted_stops_the_run_and_resume_goes_on(federation, tuned, pocket, saves):
    running = submit(federation, "finetune", "stopped", rounds(6))
    after_round(federation, "stopped")
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(60) == 130
    assert "was stopped at the server" in running.text()
    time.sleep(5)
    done(submit(federation, "finetune", "stopped", rounds(6), "resume=true"))
    ours = finetune(pocket, saves, "stopped", "launcher.threads=1", THREE, rounds(6))
    assert largest_difference(ours, federation.saves / "finetune" / "stopped") <= 1e-6


def test_a_serverapp_that_is_killed_ends_the_command_with_the_way_out_and_resume_goes_on(
    federation, tuned, pocket, saves
):
    running = submit(federation, "finetune", "app", rounds(4))
    after_round(federation, "app")
    federation.of_server(SERVER_APP).kill()
    said = running.refused(SECONDS)
    assert "its ServerApp died" in said
    assert "resume=true" in said
    done(submit(federation, "finetune", "app", rounds(4), "resume=true"))
    assert [line["round"] for line in history(federation.run_folder("finetune", "app"))] == [1, 2, 3, 4]
    ours = finetune(pocket, saves, "app", "launcher.threads=1", THREE, rounds(4))
    assert largest_difference(ours, federation.run_folder("finetune", "app")) <= 1e-6


def test_all_listen_on_loopback_alone(federation, tuned):
    listening = set()
    for process in federation.processes():
        with suppress(psutil.NoSuchProcess):  # the last message's process may still have been there
            found = process.net_connections(kind="inet")
            listening |= {(one.laddr.ip, one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN}
    assert {ip for ip, _ in listening} == {"127.0.0.1"}
    assert len(listening) >= 1 + CLIENTS  # the SuperLink's port and each node's own


@pytest.fixture
def changed(federation):
    """Starts a client's node again with other keys in its site or its policy; afterwards it is what it was."""
    before = {}

    def change(client, path, **changes):
        before[client, path] = path.read_text()
        edit(path, **changes)
        started_again(federation, client)

    yield change
    for (client, path), text in before.items():
        path.write_text(text)
        started_again(federation, client)


def started_again(federation, client):
    federation.nodes[client].end()
    federation.start_again(client)


def test_a_node_with_another_base_is_refused_by_name(federation, tuned, pocket, tmp_path, changed):
    other = tmp_path / "model"
    shutil.copytree(pocket.model, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    changed(2, federation.site_of(2), models={MODEL: str(other)})
    text = done(submit(federation, "finetune", "base", "trainer.federated.min_clients=2"))
    assert "round 2: clients [0, 1]," in text
    assert "client 2 has base_fingerprint=" in " ".join(text.split())
    folder = federation.run_folder("finetune", "base")
    (refused, absent) = json.loads((folder / "roll_call.json").read_text())["refused"]
    assert refused.startswith("roll call: client 2 has base_fingerprint=")
    assert absent == "roll call: client 2 is not there"
    assert refused in json.loads((folder / "done.json").read_text())["account"]["dropped"]


def test_a_second_node_of_a_client_that_is_there_is_refused_by_name(federation, tuned):
    double = edit(federation.site_of(CLIENTS), client_id=0)
    running = submit(federation, "finetune", "double", rounds(5))
    after_round(federation, "double")
    node = start_node(double)
    try:
        node.wait_for("SuperNode ID")
        said = " ".join(done(running).split())
    finally:
        node.end()
    lines = history(federation.run_folder("finetune", "double"))
    assert [len([c for c in line["clients"] if c["weight"] > 0]) for line in lines] == [CLIENTS] * 5
    assert "says that it is client 0, which is there already as node" in said


def test_a_node_that_says_another_client_s_id_is_refused_by_its_key(federation, tuned, changed):
    changed(1, federation.site_of(1), client_id=2)
    text = done(submit(federation, "finetune", "poses", "trainer.federated.min_clients=2"))
    assert "round 2: clients [0, 2]," in text
    assert "a node with the key of client 1 says that it is client 2: correct client_id" in " ".join(text.split())


def test_a_client_whose_task_raises_is_dropped_by_name_in_each_round(federation, tuned, changed):
    changed(1, federation.policy_of(1), max_steps=1)
    text = done(submit(federation, "finetune", "raises", "trainer.federated.min_clients=2"))
    for line in history(federation.run_folder("finetune", "raises")):
        (dropped,) = [client for client in line["clients"] if client["reason"]]
        assert (dropped["client_id"], dropped["reason"], dropped["weight"]) == (1, "crashed", 0.0)
        assert "max_steps" in dropped["detail"]
        assert f"round {line['round']}: clients [0, 2]," in text


def test_no_superlink_at_the_address(tmp_path, pocket):
    port = free_port()
    words = [
        DOOR, "--config-name=train-lora.yaml", "experiment=finetune/tofu/pocket", "task_name=n", "launcher=superlink",
        f"launcher.address=127.0.0.1:{port}", "launcher.insecure=true",
    ]  # fmt: skip
    running = Running(tmp_path / "log", *words)
    assert running.process.wait(60) == 2
    assert f"launcher.address='127.0.0.1:{port}': no SuperLink answers there" in running.text()
