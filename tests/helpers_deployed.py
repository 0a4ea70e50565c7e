"""Nodes of a real federation without Flower's network: each message goes to the thin ClientApp, and from there to a real worker process."""

import os
from pathlib import Path

import yaml
from flwr.app import Context, RecordDict
from helpers_runs import tiny

from fedunlearn.config.sites import ClientSite, ServerSite, read_site
from fedunlearn.doors.deployed import run_submitted
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
