"""A trial federation from nothing: what is written, for whom, and that the sites can be read."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from federation_here import trial

from fedunlearn.config.sites import ClientSite, ServerSite, read_site
from fedunlearn.errors import UserError
from fedunlearn.sites import tls
from fedunlearn.sites.certificates import Federation, make_federation

PLAIN = {"hosts": ["localhost"], "clients": 1, "days": 2, "models": {"m": "m"}, "benchmark": "tofu", "data": "d"}


def test_every_machine_has_its_folder_and_private_files_are_private(tmp_path):
    trial(tmp_path)
    private = {"authority/ca.key", "server/server.key", "client0/node.key", "client1/node.key"}
    files = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name, path in files.items() if stat.S_IMODE(path.stat().st_mode) == 0o600} == private
    assert not [name for name in files if name.startswith(("server/", "client")) and name.endswith("ca.key")]
    assert {path.name for path in (tmp_path / "server" / "client_keys").iterdir()} == {"client0.pub", "client1.pub"}


def test_the_sites_are_ready_to_be_read(tmp_path):
    trial(tmp_path, clients=3)
    server = read_site(tmp_path / "server" / "server.yaml", ServerSite)
    for index in range(3):
        client = read_site(tmp_path / f"client{index}" / f"client{index}.yaml", ClientSite)
        assert client.client_id == index
        assert client.superlink_address.port == server.listen_address.port
        assert client.data.missing() is None
        assert client.policy.models == ("pocket",)


def test_nodes_keys_fit_their_public_ones(tmp_path):
    trial(tmp_path)
    for name in ("client0", "client1"):
        private = load_ssh_private_key((tmp_path / name / "node.key").read_bytes(), None)
        public = load_ssh_public_key((tmp_path / "server" / "client_keys" / f"{name}.pub").read_bytes())
        assert private.public_key() == public
        assert private.curve.name == "secp384r1"


def test_the_certificate_is_believed_for_every_host(tmp_path):
    trial(tmp_path, hosts=["fed.example", "10.1.2.3"])
    server = tmp_path / "server"
    shake = tls.in_memory(str(server / "server.crt"), str(server / "server.key"))
    hosts = ["fed.example", "10.1.2.3", "localhost", "127.0.0.1"]
    assert tls.certificate_faults(shake, hosts, str(server / "ca.crt"), "it") == []
    days = x509.load_pem_x509_certificate((server / "server.crt").read_bytes())
    assert 2 <= (days.not_valid_after_utc - days.not_valid_before_utc).total_seconds() / 86400 < 2.1


def test_other_machines_get_a_proxy_unless_control_is_opened(tmp_path):
    trial(tmp_path / "a", hosts=["fed.example"], port=8000)
    assert "proxy_pass https://127.0.0.1:8000;" in (tmp_path / "a" / "server" / "nginx.conf").read_text()
    assert read_site(tmp_path / "a" / "server" / "server.yaml", ServerSite).listen == "127.0.0.1:8000"
    assert read_site(tmp_path / "a" / "client0" / "client0.yaml", ClientSite).superlink == "fed.example:8443"
    trial(tmp_path / "b", hosts=["fed.example"], port=8000, open_control=True)
    assert not (tmp_path / "b" / "server" / "nginx.conf").exists()
    assert read_site(tmp_path / "b" / "server" / "server.yaml", ServerSite).listen == "0.0.0.0:8000"
    assert read_site(tmp_path / "b" / "client0" / "client0.yaml", ClientSite).superlink == "fed.example:8000"


def test_nothing_is_overwritten_unasked(tmp_path):
    trial(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"exist already.*--overwrite"):
        make_federation(tmp_path, Federation(**PLAIN))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    make_federation(tmp_path, Federation(**PLAIN), overwrite=True)
    assert (tmp_path / "authority" / "ca.key").read_bytes() != before[tmp_path / "authority" / "ca.key"]
    assert [path.name for path in (tmp_path / "server" / "client_keys").iterdir()] == ["client0.pub"]


def test_every_fault_of_what_is_wanted_is_told():
    with pytest.raises(UserError) as caught:
        Federation(**{**PLAIN, "clients": 0, "days": 0, "hosts": ["https://a", "b:80"]})
    assert len(caught.value.faults) == 4


def test_the_script(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "make_certificates.py"
    words = [
        sys.executable,
        str(script),
        "--to",
        str(tmp_path / "f"),
        "--tofu",
        "d",
        "--model",
        "m=m",
        "--clients",
        "1",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "f" / "client0" / "client0.yaml") in done.stdout.split()
    again = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (again.returncode, again.stderr.startswith("error: ")) == (2, True)
