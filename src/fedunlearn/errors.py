"""The one error a user is meant to read: key, value, what is allowed, way out."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A fault of the configuration, the data or the machine, told in one message; the doors print it without a traceback.

    faults: one sentence a fault; several are printed one a line.
    """

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Gives `; did you mean 'x'?` for the nearest known word, or an empty string where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


class NotApplicableError(UserError):
    """A method cannot serve a request because of who owns what, however it is set."""
