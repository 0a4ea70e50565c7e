"""Node keys that Flower would take, and every way in which one is not."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedunlearn.errors import UserError
from fedunlearn.sites.keys import client_keys, names_by_key, new_node_key, node_key, public_bytes

LOCKED = b"""-----BEGIN OPENSSH PRIVATE KEY-----
b3BlbnNzaC1rZXktdjEAAAAACmFlczI1Ni1jdHIAAAAGYmNyeXB0AAAAGAAAABCpNFeL0h
6Yu/mYjfiSOWnrAAAAEAAAAAEAAABoAAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlz
dHAyNTYAAABBBC3XeGI3Ph1InX1F2xlGeLqYir+gVM3SGLrXU0m+nY58j0vAn0hCmD8euD
RPqNoqhW8o6/K7Y8nyQaXvdxkJDvUAAACgr7ZcLjf9p3WVk6xv2iL8IjwF5/KH6VBozQ6m
GvC7JtKrM3ER8hENFd4XUpW1fMLiCXLbV8/mspjwr4GU74aDRgikzvF1ZJUFDyR1+D8I75
nUK/KoWoUP7EXfo88RJtFV4kA2mDFfhpc0dnKQYuJ/YLwrBEnTrh6bEC+1Qhpdz69KOAI1
xpJhDkk/2KbVXXd5Vu20l69iIUr2CWiZ/ESqZw==
-----END OPENSSH PRIVATE KEY-----
"""
"""By `ssh-keygen -t ecdsa -N pass`; nobody has its public key."""


def private_file(folder, content, mode=0o600):
    path = folder / "node.key"
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def in_format(key, form):
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def test_a_fresh_key_is_taken(tmp_path):
    private, public = new_node_key()
    (tmp_path / "a.pub").write_bytes(public)
    key = node_key(private_file(tmp_path, private))
    assert names_by_key(client_keys(str(tmp_path))) == {public_bytes(key.public_key()): "a.pub"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (in_format(ec.generate_private_key(ec.SECP384R1()), PrivateFormat.PKCS8), "PEM key of another format"),
        (
            in_format(ec.generate_private_key(ec.SECP384R1()), PrivateFormat.TraditionalOpenSSL),
            "PEM key of another format",
        ),
        (in_format(ed25519.Ed25519PrivateKey.generate(), PrivateFormat.OpenSSH), "no(t an)? elliptic-curve"),
        (LOCKED, "passphrase"),
        (b"nonsense", "is no private key"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n", "damaged"),
    ],
)
def test_other_keys_are_refused(tmp_path, content, said):
    with pytest.raises(UserError, match=said):
        node_key(private_file(tmp_path, content))


def test_a_key_that_others_can_read_and_is_none_has_both_faults(tmp_path):
    with pytest.raises(UserError) as caught:
        node_key(private_file(tmp_path, b"nonsense", 0o644))
    assert [
        part in fault for part, fault in zip(("chmod 600", "no private key"), caught.value.faults, strict=True)
    ] == [True, True]


def test_a_key_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        node_key(str(tmp_path / "none"))


def test_public_keys_that_no_node_can_have_and_one_under_two_names(tmp_path):
    with pytest.raises(UserError, match="holds no"):
        client_keys(str(tmp_path))
    _, public = new_node_key()
    for name, content in (
        ("a", public),
        ("b", public.rstrip() + b" comment\n"),
        ("c", b"ssh-rsa nonsense"),
        ("d", b"ssh-ed25519 AAAA"),
    ):
        (tmp_path / f"{name}.pub").write_bytes(content)
    with pytest.raises(UserError) as caught:
        client_keys(str(tmp_path))
    told = "\n".join(caught.value.faults)
    assert "a.pub and b.pub are the same key" in told
    assert "c.pub is no" in told
    assert "d.pub is no" in told
