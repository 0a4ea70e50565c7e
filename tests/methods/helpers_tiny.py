"""A tiny Llama with an adapter that acts and a frozen reference beside it, and what every method reads of rows through it."""

import torch
from helpers_eval import tiny_llama
from peft import LoraConfig, PeftModel

from fedunlearn.config.data import CollatorConfig
from fedunlearn.data.chat import EncodedRow
from fedunlearn.data.collator import collate
from fedunlearn.methods.altpo import AltPO
from fedunlearn.methods.base import Method
from fedunlearn.methods.ceu import CEU
from fedunlearn.methods.dpo import DPO
from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.methods.idk_dpo import IdkDPO
from fedunlearn.methods.ihl import IHL
from fedunlearn.methods.npo import NPO
from fedunlearn.methods.pdu import PDU
from fedunlearn.methods.rmu import RMU
from fedunlearn.methods.satimp import SatImp
from fedunlearn.methods.simnpo import SimNPO
from fedunlearn.methods.tokens import Need, StepTotals
from fedunlearn.methods.uce import UCE
from fedunlearn.methods.undial import UNDIAL
from fedunlearn.methods.wga import WGA
from fedunlearn.models.adapter_tensors import live_parameters, read_tensors
from fedunlearn.models.hidden_states import num_blocks
from fedunlearn.models.initial import draw_fresh
from fedunlearn.models.lora import attach_lora, hold_reference
from fedunlearn.records.adapter import Weights
from fedunlearn.training.forward import token_losses

CPU = torch.device("cpu")
ROWS = (
    EncodedRow((256, 10, 11, 12, 40, 41, 265), 4),
    EncodedRow((256, 20, 265), 2),
    EncodedRow((256, 265, 31, 32, 33, 34, 50, 51, 52, 265), 6),
)
OTHERS = (
    EncodedRow((256, 10, 11, 12, 70, 265), 4),
    EncodedRow((256, 20, 71, 72, 73, 74, 265), 2),
    EncodedRow((256, 265, 31, 32, 33, 34, 75, 265), 6),
)
SUMS = {ROWS: (9.0, 4.0, 30.0), OTHERS: (8.0, 25.0, 7.0)}
RIGHT = CollatorConfig()
# Every member, where the fields of a class change what is computed more than once; mild settings, so that no gradient is next to nothing.
EVERY: tuple[Method, ...] = (
    GradAscent(),
    GradDiff(),
    NPO(),
    SimNPO(beta=1.0, delta=5.0),
    DPO(),
    IdkDPO(),
    AltPO(),
    RMU(layer=0),
    RMU(layer=1),
    RMU(layer=1, retain="kl"),
    UNDIAL(),
    CEU(),
    WGA(beta=0.2),
    SatImp(beta1=0.2, beta2=1.0),
    PDU(eps=0.3),
    IHL(),
    UCE(),
    GradDiff(retain="kl"),
)


def name_of(method: Method) -> str:
    """A short name for a test's id."""
    return f"{type(method).__name__}-{method.retain}{getattr(method, 'layer', '')}"


def made_tiny(**lora: object) -> PeftModel:
    """Two blocks, no dropout; the reference is the adapter before something was added to it."""
    base = tiny_llama()
    base.name_or_path = "base"
    usual = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    made = attach_lora(base, LoraConfig(**{**usual, **lora}))
    draw_fresh(made, 0)
    reference = read_tensors(made)
    with torch.no_grad():
        for parameter in live_parameters(made).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    hold_reference(made, Weights(reference))
    return made.eval()


def term_of(
    model: PeftModel,
    method: Method,
    term: str = "forget",
    rows: tuple[EncodedRow, ...] = ROWS,
    others: tuple[EncodedRow, ...] = OTHERS,
    config: CollatorConfig = RIGHT,
    pad: int = 0,
) -> tuple[float, torch.Tensor]:
    """A term over these rows in one batch, and its gradient by the adapter; reference sums are fixed numbers."""
    needs = method.needs if term == "forget" else method.retain_needs
    deep = needs & {Need.HIDDEN, Need.REFERENCE_HIDDEN}
    layer = method.hidden_layer(num_blocks(model)) if deep else None

    def losses(chosen: tuple[EncodedRow, ...], sums: tuple[float, ...], alternates: object = None) -> object:
        batch = collate(chosen, config, pad, CPU)
        return token_losses(model, batch, needs, layer=layer, reference_sums=torch.tensor(sums), alternates=alternates)

    other = losses(others, SUMS[OTHERS]) if Need.ALTERNATES in needs else None
    totals = StepTotals(num_labels=tuple(row.num_labels for row in rows))
    loss = getattr(method, term)(losses(rows, SUMS[ROWS], other), totals)
    live = list(live_parameters(model).values())
    found = torch.autograd.grad(loss, live, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(live, found, strict=True)]
    return loss.item(), torch.cat([g.flatten() for g in flat])
