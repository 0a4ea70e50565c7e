"""The server's site: a SuperLink, what starts its ServerApps, and the keys of the nodes that may connect."""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from fedunlearn.config.sites import ServerSite, read_site
from fedunlearn.errors import UserError
from fedunlearn.files import write_bytes
from fedunlearn.sites import fleet
from fedunlearn.sites.checks import TIMEOUT, check_server, connect_address
from fedunlearn.sites.commands import (
    Command,
    flower_config,
    flower_home,
    register_command,
    superexec_command,
    superlink_command,
)
from fedunlearn.sites.keys import client_keys, names_by_key
from fedunlearn.sites.registry import Registry
from fedunlearn.sites.retold import retelling
from fedunlearn.sites.running import (
    POLL,
    Child,
    Stop,
    alone_in,
    asked_to_stop,
    interrupted,
    nothing_started,
    tell,
    until,
)
from fedunlearn.sites.tls import unverified

START_TIMEOUT = 60.0
_RESTARTS, _WITHIN = 5, 600.0


def run_server(site_file: Path, *, only_print: bool = False) -> None:
    """Checks the site, runs its SuperLink until we are asked to end.

    only_print: tells the commands and does nothing. A process that dies is started again: the SuperLink's state is on disk, and a run goes on without it for a
    while; with the SuperExec the ServerApps end. Raises UserError for every fault of the site, and where a process does not start or dies too often.
    """
    site = read_site(site_file, ServerSite)
    superlink, superexec = superlink_command(site, site_file), superexec_command(site, site_file)
    keys = client_keys(site.client_keys) if site.client_keys else []
    commands = (superlink, superexec, *(register_command(site, site_file, key) for key in keys))
    if not only_print:
        with nothing_started():
            check_server(site)
    for command in commands:
        tell(command.shown())
    if only_print:
        return
    with alone_in(site.work_dir), asked_to_stop() as stop:
        config = flower_config(connect_address(site), site.tls.ca if site.tls else None)
        write_bytes(flower_home(site.work_dir) / "config.toml", config.encode())
        registry = Registry.opened(site, site_file)
        running = [_Kept(superlink, "runs go on", retelling(names_by_key(keys)))]
        try:
            _wait_until_up(site, running[0].child, stop)
            if not stop.signal:
                running.append(
                    _Kept(superexec, "runs under way ended with it, and go on when they are submitted with resume=true")
                )
                registry.sync(keys, stop)
                _tell_ready(site, len(keys))
            while not stop.wait(POLL):
                for kept in running:
                    kept.look()
        finally:
            for kept in reversed(running):
                kept.child.end()
    interrupted(stop)


class _Kept:
    """A process that is started again when it dies, a few times in ten minutes. effect: what its death means for runs, for messages."""

    def __init__(self, command: Command, effect: str, retell: Callable[[str], str] = str) -> None:
        self._effect = effect
        self.child = Child(command, retell)
        self._retell = retell
        self._deaths: deque[float] = deque(maxlen=_RESTARTS)

    def look(self) -> None:
        """Starts it again where it has died. Raises UserError where it has died too often."""
        if self.child.ended() is None:
            return
        why, now = self.child.why(), time.monotonic()
        if len(self._deaths) == _RESTARTS and now - self._deaths[0] < _WITHIN:
            raise UserError(
                f"server: {why}; it has died {_RESTARTS + 1} times within {_WITHIN / 60:.0f} minutes and is not started again"
            )
        self._deaths.append(now)
        tell(f"server: {why}; starting it again; {self._effect}")
        self.child.end()  # what is left of its group
        self.child = Child(self.child.command, self._retell)


def _wait_until_up(site: ServerSite, child: Child, stop: Stop) -> None:
    if not until(lambda: child.ended() is not None or _answers(site), stop, START_TIMEOUT) and not stop.signal:
        raise UserError(
            f"server: SuperLink does not answer at {connect_address(site)} after {START_TIMEOUT:.0f} s; see the lines above"
        )
    if child.ended() is not None:
        raise UserError(f"server: {child.why()}")


def _answers(site: ServerSite) -> bool:
    try:
        fleet.clock_ahead(connect_address(site), unverified() if site.tls else None, TIMEOUT)
    except (OSError, fleet.NotHttpError):
        return False
    return True


def _tell_ready(site: ServerSite, num_keys: int) -> None:
    who = f"{num_keys} nodes may connect" if site.tls else "any node on this machine may connect"
    tell(f"server: the SuperLink is up at {site.listen}; {who}")
    if not site.listen_address.is_loopback:
        tell(
            "server: open_control=true: whoever reaches this port can run code on every node; let through only the nodes you know, or "
            "publish /v1/fleet/ alone (deploy/nginx.conf)"
        )
