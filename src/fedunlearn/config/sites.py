"""What one machine of a real federation says of itself: where its data, models and keys are, and what it lets the server ask for.

Read from a YAML of that machine, never from the wire; imports neither torch nor Flower, for a node's short-lived processes read it.
"""

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar, cast

from fedunlearn.config.addresses import Address, parse_address
from fedunlearn.config.reading import Reader
from fedunlearn.config.site_files import FilePath, FolderPath, NewPath, PathTo, absolute_paths, read_yaml
from fedunlearn.errors import UserError

Site = TypeVar("Site", bound="ClientSite | ServerSite | Policy")
Device = Literal["auto", "cpu", "cuda"]
SITE_VARIABLE = "FEDUNLEARN_SITE"
"""Names the server's site YAML to the ServerApp that its SuperLink starts."""
_LARGEST_SECONDS = 1e7


@dataclass(frozen=True, kw_only=True)
class SiteData:
    """The benchmark's folder on this machine: TOFU's or MUSE's, exactly one of the two."""

    tofu_path: NewPath | None = None
    muse_path: NewPath | None = None

    def __post_init__(self) -> None:
        if (self.tofu_path is None) == (self.muse_path is None):
            given = "both are" if self.tofu_path is not None else "neither is"
            raise UserError(f"data.tofu_path and data.muse_path: {given} given; give exactly one of the two")

    @property
    def path(self) -> Path:
        """The folder that is given."""
        return Path(self.tofu_path or self.muse_path or "")

    def missing(self) -> str | None:
        """The fault where the folder is not there, None where it is: a client starts without its data and is refused by name at the roll call."""
        return next(iter(_missing_data(vars(self))), None)


@dataclass(frozen=True, kw_only=True)
class WorkerLimits:
    """idle_minutes: after how long without a task the process that keeps the model ends. start_timeout: seconds it may take to be ready."""

    idle_minutes: float = 30.0
    start_timeout: float = 120.0

    def __post_init__(self) -> None:
        _raise(
            f"worker.{name}={value} must be above 0, at most {_LARGEST_SECONDS:g}"
            for name, value in (("idle_minutes", self.idle_minutes), ("start_timeout", self.start_timeout))
            if not 0 < value <= _LARGEST_SECONDS
        )


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What this machine lets a server ask of it; a file of its own, so that whoever answers for the data can own it.

    models: ids of the models that may be trained, as the server's config names them. max_steps: optimiser steps a task may ask for.
    score_forget_rows: whether the server may ask for scores of rows that are to be forgotten. max_task_seconds: after which a task is ended.
    allowed_targets: dotted names, beside fedunlearn's own classes, that a config from the server may name in a `_target_`.
    """

    models: tuple[str, ...]
    max_steps: int
    score_forget_rows: bool
    max_task_seconds: float
    allowed_targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        faults = []
        if not self.models:
            faults.append("models=[] allows no model, so no task: list the ids of the models that may be trained")
        if self.max_steps < 1:
            faults.append(f"max_steps={self.max_steps} must be at least 1")
        if not 0 < self.max_task_seconds <= _LARGEST_SECONDS:
            faults.append(f"max_task_seconds={self.max_task_seconds} must be above 0, at most {_LARGEST_SECONDS:g}")
        faults += [
            f"allowed_targets: {name!r} is no dotted name (package.module.Class)"
            for name in self.allowed_targets
            if "." not in name or not all(part.isidentifier() for part in name.split("."))
        ]
        _raise(faults)


@dataclass(frozen=True, kw_only=True)
class ClientSite:
    """One client of the federation.

    client_id: its number in the partition. superlink: host:port of the server. ca: certificate that the server's is checked against; null = those the
    machine trusts. key: the node's private key (OpenSSH). insecure: neither TLS nor key, on this machine alone. listen: where the node's own
    processes meet. models: model id as the server's config names it -> folder. device: null = as the config says. work_dir: sockets, caches, logs.
    policy: in the YAML the path of a policy's own YAML, or its keys.
    """

    client_id: int
    superlink: str
    data: SiteData
    models: dict[str, FolderPath]
    work_dir: NewPath
    policy: Annotated[Policy, PathTo("file")]
    ca: FilePath | None = None
    key: FilePath | None = None
    insecure: bool = False
    listen: str = "127.0.0.1:9094"
    device: Device | None = None
    worker: WorkerLimits = field(default_factory=WorkerLimits)

    def __post_init__(self) -> None:
        _raise(client_faults(vars(self)))

    @property
    def superlink_address(self) -> Address:
        """Where the server is."""
        return cast("Address", parse_address(self.superlink))

    @property
    def listen_address(self) -> Address:
        """Where the node's own processes meet."""
        return cast("Address", parse_address(self.listen))


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files: the authority's certificate, the server's certificate (with those between the two), the server's private key."""

    ca: FilePath
    certificate: FilePath
    key: FilePath


