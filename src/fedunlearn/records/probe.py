"""What a probe found: figures of every model before and after every attack, and what they say."""

from collections.abc import Mapping
from dataclasses import dataclass, field

Figures = Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model. before: its metrics; after: by attack. below: it starts below the oracle in forget probability, so that a small gain is no merit."""

    name: str
    before: Figures
    after: Mapping[str, Figures]
    below: bool = False


@dataclass(frozen=True, kw_only=True)
class Leak:
    """What an attacker who holds both adapters learns: metrics of base, base - U and base + U, U = what unlearning added."""

    name: str
    base: Figures
    minus: Figures
    plus: Figures

    def of(self, metric: str) -> float:
        """The metric under base - U, above that of base."""
        minus, base = self.minus[metric], self.base[metric]
        if minus is None or base is None:
            raise ValueError(f"{metric} has no value")
        return minus - base


@dataclass(frozen=True, kw_only=True)
class Probed:
    """A whole probe. subjects: the oracle first."""

    subjects: tuple[Subject, ...]
    leaks: tuple[Leak, ...] = field(default=())
