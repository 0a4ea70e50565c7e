"""A client's site: one SuperNode in the foreground."""

import os
from pathlib import Path

from fedunlearn.config.sites import ClientSite, read_site
from fedunlearn.errors import UserError
from fedunlearn.sites.checks import check_client
from fedunlearn.sites.commands import supernode_command
from fedunlearn.sites.running import POLL, Child, alone_in, asked_to_stop, interrupted, nothing_started, tell


def run_node(site_file: Path, *, only_print: bool = False) -> None:
    """Checks the site, runs its SuperNode until it ends or we are asked to end.

    only_print: tells the command and does nothing. Raises UserError for every fault of the site, and where the node ends of its own accord.
    """
    site = read_site(site_file, ClientSite)
    command = supernode_command(site, site_file, os.getpid())
    if only_print:
        tell(command.shown())
        return
    missing = site.data.missing()
    if missing:
        tell(f"client {site.client_id}: {missing}; until then the server refuses this client")
    with nothing_started():
        check_client(site)
    tell(command.shown())
    with alone_in(site.work_dir), asked_to_stop() as stop:
        child = Child(command)
        try:
            while child.ended() is None and not stop.wait(POLL):
                pass
        finally:
            child.end()
        if not stop.signal:
            raise UserError(f"client {site.client_id}: {child.why(is_node=True)}")
    interrupted(stop)
