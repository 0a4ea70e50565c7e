"""Where a service listens or is reached: `host:port`."""

import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Address:
    """host: a name or an IP address without brackets. port: 1 to 65535."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address | None:
    """Gives the address that `host:port` or `[IPv6]:port` means, None where it means none."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    plain = _is_name(bare) and not set(bare) & set("[]/@ \t") and (":" in bare) == bracketed
    if not (colon and plain and port.isdecimal() and port.isascii() and 0 < int(port) < 65536):
        return None
    return Address(host=bare, port=int(port))


def _is_name(host: str) -> bool:
    """Whether a resolver can be asked for it: no empty label, none of more than 63 characters."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False
