"""FedEraser: fine-tuning replayed with directions new and lengths old (Liu et al. 2021, arXiv:2012.13891)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedunlearn.errors import UserError
from fedunlearn.protocols.base import Assignment, Stage, finetune_or_idle, idle
from fedunlearn.records.rounds import ClientRows
from fedunlearn.server_methods.base import Beginning, Change, Scene, ServerMethod, ServerStep
from fedunlearn.server_methods.linear import difference, norms_by_module


@dataclass(frozen=True, kw_only=True)
class FedEraser(ServerMethod):
    """Every `interval`-th fine-tuning round again, from the adapter before round 1. The first takes the remaining clients' old updates as they are; then
    each trains `ratio` of its epochs (rounded up to whole ones) from the new adapter, and its update becomes ||U_old|| U_new / ||U_new||, module
    by module, in product space; their weighted mean is brought back to rank r.

    The public re-implementation scales the clients' mean; the paper, and this, scales each client. An owner with retain rows comes back with those rows
    alone, at its old length. ratio 1, interval 1 and nobody forgotten is the fine-tuning run itself, where its reducer is exact.
    """

    interval: int = 2
    ratio: float = 0.5

    def __post_init__(self) -> None:
        faults = []
        if self.interval < 1:
            faults.append(f"method.interval={self.interval} of FedEraser must be at least 1 (every round)")
        if not 0 < self.ratio <= 1:
            faults.append(f"method.ratio={self.ratio} of FedEraser must lie in (0, 1]")
        if faults:
            raise UserError(*faults)

    @property
    def beginning(self) -> Beginning:
        """What fine-tuning began with."""
        return "origin"

    @property
    def reads_ledger(self) -> bool:
        """Old updates of the first round, old norms of the others."""
        return True

    def faults(self, num_rounds: int) -> tuple[str, ...]:
        """See ServerMethod.faults."""
        if self.interval <= num_rounds:
            return ()
        return (
            f"method.interval={self.interval} of FedEraser is above trainer.federated.num_rounds={num_rounds}, fine-tuning's rounds: lower it",
        )

    def rounds(self, num_rounds: int) -> int:
        """Every interval-th."""
        return math.ceil(num_rounds / self.interval)

    def origin_round(self, round: int) -> int:
        """1, 1 + interval, ..."""
        return 1 + (round - 1) * self.interval

    def as_they_were(self, stage: Stage) -> bool:
        """In the first round."""
        return stage.round == 1

    def assign(self, stage: Stage, cohort: Sequence[ClientRows], epochs: float) -> tuple[Assignment, ...]:
        """See ServerMethod.assign."""
        if self.as_they_were(stage):
            return tuple(idle(rows) for rows in cohort)
        return tuple(finetune_or_idle(rows, math.ceil(self.ratio * epochs - 1e-9)) for rows in cohort)

    def step(self, stage: Stage) -> ServerStep:
        """Its own, in every round: the mean of products at rank r."""
        return ServerStep.OWN

    def change(self, scene: Scene) -> Change:
        """See the class. A client whose new update is 0 in a module adds nothing there."""
        if self.as_they_were(scene.stage):
            return Change(weights={m.name: {u.client_id: u.weight for u in scene.updates} for m in scene.modules})
        lengths = {u.client_id: norms_by_module(difference(u.new, u.old), scene.modules) for u in scene.updates}
        return Change(
            weights={
                module.name: {
                    u.client_id: u.weight
                    * _ratio(scene.old_norms[u.client_id][module.name], lengths[u.client_id][module.name])
                    for u in scene.updates
                }
                for module in scene.modules
            }
        )


def _ratio(old: float, new: float) -> float:
    return old / new if new > 0 else 0.0
