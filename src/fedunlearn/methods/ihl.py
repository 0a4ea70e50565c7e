"""Inverted hinge loss: LoKU without its Fisher start (Cha et al. 2025, arXiv:2408.06621)."""

from dataclasses import dataclass

import torch

from fedunlearn.methods.base import Method, RetainTerm, check_weights
from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses


@dataclass(frozen=True, kw_only=True)
class IHL(Method):
    """F = mean over label positions of 1 + p(y) - max_{v != y} p(v), in [0, 2].

    The runner-up takes the label's place instead of all tokens alike. Two tokens over three words, probabilities (1/2, 1/4, 1/4) with y = 0 and
    (1/2, 3/8, 1/8) with y = 2: F = (1 + 1/2 - 1/4 + 1 + 1/8 - 1/2) / 2 = 15/16. FILA, LoKU's start of the adapter, rewrites the base
    and is left out.
    """

    gamma: float = 1.0
    alpha: float = 1.0
    retain: RetainTerm = "nll"

    def __post_init__(self) -> None:
        check_weights("IHL", self.gamma, self.alpha, self.retain)

    @property
    def needs(self) -> frozenset[Need]:
        """The logits."""
        return frozenset({Need.LOGITS})

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """See Method.forget."""
        probabilities = batch.the(Need.LOGITS).softmax(-1)  # [N, V]
        own = probabilities.gather(-1, batch.labels[:, None])
        runner_up = probabilities.scatter(-1, batch.labels[:, None], -1.0).amax(-1)
        return (1.0 + own[:, 0] - runner_up).sum() / totals.num_tokens
