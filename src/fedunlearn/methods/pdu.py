"""PDU: primal-dual unlearning (Entesari et al. 2025, arXiv:2506.05314)."""

import math
from dataclasses import dataclass, field

import torch

from fedunlearn.errors import UserError
from fedunlearn.methods.base import Method
from fedunlearn.methods.retain import cross_entropy
from fedunlearn.methods.tokens import Memory, Need, StepDone, StepTotals, TokenLosses

LAM, SEEN = "lam", "seen"


@dataclass(frozen=True, kw_only=True)
class PDU(Method):
    """F = mean over label positions of (max_v z - mean_v z)^2; L = gamma F + lam (CE(retain) - eps).

    lam begins at `lam` and follows lam <- max(0, lam + eta (CE(retain) - eps)) once after each optimiser step, with that step's CE, as soon as
    `warmup` epochs over the forget rows are done; epochs count over the whole request, and lam is the client's from round to round.
    eps: the loss on retain rows that is allowed, required (the authors have 0.3 on TOFU). The common implementation takes the positions one later
    and moves lam after each micro-batch. Two tokens with z = (2, 0) and (3, 1): F = ((2 - 1)^2 + (3 - 2)^2) / 2 = 1.
    """

    eps: float
    lam: float = 1.0
    eta: float = 1.0
    warmup: int = 5
    gamma: float = 1.0
    alpha: float = field(default=1.0, init=False)
    retain: str = field(default="nll", init=False)

    def __post_init__(self) -> None:
        at = "method."
        rules = [
            (
                self.eps >= 0,
                f"{at}eps={self.eps} of PDU must not be negative: it is the loss on retain rows that is allowed",
            ),
            (self.lam >= 0, f"{at}lam={self.lam} of PDU must not be negative"),
            (self.eta >= 0, f"{at}eta={self.eta} of PDU must not be negative (0: lam stays)"),
            (self.warmup >= 0, f"{at}warmup={self.warmup} of PDU must not be negative"),
            (self.gamma > 0, f"{at}gamma={self.gamma} of PDU must be above 0"),
        ]
        faults = [fault for holds, fault in rules if not holds]
        if faults:
            raise UserError(*faults)

    @property
    def needs(self) -> frozenset[Need]:
        """The logits."""
        return frozenset({Need.LOGITS})

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """See Method.forget."""
        logits = batch.the(Need.LOGITS)
        return (logits.amax(-1) - logits.mean(-1)).square().sum() / totals.num_tokens

    def retain_loss(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """Gives this micro-batch's share of CE(retain) - eps."""
        return cross_entropy(batch, totals) - self.eps * len(batch.labels) / totals.num_tokens

    def memory(self) -> Memory:
        """lam, and how many forget rows were seen."""
        return {LAM: self.lam, SEEN: 0.0}

    def retain_weight(self, memory: Memory) -> float:
        """Lam."""
        return memory[LAM]

    def remember(self, memory: Memory, done: StepDone) -> Memory:
        """See the class; a step that ends after the warm-up moves lam."""
        seen, lam = memory[SEEN] + done.num_rows, memory[LAM]
        if seen > self.warmup * done.num_forget and done.retain is not None and math.isfinite(done.retain):
            lam = max(0.0, lam + self.eta * done.retain)
        return {LAM: lam, SEEN: seen}
