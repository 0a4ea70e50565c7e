"""Rows that share what they begin with, against a plain slow way: one row at a time, no padding, no mask, every number by its definition."""

import copy
import random

import numpy as np
import pytest
import torch
from helpers_eval import PHI_ARGS, SHARED, SMALL, needs_shared, tiny_llama
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MistralConfig, Qwen2Config

from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.data.tofu import load_tofu
from fedunlearn.evals.scoring import score_rows
from fedunlearn.models.block_mask import takes_block_mask
from fedunlearn.records.evaluation import Detail

GPT2_SMALL = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 266,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.3,
}


def made_model(config, attention="sdpa"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def made_rows(seed=0):
    """Questions of several answers that part at many depths; one row the beginning of another; one in two lengths of prompt; strangers; a group of one."""
    draw = random.Random(seed)
    ids = lambda count: tuple(draw.randrange(3, 266) for _ in range(count))  # noqa: E731
    rows = []
    for _ in range(3):
        prompt, stem = ids(draw.randrange(5, 12)), ids(4)
        rows += [EncodedRow(prompt + ids(draw.randrange(1, 15)), len(prompt)) for _ in range(3)]
        rows += [EncodedRow(prompt + stem + ids(draw.randrange(1, 9)), len(prompt)) for _ in range(3)]
        rows += [EncodedRow(prompt + stem[:2] + ids(3), len(prompt))]
    long = rows[0].input_ids + ids(6)
    rows += [EncodedRow(long, rows[0].num_prompt), EncodedRow(long, rows[0].num_prompt + 2), EncodedRow(long, 1)]
    return [*rows, EncodedRow(ids(9), 3), EncodedRow(ids(2), 1), EncodedRow(long[:2], 1)]


def plain(model, row):
    """Columns logp, hit, mu, sigma2 in the model's dtype: the row alone, log-softmax of every position."""
    with torch.no_grad():
        logits = model(torch.tensor([row.input_ids]), use_cache=False).logits[0]
    logp, labels = torch.log_softmax(logits[row.num_prompt - 1 : -1], -1), torch.tensor(row.labels)
    mu = (logp.exp() * logp).sum(-1)
    sigma2 = (logp.exp() * (logp - mu[:, None]).square()).sum(-1)
    return [x.numpy() for x in (logp[range(len(labels)), labels], logp.argmax(-1) == labels, mu, sigma2)]


def check(model, rows, tolerance, *, batch_tokens=4096, wanted=None, pad_id=0):
    wanted = wanted or dict.fromkeys(rows, Detail.MOMENTS)
    found = score_rows(model, wanted, pad_id=pad_id, batch_tokens=batch_tokens)
    assert set(found) == set(rows)
    for row in rows:
        logp, hit, mu, sigma2 = plain(model, row)
        loss = -logp.astype(np.float64).mean()
        assert found[row].avg_loss == pytest.approx(loss, abs=tolerance, rel=tolerance)
        assert found[row].prob == pytest.approx(np.exp(-loss), abs=tolerance, rel=tolerance)
        assert found[row].num_labels == len(row.labels)
        tokens = found[row].tokens
        assert (tokens is None) == (wanted[row] == Detail.LOSS)
        if tokens is not None:
            np.testing.assert_allclose(tokens.logp, logp, atol=tolerance, rtol=tolerance)
            np.testing.assert_array_equal(tokens.hit, hit)
        if wanted[row] == Detail.MOMENTS:
            np.testing.assert_allclose(tokens.mu, mu, atol=tolerance, rtol=tolerance)
            np.testing.assert_allclose(tokens.sigma2, sigma2, atol=tolerance, rtol=tolerance)
        elif tokens is not None:
            assert tokens.mu is None
            assert tokens.sigma2 is None


@pytest.mark.parametrize("batch_tokens", [1, 20, 64, 4096])
def test_every_number_is_the_plain_one(batch_tokens):
    """Float32 to 1e-5, and a model in float64 to 1e-9, whatever the batches."""
    model, rows = tiny_llama().eval(), made_rows()
    check(model, rows, 1e-5, batch_tokens=batch_tokens)
    check(copy.deepcopy(model).double(), rows, 1e-9, batch_tokens=batch_tokens)


def test_order_company_and_detail_of_the_others_move_nothing():
    """Each row alone, all rows backwards, and details mixed within a batch: the same numbers."""
    model, rows = tiny_llama().double().eval(), made_rows()
    for row in rows:
        check(model, [row], 1e-9)
    check(model, rows[::-1], 1e-9, pad_id=7)
    for turn in range(3):
        check(model, rows, 1e-9, wanted={row: Detail((i + turn) % 3) for i, row in enumerate(rows)})


def test_moments_are_not_paid_for_rows_of_losses(monkeypatch):
    """One row of MOMENTS among many of LOSS: the others' contexts are asked for a loss alone."""
    from fedunlearn.evals import scoring

    model, rows, seen = tiny_llama(), made_rows(), []
    monkeypatch.setattr(
        scoring, "score_contexts", lambda logits, detail, real=scoring.score_contexts: seen.append(detail) or real(logits, detail)
    )  # fmt: skip
    score_rows(
        model, {row: Detail.MOMENTS if row == rows[0] else Detail.LOSS for row in rows}, pad_id=0, batch_tokens=4096
    )
    assert sum(int((detail == Detail.MOMENTS).sum()) for detail in seen) == rows[0].num_labels


def test_what_rows_share_is_run_once():
    model, rows, seen = tiny_llama(), made_rows(), []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    score_rows(model, dict.fromkeys(rows, Detail.LOSS), pad_id=0, batch_tokens=4096)
    hook.remove()
    # Each id is one of 263 drawn at random, so a count of places tells how often what rows share was run.
    paths = {row.input_ids[:end] for row in rows for end in range(1, len(row.input_ids))}
    assert len(paths) <= sum(ids.numel() for ids in seen) < 0.75 * sum(len(row.input_ids) for row in rows)


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (Qwen2Config(**SMALL), "sdpa"),
        (Qwen2Config(**SMALL), "eager"),
        (Gemma2Config(**SMALL, head_dim=8), "eager"),
        (GPT2Config(**GPT2_SMALL), "sdpa"),
        (MistralConfig(**SMALL), "sdpa"),
    ],
    ids=lambda case: getattr(case, "model_type", case),
)
def test_other_architectures_share_too(config, attention):
    """Biases, soft caps of the logits and alternating windows that no row reaches, learned positions, a window of 4096.

    Eager attention takes its softmax in float32 whatever the model's dtype, and rounds by what stands beside a row.
    """
    model = made_model(config, attention).double()
    assert takes_block_mask(model, 40)
    check(model, made_rows(), 1e-9 if attention == "sdpa" else 1e-5)


