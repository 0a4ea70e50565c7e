"""launcher.address: what is refused before a client is sent to a cluster, and what a cluster does to a run."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers_ray import HEAD, SECOND, free_port, ray_cluster
from helpers_runs import adapter_bytes, finetune, history, tiny, unlearn

from fedunlearn.config.launcher import LocalLauncher, RayLauncher
from fedunlearn.doors.stages import run_federated
from fedunlearn.errors import UserError
from fedunlearn.federation.client_evaluation import lost_in_survey
from fedunlearn.federation.collect import check_all_there
from fedunlearn.records.rounds import ClientEvaluation, ClientScore

pytest.importorskip("ray")
from fedunlearn.federation.ray_child import needed_by_clients
from fedunlearn.federation.ray_cluster import Node, Sight, differences, looking, room_fault

TWO = (Node(id="a", name="10.0.0.1", cpus=4, gpus=0), Node(id="b", name="10.0.0.2", cpus=3, gpus=2))
FREE = {"CPU": 7.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"address": "auto"}, "launcher.address='auto' is no address of a Ray cluster"),
        ({"address": "ray://10.0.0.1:10001"}, "launcher.address='ray://10.0.0.1:10001' is no address"),
        ({"address": "10.0.0.1"}, "launcher.address='10.0.0.1' is no address"),
        ({"address": ""}, "launcher.address='' is no address"),
        ({"min_nodes": 2}, "launcher.min_nodes=2 must be .* 1 without launcher.address"),
        ({"address": "10.0.0.1:6379", "min_nodes": 0}, "launcher.min_nodes=0 must be at least 1"),
        ({"client_cpus": 0}, "launcher.client_cpus=0 must be above 0"),
        ({"client_cpus": 1.5}, "launcher.client_cpus=1.5: Ray gives away whole ones"),
        ({"client_gpus": 2.5}, "launcher.client_gpus=2.5: Ray gives away whole ones"),
        ({"client_gpus": -1}, "launcher.client_gpus=-1 not below"),
        ({"start_timeout": 0}, "launcher.start_timeout=0 must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_the_record(settings, fault):
    with pytest.raises(UserError, match=fault):
        RayLauncher(**settings)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(UserError) as told:
        RayLauncher(address="auto", client_cpus=-1, start_timeout=0)
    assert len(told.value.faults) == 3


def test_nobody_at_the_address_is_told_at_once_and_nothing_is_made(pocket, saves):
    began = time.monotonic()
    with pytest.raises(UserError, match=f"launcher.address='{HEAD}:[0-9]+': nobody answers there"):
        finetune(pocket, saves, "ray", "launcher=ray", f"launcher.address={HEAD}:{free_port()}")
    assert time.monotonic() - began < 10
    assert not (saves / "finetune" / "ray").exists()


def test_actors_are_counted_node_by_node():
    """3 CPUs an actor: one on each node, not int(7 / 3) = 2 of which one lies across both; with a GPU each, on the second alone."""
    assert [node.holds(RayLauncher(client_cpus=3)) for node in TWO] == [1, 1]
    assert [node.holds(RayLauncher(client_cpus=1, client_gpus=0.5)) for node in TWO] == [0, 3]


@pytest.mark.parametrize(
    ("settings", "free", "fault"),
    [
        ({"client_cpus": 3}, FREE, ""),
        ({"client_cpus": 3, "min_nodes": 2, "address": "10.0.0.1:1"}, FREE, ""),
        ({"min_nodes": 3, "address": "10.0.0.1:1"}, FREE, "launcher.min_nodes=3, but 2 are in the cluster (10.0.0.1, 10.0.0.2)"),
        ({"client_cpus": 8}, FREE, "fit on no node of the cluster (10.0.0.1 has 4 CPUs and 0 GPUs, 10.0.0.2 has 3 CPUs and 2 GPUs)"),
        ({"client_cpus": 1}, {**FREE, "CPU": 6.0}, "make 7 actors, which the cluster has no room for: 6 CPUs and 2 GPUs are free"),
        ({"client_cpus": 1, "client_gpus": 1}, {"CPU": 7.0}, "make 2 actors, which the cluster has no room for: 7 CPUs and 0 GPUs are free"),
    ],
)  # fmt: skip
def test_why_actors_have_no_room(settings, free, fault):
    told = room_fault(RayLauncher(**settings), TWO, free)
    assert fault in told
    assert bool(told) == bool(fault)


def test_a_node_is_refused_for_what_it_lacks_and_has_otherwise():
    here = Sight(versions={"fedunlearn": "0.1.0", "torch": "2.9.0"}, lacks=("hub/id",))
    there = Sight(versions={"fedunlearn": "not at all", "torch": "2.8.0"}, lacks=("hub/id", "/saves/run"))
    assert differences("10.0.0.2", here, here) == []
    package, torch, file = differences("10.0.0.2", here, there)
    assert package.startswith("launcher=ray: node 10.0.0.2 has fedunlearn not at all, this machine 0.1.0: install")
    assert torch.startswith("launcher=ray: node 10.0.0.2 has torch 2.8.0, this machine 2.9.0: install")
    assert file.startswith("launcher=ray: node 10.0.0.2 does not see '/saves/run' as this machine does")


def test_looking_tells_folders_and_packages_that_are_not_there(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "run" / "mark").write_text("word")
    (tmp_path / "other" / "mark").write_text("another word")
    marks = {str(tmp_path / "run" / "mark"): "word", str(tmp_path / "other" / "mark"): "word", "/nowhere/mark": "word"}
    seen = looking()(marks, [str(tmp_path), "/no/data"], ["torch", "no-such-package"], 0.0)
    assert seen["lacks"] == (str(tmp_path / "other"), "/nowhere", "/no/data")
    assert set(seen["versions"]) == {"torch", "no-such-package", "fedunlearn"}
    assert seen["versions"]["no-such-package"] == "not at all"


LOADED_ELSEWHERE = """
import json, pickle, sys
class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fedunlearn":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Lacking())
print(json.dumps(pickle.load(sys.stdin.buffer)({}, ["/"], ["ray"], 0.0)))
"""


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("dpo", "data.alternates_path"),
        ("idk_dpo", "data.idk_path"),
        ("npo", "model.tokenizer_args.pretrained_model_name_or_path"),
    ],
)
def test_nodes_are_asked_for_every_file_that_a_client_opens(pocket, saves, method, key):
    run = tiny(pocket, saves, "unlearn", "un", f"method={method}", f"{key}=/there").run
    assert set(needed_by_clients(run)) == {Path("/there"), Path(pocket.data), Path(pocket.model)}


def test_looking_travels_to_a_node_without_the_package():
    from ray import cloudpickle

    done = subprocess.run(
        [sys.executable, "-c", LOADED_ELSEWHERE], input=cloudpickle.dumps(looking()), capture_output=True, check=True
    )
    assert json.loads(done.stdout)["versions"]["fedunlearn"] == "not at all"


@pytest.mark.parametrize("launcher", [LocalLauncher(), RayLauncher()])
def test_a_client_that_is_missing_ends_a_run_where_the_launcher_cannot_go_on(pocket, saves, launcher):
    from dataclasses import replace

    run = replace(tiny(pocket, saves, "finetune", "ft").run, launcher=launcher)
    check_all_there(run, [])
    if launcher.survives_lost_clients:
        check_all_there(run, ["roll call: client 2 is not there"])
        return
    with pytest.raises(UserError, match="roll call: client 2 is not there") as told:
        check_all_there(run, ["roll call: client 2 is not there"])
    assert "cannot go on without a client" in told.value.faults[-1]


def test_who_is_lost_in_an_evaluation_by_the_clients():
    scores = (ClientScore(client_id=0), ClientScore(client_id=1, reason="crashed", detail="ActorDiedError"), ClientScore(client_id=2, reason="unreadable"))  # fmt: skip
    told = lost_in_survey(3, ClientEvaluation(figures={}, clients=scores))
    assert told == ["round 3, evaluation by the clients: client 1: crashed (ActorDiedError)"]


def attached(cluster, *more):
    return "launcher=ray", f"launcher.address={cluster.address}", "launcher.client_cpus=1", *more


@pytest.mark.slow
def test_more_clients_than_actors_give_the_bits_of_local_and_each_actor_loads_its_base_once(
    pocket, tmp_path, monkeypatch
):
    """Relative paths, and PYTHONPATH: a cluster that was started elsewhere knows neither. Nine clients on one actor."""
    monkeypatch.chdir(tmp_path)
    saves = Path("saves")
    more = ("trainer.federated.num_clients=9",)
    local = finetune(pocket, saves, "local", *more)
    with ray_cluster(cpus=1) as cluster:
        ray = finetune(pocket, saves, "ray", *more, *attached(cluster))
        assert cluster.processes("raylet")  # it was not ours to end
    assert adapter_bytes(local) == adapter_bytes(ray)
    loading = [client["seconds_loading"] for line in history(ray) for client in line["clients"]]
    assert loading == [0.0] * 18  # the roll call had the one actor load it
    assert not list(ray.glob(".seen-*"))


def _once(path, lines, act):
    """Acts when a file has so many lines, in a thread of its own; gives the thread."""

    def watch():
        end = time.monotonic() + 240
        while time.monotonic() < end:
            if path.is_file() and len(path.read_text().splitlines()) >= lines:
                act()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_dead_actor_ends_the_run_with_an_error_and_a_dead_head_too(pocket, saves):
    long = ("trainer.federated.num_rounds=200", "trainer.federated.num_clients=4")
    with ray_cluster(cpus=2) as cluster:
        _once(
            saves / "finetune" / "actor" / "history.jsonl",
            1,
            lambda: cluster.processes("ray::ClientAppActor")[0].kill(),
        )
        with pytest.raises(UserError, match=r"crashed .*ActorDiedError.*cannot go on without a client"):
            finetune(pocket, saves, "actor", *long, *attached(cluster))
        _once(saves / "finetune" / "head" / "history.jsonl", 1, lambda: cluster.processes("gcs_server")[0].kill())
        began = time.monotonic()
        with pytest.raises(UserError, match=r"launcher=ray|cannot go on without a client"):
            finetune(pocket, saves, "head", *long, *attached(cluster))
        assert time.monotonic() - began < 200
    for run in ("actor", "head"):
        assert not (saves / "finetune" / run / "done.json").exists()


@pytest.mark.slow
def test_a_client_that_hangs_is_ended_on_the_cluster_too(pocket, saves, monkeypatch):
    """Nothing of it stays in the way of the next run. The cluster finds the tests' methods by the command's PYTHONPATH."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent), prepend=os.pathsep)
    hanging = ("method=grad_ascent", "method._target_=helpers_methods.Hanging", "trainer.federated.round_timeout=15")
    with ray_cluster() as cluster:
        with pytest.raises(UserError, match=r"client \d: timeout .*cannot go on without a client"):
            unlearn(pocket, saves, None, "hanging", *hanging, *attached(cluster))
        end = time.monotonic() + 60
        while cluster.processes("ray::ClientAppActor") and time.monotonic() < end:
            time.sleep(0.2)
        assert not cluster.processes("ray::ClientAppActor")


