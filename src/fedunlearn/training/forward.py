"""One forward of a batch: what the loss declared at label positions, and nothing else; log-probabilities in float32."""

from collections.abc import Set
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fedunlearn.data.collator import Batch
from fedunlearn.methods.tokens import Need, TokenLosses
from fedunlearn.models.hidden_states import block_output
from fedunlearn.models.label_logits import label_logits
from fedunlearn.models.lora import reference_active

AT_THE_END = frozenset({Need.NLL, Need.LOGITS})
OF_REFERENCE = frozenset({Need.REFERENCE_LOGITS, Need.REFERENCE_HIDDEN})


def batch_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Gives the logits [N, V] that predict the batch's label tokens, float32."""
    return label_logits(model, batch.input_ids, batch.attention_mask, batch.positions).float()


def token_losses(
    model: nn.Module,
    batch: Batch,
    needs: Set[Need],
    *,
    layer: int | None = None,
    reference_sums: torch.Tensor | None = None,
    alternates: TokenLosses | None = None,
) -> TokenLosses:
    """Runs the model and gives what the losses declared in `needs`, with gradient through the active adapter.

    layer: the block that hidden states are read after. reference_sums [B] float32, alternates: handed through. What is read of the reference comes
    from the frozen second adapter, first and without gradient.
    """
    reference = _Seen()
    if needs & OF_REFERENCE:
        with reference_active(model):
            hidden = layer if Need.REFERENCE_HIDDEN in needs else None
            reference = _look(model, batch, hidden, to_the_end=Need.REFERENCE_LOGITS in needs)
    own = _look(model, batch, layer if Need.HIDDEN in needs else None, to_the_end=bool(needs & AT_THE_END))
    nll = None
    if Need.NLL in needs and own.logits is not None:
        nll = F.cross_entropy(own.logits, batch.labels, reduction="none")
    return TokenLosses(
        row=batch.row,
        labels=batch.labels,
        num_labels=batch.num_labels,
        nll=nll,
        logits=own.logits if Need.LOGITS in needs else None,
        hidden=own.hidden,
        reference_sums=reference_sums,
        reference_logits=reference.logits,
        reference_hidden=reference.hidden,
        alternates=alternates,
    )


@dataclass(frozen=True)
class _Seen:
    logits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


def _look(model: nn.Module, batch: Batch, layer: int | None, *, to_the_end: bool) -> _Seen:
    if layer is None:
        return _Seen(logits=batch_logits(model, batch)) if to_the_end else _Seen()
    logits = None
    with block_output(model, layer, stop=not to_the_end) as seen:
        logits = batch_logits(model, batch)
    return _Seen(logits=logits, hidden=seen[0][batch.own_positions].float())