@dataclass(frozen=True, kw_only=True)
class ServerSite:
    """The machine that runs the SuperLink and the ServerApp.

    listen: host:port of all of Flower's services. open_control: allows another host than loopback there; whoever reaches it can then run code on every
    node, for Flower's Control API asks for no password. public_hosts: names by which nodes reach the server; its certificate must have
    each. client_keys: folder of the public keys (*.pub) of the nodes that may connect. database: the SuperLink's state; null = in work_dir.
    saves_root: where runs' folders go. log_file: a copy of the SuperLink's log, rotated every day; null = none.
    """

    listen: str
    saves_root: NewPath
    data: SiteData
    models: dict[str, FolderPath]
    work_dir: NewPath
    open_control: bool = False
    public_hosts: tuple[str, ...] = ()
    tls: TlsFiles | None = None
    insecure: bool = False
    client_keys: FolderPath | None = None
    database: NewPath | None = None
    device: Device | None = None
    log_file: NewPath | None = None

    def __post_init__(self) -> None:
        _raise(server_faults(vars(self)))

    @property
    def listen_address(self) -> Address:
        """Where the SuperLink listens."""
        return cast("Address", parse_address(self.listen))

    @property
    def database_path(self) -> Path:
        """The SuperLink's state: what lets a run outlive it."""
        return Path(self.database or Path(self.work_dir) / "superlink.sqlite")


def client_faults(given: Mapping[str, object]) -> list[str]:
    """The faults of a client's values taken together. Values that are not of their type are passed over."""
    faults = _address_faults(given, "superlink") + _address_faults({"listen": ClientSite.listen, **given}, "listen")
    client_id = given.get("client_id")
    if type(client_id) is int and client_id < 0:
        faults.append(f"client_id={client_id} must be at least 0: it is the client's number in the partition")
    listen, superlink = _address(given.get("listen", ClientSite.listen)), _address(given.get("superlink"))
    if listen and not listen.is_loopback:
        faults.append(
            f"listen={str(listen)!r} must be on loopback (127.0.0.1:PORT): who reaches it can take the node's tasks"
        )
    faults += _insecure_faults(given, "superlink", superlink, ("ca", "key"))
    if given.get("insecure") in (False, None) and given.get("key") is None:
        faults.append(
            "key is missing: a node shows its private key (make one with scripts/make_certificates.py, and give the .pub to the "
            "server's client_keys); only with insecure=true on one machine there is none"
        )
    return faults


def server_faults(given: Mapping[str, object]) -> list[str]:
    """The faults of a server's values taken together. Values that are not of their type are passed over."""
    faults = _address_faults(given, "listen")
    listen = _address(given.get("listen"))
    insecure = given.get("insecure") is True
    faults += _insecure_faults(given, "listen", listen, ("tls", "client_keys"))
    if not insecure:
        faults += [
            f"{name} is missing: {why}, or set insecure=true for a trial on this machine alone"
            for name, why in (
                ("tls", "give tls.ca, tls.certificate and tls.key (scripts/make_certificates.py makes them)"),
                ("client_keys", "give the folder of the public keys of the nodes that may connect"),
            )
            if given.get(name) is None
        ]
    if listen and not listen.is_loopback and not insecure and given.get("open_control") is not True:
        faults.append(
            f"listen={str(listen)!r} opens Flower's Control API to other machines, and who reaches it can run code on every node: listen on "
            "127.0.0.1 and publish /v1/fleet/ alone through a proxy (deploy/nginx.conf), or set open_control=true in a network you trust"
        )
    data = given.get("data")
    return faults + _missing_data(vars(data) if isinstance(data, SiteData) else data)


