"""What a client was charged for in a run: work that is kept between runs costs each run once, whether it was done anew or not."""

import hashlib
import json
import logging
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from fedunlearn.files import write_json

log = logging.getLogger(__name__)


class Charges:
    """Names of kept work (a row's reference sum, its alternates) that a client has used in a run.

    path: where they stand from round to round, so that a process that begins anew goes on with them; null keeps them in memory.
    round: the client's round, from 1. What was charged in this round or later is charged again: such a round was not completed.
    """

    def __init__(self, path: Path | None, round: int) -> None:
        self._path, self._round = path, round

    @cached_property
    def _charged(self) -> dict[str, int]:
        if self._path is None or not self._path.is_file():
            return {}
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            rounds = {str(name): int(number) for name, number in saved.items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            log.warning("%s is damaged (%s): the run's reference tokens are counted anew", self._path, error)
            return {}
        return {name: number for name, number in rounds.items() if number < self._round}

    def due(self, names: Iterable[str]) -> frozenset[str]:
        """Gives those of the names that were not charged yet, and charges them."""
        new = frozenset(names) - self._charged.keys()
        if new:
            self._charged.update(dict.fromkeys(sorted(new), self._round))
            if self._path is not None:
                write_json(self._path, self._charged)
        return new


def charges_of(cache: Path, run_id: str, client_id: int, round: int) -> Charges:
    """Gives a client's charges in the run of that id. run_id comes over the wire, so that it names a folder by its hash only."""
    folder = hashlib.sha256(run_id.encode()).hexdigest()[:32]
    return Charges(cache / "charged" / folder / f"{client_id}.json", round)
