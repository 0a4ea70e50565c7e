"""Token losses of a batch: one forward, logits at label positions only, log-probabilities in float32."""

from collections.abc import Set

import torch
import torch.nn.functional as F
from torch import nn

from fedunlearn.data.collator import Batch
from fedunlearn.methods.base import Need, TokenLosses
from fedunlearn.models.label_logits import label_logits
from fedunlearn.models.lora import reference_active


def batch_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Gives the logits [N, V] that predict the batch's label tokens, float32."""
    return label_logits(model, batch.input_ids, batch.attention_mask, batch.positions).float()


def token_losses(model: nn.Module, batch: Batch, needs: Set[Need], reference_sums: torch.Tensor | None) -> TokenLosses:
    """Runs the model and gives what the losses declared in `needs`, with gradient through the active adapter.

    reference_sums: [B] float32, handed through; given exactly where Need.REFERENCE_SUMS is declared. Reference logits come
    from the frozen reference adapter, computed first and without gradient.
    """
    reference = None
    if Need.REFERENCE_LOGITS in needs:
        with reference_active(model):
            reference = batch_logits(model, batch)
    logits = batch_logits(model, batch)
    return TokenLosses(
        nll=F.cross_entropy(logits, batch.labels, reduction="none"),
        row=batch.row,
        num_labels=batch.num_labels,
        reference_sums=reference_sums,
        logits=logits if Need.LOGITS in needs else None,
        reference_logits=reference,
    )
