"""What a comparison of methods is made of: one row a method, request and seed; and what they come to over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, pstdev


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one run came to. Probabilities, ROUGE and utility in [0, 1]; None where the data has nothing to compute it from.

    tokens, steps, seconds: fractions of the oracle's (tokens with those of reference and generation); wall: seconds of the clients, all together.
    """

    forget_prob: float | None
    forget_quality: float | None
    truth_ratio: float | None
    utility: float | None
    rouge: float | None
    tokens: float
    steps: float
    seconds: float
    wall: float


FIELDS = ("forget_prob", "forget_quality", "truth_ratio", "utility", "rouge", "tokens", "steps", "seconds", "wall")


@dataclass(frozen=True, kw_only=True)
class MethodRun:
    """One method on one request with one seed. request: its number from 1. settings: what differs from the method's defaults.

    figures: None where the pair is not applicable, for the reason in `why`.
    """

    name: str
    protocol: str
    settings: str
    request: int
    seed: int
    figures: Figures | None
    why: str = ""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; of a p-value the geometric mean and its factor."""

    mean: float
    deviation: float


@dataclass(frozen=True, kw_only=True)
class Standard:
    """What a method is held against: the oracle's forget probability and the fine-tuned model's utility, means over seeds; None where they are not known."""

    oracle_prob: float | None
    tuned_utility: float | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """fails: bounds that a method misses. unknown: those that nothing is known of, for the data had nothing to compute it from."""

    fails: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether it meets all four."""
        return not self.fails and not self.unknown


SMALLEST_P = 1e-300


def spread(values: Sequence[float | None], *, geometric: bool = False) -> Spread | None:
    """Gives mean and deviation; None where a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    if geometric:
        logs = [math.log(max(value, SMALLEST_P)) for value in known]
        return Spread(math.exp(mean(logs)), math.exp(pstdev(logs)))
    return Spread(mean(known), pstdev(known))


def verdict(
    prob: Spread | None, quality: Spread | None, utility: Spread | None, cost: Spread | None, than: Standard
) -> Verdict:
    """Holds a method against four bounds: `forget_prob` between 0.2 and 1.25 x the oracle's, `forget_quality` >= 1e-2, `utility` >= 0.9 x the
    fine-tuned model's, `cost` <= 0.25 of the oracle's tokens.
    """
    holds = {
        "forget_prob": _between(prob, _times(0.2, than.oracle_prob), _times(1.25, than.oracle_prob)),
        "forget_quality": _between(quality, 1e-2, math.inf),
        "utility": _between(utility, _times(0.9, than.tuned_utility), math.inf),
        "cost": _between(cost, 0.0, 0.25),
    }
    return Verdict(
        fails=tuple(name for name, good in holds.items() if good is False),
        unknown=tuple(name for name, good in holds.items() if good is None),
    )


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _between(value: Spread | None, least: float | None, most: float | None) -> bool | None:
    """Whether a mean lies between two bounds; None where one of the three is not known."""
    if value is None or least is None or most is None:
        return None
    return least <= value.mean <= most
