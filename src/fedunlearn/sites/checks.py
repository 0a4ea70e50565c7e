"""What can be known before a site starts: every fault at once, by name and cause, for Flower itself retries in silence."""

import os
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from fedunlearn.config.addresses import Address
from fedunlearn.config.sites import ClientSite, ServerSite, TlsFiles, make_work_dir
from fedunlearn.errors import UserError
from fedunlearn.sites import fleet, tls
from fedunlearn.sites.keys import client_keys, node_key, private_file_faults

TIMEOUT = 3.0
"""Seconds for each thing asked over the network; a check asks three before it knows that somebody answers."""


def check_client(site: ClientSite) -> None:
    """Raises UserError with every fault for which this node could not work: its folder, key, port, and the way to the server."""
    name = f"client {site.client_id}"
    faults = [*_work_dir_faults(site.work_dir), *_port_faults("listen", site.listen_address)]
    key: ec.EllipticCurvePrivateKey | None = None
    try:
        key = node_key(site.key) if site.key else None
    except UserError as error:
        faults += error.faults
    way = Way(key="superlink", address=site.superlink_address, ca_key="ca", ca=site.ca, insecure=site.insecure)
    on_the_way = way_faults(
        way
    )  # only where there is none the key is shown, to nobody but the server that the authority vouches for
    faults += on_the_way or (_key_faults(site, key) if key and not site.insecure else [])
    if faults:
        raise UserError(*(f"{name}: {fault}" for fault in faults))


def check_server(site: ServerSite) -> None:
    """Raises UserError with every fault for which the server could not work: its folder, port, certificate and the nodes' public keys."""
    faults = [*_work_dir_faults(site.work_dir), *_port_faults("listen", site.listen_address), *_writable_faults(site)]
    if site.tls:
        names = dict.fromkeys([connect_address(site).host, *site.public_hosts])
        faults += _own_certificate_faults(site.tls, list(names))
    try:
        if site.client_keys:
            client_keys(site.client_keys)
    except UserError as error:
        faults += error.faults
    if faults:
        raise UserError(*(f"server: {fault}" for fault in faults))


def connect_address(site: ServerSite) -> Address:
    """Where the server's own processes reach the SuperLink: where it listens, or loopback where it listens everywhere."""
    listen = site.listen_address
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    return Address(host=loopback.get(listen.host, listen.host), port=listen.port)


def _work_dir_faults(work_dir: str) -> list[str]:
    try:
        make_work_dir(work_dir)
    except UserError as error:
        return list(error.faults)
    return []


def _writable_faults(site: ServerSite) -> list[str]:
    faults = []
    wanted = {"saves_root": Path(site.saves_root), "database": site.database_path.parent}
    if site.log_file:
        wanted["log_file"] = Path(site.log_file).parent
    for name, folder in wanted.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            faults.append(f"{name}: {folder} cannot be made ({error.strerror or error}): give another")
            continue
        if not os.access(folder, os.W_OK | os.X_OK):
            faults.append(f"{name}: {folder} cannot be written by this user: mend the rights there, or give another")
    return faults


def _port_faults(key: str, address: Address) -> list[str]:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            return [
                f"{key}={str(address)!r} cannot be listened at ({error.strerror or error}): end what uses it (`ss -ltnp`), or give another port"
            ]
    return []


def _own_certificate_faults(files: TlsFiles, names: Sequence[str]) -> list[str]:
    faults = private_file_faults("tls.key", files.key)
    try:
        shake = tls.in_memory(files.certificate, files.key)
    except (ssl.SSLError, OSError, ValueError) as error:
        return [
            *faults,
            f"tls.certificate={files.certificate!r} and tls.key={files.key!r} do not go together ({_reason(error)}): give the PEM "
            "certificate and the PEM key without passphrase that were made for each other",
        ]
    try:
        return faults + tls.certificate_faults(shake, list(names), files.ca, f"tls.certificate={files.certificate!r}")
    except (ssl.SSLError, OSError, ValueError) as error:
        return [
            *faults,
            f"tls.ca={files.ca!r} cannot be used ({_reason(error)}): give the authority's certificate, PEM",
        ]


