"""Retain terms R of the unlearning losses: nll and kl, on the label tokens of the retain rows."""

import torch
import torch.nn.functional as F

from fedunlearn.methods.base import Need, RetainTerm, StepTotals, TokenLosses


def retain_needs(term: RetainTerm) -> frozenset[Need]:
    """What the retain term reads beside the token losses."""
    return frozenset({Need.LOGITS, Need.REFERENCE_LOGITS}) if term == "kl" else frozenset()


def retain_loss(term: RetainTerm, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
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
    return batch.nll.sum() / totals.num_tokens


def _kl(batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
    if batch.logits is None or batch.reference_logits is None:
        raise ValueError("the kl retain term needs logits and reference_logits")
    model = batch.logits.log_softmax(-1)  # [N, V]
    reference = batch.reference_logits.log_softmax(-1)
    return F.kl_div(model, reference, reduction="sum", log_target=True) / totals.num_tokens
