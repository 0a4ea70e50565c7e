"""The base's training: what carries a loss, which rows a step sees, and that a seed settles the weights."""

import itertools
import random

import pytest
import torch

from fedunlearn.data.pocket.pretrain import (
    BaseRecipe,
    EncodedPair,
    batch_loss,
    collate,
    encode,
    lr_factor,
    new_model,
    plan_batches,
    pretrain_base,
)
from fedunlearn.data.pocket.tokenizer import train_tokenizer
from fedunlearn.data.pocket.world import Pair, WorldSize, make_world

TEXT = make_world(0, WorldSize(num_crowd=5, num_known=3, num_facts=4)).pretraining
TINY = BaseRecipe(
    vocab_size=400,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    steps=6,
    warmup_steps=2,
    known_rows=3,
    crowd_rows=2,
    fact_rows=1,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT.sentences(), TINY.vocab_size)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return new_model(tokenizer, TINY).eval()


def rows(*lengths):
    return [EncodedPair(tuple(range(1, length + 1)), 2) for length in lengths]


def test_encoding_splits_prompt_and_answer(tokenizer):
    (row,) = encode(tokenizer, [Pair("Who?", "The hero is Ada.")])
    assert tokenizer.decode(row.ids[: row.prompt_length]).endswith("<|end_header_id|>\n\n")
    assert tokenizer.decode(row.ids[row.prompt_length :]) == "The hero is Ada.<|eot_id|>"


def test_collate_marks_the_answers_tokens_one_place_earlier():
    """Prompt 1 2, answer 3 4: position 1 (the prompt's last) is to say 3, position 2 is to say 4."""
    batch = collate([EncodedPair((1, 2, 3, 4), 2), EncodedPair((1, 2, 5), 2)], pad=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 5, 0]]
    assert batch.targets.tolist() == [[-100, 3, 4, -100], [-100, 5, -100, -100]]


def test_the_loss_is_the_mean_over_answer_tokens(model):
    """Against the whole vocabulary projection: tokens 3, 4 of the first row and 5 of the second, a third each."""
    batch = collate([EncodedPair((1, 2, 3, 4), 2), EncodedPair((1, 2, 5), 2)], pad=0)
    log_probs = model(input_ids=batch.input_ids).logits.log_softmax(-1)
    expected = -(log_probs[0, 1, 3] + log_probs[0, 2, 4] + log_probs[1, 1, 5]) / 3
    assert batch_loss(model, batch).item() == pytest.approx(expected.item(), abs=1e-6)


def test_padding_does_not_change_the_loss(model):
    row = EncodedPair((1, 2, 3, 4), 2)
    alone = batch_loss(model, collate([row], pad=0))
    padded = collate([row, EncodedPair((1,) * 12, 11)], pad=0)
    padded.targets[1] = -100
    assert batch_loss(model, padded).item() == pytest.approx(alone.item(), abs=1e-6)


def test_every_four_steps_hold_the_rows_that_the_recipe_names():
    kinds = [[EncodedPair((kind, *range(length)), 1) for length in range(2, 9)] for kind in (100, 200, 300)]
    plan = plan_batches(kinds, TINY, random.Random(0))
    assert [len(step) for step in plan] == [6] * 6
    drawn = [row.ids[0] for step in plan[:4] for row in step]
    assert (drawn.count(100), drawn.count(200), drawn.count(300)) == (12, 8, 4)


def test_rows_of_a_step_are_of_like_length():
    kinds = [rows(*range(5, 40))] * 3
    plan = plan_batches(kinds, TINY, random.Random(0))[:4]
    lengths = sorted([[len(row.ids) for row in step] for step in plan], key=min)
    assert all(max(shorter) <= min(longer) for shorter, longer in itertools.pairwise(lengths))


def test_the_learning_rate_rises_then_falls_to_its_share():
    """Warm-up of 2: 1/2, 1; half of the cosine over the 4 steps left: 0.51 = 0.02 + 0.98 / 2."""
    factors = [lr_factor(step, TINY) for step in (0, 1, 2, 4, 6)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.51, 0.02], abs=1e-6)


def test_a_step_has_the_rows_of_all_kinds():
    assert TINY.rows == 6


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tokenizer):
    first, again, other = (pretrain_base(TEXT, tokenizer, TINY, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_global_random_state_is_left_as_it_was(tokenizer):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    pretrain_base(TEXT, tokenizer, TINY, 0)
    assert torch.equal(torch.rand(3), expected)


def test_training_lowers_the_loss(tokenizer, model):
    trained = pretrain_base(TEXT, tokenizer, BaseRecipe(**{**vars(TINY), "steps": 60}), 0)
    batch = collate(encode(tokenizer, TEXT.facts), tokenizer.pad_token_id)
    with torch.no_grad():
        assert batch_loss(trained, batch).item() < batch_loss(model, batch).item() - 1.0


def test_the_model_stops_at_the_closing_token_and_ties_its_embeddings(tokenizer, model):
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.lm_head.weight is model.model.embed_tokens.weight
