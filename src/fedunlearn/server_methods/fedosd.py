"""FedOSD: unlearning orthogonal to what the others need (Pan et al. 2025, arXiv:2412.20200)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedunlearn.aggregation.factors import Module
from fedunlearn.aggregation.product import LowRank
from fedunlearn.errors import UserError
from fedunlearn.methods.base import Method
from fedunlearn.methods.uce import UCE
from fedunlearn.protocols.base import Assignment, Stage, finetune_or_idle, idle, unlearn
from fedunlearn.records.adapter import Tensors
from fedunlearn.records.rounds import ClientRows
from fedunlearn.server_methods.base import Change, Contribution, Scene, ServerMethod, ServerStep, epochs_fault
from fedunlearn.server_methods.linear import ReadProduct, Term, block_of, difference, gram

LARGEST_COS = "fedosd/largest_cos"


@dataclass(frozen=True, kw_only=True)
class FedOSD(ServerMethod):
    """`steps` times two rounds: in the first every client with retain rows makes one update on them (rows of G), from an adapter that stays; in the
    second the owners descend UCE, g_u is the weighted mean of their updates, and the server goes g_u - G^T (G G^T)^+ G g_u, scaled back to ||g_u||.
    The rounds that are left repair: each update g loses its part along a = adapter now - adapter when unlearning began, scaled back to ||g||.

    All in product space, by inner products alone. The step is kept as an exact stack: cut to rank r it is orthogonal to 1e-3 at best. The largest |cos| of
    what was stored with a row of G is the history's `fedosd/largest_cos`.
    """

    steps: int = 1
    retain_epochs: float = 1.0

    def __post_init__(self) -> None:
        faults = epochs_fault("FedOSD", "retain_epochs", self.retain_epochs)
        if self.steps < 1:
            faults.append(f"method.steps={self.steps} of FedOSD must be at least 1")
        if faults:
            raise UserError(*faults)

    @property
    def local(self) -> Method:
        """UCE alone."""
        return UCE(alpha=0.0, retain="none")

    def assign(self, stage: Stage, cohort: Sequence[ClientRows], epochs: float) -> tuple[Assignment, ...]:
        """See the class."""
        if stage.round > 2 * self.steps:
            return tuple(finetune_or_idle(rows, self.retain_epochs) for rows in cohort)
        if stage.round % 2:
            return tuple(finetune_or_idle(rows, self.retain_epochs) for rows in cohort)
        return tuple(unlearn(rows, epochs) if rows.num_forget else idle(rows) for rows in cohort)

    def draws_all(self, stage: Stage) -> bool:
        """Before repair: the direction is orthogonal to an update of everyone who has retain rows."""
        return stage.round <= 2 * self.steps

    def owner_rounds(self, num_rounds: int) -> Sequence[int]:
        """Every second of the first 2 * steps rounds."""
        return range(2, 2 * self.steps + 1, 2)

    @property
    def never_averages(self) -> bool:
        """Yes: repair has its own step too."""
        return True

    def step(self, stage: Stage) -> ServerStep:
        """Its own, always."""
        return ServerStep.OWN

    def change(self, scene: Scene) -> Change:
        """See the class."""
        if scene.stage.round > 2 * self.steps:
            return _repair(scene)
        return Change(hold=True) if scene.stage.round % 2 else _orthogonal(scene)


def _update(of: Contribution) -> ReadProduct:
    return difference(of.new, of.old)


def _orthogonal(scene: Scene) -> Change:
    others, owners = [_update(u) for u in scene.held], [_update(u) for u in scene.updates]
    inner = gram([*others, *owners], scene.modules)
    forget = torch.tensor([u.weight for u in scene.updates], dtype=torch.float64)
    coefficients = orthogonal_coefficients(inner, forget)
    terms = [Term(float(c), product) for c, product in zip(coefficients, [*others, *owners], strict=True)]
    block = block_of(terms, scene.modules)
    return Change(block=block, figures={LARGEST_COS: largest_cos(block, others, scene.modules)})


def orthogonal_coefficients(inner: torch.Tensor, forget: torch.Tensor) -> torch.Tensor:
    """Gives the step as weights of the updates, [n + m] float64: g_u without its part in the span of the first n, scaled back to ||g_u||.

    inner: [n + m, n + m] float64, Gram matrix of n retain updates and m forget updates, in this order. forget: [m], the weights of g_u. All 0 where
    nothing is left of g_u.
    """
    n = len(inner) - len(forget)
    g = torch.cat([torch.zeros(n, dtype=torch.float64), forget])
    along = torch.linalg.pinv(inner[:n, :n], hermitian=True) @ (inner[:n] @ g)
    step = g.clone()
    step[:n] -= along
    before, after = float(g @ inner @ g), float(step @ inner @ step)
    if after <= 1e-24 * max(before, 1e-300):
        return torch.zeros_like(step)
    scaled: torch.Tensor = step * (before / after) ** 0.5
    return scaled


def _repair(scene: Scene) -> Change:
    away = difference(scene.now, scene.start)
    updates = [_update(u) for u in scene.updates]
    inner = gram([away, *updates], scene.modules)
    along, terms, total = float(inner[0, 0]), [], 0.0
    for place, (update, product) in enumerate(zip(scene.updates, updates, strict=True), 1):
        share = float(inner[0, place]) / along if along > 0 else 0.0
        left = float(inner[place, place]) - share * float(inner[0, place])
        stretch = (float(inner[place, place]) / left) ** 0.5 if left > 0 else 0.0
        terms.append(Term(update.weight * stretch, product))
        total -= update.weight * stretch * share
    return Change(block=block_of([*terms, Term(total, away)], scene.modules))


def largest_cos(block: Tensors, others: Sequence[ReadProduct], modules: Sequence[Module]) -> float:
    """Gives the largest |cos| of a stored block with any of the updates, in product space; 0 where there is nothing to compare."""
    if not block or not others:
        return 0.0

    def stored(module: Module) -> LowRank:
        return LowRank(block[module.b].double(), block[module.a].double())

    inner = gram([stored, *others], modules)
    sizes = (inner[0, 0] * inner.diagonal()[1:]).sqrt()
    return float((inner[0, 1:].abs() / sizes.clamp(min=1e-300)).max())