_RULES: Mapping[type, Callable[[Mapping[str, object]], list[str]]] = {
    ClientSite: client_faults,
    ServerSite: server_faults,
}


def read_site(path: str | Path, kind: type[Site]) -> Site:
    """Gives the record of a site (ClientSite, ServerSite, Policy) from its YAML; paths in it start at the YAML's folder.

    Raises UserError with every fault: unknown keys, wrong types, files that are not there, values that do not go together. A client's
    missing data is none (SiteData.missing tells it); everything else that is named must be there, but work_dir, saves_root,
    database and log_file, which are made.
    """
    file = Path(os.path.abspath(Path(path).expanduser()))
    read = read_yaml(file)
    _raise(_other_s_faults(file, read, kind))
    data, faults = absolute_paths(kind, read, file.parent)
    unread = data.get("policy") if kind is ClientSite else None
    if isinstance(unread, str) and Path(unread).is_file():
        try:
            data["policy"] = read_yaml(Path(unread))
        except UserError as error:
            faults += error.faults
    reader = Reader(give="set it in this file")
    record = reader.record(kind, data, "")
    if reader.faults and kind in _RULES:  # else the record itself has kept them
        reader.faults += [fault for fault in _RULES[kind](data) if fault not in reader.faults]
    told = [fault for fault in reader.faults if not (isinstance(unread, str) and fault.startswith("policy="))]
    if told or faults:
        raise UserError(*(f"{file}: {fault}" for fault in [*told, *faults]))
    return cast("Site", record)


def _other_s_faults(file: Path, data: Mapping[str, object], kind: type[object]) -> list[str]:
    """The one fault of a server's YAML given to a client, or the other way round: told alone, for every key of it would be unknown."""
    mark, others_mark = ("client_id", "saves_root") if kind is ClientSite else ("saves_root", "client_id")
    if kind not in _RULES or mark in data or others_mark not in data:
        return []
    if kind is ClientSite:
        return [f"{file} is a server's YAML: start that with scripts/superlink.py start, or give a client's here"]
    return [f"{file} is a client's YAML: start that with scripts/supernode.py, or give the server's here"]


def make_work_dir(work_dir: str) -> Path:
    """Makes the folder for this user alone (0700). Raises UserError where it is there and others can enter it, or it cannot be made."""
    path = Path(work_dir)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise UserError(f"work_dir={work_dir!r} cannot be made ({error.strerror or error}): give another") from error
    if mode & 0o077:
        raise UserError(f"work_dir={work_dir!r} can be entered by others (mode {mode:04o}): chmod 700 {work_dir}")
    return path


def _raise(faults: object) -> None:
    found = list(cast("list[str]", faults))
    if found:
        raise UserError(*found)


def _address(value: object) -> Address | None:
    return parse_address(value) if isinstance(value, str) else None


def _address_faults(given: Mapping[str, object], key: str) -> list[str]:
    value = given.get(key)
    if not isinstance(value, str) or parse_address(value):
        return []
    return [f"{key}={value!r} is no address: give host:port without https:// ([IPv6]:port), port 1 to 65535"]


def _insecure_faults(
    given: Mapping[str, object], key: str, address: Address | None, without: tuple[str, ...]
) -> list[str]:
    if given.get("insecure") is not True:
        return []
    faults = [
        f"insecure=true sends everything in the clear, keys and certificates included: leave {name} out, or set insecure=false"
        for name in without
        if given.get(name) is not None
    ]
    if address and not address.is_loopback:
        faults.append(f"insecure=true goes with loopback only, {key}={str(address)!r} is not: use TLS (insecure=false)")
    return faults


def _missing_data(data: object) -> list[str]:
    paths = data if isinstance(data, Mapping) else {}
    return [
        f"data.{name}={path!r} is no folder on this machine: put the data there"
        for name, path in paths.items()
        if name in ("tofu_path", "muse_path") and isinstance(path, str) and not Path(path).is_dir()
    ]
