"""Node keys: elliptic-curve keys in OpenSSH's format, the only one that Flower's nodes take."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedunlearn.errors import UserError

NIST_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_MAKE = "make one with scripts/make_certificates.py or `ssh-keygen -t ecdsa -b 384 -N '' -f FILE`"


def new_node_key() -> tuple[bytes, bytes]:
    """Gives a fresh P-384 key: the private file (OpenSSH, no passphrase) and the public one (one line)."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return private, public + b"\n"


def node_key(path: str) -> ec.EllipticCurvePrivateKey:
    """Reads a node's private key. Raises UserError with every fault: others can read it, another format or curve, a passphrase."""
    faults = private_file_faults("key", path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"key={path!r} cannot be read ({error.strerror or error})") from error
    key, fault = _loaded(data)
    if fault:
        faults.append(f"key={path!r} {fault}: {_MAKE}")
    if faults or key is None:
        raise UserError(*faults)
    return key


def _loaded(data: bytes) -> tuple[ec.EllipticCurvePrivateKey | None, str]:
    if b"BEGIN OPENSSH PRIVATE KEY" not in data:
        what = "a PEM key of another format (openssl's)" if b"PRIVATE KEY" in data else "no private key"
        return None, f"is {what}, not an OpenSSH one"
    try:
        key = serialization.load_ssh_private_key(data, None)
    except TypeError:
        return None, "is locked by a passphrase, which a node cannot give"
    except (ValueError, UnsupportedAlgorithm) as error:
        return None, f"is damaged ({error})"
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, NIST_CURVES):
        return None, "is not an elliptic-curve key of NIST's (P-256, P-384, P-521)"
    return key, ""


def private_file_faults(name: str, path: str) -> list[str]:
    """The fault of a private key's file that others than its owner can read. A file that is not there has none here."""
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError:
        return []
    return [f"{name}={path!r} can be read by others (mode {mode:04o}): chmod 600 {path}"] if mode & 0o077 else []


def client_keys(folder: str) -> list[Path]:
    """Gives the public keys in the folder, sorted by name. Raises UserError for none, for one that no node can have, and for one key under two names."""
    paths = sorted(Path(folder).glob("*.pub"))
    faults = (
        []
        if paths
        else [f"client_keys={folder!r} holds no *.pub: no node could connect; put the nodes' public keys there"]
    )
    owners: dict[bytes, Path] = {}
    for path in paths:
        key, fault = _public(path)
        if fault:
            faults.append(f"client_keys: {path} {fault}: {_MAKE}, and take its .pub")
        elif key in owners:
            faults.append(
                f"client_keys: {owners[key].name} and {path.name} are the same key: every node has one of its own"
            )
        else:
            owners[key] = path
    if faults:
        raise UserError(*faults)
    return paths


def names_by_key(paths: Sequence[Path]) -> dict[bytes, str]:
    """Public key as Flower sends it -> its file's name, of keys that `client_keys` gave."""
    return {_public(path)[0]: path.name for path in paths}


def _public(path: Path) -> tuple[bytes, str]:
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except OSError as error:
        return b"", f"cannot be read ({error.strerror or error})"
    except (ValueError, UnsupportedAlgorithm):
        return b"", "is no OpenSSH public key"
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, NIST_CURVES):
        return b"", "is not an elliptic-curve key of NIST's (P-256, P-384, P-521)"
    return public_bytes(key), ""


def public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """The form in which Flower sends and stores a public key."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
