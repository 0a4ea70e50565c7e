"""CE-U: cross-entropy towards the model's own distribution without the label (Yang 2025, arXiv:2503.01224)."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from fedunlearn.errors import UserError
from fedunlearn.methods.base import Method
from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses


@dataclass(frozen=True, kw_only=True)
class CEU(Method):
    """F = mean over label positions, without each row's first `skip`, of -sum_v q_v log softmax(z)_v, q = softmax(sg(z)) with z_y = -inf.

    A row of no more than `skip` labels adds nothing. Two tokens over two words at skip 1: the first, z = (5, 1), adds nothing; the second,
    z = (ln 3, 0) with y = 0: q = (0, 1), softmax(z) = (3/4, 1/4), F = -ln(1/4) = ln 4, gradient (3/4, -3/4).
    """

    skip: int = 1
    gamma: float = field(default=1.0, init=False)
    alpha: float = field(default=0.0, init=False)
    retain: str = field(default="none", init=False)

    def __post_init__(self) -> None:
        if self.skip < 0:
            raise UserError(f"method.skip={self.skip} of CE-U must not be negative")

    @property
    def needs(self) -> frozenset[Need]:
        """The logits."""
        return frozenset({Need.LOGITS})

    @property
    def skipped_labels(self) -> int:
        """See Method.skipped_labels."""
        return self.skip

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """See Method.forget."""
        first = batch.num_labels.cumsum(0) - batch.num_labels  # [B]: where each row begins
        place = torch.arange(len(batch.row), device=batch.row.device) - first[batch.row]
        kept = place >= self.skip
        logits, label = batch.the(Need.LOGITS)[kept], batch.labels[kept][:, None]
        others = logits.detach().scatter(-1, label, float("-inf")).softmax(-1)
        count = sum(max(labels - self.skip, 0) for labels in totals.num_labels)
        return F.cross_entropy(logits, others, reduction="sum") / max(count, 1)