@dataclass(frozen=True, kw_only=True)
class Way:
    """The way to a SuperLink. key: what names it in messages; ca_key: what names the authority. ca: None for those the machine trusts. insecure: no TLS."""

    key: str
    address: Address
    ca_key: str
    ca: str | None
    insecure: bool

    @property
    def said(self) -> str:
        """Key and value, for messages."""
        return f"{self.key}={str(self.address)!r}"


def check_way(way: Way) -> None:
    """Raises UserError where no SuperLink answers there, or not in that way; within about 10 s."""
    faults = way_faults(way)
    if faults:
        raise UserError(*faults)


def way_faults(way: Way) -> list[str]:
    """The faults of the connection: nobody there, TLS where plaintext is meant or the other way round, a certificate that does not fit, a clock."""
    return _plain_way_faults(way) if way.insecure else _tls_way_faults(way)


def _plain_way_faults(way: Way) -> list[str]:
    try:
        fleet.clock_ahead(way.address, None, TIMEOUT)
    except fleet.NotHttpError:
        return [
            f"{way.said} does not answer in plaintext, as insecure=true has it; a SuperLink with TLS does so: give insecure=false and {way.ca_key}"
        ]
    except OSError as error:
        return [_nobody(way.said, error)]
    return []


def _tls_way_faults(way: Way) -> list[str]:
    fault = _unreadable_ca(way)
    if fault:
        return [fault]
    try:
        socket.create_connection((way.address.host, way.address.port), timeout=TIMEOUT).close()
    except OSError as error:
        return [_nobody(way.said, error)]
    try:
        faults = tls.certificate_faults(
            tls.over_network(way.address, TIMEOUT), [way.address.host], way.ca, f"{way.said}: its certificate"
        )
    except TimeoutError:
        return [
            f"{way.said} takes the connection, but does not answer in TLS within {TIMEOUT:g} s: the server is too busy (try again), or "
            "another program listens there (correct host:port)"
        ]
    except OSError as error:
        return [
            f"{way.said} answers, but not in TLS ({_reason(error)}): a SuperLink started with insecure=true does so, or "
            "another program listens there; start the server with tls, or correct host:port"
        ]
    return faults + _clock_faults(way)


def _unreadable_ca(way: Way) -> str | None:
    try:
        ssl.create_default_context(cafile=way.ca)
    except (ssl.SSLError, OSError) as error:
        return f"{way.ca_key}={way.ca!r} is no PEM certificate ({_reason(error)}): give the authority's certificate, as the server's site has it"
    return None


def _clock_faults(way: Way) -> list[str]:
    """Over a connection that nobody vouches for: a hint is asked for, nothing is given away."""
    try:
        ahead = fleet.clock_ahead(way.address, tls.unverified(), TIMEOUT)
    except (OSError, fleet.NotHttpError) as error:
        return [
            f"{way.said} answers in TLS, but not as a SuperLink does ({_reason(error)}): another program listens there, or the server is "
            "too busy; correct host:port, or try again"
        ]
    if ahead is None or abs(ahead) < fleet.CLOCK_TOLERANCE:
        return []
    word = "ahead of" if ahead > 0 else "behind"
    return [
        f"{way.said}: its clock is {abs(ahead) / 60:.0f} minutes {word} this machine's, and signatures older than "
        f"{fleet.CLOCK_TOLERANCE / 60:.0f} minutes are refused: set both by the same time server"
    ]


def _key_faults(site: ClientSite, key: ec.EllipticCurvePrivateKey) -> list[str]:
    context = ssl.create_default_context(cafile=site.ca)
    try:
        known = fleet.knows_key(site.superlink_address, context, key, TIMEOUT)
    except OSError as error:
        return [_nobody(f"superlink={site.superlink!r}", error)]
    if known is True:
        return []
    if known is False:
        return [
            f"superlink={site.superlink!r} does not know key={site.key!r}: put its public key (.pub) into the server's client_keys and start "
            "the server again, or give the key that was registered"
        ]
    return [
        f"superlink={site.superlink!r} does not answer as a SuperLink does ({known}): check host:port, and that a proxy publishes /v1/fleet/"
    ]


def _nobody(said: str, error: OSError) -> str:
    return (
        f"{said}: no SuperLink answers there ({_reason(error)}): start the server first (scripts/superlink.py start), or "
        "correct host:port; a firewall may be in the way"
    )


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error or type(error).__name__)
