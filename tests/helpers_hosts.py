"""Hosts that are network namespaces: each has a loopback and an address of its own, and reaches the others by veth pairs through the first."""

import shutil
import subprocess
import time
from functools import cache

SERVER = "10.77.0.1"
TOOLS = ("unshare", "nsenter", "ip", "sleep")


@cache
def why_none() -> str:
    """Why there can be no such hosts here; empty where there can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)}"
    try:
        with Hosts(1):
            return ""
    except (subprocess.SubprocessError, OSError) as error:
        return f"no network namespaces here ({getattr(error, 'stderr', None) or error})"


class Hosts:
    """Host 0 has address 10.77.0.1; host k, from 1 to num_clients, 10.77.k.2, and sees host 0 alone."""

    def __init__(self, num_clients: int) -> None:
        self.num_clients = num_clients
        self._held: list[subprocess.Popen] = []

    def __enter__(self) -> "Hosts":
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        self._hold("unshare", "--user", "--map-root-user", "--net")
        self._ip(0, "link set lo up")
        self._ip(0, f"addr add {SERVER}/32 dev lo")
        for k in range(1, self.num_clients + 1):
            self._hold(*self.at(0), "unshare", "--net")
            self._ip(0, f"link add v{k} type veth peer name eth0 netns {self._held[k].pid}")
            self._ip(0, f"addr add 10.77.{k}.1/24 dev v{k}")
            self._ip(0, f"link set v{k} up")
            self._ip(k, "link set lo up")
            self._ip(k, f"addr add 10.77.{k}.2/24 dev eth0")
            self._ip(k, "link set eth0 up")
            self._ip(k, f"route add {SERVER} via 10.77.{k}.1")

    def __exit__(self, *_: object) -> None:
        for held in reversed(self._held):
            held.kill()
            held.wait()

    def at(self, host: int) -> list[str]:
        """What a command begins with that is to run on a host."""
        return ["nsenter", f"--target={self._held[host].pid}", "--user", "--net", "--preserve-credentials"]

    def _hold(self, *words: str) -> None:
        """Starts what keeps a namespace there, and waits until it has come into it."""
        process = subprocess.Popen([*words, "sleep", "infinity"], stderr=subprocess.PIPE, text=True)
        self._held.append(process)
        end = time.monotonic() + 10
        while (name := _name_of(process.pid)) != "sleep":
            if process.poll() is not None or time.monotonic() > end:
                raise subprocess.SubprocessError(
                    f"{name}: {process.stderr.read() if process.poll() else 'late'}".strip()
                )
            time.sleep(0.01)

    def _ip(self, host: int, words: str) -> None:
        subprocess.run([*self.at(host), "ip", *words.split()], check=True, capture_output=True, text=True, timeout=10)


def _name_of(pid: int) -> str:
    with open(f"/proc/{pid}/comm") as file:
        return file.read().strip()
