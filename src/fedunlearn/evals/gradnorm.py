"""The gradient pass: how strongly a row's loss pulls at the model, row by row; a row that was trained on pulls little (arXiv:2402.17012)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from fedunlearn.data.chat import EncodedRow
from fedunlearn.errors import UserError
from fedunlearn.evals.inference import inference
from fedunlearn.models.label_logits import label_logits
from fedunlearn.reporting.progress import track

Parameters = Literal["model", "adapter"]


def gradient_norms(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    parameters: Parameters,
    names: Mapping[EncodedRow, str] | None = None,
) -> list[float]:
    """Gives each row's mean over parameter tensors of the L2 norm of the gradient of its mean loss over its N labels, the last id left out.

    parameters: `model` = all weights but the adapter's, as the merged model has them (its gradient by W is that of W + s B A); `adapter` = the trainable LoRA factors. Tied tensors
    count once, tensors without a gradient not at all. Loss in float32, gradients in the weights' dtype. A row with N = 0 has norm 0.
    Modes, gradients and what is trainable are left as they were. names: what a message calls a row. Raises UserError, naming the row, for a norm that is not finite.
    """
    norms = []
    with inference(model) as device, _gradients(model, parameters) as chosen:
        for row in track(rows, "gradients", len(rows)):
            norm = _norm(model, row, chosen, device) if row.num_labels > 1 else 0.0
            if not math.isfinite(norm):
                raise UserError(
                    f"{(names or {}).get(row, 'a row')}: its gradient is not finite: the adapter has diverged, or torch_dtype is too narrow; evaluate in float32, or "
                    "take the metric out (~eval.metrics.mia_gradnorm)"
                )
            norms.append(norm)
    return norms


def _norm(model: nn.Module, row: EncodedRow, chosen: list[nn.Parameter], device: torch.device) -> float:
    ids = torch.tensor([row.input_ids], device=device)
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    wanted[0, row.num_prompt - 1 : len(row.input_ids) - 2] = True  # the logits in front of all labels but the last
    labels = torch.tensor(row.labels[:-1], device=device)
    with torch.enable_grad():
        logits = label_logits(model, ids, torch.ones_like(ids), wanted)
        loss = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)
        found = torch.autograd.grad(loss, chosen, allow_unused=True)
    norms = [torch.linalg.vector_norm(one.double()) for one in found if one is not None]
    return float(torch.stack(norms).mean())


@contextmanager
def _gradients(model: nn.Module, parameters: Parameters) -> Iterator[list[nn.Parameter]]:
    """Gives the parameters in question, which inside the block ask for gradients, and no others do."""
    named = dict(model.named_parameters())
    asked = {name: parameter.requires_grad for name, parameter in named.items()}
    chosen = [one for name, one in named.items() if (".lora_" in name) == (parameters == "adapter")]
    if parameters == "adapter":
        chosen = [one for one in chosen if one.requires_grad]
    if not chosen:
        raise UserError("eval.gradnorm_of=adapter, but the model has no adapter: set it to model")
    picked = {id(one) for one in chosen}
    try:
        for parameter in named.values():
            parameter.requires_grad_(id(parameter) in picked)
        yield chosen
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(asked[name])
