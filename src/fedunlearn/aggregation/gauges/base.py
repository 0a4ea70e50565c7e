"""The interface of a gauge: factors may be turned before they are reduced, and factored anew afterwards."""

from dataclasses import dataclass

import torch

from fedunlearn.aggregation.factors import Factors
from fedunlearn.aggregation.reducers.base import ModuleCohort


@dataclass(frozen=True, eq=False, kw_only=True)
class Moment:
    """Where in the run a gauge acts. round: from 1. generator: seeded by (run, round), drawn from module by module in name order."""

    round: int
    generator: torch.Generator


class Gauge:
    """Leaves everything as it is (`as_is`); members override one of the two steps. Law: the product of what comes out is that of what goes in."""

    @property
    def keeps_place(self) -> bool:
        """Whether an entry of a factor means the same in the next round: what a server optimiser with moments builds on."""
        return True

    def align(self, cohort: ModuleCohort, moment: Moment) -> ModuleCohort:
        """Turns the clients' factors before they are reduced."""
        return cohort

    def refactor(
        self, b: torch.Tensor, a: torch.Tensor, old: Factors, moment: Moment
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives other factors b [d_out, r], a [r, d_in] of b @ a; float64."""
        return b, a
