"""Only label tokens count: padding of either side, the pad id and the prompt change no loss of a tiny Llama."""

import pytest
import torch
from helpers_eval import tiny_llama
from peft import LoraConfig

from fedunlearn.config.data import CollatorConfig
from fedunlearn.data.chat import EncodedRow
from fedunlearn.data.collator import collate
from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.methods.npo import NPO
from fedunlearn.methods.retain import retain_loss
from fedunlearn.methods.simnpo import SimNPO
from fedunlearn.methods.tokens import Need, StepTotals
from fedunlearn.models.adapter_tensors import live_parameters, read_tensors
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
TOTALS = StepTotals(num_labels=(3, 1, 4))
KL_NEEDS = frozenset({Need.NLL, Need.LOGITS, Need.REFERENCE_LOGITS})
RIGHT = CollatorConfig()
VARIANTS = [
    pytest.param(CollatorConfig(padding_side="left"), 0, id="left"),
    pytest.param(CollatorConfig(pad_to_multiple_of=8), 0, id="right to 16"),
    pytest.param(CollatorConfig(padding_side="left", pad_to_multiple_of=32), 0, id="left to 32"),
    pytest.param(RIGHT, 265, id="the pad id is the closing token"),
    pytest.param(CollatorConfig(padding_side="left"), 10, id="the pad id is a word of the prompt"),
]


@pytest.fixture(scope="module")
def model():
    """A tiny Llama with an adapter that acts, and a frozen reference beside it."""
    base = tiny_llama()
    base.name_or_path = "base"
    made = attach_lora(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    draw_fresh(made, 0)
    reference = read_tensors(made)
    with torch.no_grad():
        for parameter in live_parameters(made).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    hold_reference(made, Weights(reference))
    return made.eval()


def losses_of(model, rows, config, pad, needs=frozenset({Need.NLL})):
    sums = torch.tensor([9.0, 4.0, 30.0])[: len(rows)]
    return token_losses(model, collate(rows, config, pad, CPU), needs, reference_sums=sums)


def test_token_losses_are_those_of_each_row_alone(model):
    """Row by row and unpadded, label t from the logits one place before it, closing token included: 3 + 1 + 4 labels."""
    batch = losses_of(model, ROWS, RIGHT, 0)
    wanted = []
    with torch.no_grad():
        for row in ROWS:
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
            for place in range(row.num_prompt, len(row.input_ids)):
                wanted.append(-torch.log_softmax(logits[place - 1], -1)[row.input_ids[place]])
    assert batch.num_labels.tolist() == [3, 1, 4]
    assert batch.row.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert batch.nll.dtype == torch.float32
    assert (batch.nll.double() - torch.stack(wanted)).abs().max() < 1e-5


@pytest.mark.parametrize(("config", "pad"), VARIANTS)
def test_padding_changes_no_token_loss_and_no_logit(model, config, pad):
    plain, padded = losses_of(model, ROWS, RIGHT, 0, KL_NEEDS), losses_of(model, ROWS, config, pad, KL_NEEDS)
    assert (plain.nll - padded.nll).abs().max() < 1e-5
    assert (plain.logits - padded.logits).abs().max() < 1e-5
    assert (plain.reference_logits - padded.reference_logits).abs().max() < 1e-5
    assert (plain.logits - plain.reference_logits).abs().max() > 1e-2
    assert torch.equal(plain.row, padded.row)


@pytest.mark.parametrize("config", [CollatorConfig(padding_side="left"), CollatorConfig(pad_to_multiple_of=32)])
@pytest.mark.parametrize("method", [GradDiff(), NPO(), SimNPO(beta=1.0, delta=5.0), "kl"])
def test_padding_changes_no_gradient_of_the_adapter(model, method, config):
    def gradient(settings, pad):
        batch = losses_of(model, ROWS, settings, pad, KL_NEEDS)
        loss = retain_loss("kl", batch, TOTALS) if method == "kl" else method.forget(batch, TOTALS)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(live_parameters(model).values()))])

    plain, padded = gradient(RIGHT, 0), gradient(config, 77)
    assert plain.abs().max() > 1e-3
    assert (plain - padded).abs().max() < 1e-5 * plain.abs().max()


def test_a_prompt_token_is_no_label_however_badly_it_is_predicted(model):
    """Two prompts of one length and unlike words before the same answer: as many losses, and none of them the prompt's own."""
    rows = (EncodedRow((256, 1, 2, 40, 265), 3), EncodedRow((256, 200, 201, 40, 265), 3))
    batch = losses_of(model, rows, RIGHT, 0)
    assert batch.nll.shape == (4,)
    assert losses_of(model, rows[:1], RIGHT, 0).nll.tolist() == pytest.approx(batch.nll[:2].tolist(), abs=1e-5)


def test_what_is_not_declared_is_not_computed(model):
    batch = losses_of(model, ROWS, RIGHT, 0)
    assert batch.logits is None
    assert batch.reference_logits is None


def test_reference_logits_carry_no_gradient(model):
    batch = losses_of(model, ROWS, RIGHT, 0, KL_NEEDS)
    assert batch.logits.requires_grad
    assert not batch.reference_logits.requires_grad
    assert batch.reference_logits.dtype == batch.logits.dtype == torch.float32
