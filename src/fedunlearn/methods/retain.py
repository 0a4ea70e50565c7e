"""Retain terms R of the unlearning losses: nll and kl, on the label tokens of the retain rows."""

import torch
import torch.nn.functional as F

from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses

_NEEDS = {
    "nll": frozenset({Need.NLL}),
    "kl": frozenset({Need.LOGITS, Need.REFERENCE_LOGITS}),
    "none": frozenset[Need](),
}


def retain_needs(term: str) -> frozenset[Need]:
    """What the retain term reads beside rows and labels; nothing for `none`. Raises ValueError for a term that is none of these."""
    if term not in _NEEDS:
        raise ValueError(
            f"retain term {term!r} is none of {', '.join(_NEEDS)}: a method with another one overrides retain_needs"
        )
    return _NEEDS[term]


def retain_loss(term: str, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
    """Gives this micro-batch's share of R, a float32 scalar with gradient.

    nll: cross-entropy, sum of nll over the step's label tokens. kl: mean over label positions of KL(reference || model),
    sum_v p_ref (log p_ref - log p); the reference carries no gradient. `none` has no loss: raises ValueError.
    """
    if term == "nll":
        return cross_entropy(batch, totals)
    if term == "kl":
        return _kl(batch, totals)
    raise ValueError(f"retain term {term!r} has no loss")


def cross_entropy(batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
    """CE = sum nll / sum T, this micro-batch's share of the step's; float32 scalar."""
    return batch.the(Need.NLL).sum() / totals.num_tokens


def _kl(batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
    model = batch.the(Need.LOGITS).log_softmax(-1)  # [N, V]
    reference = batch.the(Need.REFERENCE_LOGITS).log_softmax(-1)
    return F.kl_div(model, reference, reduction="sum", log_target=True) / totals.num_tokens
