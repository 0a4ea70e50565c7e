"""Every fault that is told before a site starts; the servers answer in threads of this process."""

import socket

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from federation_here import edit, free_port, trial
from helpers_sites import answering, server_files, valid

from fedunlearn.config.sites import ClientSite, ServerSite, read_site
from fedunlearn.errors import UserError
from fedunlearn.sites.authority import Authority
from fedunlearn.sites.checks import check_client, check_server

KNOWN = b'{"code": 2003, "detail": "Invalid heartbeat interval."}'
UNKNOWN = b'{"code": 2004, "detail": "Failed to activate SuperNode."}'


@pytest.fixture
def folder(tmp_path):
    return trial(tmp_path)


def client(folder, **changes):
    return read_site(edit(folder / "client0" / "client0.yaml", **changes), ClientSite)


def server(folder, **changes):
    return read_site(edit(folder / "server" / "server.yaml", **changes), ServerSite)


def faults(check, site):
    with pytest.raises(UserError) as caught:
        check(site)
    return list(caught.value.faults)


def test_a_good_client(folder):
    with answering(folder / "server", body=KNOWN) as port:
        check_client(client(folder, superlink=f"localhost:{port}"))


@pytest.mark.parametrize("hours", [-1, 1])
def test_clocks_an_hour_apart(folder, hours):
    with answering(folder / "server", body=KNOWN, hours_ahead=hours) as port:
        (fault,) = faults(check_client, client(folder, superlink=f"localhost:{port}"))
    assert f"60 minutes {'ahead of' if hours > 0 else 'behind'} this machine's" in fault


@pytest.mark.parametrize("date", ["yesterday", "Mon, 01 Jan 2024 00:00:00 -0000"])
def test_a_clock_that_says_no_time_is_no_fault(folder, date):
    with answering(folder / "server", body=KNOWN, date=date) as port:
        check_client(client(folder, superlink=f"localhost:{port}"))


def test_a_key_the_server_does_not_know(folder):
    with answering(folder / "server", body=UNKNOWN, status=412) as port:
        (fault,) = faults(check_client, client(folder, superlink=f"localhost:{port}"))
    assert "client 0: " in fault
    assert "does not know key=" in fault


def test_something_else_behind_the_port(folder):
    with answering(folder / "server", body=b"<html>", status=404) as port:
        (fault,) = faults(check_client, client(folder, superlink=f"localhost:{port}"))
    assert "does not answer as a SuperLink does (HTTP 404: <html>)" in fault


def test_nobody_at_the_address(folder):
    (fault,) = faults(check_client, client(folder, superlink=f"localhost:{free_port()}"))
    assert "no SuperLink answers there (Connection refused)" in fault


def test_plaintext_where_tls_is_wanted(folder):
    with answering(None) as port:
        (fault,) = faults(check_client, client(folder, superlink=f"localhost:{port}"))
    assert "answers, but not in TLS" in fault


def test_another_program_in_tls_is_not_told_as_plaintext_and_hides_no_fault_of_its_certificate(folder, tmp_path):
    server_files(tmp_path / "old", Authority("theirs", valid(-100, 100)), ["localhost"], valid(-50, -1))
    with answering(tmp_path / "old", closes=True) as port:
        found = faults(check_client, client(folder, superlink=f"localhost:{port}"))
    parts = ("expired at", "was not signed by", "answers in TLS, but not as a SuperLink does (")
    assert [part in fault for part, fault in zip(parts, found, strict=True)] == [True] * len(parts)


def test_a_server_that_is_silent_is_not_told_as_plaintext(folder, monkeypatch):
    monkeypatch.setattr("fedunlearn.sites.checks.TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (fault,) = faults(check_client, client(folder, superlink=f"localhost:{silent.getsockname()[1]}"))
    assert "takes the connection, but does not answer in TLS within 0.2 s" in fault


def test_tls_where_plaintext_is_wanted(folder):
    with answering(folder / "server") as port:
        site = client(folder, superlink=f"localhost:{port}", insecure=True, ca=None, key=None)
        (fault,) = faults(check_client, site)
    assert "does not answer in plaintext" in fault


def test_plaintext_where_plaintext_is_wanted(folder):
    with answering(None) as port:
        check_client(client(folder, superlink=f"localhost:{port}", insecure=True, ca=None, key=None))


def test_all_faults_of_a_client_at_once(folder, tmp_path):
    server_files(tmp_path / "old", Authority("theirs", valid(-100, 100)), ["fed.example"], valid(-50, -1))
    (folder / "client0" / "node.key").chmod(0o644)
    with answering(tmp_path / "old", hours_ahead=2) as port, socket.create_server(("127.0.0.1", 0)) as taken:
        site = client(folder, superlink=f"localhost:{port}", listen=f"127.0.0.1:{taken.getsockname()[1]}")
        (folder / "client0" / "work").mkdir(mode=0o755)
        found = faults(check_client, site)
    parts = (
        "work_dir=",
        "listen=",
        "chmod 600",
        "expired at",
        "was not signed by",
        "not made out to localhost",
        "120 minutes ahead",
    )
    assert [part in fault for part, fault in zip(parts, found, strict=True)] == [True] * len(parts)


def test_a_ca_that_is_none(folder):
    (folder / "client0" / "ca.crt").write_text("nonsense")
    (fault,) = faults(check_client, client(folder))
    assert "ca=" in fault
    assert "is no PEM certificate" in fault


def test_a_good_server(folder):
    check_server(server(folder))
    assert (folder / "server" / "saves").is_dir()


def test_all_faults_of_a_server_at_once(folder, tmp_path):
    server_files(folder / "server", Authority("theirs", valid(-100, 100)), ["localhost", "127.0.0.1"], valid(1, 2))
    (folder / "server" / "ca.crt").write_bytes((folder / "authority" / "ca.crt").read_bytes())
    (folder / "server" / "server.key").chmod(0o644)
    keys = folder / "server" / "client_keys"
    (keys / "again.pub").write_bytes((keys / "client0.pub").read_bytes())
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        site = server(
            folder,
            listen=f"127.0.0.1:{taken.getsockname()[1]}",
            public_hosts=["fed.example"],
            saves_root=str(tmp_path / "file" / "saves"),
        )
        found = faults(check_server, site)
    parts = (
        "listen=",
        "saves_root",
        "chmod 600",
        "not valid before",
        "was not signed by",
        "not made out to fed.example",
        "the same key",
    )
    assert [part in fault for part, fault in zip(parts, found, strict=True)] == [True] * len(parts)
    assert all(fault.startswith("server: ") for fault in found)


def test_a_certificate_with_another_s_key(folder):
    (folder / "server" / "server.key").write_bytes(Authority("x", valid(-1, 1)).server(["localhost"])[1])
    (fault,) = faults(check_server, server(folder))
    assert "do not go together" in fault


def test_a_server_s_key_that_is_locked_is_told_and_nobody_is_asked(folder):
    path = folder / "server" / "server.key"
    key = load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    (fault,) = faults(check_server, server(folder))
    assert "PEM key without passphrase" in fault
