"""What a node can ask a SuperLink before it starts: whether it speaks HTTP, what time it has, whether it knows the node's key."""

import http.client
import json
import ssl
from base64 import b64encode
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedunlearn.config.addresses import Address
from fedunlearn.sites.keys import public_bytes

CLOCK_TOLERANCE = 300.0
"""Seconds by which a node's signature may be older than the server's clock."""
ACTIVATE = "/v1/fleet/activate-node"
INTERVAL_REFUSED, ACTIVATION_FAILED = 2003, 2004


class NotHttpError(Exception):
    """What answers does not speak plain HTTP."""


def clock_ahead(address: Address, context: ssl.SSLContext | None, timeout: float) -> float | None:
    """Gives by how many seconds the server's clock is ahead of ours, None where it does not say, or not as HTTP has it.

    context: None for plaintext. Raises OSError where nobody answers, NotHttpError.
    """
    connection = _connection(address, context, timeout)
    try:
        connection.request("HEAD", "/health")
        date = connection.getresponse().getheader("date")
    except (http.client.HTTPException, ConnectionResetError) as error:
        raise NotHttpError(str(error)) from error
    finally:
        connection.close()
    try:
        return (parsedate_to_datetime(date or "") - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):  # no date, or one without its zone
        return None


def knows_key(address: Address, context: ssl.SSLContext, key: ec.EllipticCurvePrivateKey, timeout: float) -> bool | str:
    """Whether the SuperLink has this key registered; else what it answered, where that says neither.

    Asks for an activation with a heartbeat interval of 0, which is refused in either case and changes nothing: a key that is not known
    is refused before the interval is looked at. Raises OSError.
    """
    public, now = public_bytes(key.public_key()), datetime.now(UTC).isoformat()
    headers = {
        "content-type": "application/protobuf",
        "flwr-public-key": b64encode(public).decode(),
        "flwr-timestamp": now,
        "flwr-signature": b64encode(key.sign(now.encode(), ec.ECDSA(hashes.SHA256()))).decode(),
    }
    connection = _connection(address, context, timeout)
    try:
        connection.request("POST", ACTIVATE, body=_first_field(public), headers=headers)
        response = connection.getresponse()
        text = response.read(10_000).decode(errors="replace")
    except http.client.HTTPException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    code = _code(text)
    return {INTERVAL_REFUSED: True, ACTIVATION_FAILED: False}.get(code, f"HTTP {response.status}: {text[:200]}")


def _first_field(value: bytes) -> bytes:
    """A protobuf message whose field 1 holds these bytes, at most 16383 of them."""
    return b"\x0a" + bytes((len(value) & 0x7F | 0x80, len(value) >> 7)) + value


def _code(text: str) -> int:
    try:
        answer = json.loads(text)
    except ValueError:
        return 0
    code = answer.get("code", 0) if isinstance(answer, dict) else 0
    return code if isinstance(code, int) else 0


def _connection(address: Address, context: ssl.SSLContext | None, timeout: float) -> http.client.HTTPConnection:
    if context is None:
        return http.client.HTTPConnection(address.host, address.port, timeout=timeout)
    return http.client.HTTPSConnection(address.host, address.port, timeout=timeout, context=context)
