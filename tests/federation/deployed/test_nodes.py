"""A whole run over thin clients and their workers: the same adapter as launcher=local, a base loaded once, and what happens to a worker that dies or hangs."""

import json
import subprocess
import sys
import threading

import pytest
from helpers_deployed import ThinGrid, client_site, run_deployed, submitted, workers_of, write_sites
from helpers_runs import adapter_bytes, finetune, history, unlearn

from fedunlearn.doors.own_rows import split_off
from fedunlearn.errors import UserError


@pytest.fixture
def nodes(tmp_path, pocket):
    """Sites and a grid over them; workers that are left are ended."""
    paths = write_sites(tmp_path, pocket)
    yield tmp_path, paths
    for process in workers_of(paths):
        process.kill()


def test_fine_tuning_and_unlearning_give_the_bytes_of_launcher_local(nodes, pocket, saves):
    folder, paths = nodes
    ours = finetune(pocket, saves, "ft", "launcher.threads=1")
    theirs = run_deployed(folder, submitted(pocket, "finetune", "ft"), ThinGrid(paths))
    assert adapter_bytes(theirs) == adapter_bytes(ours)
    (pids,) = {tuple(sorted(process.pid for process in workers_of(paths)))}
    assert len(pids) == 4
    (socket,) = (folder / "c0").glob("*.sock")
    assert [place.stat().st_mode & 0o077 for place in (socket, folder / "c0")] == [0, 0]  # their owner's alone
    ours = unlearn(pocket, saves, ours, "un", "launcher.threads=1")
    plain = submitted(pocket, "unlearn", "un", "model.model_args.pretrained_model_name_or_path=saves/finetune/ft")
    theirs = run_deployed(folder, plain, ThinGrid(paths, run_id=2))
    assert adapter_bytes(theirs) == adapter_bytes(ours)
    assert {process.pid for process in workers_of(paths)} == set(pids)  # another run, the same base
    for line in history(theirs):
        assert [client["seconds_loading"] for client in line["clients"]] == [0.0] * 4


def test_the_thin_client_imports_no_torch():
    code = "import sys; import fedunlearn.federation.deployed.thin_client; print(sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_a_worker_that_dies_in_its_task_costs_its_client_one_attempt(nodes, pocket):
    folder, paths = nodes
    grid, killed = ThinGrid(paths), []

    def kill(message):
        if message.metadata.message_type.startswith("train") and message.metadata.dst_node_id == 3 and not killed:
            (worker,) = workers_of(paths[1:2])
            killed.append(worker.pid)
            worker.suspend()  # it has the message, and never answers
            threading.Timer(1.0, worker.kill).start()

    grid.before = kill
    run = run_deployed(folder, submitted(pocket, "finetune", "ft", "trainer.federated.min_clients=4"), grid)
    assert [line["attempt"] for line in history(run)] == [2, 1]  # the message that is sent again starts another worker
    (after,) = workers_of(paths[1:2])
    assert [after.pid] != killed
    assert history(run)[0]["clients"][1]["seconds_loading"] > 0


def test_a_worker_that_hangs_is_ended_at_the_deadline_and_told(tmp_path, pocket, monkeypatch):
    paths = write_sites(tmp_path, pocket, policy={"max_task_seconds": 4.0})
    grid, stopped = ThinGrid(paths), []

    def stop(message):
        if message.metadata.message_type.startswith("train") and message.metadata.dst_node_id == 2 and not stopped:
            (worker,) = workers_of(paths[:1])
            stopped.append(worker)
            worker.suspend()

    grid.before = stop
    run = run_deployed(tmp_path, submitted(pocket, "finetune", "ft", "trainer.federated.min_clients=2"), grid)
    first = history(run)[0]["clients"][0]
    assert (first["reason"], "no answer within 4 s" in first["detail"]) == ("timeout", True)
    assert not history(run)[1]["clients"][0]["reason"]
    assert not stopped[0].is_running()
    for process in workers_of(paths):
        process.kill()


