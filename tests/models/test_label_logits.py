"""Logits at label positions alone equal the full ones there, whatever the padding."""

import pytest
import torch
from helpers_eval import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from fedunlearn.models.label_logits import label_logits


@pytest.fixture(scope="module")
def model():
    return tiny_llama().eval()


def batch(side):
    """Rows of 6, 3 and 4 ids padded to 6; positions: all but the first two of each row."""
    rows = [torch.arange(10, 16), torch.arange(30, 33), torch.arange(50, 54)]
    ids, mask = torch.zeros(3, 6, dtype=torch.int64), torch.zeros(3, 6, dtype=torch.int64)
    positions = torch.zeros(3, 6, dtype=torch.bool)
    for k, row in enumerate(rows):
        start = 6 - len(row) if side == "left" else 0
        ids[k, start : start + len(row)], mask[k, start : start + len(row)] = row, 1
        positions[k, start + 2 : start + len(row)] = True
    return rows, ids, mask, positions


def tiny_gpt2():
    """Learned absolute positions, which padding on the left would move; rotary ones are relative."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"vocab_size": 266, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
        return GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.3, bos_token_id=0, eos_token_id=0)).eval()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_equals_the_full_logits_of_each_row_alone(make, side):
    model = make().eval()
    rows, ids, mask, positions = batch(side)
    with torch.no_grad():
        found = label_logits(model, ids, mask, positions)
        wanted = torch.cat([model(input_ids=row.unsqueeze(0)).logits[0, 2:] for row in rows])
    assert found.shape == (4 + 1 + 2, 266)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_head_sees_the_chosen_positions_only(model):
    _, ids, mask, positions = batch("right")
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(tuple(inputs[0].shape)))
    label_logits(model, ids, mask, positions)
    handle.remove()
    assert seen == [(7, 32)]


def test_the_gradient_is_that_of_the_full_logits(model):
    _, ids, mask, positions = batch("right")
    weight = model.model.layers[0].self_attn.q_proj.weight
    narrow = torch.autograd.grad(label_logits(model, ids, mask, positions).square().mean(), weight)[0]
    full = model(input_ids=ids, attention_mask=mask).logits[positions].square().mean()
    wide = torch.autograd.grad(full, weight)[0]
    assert (narrow - wide).abs().max() < 1e-5 * wide.abs().max()


def test_the_model_is_itself_again_afterwards_even_after_an_error(model):
    _, ids, mask, positions = batch("right")
    label_logits(model, ids, mask, positions)
    with pytest.raises(IndexError, match="mask"):
        label_logits(model, ids, mask, positions[:, :4])
    assert model(input_ids=ids).logits.shape == (3, 6, 266)
    assert not model.lm_head._forward_pre_hooks


def test_no_position_gives_no_row(model):
    _, ids, mask, positions = batch("left")
    assert label_logits(model, ids, mask, torch.zeros_like(positions)).shape == (0, 266)
