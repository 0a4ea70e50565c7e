"""scripts/supernode.py SITE.yaml --end-workers: idle workers end at once, busy ones after their task; a node without any is no fault."""

import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from federation_here import SCRIPTS
from helpers_deployed import ThinGrid, client_site, run_deployed, submitted, write_sites

from fedunlearn.federation.deployed.ending import Asked, end_workers

ONE = "trainer.federated.num_clients=1"


def asked(site):
    words = [sys.executable, str(SCRIPTS / "supernode.py"), str(site), "--end-workers"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def pid_of(site):
    """The process that listens at the node's one socket."""
    (path,) = (site.parent / "c0").glob("worker-*.sock")
    return next(
        process
        for process in psutil.process_iter(["cmdline"])
        if str(site) in (words := process.info["cmdline"] or ()) and path.stem.removeprefix("worker-") in words
    )


@pytest.fixture
def site(tmp_path, pocket):
    """A node whose worker has done a run's work and waits."""
    (path,) = write_sites(tmp_path, pocket, clients=1)
    run_deployed(tmp_path, submitted(pocket, "finetune", "ft", ONE), ThinGrid([path]))
    worker = pid_of(path)
    yield path
    if worker.is_running():
        worker.kill()


def test_a_worker_ends_when_it_is_asked_and_the_next_message_starts_another(site, pocket):
    worker = pid_of(site)
    assert asked(site) == (0, "client 0: 1 worker ended\n", "")
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert asked(site) == (0, "client 0: 0 workers ended\n", "")
    run_deployed(site.parent, submitted(pocket, "finetune", "again", ONE), ThinGrid([site], run_id=2))
    another = pid_of(site)
    assert another.pid != worker.pid
    another.kill()


def test_a_worker_that_is_busy_ends_afterwards_and_is_told_apart(site):
    worker = pid_of(site)
    worker.suspend()
    assert end_workers(client_site(site), seconds=0.2) == Asked(ended=0, busy=1)
    worker.resume()
    worker.wait(10)
    assert not list((site.parent / "c0").glob("*.sock"))


def test_several_workers_are_counted_one_by_one(tmp_path, pocket):
    """Two that end and one that does not; what a killed worker left behind is none."""
    (path,) = write_sites(tmp_path, pocket, clients=1)
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); s.accept()[0].recv(99); print(s.close())"
    folder = tmp_path / "c0"
    names = ["worker-a.sock", "worker-b.sock"]
    ending = [subprocess.Popen([sys.executable, "-c", code, str(folder / name)]) for name in names]
    stays = subprocess.Popen([sys.executable, "-c", code.replace(".accept", "; input(), s.accept"), str(folder / "worker-c.sock")],
                             stdin=subprocess.PIPE)  # fmt: skip
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "worker-d.sock"))
    end = time.monotonic() + 10
    while len(list(folder.glob("*.sock"))) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.2)  # from bind to listen
    reaped = [threading.Thread(target=process.wait) for process in ending]
    for thread in reaped:
        thread.start()
    assert (
        str(end_workers(client_site(path), seconds=2)) == "2 workers ended; 1 at work, to end when what they do is done"
    )
    stays.kill()
    stays.wait()
    assert all(process.returncode == 0 for process in ending)


def test_a_faulty_site_is_told(tmp_path):
    (tmp_path / "no.yaml").write_text("client_id: 0\n")
    code, out, err = asked(tmp_path / "no.yaml")
    assert (code, out) == (2, "")
    assert "work_dir" in err