def test_a_worker_ends_with_its_supernode(tmp_path, pocket):
    paths = write_sites(tmp_path, pocket, clients=1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as supernode:
        plain = submitted(pocket, "finetune", "ft", "trainer.federated.num_clients=1")
        run_deployed(tmp_path, plain, ThinGrid(paths, supernode.pid))
        (worker,) = workers_of(paths)
        supernode.kill()
        supernode.wait()
        worker.wait(10)
    assert not workers_of(paths)


def test_a_worker_without_work_ends(tmp_path, pocket):
    paths = write_sites(tmp_path, pocket, clients=1, worker={"idle_minutes": 0.03})
    run_deployed(tmp_path, submitted(pocket, "finetune", "ft", "trainer.federated.num_clients=1"), ThinGrid(paths))
    for worker in workers_of(paths):
        worker.wait(10)
    assert not list((tmp_path / "c0").glob("*.sock"))


def refused(folder, paths, plain):
    with pytest.raises(UserError) as caught:
        run_deployed(folder, plain, ThinGrid(paths))
    return "\n".join(caught.value.faults)


def test_nodes_that_cannot_take_part_are_refused_by_name_and_the_others_go_on(nodes, pocket):
    """One lacks its data, one's policy forbids the model, one has a number that the run does not have."""
    folder, paths = nodes
    (folder / "narrow.yaml").write_text((folder / "policy.yaml").read_text().replace("pocket-base", "another"))
    paths[1].write_text(paths[1].read_text().replace(str(pocket.data), str(folder / "gone")))
    paths[2].write_text(paths[2].read_text().replace("policy.yaml", "narrow.yaml"))
    paths[3].write_text(paths[3].read_text().replace("client_id: 3", "client_id: 7"))
    run = run_deployed(folder, submitted(pocket, "finetune", "ft", "trainer.federated.min_clients=1"), ThinGrid(paths))
    data, policy, number, missing = json.loads((run / "roll_call.json").read_text())["refused"]
    assert f"failed: client 1: data.tofu_path='{folder / 'gone'}' is no folder on this machine" in data
    assert "failed: client 2: this node's policy does not allow model 'pocket-base'; it allows ['another']" in policy
    assert "failed: client 7: the run has clients 0 to 3 only: correct this node's client_id" in number
    assert missing == "roll call: client 3 is not there"  # a client that told why it takes no part is told once
    assert [[client["client_id"] for client in line["clients"]] for line in history(run)] == [[0]] * 2


def test_more_steps_than_the_policy_allows_are_not_made(tmp_path, pocket):
    paths = write_sites(tmp_path, pocket, clients=2, policy={"max_steps": 1})
    said = refused(tmp_path, paths, submitted(pocket, "finetune", "ft", "trainer.federated.num_clients=2"))
    assert "optimiser steps, this client's policy allows 1 (policy: max_steps)" in said
    for process in workers_of(paths):
        process.kill()


def test_forget_rows_are_not_scored_where_the_policy_forbids_it(tmp_path, pocket):
    paths = write_sites(tmp_path, pocket, clients=2, policy={"score_forget_rows": False})
    two = ("trainer.federated.num_clients=2", "eval.clients_every_n_rounds=1", "method=grad_ascent")
    plain = submitted(pocket, "unlearn", "un", *two)
    run = run_deployed(tmp_path, plain, ThinGrid(paths))
    scored = history(run)[0]["by_clients"]["clients"]
    assert all("policy: score_forget_rows=false" in one["detail"] for one in scored)
    for process in workers_of(paths):
        process.kill()


def test_a_site_that_claims_anothers_id_is_refused_by_name(nodes, pocket):
    folder, paths = nodes
    paths[3].write_text(paths[3].read_text().replace("client_id: 3", "client_id: 1"))
    run = run_deployed(folder, submitted(pocket, "finetune", "ft"), ThinGrid(paths))
    assert "2 nodes say that they are client 1" in (run / "roll_call.json").read_text()
    assert client_site(paths[3]).client_id == 1


def test_nodes_that_hold_their_own_rows_alone_give_the_same_bytes(nodes, pocket, saves):
    folder, paths = nodes
    ours = finetune(pocket, saves, "ft", "launcher.threads=1")
    for client, path in enumerate(paths):
        split_off(str(pocket.data), ours, client, folder / f"rows{client}")
        path.write_text(path.read_text().replace(str(pocket.data), str(folder / f"rows{client}")))
    theirs = run_deployed(folder, submitted(pocket, "finetune", "ft"), ThinGrid(paths))
    assert adapter_bytes(theirs) == adapter_bytes(ours)
    ours = unlearn(pocket, saves, ours, "un", "launcher.threads=1", "method=npo")
    plain = submitted(
        pocket, "unlearn", "un", "model.model_args.pretrained_model_name_or_path=saves/finetune/ft", "method=npo"
    )
    theirs = run_deployed(folder, plain, ThinGrid(paths, run_id=2))
    assert adapter_bytes(theirs) == adapter_bytes(ours)
