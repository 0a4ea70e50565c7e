"""Ray clusters on this machine for the launcher's tests: each with sockets, a port and addresses of its own, ended by its own processes' ids."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SECONDS_TO_START = 90
HEAD, SECOND = "127.0.0.2", "127.0.0.3"
START = "import ray, sys; ray.__version__ = sys.argv.pop(1) or ray.__version__; from ray.scripts.scripts import main; main()"


@dataclass
class Cluster:
    """port: of the head. folder: Ray's own, with a short path. started: the processes of `ray start --block`."""

    port: int
    folder: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{HEAD}:{self.port}"

    def start(self, *words: str, before: tuple[str, ...] = (), version: str = "", cwd: str = "/") -> subprocess.Popen:
        """Starts one node. before: a command that runs it; version: what it says that Ray's is."""
        common = [
            "--block",
            "--num-gpus=0",
            "--disable-usage-stats",
            "--object-store-memory=80000000",
            f"--temp-dir={self.folder}",
        ]
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
        process = subprocess.Popen(
            [*before, sys.executable, "-c", START, version, "start", *common, *words],
            cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def processes(self, name: str) -> list[psutil.Process]:
        """This cluster's processes whose name begins so."""
        found = []
        for process in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += psutil.Process(process.pid).children(recursive=True)
        return [one for one in found if _name(one).startswith(name)]

    def end(self) -> None:
        for process in self.started:
            family = []
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            _, left = psutil.wait_procs(family, timeout=20)
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _name(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    return Path(words[0]).name if words else ""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind((HEAD, 0))
        return taken.getsockname()[1]


@contextmanager
def ray_cluster(cpus: int = 1, version: str = "") -> Iterator[Cluster]:
    """A cluster of one node, whose working directory is / and whose environment has no PYTHONPATH, as another machine's would be."""
    cluster = Cluster(free_port(), Path(tempfile.mkdtemp(prefix="ray", dir="/tmp")))
    try:
        cluster.start("--head", f"--port={cluster.port}", f"--node-ip-address={HEAD}", f"--num-cpus={cpus}", "--include-dashboard=false", version=version)  # fmt: skip
        await_port(cluster)
        yield cluster
    finally:
        cluster.end()


def await_port(cluster: Cluster) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection((HEAD, cluster.port), 1).close()
            return
        assert time.monotonic() < end, "Ray's head does not come up"
        time.sleep(0.2)
