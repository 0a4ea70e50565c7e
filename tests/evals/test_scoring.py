"""The scoring pass against a slow plain formula: one row at a time, no padding, everything in float64."""

import copy
import math

import pytest
import torch
from helpers_eval import PHI_ARGS, SHARED, needs_shared, tiny_chat, tiny_llama
from torch import nn

from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.data.tofu import load_tofu
from fedunlearn.errors import UserError
from fedunlearn.evals.scoring import score_rows
from fedunlearn.records.evaluation import Detail

EOT = 265
ANSWERS = [
    ("Who?", "Me"),
    ("Where was he born?", "In a very small town by the sea."),
    ("Who?", "You, of course"),
    ("When", "Now"),
]


def encoded(chat=None, pairs=ANSWERS):
    chat = chat or tiny_chat()
    return [chat.encode(question, answer, "row") for question, answer in pairs]


def plain_loss(model, row):
    """Mean over labels of -log softmax(logits[t - 1])[label t], float64 throughout."""
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = twin(torch.tensor([row.input_ids])).logits[0]
    steps = range(row.num_prompt, len(row.input_ids))
    return -sum(float(torch.log_softmax(logits[t - 1], -1)[row.input_ids[t]]) for t in steps) / len(steps)


def scored(model, rows, detail=Detail.LOSS, *, pad_id=EOT, batch_tokens=4096, **kwargs):
    found = score_rows(model, dict.fromkeys(rows, detail), pad_id=pad_id, batch_tokens=batch_tokens, **kwargs)
    return [found[row] for row in rows]


def losses(model, rows, batch_tokens=4096, **kwargs):
    return [score.avg_loss for score in scored(model, rows, batch_tokens=batch_tokens, **kwargs)]


def test_scores_are_the_plain_formula():
    model, rows = tiny_llama(), encoded()
    found = scored(model, rows)
    for score, row in zip(found, rows, strict=True):
        assert score.avg_loss == pytest.approx(plain_loss(model, row), abs=2e-6)
        assert score.prob == pytest.approx(math.exp(-score.avg_loss), rel=1e-6)
        assert score.num_labels == row.num_labels
    assert max(score.avg_loss for score in found) - min(score.avg_loss for score in found) > 0.1


def test_scores_are_float32_numbers():
    for score in scored(tiny_llama(), encoded()):
        for number in (score.avg_loss, score.prob):
            assert torch.tensor(number, dtype=torch.float32).item() == number


def test_padding_and_order_and_pad_id_change_nothing():
    """One batch of all, one row a batch, reversed, another pad id: the same to float32's rounding."""
    model, rows = tiny_llama(), encoded()
    together = losses(model, rows)
    assert losses(model, rows, batch_tokens=1) == pytest.approx(together, abs=4e-6)
    assert losses(model, rows[::-1])[::-1] == pytest.approx(together, abs=4e-6)
    other = [score.avg_loss for score in scored(model, rows, pad_id=0)]
    assert other == pytest.approx(together, abs=4e-6)


def test_equal_rows_are_one_row_and_a_prompt_of_other_length_is_another():
    model, rows = tiny_llama(), encoded()
    shifted = EncodedRow(rows[0].input_ids, rows[0].num_prompt - 1)
    found = scored(model, [*rows, rows[0], shifted, rows[1]])
    assert found[4] == found[0]
    assert found[6] == found[1]
    assert found[5].num_labels == found[0].num_labels + 1


def test_the_projection_sees_each_context_of_a_label_once():
    """Labels of equal contexts (the first ids of two answers to "Who?") share one row of logits."""
    model, rows, sizes = tiny_llama(), encoded(), []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[0]))
    losses(model, rows)
    hook.remove()
    contexts = {row.input_ids[:end] for row in rows for end in range(row.num_prompt, len(row.input_ids))}
    assert sum(sizes) == len(contexts) < sum(row.num_labels for row in rows)


def test_modes_random_state_and_hooks_are_left_as_they_were():
    model = tiny_llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    losses(model, encoded(), compat="open-unlearning")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert not model._forward_pre_hooks
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_dropout_does_not_act_and_the_mode_comes_back_after_a_fault():
    class Broken(nn.Module):
        def forward(self, *args):
            raise RuntimeError("broken")

    model = tiny_llama().train()
    model.model.layers[0].self_attn.attention_dropout = 0.9
    assert losses(model, encoded()) == losses(model, encoded())
    model.model.norm = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        losses(model, encoded())
    assert model.training


def test_a_diverged_model_is_refused():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(
        UserError,
        match=r"^forget row 2: .*loss that is not finite.*lower trainer.args.learning_rate, or evaluate in float32",
    ):
        losses(model, [encoded()[2]], names={encoded()[2]: "forget row 2"})
    with pytest.raises(UserError, match=r"^a row: "):
        losses(model, encoded())


def test_compat_hides_real_closing_tokens_where_pad_is_eos():
    """Their mask is ids != pad with positions 0 .. n-1: prompts hold <|eot_id|>, so losses differ; the formula is rebuilt by hand."""
    model, row = tiny_llama(), encoded()[1]
    ids = torch.tensor([row.input_ids])
    with torch.no_grad():
        logits = model.eval()(ids, attention_mask=ids != EOT, position_ids=torch.arange(ids.shape[1])[None]).logits[0]
    token_losses = -torch.log_softmax(logits, -1)[range(row.num_prompt - 1, len(row.input_ids) - 1), list(row.labels)]
    theirs = losses(model, [row, encoded()[0]], compat="open-unlearning")[0]
    assert theirs == pytest.approx(token_losses.mean().item(), abs=4e-6)
    assert abs(theirs - losses(model, [row])[0]) > 1e-3


def test_compat_is_ours_where_pad_is_a_token_of_its_own():
    model, rows = tiny_llama(), encoded()
    ours, theirs = (scored(model, rows, pad_id=260, compat=compat) for compat in (None, "open-unlearning"))
    assert [score.avg_loss for score in theirs] == pytest.approx([score.avg_loss for score in ours], abs=4e-6)


@needs_shared
def test_stories260k_with_phi_tags_is_the_plain_formula():
    """A real tokenizer that merges the blank of "Answer: " with the answer's first word, a real model with tied embeddings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = SHARED / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = ChatFormat(AutoTokenizer.from_pretrained(folder), PHI_ARGS, 512)
    rows = [
        chat.encode(row.question, answer, "retain")
        for row in load_tofu(str(SHARED / "tofu")).perturbed("retain")[:4]
        for answer in (row.answer, *row.perturbed_answers)
    ]
    assert losses(model, rows, batch_tokens=2048) == pytest.approx([plain_loss(model, row) for row in rows], abs=1e-5)
