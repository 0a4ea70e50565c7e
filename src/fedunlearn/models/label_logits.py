"""Logits where labels are: the vocabulary projection sees the chosen positions only, not the whole sequence."""

from typing import Any

import torch
from torch import nn


def label_logits(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Gives the logits [N, V], in the model's own dtype, at the N chosen positions.

    input_ids [B, T] int64; attention_mask [B, T], 1 at real tokens; positions [B, T] bool, true where a logit is wanted (the
    position before its label). Rows of the result follow the order of `positions` when flattened. Position ids are counted
    over real tokens, so padding on either side changes nothing.
    """
    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return placed_logits(model, input_ids, attention_mask, position_ids, positions)


def placed_logits(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Gives what label_logits gives, with position_ids [B, T] as the caller counts them.

    attention_mask: [B, T], or [B, 1, T, T] where the model takes one (fedunlearn.models.block_mask).
    The head's input is narrowed by a hook, hence whatever the architecture does after its head (soft caps, scales) still acts.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]

    def narrow(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[torch.Tensor]:
        return (inputs[0][positions],)

    handle = head.register_forward_pre_hook(narrow)
    try:
        output = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    finally:
        handle.remove()
    logits: torch.Tensor = output.logits
    return logits
