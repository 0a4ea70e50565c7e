"""Nodes of a real federation without Flower's network: each message goes to the thin ClientApp, and from there to a real worker process."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml
from flwr.app import Context, Message, RecordDict
from helpers_runs import tiny

from fedunlearn.config.sites import ClientSite, ServerSite, read_site
from fedunlearn.doors.deployed import run_submitted
from fedunlearn.federation.deployed.enrolment import enrolment_of
from fedunlearn.federation.deployed.frames import Frame, pack_content
from fedunlearn.federation.deployed.keeper import MODULE, Keeper
from fedunlearn.federation.deployed.server import carry
from fedunlearn.federation.deployed.submission import at_server
from fedunlearn.federation.deployed.thin_client import app
from fedunlearn.federation.local_grid import RUN_ID, SequentialGrid, call_client

MODEL = "pocket-base"
POLICY = {"models": [MODEL], "max_steps": 1000, "score_forget_rows": True, "max_task_seconds": 120.0}


def write_sites(folder, pocket, clients=4, policy=None, **changes):
    """Writes server.yaml and client0.yaml ... and gives the clients' paths. changes: of every client's site."""
    places = {"data": {"tofu_path": str(pocket.data)}, "models": {MODEL: str(pocket.model)}, "insecure": True}
    server = {**places, "listen": "127.0.0.1:8000", "saves_root": "served", "work_dir": "server"}
    _write(folder / "server.yaml", server)
    _write(folder / "policy.yaml", {**POLICY, **(policy or {})})
    paths = []
    for k in range(clients):
        site = {**places, "client_id": k, "superlink": "127.0.0.1:8000", "work_dir": f"c{k}", "policy": "policy.yaml"}
        (folder / f"c{k}").mkdir(mode=0o700, exist_ok=True)
        paths.append(_write(folder / f"client{k}.yaml", {**site, **changes}))
    return paths


def _write(path, content):
    path.write_text(yaml.safe_dump(content))
    return path


def client_site(path) -> ClientSite:
    return read_site(path, ClientSite)


class ThinGrid(SequentialGrid):
    """Client k at node k + 2; supernode: the process that its workers end with."""

    def __init__(self, paths, supernode=None, run_id=RUN_ID):
        super().__init__(len(paths))
        config = {"supernode-pid": supernode or os.getpid()}
        self.contexts = {
            node: Context(run_id, node, {"site": str(path), **config}, RecordDict(), {})
            for node, path in zip(self._nodes, paths, strict=True)
        }
        self.before = lambda message: None

    def _answer(self, message):
        self.before(message)
        return call_client(app, self.contexts[message.metadata.dst_node_id], message)


def submitted(pocket, kind, task, *overrides):
    """The config as it is submitted: ids and runs in the place of paths."""
    composed = tiny(
        pocket,
        Path("saves"),
        kind,
        task,
        "launcher=superlink",
        "launcher.address=127.0.0.1:8000",
        "launcher.insecure=true",
        "launcher.threads=1",
        f"model.model_args.pretrained_model_name_or_path={MODEL}",
        *overrides,
    )
    return composed.plain


def run_deployed(folder, plain, grid):
    """The stage that a SuperLink would start, over a grid; gives the run's folder."""
    site = read_site(folder / "server.yaml", ServerSite)
    done = run_submitted(at_server(site, plain), lambda prepared: carry(grid, site, prepared))
    return Path(site.saves_root) / done["folder"]


def workers_of(paths):
    """The workers' processes of some sites."""
    words = {str(path) for path in paths}
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if MODULE in (line := process.info["cmdline"] or ()) and words & set(line)
    ]


def end_workers(paths):
    """Ends those that are left."""
    for process in workers_of(paths):
        process.kill()


class RecordingThinGrid(ThinGrid):
    """Keeps what was asked and said last, by kind."""

    def __init__(self, paths, run_id):
        super().__init__(paths, run_id=run_id)
        self.asked, self.said = {}, {}

    def _answer(self, message):
        reply = super()._answer(message)
        kind = message.metadata.message_type.split(".")[0]
        self.asked[kind], self.said[kind] = message.content, reply.content
        return reply


@dataclass(eq=False)
class Node:
    """The one client of runs that are over, whose worker is there still. asked, said: contents of their one round, by run and kind."""

    path: Path
    asked: dict = field(default_factory=dict)
    said: dict = field(default_factory=dict)

    def take_part(self, folder, pocket, run_id, *overrides):
        """Takes part in a run of one round."""
        grid = RecordingThinGrid([self.path], run_id)
        one = ("trainer.federated.num_clients=1", "trainer.federated.num_rounds=1")
        run_deployed(folder, submitted(pocket, "finetune", f"run{run_id}", *one, *overrides), grid)
        self.asked[run_id], self.said[run_id] = grid.asked, grid.said

    def answer(self, run_id, kind="train") -> Message:
        """What its thin client says to what it was asked then."""
        message = Message(self.asked[run_id][kind], 2, kind)
        message.metadata.__dict__["_message_id"] = "asked"
        config = {"site": str(self.path), "supernode-pid": os.getpid()}
        return call_client(app, Context(run_id, 2, config, RecordDict(), {}), message)

    def says_the_same(self, run_id, reply=None) -> bool:
        """Whether a reply has the bits that it gave then, and all of its numbers but seconds."""
        reply = reply or self.answer(run_id)
        said = self.said[run_id]["train"]
        return not reply.has_error() and _timeless(reply.content) == _timeless(said)

    def frame(self, run_id, kind="train") -> Frame:
        """What the thin client sends its worker."""
        described, blobs = pack_content(self.asked[run_id][kind])
        return Frame({"do": "answer", "folder": str(run_id), "kind": kind, "content": described}, blobs)

    def keeper(self, run_id) -> Keeper:
        """The keeper of the run's worker."""
        site, enrolment = client_site(self.path), enrolment_of(client_site(self.path), run_id)
        base = Path(enrolment.read_config()["model"]["model_args"]["pretrained_model_name_or_path"])
        return Keeper(site=site, site_path=self.path, key=enrolment.worker_key, base=base, supernode=os.getpid())

    @property
    def worker(self) -> psutil.Process:
        """Its one worker."""
        (process,) = workers_of([self.path])
        return process


def _timeless(content):
    numbers = json.loads(content["reply"]["json"])
    return {k: v for k, v in numbers.items() if "seconds" not in k}, bytes(content["adapter"]["blob"].data)


@contextmanager
def one_node(folder, pocket) -> Iterator[Node]:
    """A node that took part in runs 1 and 2 on one base; its workers end with the block."""
    node = Node(write_sites(folder, pocket, clients=1)[0])
    try:
        node.take_part(folder, pocket, 1)
        node.take_part(folder, pocket, 2, "trainer.args.seed=5")
        yield node
    finally:
        end_workers([node.path])
