"""Seconds of a round by part."""

import time

from fedunlearn.records.rounds import RoundSeconds


class Laps:
    """A stopwatch that has run since it was made: each lap goes to the part that just ended."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._seconds = dict.fromkeys(vars(RoundSeconds()), 0.0)

    def end(self, part: str) -> None:
        """Adds the time since the last lap to a part of RoundSeconds. Raises KeyError for one that it does not have."""
        now = time.monotonic()
        self._seconds[part] = self._seconds[part] + now - self._last
        self._last = now

    @property
    def seconds(self) -> RoundSeconds:
        """All laps so far."""
        return RoundSeconds(**self._seconds)

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(self._seconds.values())
