"""Whether a server's certificate will be believed: asked of OpenSSL itself, one question at a time, so that every fault is told."""

import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime

from cryptography import x509

from fedunlearn.config.addresses import Address

Handshake = Callable[[ssl.SSLContext, str], bytes]
"""Shakes hands with the server under this context, asking for this name; gives its certificate (DER). Raises OSError, ssl.SSLError."""

_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, which the ssl module has no name for


def over_network(address: Address, timeout: float) -> Handshake:
    """Shakes hands over a connection of its own each time."""

    def shake(context: ssl.SSLContext, name: str) -> bytes:
        with (
            socket.create_connection((address.host, address.port), timeout=timeout) as plain,
            context.wrap_socket(plain, server_hostname=name) as wrapped,
        ):
            return wrapped.getpeercert(binary_form=True) or b""

    return shake


def unverified() -> ssl.SSLContext:
    """Believes anybody: for questions in which nothing is given away."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def in_memory(certificate: str, key: str) -> Handshake:
    """Shakes hands with a server that would use these files, without any network."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, key, password="")  # a locked key is an error, not a question at the terminal

    def shake(context: ssl.SSLContext, name: str) -> bytes:
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(to_client, to_server, server_hostname=name)
        server = serving.wrap_bio(to_server, to_client, server_side=True)
        for _ in range(8):  # flights of a handshake; TLS 1.3 has three
            if all([_step(client), _step(server)]):  # a list: both take their turn
                break
        return client.getpeercert(binary_form=True) or b""

    return shake


def _step(side: ssl.SSLObject) -> bool:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def certificate_faults(shake: Handshake, names: list[str], ca: str | None, said: str) -> list[str]:
    """Every reason for which a node would refuse the server's certificate.

    names: hosts it must be made out to. ca: the authority's certificate; null = those the machine trusts. said: what the sentences call the
    certificate. Raises OSError where nobody answers, ssl.SSLError where what answers does not speak TLS.
    """
    leaf = shake(unverified(), names[0])
    certificate = x509.load_der_x509_certificate(leaf)
    faults = _date_faults(certificate, said)
    if not _believed(shake, _context(ca), names[0]):
        faults.append(
            f"{said} was not signed by {f'the authority of ca={ca!r}' if ca else 'an authority that this machine trusts'} but by "
            f"{certificate.issuer.rfc4514_string()!r}: give the certificate of that authority as ca (the server's site has it), or check that "
            "it is the right server"
        )
    wrong = [name for name in names if not _believed(shake, _of_leaf(leaf), name)]
    if wrong:
        faults.append(
            f"{said} is not made out to {', '.join(wrong)} but to {', '.join(_names_of(certificate))}: reach the server by one of these, or "
            "make a certificate that has the host (scripts/make_certificates.py --host HOST)"
        )
    return faults


def _date_faults(certificate: x509.Certificate, said: str) -> list[str]:
    now = datetime.now(UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    clock = f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC; set the clock where it is wrong"
    if now < begins:
        return [f"{said} is not valid before {begins:%Y-%m-%d %H:%M} UTC, and {clock}, or wait"]
    if now > ends:
        return [f"{said} expired at {ends:%Y-%m-%d %H:%M} UTC, and {clock}, or make a new certificate"]
    return []


def _context(ca: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    context.check_hostname = False
    context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
    return context


def _of_leaf(leaf: bytes) -> ssl.SSLContext:
    """Trusts this one certificate, so that only the name it is made out to is in question."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=leaf)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(_NO_CHECK_TIME)
    return context


def _believed(shake: Handshake, context: ssl.SSLContext, name: str) -> bool:
    try:
        shake(context, name)
    except ssl.SSLCertVerificationError:
        return False
    return True


def _names_of(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ["nobody"]
    return [str(name.value) for name in names]
