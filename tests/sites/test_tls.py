"""What a node would hold against a server's certificate, each alone and all together."""

import pytest
from helpers_sites import server_files, valid

from fedunlearn.sites import tls
from fedunlearn.sites.authority import Authority

LONG = valid(-100, 1000)


@pytest.fixture(scope="module")
def authority():
    return Authority("ours", LONG)


def faults(folder, names, ca="ca.crt"):
    shake = tls.in_memory(str(folder / "server.crt"), str(folder / "server.key"))
    return tls.certificate_faults(shake, names, str(folder / ca), "it")


def test_a_good_certificate_has_none(tmp_path, authority):
    server_files(tmp_path, authority, ["localhost", "127.0.0.1", "::1"])
    assert faults(tmp_path, ["localhost", "127.0.0.1", "::1"]) == []


@pytest.mark.parametrize(
    ("validity", "said"),
    [(valid(-50, -1), "it expired at"), (valid(1, 50), "it is not valid before"), (valid(-50, 50), None)],
)
def test_dates_are_told_with_this_machine_s_clock(tmp_path, authority, validity, said):
    server_files(tmp_path, authority, ["localhost"], validity)
    found = faults(tmp_path, ["localhost"])
    assert len(found) == (said is not None)
    assert all(said in fault and "this machine's clock says" in fault for fault in found)


def test_another_authority(tmp_path, authority):
    server_files(tmp_path, authority, ["localhost"])
    (tmp_path / "other.crt").write_bytes(Authority("ours", LONG).certificate)  # the same name, another key
    assert ["was not signed by the authority" in fault for fault in faults(tmp_path, ["localhost"], "other.crt")] == [
        True
    ]


def test_hosts_it_is_not_made_out_to(tmp_path, authority):
    server_files(tmp_path, authority, ["localhost", "10.0.0.1"])
    (fault,) = faults(tmp_path, ["localhost", "fed.example", "10.0.0.2"])
    assert "not made out to fed.example, 10.0.0.2 but to localhost, 10.0.0.1" in fault


def test_all_at_once(tmp_path, authority):
    server_files(tmp_path, authority, ["localhost"], valid(-50, -1))
    (tmp_path / "other.crt").write_bytes(Authority("theirs", LONG).certificate)
    found = faults(tmp_path, ["fed.example"], "other.crt")
    assert [part in fault for part, fault in zip(("expired", "not signed", "not made out"), found, strict=True)] == [
        True
    ] * 3
