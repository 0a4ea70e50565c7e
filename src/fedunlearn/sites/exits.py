"""Why a process of Flower's ended: its exit codes and last lines, in one message with cause and way out."""

import re
from collections.abc import Mapping, Sequence

_CODE = re.compile(r"Exit Code: (\d+)")
_API_CODE = re.compile(r"\[code: (\d+)\]")

_OF_CODE: Mapping[int, str] = {
    104: "it was called with options that do not go together; see the lines above",
    105: "its database was written by another version of Flower: give another `database`, or install the version that wrote it",
    250: "it lost the way to its node's own service (`listen`): see that nothing else uses that port",
    302: "its private key cannot be used: `key` must be an elliptic-curve key in OpenSSH's format (scripts/make_certificates.py makes them)",
    303: "it has a key but no TLS: set insecure=false, or leave `key` out",
    305: "it could not connect to the SuperLink; see the lines above",
    500: "a public key in client_keys is no elliptic-curve key in OpenSSH's format: take the .pub that was made with the node's key",
    600: "an address is none: give host:port without https://",
    603: "a certificate is given and insecure=true: leave one out",
    604: "a file it was given is not there (any more): see `ca`, `key` and `tls`",
    605: "the server's certificate files are incomplete: give tls.ca, tls.certificate and tls.key",
    606: "the server runs another version of Flower: install the same version of fedunlearn on all machines",
    607: "the app that was submitted needs a module that is not installed here: install the same version of fedunlearn on all machines",
}
_OF_API_CODE: Mapping[int, str] = {
    2001: "the SuperLink lets in registered keys only, and this node showed none: give `key`, and its .pub to the server's client_keys",
    2004: "the SuperLink refused this node's key: another node is connected with the same key (a node that was killed counts as connected for "
    "a minute; every node needs a key of its own), or the key was taken out of the server's client_keys",
}
_OF_TEXT: Sequence[tuple[str, str]] = (
    ("address already in use", "another program listens at its port: end it (`ss -ltnp`), or give another `listen`"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the server's certificate is not believed: compare `ca` with the server's, and the clocks",
    ),
    ("No space left on device", "the disk is full: free some space"),
    ("database is locked", "another SuperLink uses the same `database`: end it, or give another"),
)
_REFUSED_LATER = (
    "it ended of its own accord: the SuperLink no longer takes this node's signature. Its key was taken out of the server's client_keys, or the "
    "clocks of the two machines differ by more than five minutes"
)


def why_ended(returncode: int, lines: Sequence[str], *, is_node: bool) -> str:
    """Gives the cause and the way out, as the rest of a sentence.

    returncode: as subprocess gives it (negative: the signal). lines: the last ones the process wrote. is_node: for a node, ending well
    without being asked is a refusal.
    """
    text = "\n".join(lines)
    api, code = _API_CODE.search(text), _CODE.search(text)
    if api and int(api[1]) in _OF_API_CODE:
        return _OF_API_CODE[int(api[1])]
    known = next((said for sign, said in _OF_TEXT if sign.lower() in text.lower()), None)
    if known:
        return known
    if code:
        return f"{_OF_CODE.get(int(code[1]), 'see the lines above')} (Flower's exit code {code[1]})"
    if returncode < 0:
        return f"it was killed by signal {-returncode} ({'memory may have run out' if returncode == -9 else 'from outside'})"
    if returncode == 0 and is_node:
        return _REFUSED_LATER
    return f"it ended with code {returncode}; see the lines above"
