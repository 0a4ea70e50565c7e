"""Which public keys the SuperLink has been told, kept beside its database, so that the folder of keys is what counts."""

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedunlearn.config.sites import ServerSite
from fedunlearn.errors import UserError
from fedunlearn.files import write_json
from fedunlearn.sites.commands import Command, answer_in, register_command, unregister_command
from fedunlearn.sites.keys import client_keys
from fedunlearn.sites.running import Stop, tell

_CALL_TIMEOUT = 60.0
ALREADY = "already in use"
NAMED = re.compile(r"^client(\d{1,9})\.pub$")


def registry_path(site: ServerSite) -> Path:
    """The registry's file, beside the SuperLink's database."""
    return site.database_path.with_name(f"{site.database_path.name}.keys.json")


def _read(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    held: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    return held


@dataclass(frozen=True, kw_only=True)
class Registry:
    """path: the file, from public key (as in its .pub, without comment) to Flower's node id."""

    site: ServerSite
    site_file: Path
    path: Path

    @classmethod
    def opened(cls, site: ServerSite, site_file: Path) -> "Registry":
        """The registry of the site's database; one without its database speaks of another and is taken away."""
        path = registry_path(site)
        if not site.database_path.exists():
            path.unlink(missing_ok=True)
        return cls(site=site, site_file=site_file, path=path)

    def sync(self, keys: Sequence[Path], stop: Stop) -> None:
        """Tells the SuperLink the keys it lacks, and takes from it those that are gone. Raises UserError where it refuses one."""
        known, wanted = _read(self.path), {_key(path): path for path in keys}
        for key in [key for key in known if key not in wanted]:
            self._call(unregister_command(self.site, self.site_file, known[key]))
            del known[key]
            self._write(known)
            tell("server: a node whose key is no longer in client_keys was shut out")
        for key, path in wanted.items():
            if key in known or stop.signal:
                continue
            known[key] = int(str(self._call(register_command(self.site, self.site_file, path))["node-id"]))
            self._write(known)
            tell(f"server: {path.name} may connect")

    def _write(self, known: Mapping[str, int]) -> None:
        write_json(self.path, known)

    def _call(self, command: Command) -> Mapping[str, object]:
        """What Flower's command line answers, as JSON on stdout."""
        try:
            done = subprocess.run(
                command.argv,
                env={**os.environ, **command.environment},
                cwd=command.folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_CALL_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"server: `{command.shown()}` gave no answer in {_CALL_TIMEOUT:.0f} s: is the SuperLink overloaded?"
            ) from error
        answer = answer_in(done.stdout)
        if answer.get("success") is True:
            return answer
        said = str(answer.get("error-message") or (done.stderr or done.stdout).strip())[-500:]
        if ALREADY in said:
            raise UserError(
                f"server: the SuperLink's database knows {command.argv[3]} already, but {self.path} does not say as which node: give another "
                "`database`, or move this one away to begin anew"
            )
        raise UserError(f"server: {command.name} {command.argv[3]} failed: {said}")


def clients_by_node(site: ServerSite) -> dict[int, int]:
    """Gives the client of every node whose key lies as client<id>.pub in the site's folder of keys; a key of another name is anybody's. Empty without keys."""
    if site.client_keys is None:
        return {}
    nodes = _read(registry_path(site))
    named = {path: NAMED.match(path.name) for path in client_keys(site.client_keys)}
    return {nodes[key]: int(said[1]) for path, said in named.items() if said and (key := _key(path)) in nodes}


def _key(path: Path) -> str:
    """Type and key, without the comment."""
    return " ".join(path.read_text(encoding="ascii", errors="replace").split()[:2])
