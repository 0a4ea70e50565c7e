"""Greedy decoding that lets finished rows go, against transformers' generate() on the same batch."""

import pytest
import torch
from helpers_eval import tiny_llama
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MistralConfig, Qwen2Config

from fedunlearn.evals.greedy import continue_greedily, is_plainly_greedy

SMALL = {
    "vocab_size": 266,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = [
    Qwen2Config(**SMALL),
    MistralConfig(**SMALL, sliding_window=7),
    Gemma2Config(**SMALL, head_dim=8, sliding_window=7),
    GPT2Config(bos_token_id=1, eos_token_id=2, vocab_size=266, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
]


def batch():
    draw = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(3, 266, (6, 14), generator=draw), torch.ones(6, 14, dtype=torch.int64)
    for i in range(6):
        ids[i, :i], mask[i, :i] = 0, 0
    return ids, mask


def settle(model, eos, **settings):
    config = model.generation_config
    config.max_new_tokens, config.pad_token_id, config.eos_token_id = 25, 0, eos
    for name, value in settings.items():
        setattr(config, name, value)
    return model.eval()


def theirs(model, ids, mask, eos):
    """generate()'s new ids, each row cut after its first eos."""
    rows = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in eos), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@pytest.mark.parametrize("penalty", [None, 1.3])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_rows_are_generates_rows(config, penalty):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    ids, mask = batch()
    free = theirs(settle(model, None, repetition_penalty=penalty), ids, mask, [])
    # Tokens that three rows come to sooner and later: each row then ends where it first meets one.
    eos = [free[0][3], free[2][9], free[4][17]]
    settle(model, eos)
    assert is_plainly_greedy(model)
    with torch.no_grad():
        found = continue_greedily(model, ids, mask, frozenset(eos))
    assert found == theirs(model, ids, mask, eos)
    assert len({len(row) for row in found}) > 1


def test_finished_rows_leave_and_the_last_ends_the_batch():
    model = settle(tiny_llama(), list(range(60, 90)))
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with torch.no_grad():
        found = continue_greedily(model, *batch(), frozenset(range(60, 90)))
    hook.remove()
    lengths = [len(row) for row in found]
    assert sizes == [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert sizes[-1] < sizes[0] == 6


def test_no_eos_runs_to_the_limit():
    model = settle(tiny_llama(), None)
    with torch.no_grad():
        found = continue_greedily(model, *batch(), frozenset())
    assert [len(row) for row in found] == [25] * 6


@pytest.mark.parametrize(
    "settings",
    [{"do_sample": True}, {"num_beams": 2}, {"suppress_tokens": [5]}, {"min_new_tokens": 3}, {"cache_implementation": "static"}],
)  # fmt: skip
def test_other_settings_are_left_to_generate(settings):
    model = settle(tiny_llama(), 2)
    assert is_plainly_greedy(model)
    assert not is_plainly_greedy(settle(model, 2, **settings))