def test_a_window_that_rows_reach_stays_right():
    model = made_model(MistralConfig(**SMALL, sliding_window=6)).double()
    assert not takes_block_mask(model, 7)
    check(model, made_rows(), 1e-9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_adapter_with_a_side_car_acts_at_every_node(attention):
    from peft import LoraConfig, get_peft_model

    from fedunlearn.models.sidecar import put_sidecar

    torch.manual_seed(0)
    base = tiny_llama()
    base.set_attn_implementation(attention)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    rows = made_rows()
    without = score_rows(model, dict.fromkeys(rows, Detail.LOSS), pad_id=0, batch_tokens=4096)
    path = "base_model.model.model.layers.1.self_attn.q_proj"
    put_sidecar(
        model,
        {f"{path}.lora_A.weight": torch.randn(3, 32), f"{path}.lora_B.weight": torch.randn(32, 3)},
        "default",
    )
    assert takes_block_mask(model, 40)
    check(model, rows, 1e-5)
    assert score_rows(model, dict.fromkeys(rows, Detail.LOSS), pad_id=0, batch_tokens=4096) != without


@needs_shared
def test_stories260k_whose_prompts_are_not_what_rows_share():
    """The blank that ends "Answer: " merges with the first word of half the answers: their ids do not begin with the prompt's."""
    from transformers import AutoTokenizer

    folder = SHARED / "models" / "stories260K"
    chat = ChatFormat(AutoTokenizer.from_pretrained(folder), PHI_ARGS, 512)
    asked = [
        (row.question, answer)
        for row in load_tofu(str(SHARED / "tofu")).perturbed("retain")[:6]
        for answer in (row.answer, row.paraphrased_answer, *row.perturbed_answers)
    ]
    rows = [chat.encode(question, answer, "retain") for question, answer in asked]
    merged = [
        row.input_ids[: row.num_prompt] != chat.prompt(question) for row, (question, _) in zip(rows, asked, strict=True)
    ]
    assert 0.2 < sum(merged) / len(merged) < 0.8
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    check(model, list(dict.fromkeys(rows)), 1e-5, batch_tokens=2048)
    check(model.double(), list(dict.fromkeys(rows)), 1e-9)
