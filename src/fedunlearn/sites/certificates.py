"""A trial federation from nothing: one folder for each machine, with its certificate or key and a YAML that is ready to run."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from fedunlearn.config.addresses import Address
from fedunlearn.errors import UserError
from fedunlearn.files import disk_fault
from fedunlearn.sites.authority import Authority, Validity
from fedunlearn.sites.keys import new_node_key
from fedunlearn.sites.proxy import PROXY_PORT, nginx_conf

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
NODE_PORT = 9094
"""The first client's; on one machine each has one of its own."""


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What is to be made.

    hosts: names and IP addresses of the server; the nodes use the first. clients: how many. days: until certificates expire. models: model id -> folder. data: the
    benchmark's folder. port: of the SuperLink. open_control: the SuperLink listens on all interfaces; else on loopback, and where a host is another machine's a
    proxy stands before it.
    """

    hosts: Sequence[str]
    clients: int
    days: int
    models: Mapping[str, str]
    benchmark: Literal["tofu", "muse"]
    data: str
    port: int = 8000
    open_control: bool = False

    def __post_init__(self) -> None:
        faults = [
            f"--{name} {value} must be at least {least}, at most {most}"
            for name, value, least, most in (
                ("clients", self.clients, 1, 10_000),
                ("days", self.days, 1, 3650),
                ("port", self.port, 1, 65535),
            )
            if not least <= value <= most
        ]
        faults += (
            [] if self.hosts else ["--host is missing: give the name or IP address by which the nodes reach the server"]
        )
        faults += [
            f"--host {host!r} is no host name and no IP address: leave out port and https://"
            for host in self.hosts
            if not host or set(host) & set("/@[] \t*") or (":" in host and host.count(":") < 2)
        ]
        if faults:
            raise UserError(*faults)

    @property
    def needs_proxy(self) -> bool:
        """Whether nodes come from other machines while the SuperLink listens on loopback."""
        return not self.open_control and not set(self.hosts) <= set(LOOPBACK_HOSTS)


def make_federation(folder: Path, wanted: Federation, *, overwrite: bool = False) -> list[Path]:
    """Writes authority/, server/ and client0/ ... below `folder`; gives the files, private ones with mode 0600.

    Raises UserError where one of them is there already, unless `overwrite`: everything is made anew then, and what was handed out no longer
    fits. Nothing is written where a file is in the way.
    """
    files = _files(wanted)
    there = [str(folder / name) for name in files if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(
            f"{', '.join(there[:3])}{' and more' if len(there) > 3 else ''} exist already: choose another folder, or give --overwrite, which "
            "makes all certificates and keys anew (the old ones no longer fit)"
        )
    for old in (folder / "server" / "client_keys").glob("*.pub") if overwrite else ():
        old.unlink()  # of nodes that may be fewer now
    for name, (content, mode) in files.items():
        _write(folder / name, content, mode)
    return [folder / name for name in files]


def _files(wanted: Federation) -> dict[str, tuple[bytes, int]]:
    """Name below the folder -> content and mode."""
    validity = Validity.of_days(wanted.days)
    authority = Authority("fedunlearn trial federation", validity)
    names = list(dict.fromkeys([*wanted.hosts, "localhost", "127.0.0.1"]))  # the server's own processes use loopback
    certificate, key = authority.server(names)
    files = {
        "authority/ca.crt": (authority.certificate, 0o644),
        "authority/ca.key": (authority.key, 0o600),
        "server/ca.crt": (authority.certificate, 0o644),
        "server/server.crt": (certificate, 0o644),
        "server/server.key": (key, 0o600),
        "server/server.yaml": (_server_yaml(wanted), 0o644),
    }
    if wanted.needs_proxy:
        files["server/nginx.conf"] = (nginx_conf(wanted.hosts[0], wanted.port).encode(), 0o644)
    for index in range(wanted.clients):
        private, public = new_node_key()
        site = f"client{index}"
        files[f"server/client_keys/{site}.pub"] = (public, 0o644)
        files[f"{site}/node.key"] = (private, 0o600)
        files[f"{site}/ca.crt"] = (authority.certificate, 0o644)
        files[f"{site}/policy.yaml"] = (_policy_yaml(wanted), 0o644)
        files[f"{site}/{site}.yaml"] = (_client_yaml(wanted, index), 0o644)
    return files


def _server_yaml(wanted: Federation) -> bytes:
    return _yaml(
        "The server of a trial federation: python scripts/superlink.py start server.yaml",
        {
            "listen": f"{'0.0.0.0' if wanted.open_control else '127.0.0.1'}:{wanted.port}",
            **({"open_control": True} if wanted.open_control else {}),
            "public_hosts": list(wanted.hosts),
            "tls": {"ca": "ca.crt", "certificate": "server.crt", "key": "server.key"},
            "client_keys": "client_keys",
            "saves_root": "saves",
            "work_dir": "work",
            **_whereabouts(wanted),
        },
    )


def _client_yaml(wanted: Federation, index: int) -> bytes:
    port = PROXY_PORT if wanted.needs_proxy else wanted.port
    return _yaml(
        f"Client {index} of a trial federation: python scripts/supernode.py client{index}.yaml",
        {
            "client_id": index,
            "superlink": str(Address(host=wanted.hosts[0], port=port)),
            "ca": "ca.crt",
            "key": "node.key",
            "listen": f"127.0.0.1:{NODE_PORT + index}",
            "work_dir": "work",
            "policy": "policy.yaml",
            **_whereabouts(wanted),
        },
    )


def _policy_yaml(wanted: Federation) -> bytes:
    return _yaml(
        "What the server may ask of this machine; who answers for its data should own this file",
        {
            "models": list(wanted.models),
            "max_steps": 10_000,
            "score_forget_rows": True,
            "max_task_seconds": 3600.0,
            "allowed_targets": [],
        },
    )


def _whereabouts(wanted: Federation) -> dict[str, object]:
    return {
        "data": {f"{wanted.benchmark}_path": os.path.abspath(Path(wanted.data).expanduser())},
        "models": {name: os.path.abspath(Path(path).expanduser()) for name, path in wanted.models.items()},
    }


def _yaml(comment: str, content: Mapping[str, object]) -> bytes:
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    return f"# {comment}\n# Relative paths start at this file's folder; data and models are where this machine has them.\n{text}".encode()


def _write(path: Path, content: bytes, mode: int) -> None:
    """Atomically, and a private file is never readable by others, not even for a moment."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
        temporary.replace(path)
    except OSError as error:
        raise disk_fault(error, path) from error
