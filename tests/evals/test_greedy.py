"""Greedy decoding that lets finished rows go, against transformers' generate() on the same batch."""

import pytest
import torch
from helpers_eval import SMALL, tiny_llama
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MistralConfig, Qwen2Config

from fedunlearn.evals.greedy import Decoder, is_plainly_greedy

CONFIGS = [
    Qwen2Config(**SMALL),
    MistralConfig(**SMALL, sliding_window=7),
    Gemma2Config(**SMALL, head_dim=8, sliding_window=7),
    GPT2Config(bos_token_id=1, eos_token_id=2, vocab_size=266, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
]


def drawn_prompts():
    draw = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(3, 266, (14 - i % 9,), generator=draw).tolist()) for i in range(14)]


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def decoded(model, eos, prompts, batch_size, limit=25):
    decoder = Decoder(model, padded, frozenset(eos), limit, model.generation_config.repetition_penalty or 1.0)
    with torch.no_grad():
        found = list(decoder.run(prompts, batch_size))
    assert sorted(place for place, _ in found) == list(range(len(prompts)))
    return [list(ids) for _, ids in sorted(found)]


def settle(model, eos, **settings):
    config = model.generation_config
    config.max_new_tokens, config.pad_token_id, config.eos_token_id = 25, 0, eos
    for name, value in settings.items():
        setattr(config, name, value)
    return model.eval()


def theirs(model, prompts, eos):
    """generate()'s new ids, each row cut after its first eos."""
    ids, mask = padded(prompts)
    rows = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in eos), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@pytest.mark.parametrize("penalty", [None, 1.3])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_rows_are_generates_rows_whatever_the_batch(config, penalty):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    prompts = drawn_prompts()
    free = theirs(settle(model, None, repetition_penalty=penalty), prompts, [])
    # Tokens that rows come to sooner and later: each row then ends where it first meets one.
    eos = [free[0][3], free[2][9], free[4][17]]
    settle(model, eos)
    assert is_plainly_greedy(model)
    wanted = theirs(model, prompts, eos)
    assert len({len(row) for row in wanted}) > 1
    for batch_size in (1, 4, 6, 14, 50):
        assert decoded(model, eos, prompts, batch_size) == wanted


def test_finished_rows_leave_and_the_last_ends_the_batch():
    model, eos, sizes = settle(tiny_llama(), None), list(range(60, 90)), []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    lengths = [len(row) for row in decoded(model, eos, drawn_prompts(), 14)]
    hook.remove()
    assert sizes == [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert sizes[-1] < sizes[0] == 14


def test_waiting_prompts_take_free_places_once_a_quarter_is_free():
    """Fourteen prompts at four places: never more than four at once, and fewer passes than three batches and a half one after the other."""
    model, eos, sizes = settle(tiny_llama(), None), list(range(60, 90)), []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    lengths = [len(row) for row in decoded(model, eos, drawn_prompts(), 4)]
    hook.remove()
    assert max(size[0] for size in sizes) == 4
    assert sum(size[1] > 1 for size in sizes) > 4
    assert sum(size[0] for size in sizes) == sum(lengths)


def test_columns_that_no_row_sees_are_dropped():
    """The long prompt ends at once; the short one goes on in its own width."""
    model, widths = settle(tiny_llama(), None), []
    prompts = [tuple(range(3, 43)), (7, 8, 9)]
    end = decoded(model, [], prompts, 2, limit=1)[0]
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["attention_mask"].shape[1]), with_kwargs=True
    )
    decoded(model, end, prompts, 2, limit=4)
    hook.remove()
    assert widths == [40, 4, 5, 6]


def test_no_eos_runs_to_the_limit():
    assert [len(row) for row in decoded(settle(tiny_llama(), None), [], drawn_prompts(), 5)] == [25] * 14


@pytest.mark.parametrize(
    "settings",
    [{"do_sample": True}, {"num_beams": 2}, {"suppress_tokens": [5]}, {"min_new_tokens": 3}, {"cache_implementation": "static"}],
)  # fmt: skip
def test_other_settings_are_left_to_generate(settings):
    model = settle(tiny_llama(), 2)
    assert is_plainly_greedy(model)
    assert not is_plainly_greedy(settle(model, 2, **settings))
