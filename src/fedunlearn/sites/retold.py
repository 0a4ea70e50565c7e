"""The SuperLink's lines about nodes it does not let in, in words: it names them by their public key alone."""

import re
from collections.abc import Callable, Mapping

from fedunlearn.sites.fleet import ACTIVATE, ACTIVATION_FAILED, INTERVAL_REFUSED

_REFUSED = re.compile(rf"\[{re.escape(ACTIVATE)}\]\[ApiError:(\d+)\].*public key: (b'.*?'), exception: (.*)$")
_WITHOUT_KEY = "[/v1/fleet/register-node][ApiError:2001]"


def retelling(names: Mapping[bytes, str]) -> Callable[[str], str]:
    """Gives what turns a line of the SuperLink's into what is to be told; most stay as they are.

    names: public key as Flower sends it -> the name of its file in client_keys.
    """
    shown = {repr(key): name for key, name in names.items()}  # as the line has it, which anybody can have sent

    def retell(line: str) -> str:
        if _WITHOUT_KEY in line:
            return "server: a node without a registered key was refused"
        found = _REFUSED.search(line)
        if not found:
            return line
        return _of_key(int(found[1]), shown.get(found[2], "a key that is not in client_keys"), found[3]) or line

    return retell


def _of_key(code: int, name: str, reason: str) -> str:
    if code == INTERVAL_REFUSED:
        return f"server: a node with {name} asked whether it may connect: yes"
    if code == ACTIVATION_FAILED and "could not be activated" in reason:
        return f"server: a node with {name} was refused: another is connected with this key, or was killed less than a minute ago"
    return f"server: a node with {name} was refused" if code == ACTIVATION_FAILED else ""