@pytest.mark.slow
def test_a_cluster_of_another_ray_is_told_in_one_message(pocket, saves):
    with ray_cluster(version="2.40.0") as cluster, pytest.raises(UserError, match=r"launcher.address=.*Version mismatch.*2\.40\.0") as told:  # fmt: skip
        finetune(pocket, saves, "ray", *attached(cluster))
    assert len(told.value.faults) == 1


@pytest.mark.slow
def test_a_node_with_another_file_system_and_nodes_that_are_missing_are_refused_by_name(pocket, saves):
    """The second node runs where something else is mounted over the runs' folder."""
    saves.mkdir(parents=True)
    if os.system("unshare -rm true 2>/dev/null") != 0:
        pytest.skip("no mount namespaces here")
    hidden = ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs none {saves} && exec "$@"', "node")
    with ray_cluster() as cluster:
        few = attached(cluster, "launcher.min_nodes=2", "launcher.start_timeout=20")
        with pytest.raises(UserError, match=rf"launcher.min_nodes=2, but 1 are in the cluster \({HEAD}\)"):
            finetune(pocket, saves, "ray", *few)
        cluster.start(f"--address={cluster.address}", f"--node-ip-address={SECOND}", "--num-cpus=1", before=hidden)
        with pytest.raises(UserError, match=f"node {SECOND} does not see '.*saves/cache', '.*saves/finetune/ray' as this machine does"):  # fmt: skip
            finetune(pocket, saves, "ray", "overwrite=true", *attached(cluster, "launcher.min_nodes=2"))
    assert not list((saves / "finetune" / "ray").glob(".seen-*"))


@pytest.mark.slow
def test_a_cluster_of_ones_own_is_ones_own_whatever_the_environment_names(pocket, saves, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"{HEAD}:{free_port()}")
    run_federated(tiny(pocket, saves, "finetune", "own", "launcher=ray", "launcher.client_cpus=1"))
    assert json.loads((saves / "finetune" / "own" / "done.json").read_text())
