"""Flower's command lines and their environment, composed from a site."""

import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedunlearn.config.addresses import Address
from fedunlearn.config.sites import SITE_VARIABLE, ClientSite, ServerSite
from fedunlearn.errors import UserError
from fedunlearn.sites.checks import connect_address

CONNECTION = "site"
"""What the one SuperLink is called in the configuration of Flower's command line."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One process. name: for messages. environment: what is set beside what is inherited. folder: where it works."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str

    def shown(self) -> str:
        """As a shell takes it, without PATH."""
        setting = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items() if name != "PATH"]
        return " ".join([*setting, shlex.join(self.argv)])


def superlink_command(site: ServerSite, site_file: Path) -> Command:
    """The SuperLink. Its state is on disk and the ServerApp is not its child, so that a run outlives it."""
    listen = site.listen_address
    tls = (
        ("--insecure",)
        if site.tls is None
        else (
            *("--ssl-ca-certfile", site.tls.ca, "--ssl-certfile", site.tls.certificate, "--ssl-keyfile", site.tls.key),
            "--enable-supernode-auth",
        )
    )
    return Command(
        name="SuperLink",
        argv=(
            *(program("flower-superlink"), "--host", listen.host, "--port", str(listen.port), *tls),
            *("--isolation", "process", "--database", str(site.database_path)),
            "--disable-runtime-dependency-installation",
            *(("--log-file", site.log_file) if site.log_file else ()),
        ),
        environment=_server_environment(site, site_file),
        folder=site.work_dir,
    )


def superexec_command(site: ServerSite, site_file: Path) -> Command:
    """What starts the ServerApp of each run, and ends with the process that called this."""
    return Command(
        name="SuperExec",
        argv=(
            *(program("flower-superexec"), "--runtime-api-address", str(connect_address(site))),
            *(("--root-certificates", site.tls.ca) if site.tls else ("--insecure",)),
            *("--parent-pid", str(os.getpid())),
        ),
        environment=_server_environment(site, site_file),
        folder=site.work_dir,
    )


def register_command(site: ServerSite, site_file: Path, public_key: Path) -> Command:
    """Tells the SuperLink a node's public key; answers in JSON with its node id."""
    return _cli(site, site_file, "register", str(public_key))


def unregister_command(site: ServerSite, site_file: Path, node_id: int) -> Command:
    """Takes a node's key from the SuperLink; a node that is connected with it ends."""
    return _cli(site, site_file, "unregister", str(node_id))


def supernode_command(site: ClientSite, site_file: Path, pid: int) -> Command:
    """The SuperNode. pid: of the process whose end is the node's end. Raises UserError for a path that Flower's --node-config cannot hold."""
    listen = site.listen_address
    return Command(
        name="SuperNode",
        argv=(
            *(program("flower-supernode"), "--superlink", site.superlink),
            *(("--insecure",) if site.insecure else ()),
            *(("--root-certificates", site.ca) if site.ca else ()),
            *(("--auth-supernode-private-key", site.key) if site.key else ()),
            *("--host", listen.host, "--port", str(listen.port)),
            *("--node-config", node_config(site_file, pid)),
        ),
        environment=flower_environment(flower_home(site.work_dir)),
        folder=site.work_dir,
    )


def node_config(site_file: Path, pid: int) -> str:
    """What a ClientApp reads as `context.node_config`: `site` (absolute path of the YAML) and `supernode-pid`.

    Raises UserError for a path with a double quote, a backslash or a control character: Flower reads `key="value"` by a pattern that
    knows no escapes.
    """
    path = os.path.abspath(site_file)
    if any(character in '"\\' or not character.isprintable() for character in path):
        raise UserError(
            f"{path!r}: Flower cannot be given a path with quotes, backslashes or control characters: rename the folder or the file"
        )
    return f'site="{path}" supernode-pid={pid}'


def flower_config(address: Address, ca: str | None) -> str:
    """The configuration of Flower's command line (config.toml in FLWR_HOME) that reaches a SuperLink as CONNECTION. ca: None for plaintext."""
    way = f"root-certificates = {_toml(ca)}" if ca else "insecure = true"
    return (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = {_toml(str(address))}\n{way}\n'
    )


def answer_in(said: str) -> dict[str, Any]:
    """The JSON object that a command of Flower's wrote, whatever it wrote in front of it; empty where there is none."""
    start = said.find("{")
    try:
        answer = json.loads(said[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def flower_home(work_dir: str) -> Path:
    """Where Flower keeps what it writes of its own accord."""
    return Path(work_dir) / "flower"


def flower_environment(home: Path) -> dict[str, str]:
    """What is set for Flower's programs beside what is inherited: no look-ups of outside hosts, nothing installed. home: see flower_home."""
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": os.pathsep.join([_programs(), os.environ.get("PATH", os.defpath)]),  # Flower starts its own by name
    }


def program(name: str) -> str:
    """The path of one of Flower's programs, as they are installed for this Python."""
    return os.path.join(_programs(), name)


def _cli(site: ServerSite, site_file: Path, *words: str) -> Command:
    verb = words[0]
    return Command(
        name=f"flwr supernode {verb}",
        argv=(program("flwr"), "supernode", *words, CONNECTION, "--format", "json"),
        environment=_server_environment(site, site_file),
        folder=site.work_dir,
    )


def _server_environment(site: ServerSite, site_file: Path) -> dict[str, str]:
    return {**flower_environment(flower_home(site.work_dir)), SITE_VARIABLE: os.path.abspath(site_file)}


def _programs() -> str:
    return os.path.dirname(sys.executable)


def _toml(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
