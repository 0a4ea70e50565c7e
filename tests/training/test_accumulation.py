"""A whole round by micro-batches of 8, 4, 2 and 1: the same adapter, whatever the loss divides by."""

from dataclasses import replace

import pytest
import torch
from helpers_training import EVERY, flat, made_model, name_of, rows, train, with_alternates

from fedunlearn.models.lora import hold_reference
from fedunlearn.training.local import LocalData

DATA = with_alternates()
SHAPES = [{"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size} for size in (8, 4, 2, 1)]


@pytest.fixture(scope="module")
def made():
    """A float64 base; the adapters stay float32."""
    model = made_model(dtype=torch.float64)
    hold_reference(model.model, model.start.weights)
    return model


@pytest.mark.parametrize("method", [None, *EVERY], ids=lambda m: "finetune" if m is None else name_of(m))
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_the_adapter_after_a_round_is_the_same(made, method, optim):
    """Three steps each: token- and row-normalised losses divide by the step's totals, not by their micro-batch's. 12 rows for fine-tuning: a last step of four."""
    data = LocalData(forget=(), retain=rows(12, 4)) if method is None else DATA
    usual = (
        {"optim": optim, "learning_rate": 1e-3, "adam_epsilon": 1e-3}
        if optim != "sgd"
        else {"optim": optim, "learning_rate": 1e-3}
    )
    results = [train(made, method, data, epochs=2 if method is None else 3, **usual, **shape) for shape in SHAPES]
    moved = (flat(results[0].tensors) - flat(made.start.tensors)).abs().max()
    assert moved > 1e-5
    for result in results[1:]:
        assert (flat(result.tensors) - flat(results[0].tensors)).abs().max() <= 1e-6
        assert result.num_steps == results[0].num_steps == (4 if method is None else 3)


def test_dividing_by_the_micro_batch_would_show(made):
    """Rows of unequal lengths: the mean of micro-batches' means is another gradient, by far more than 1e-6."""
    data = LocalData(forget=(), retain=rows(8, 4))
    lengths = [row.num_labels for row in data.retain]
    assert len(set(lengths)) > 3
    whole = train(made, None, data, optim="sgd", learning_rate=0.1, **SHAPES[0])
    singles = [
        train(made, None, replace(data, retain=(row,)), optim="sgd", learning_rate=0.1, **SHAPES[3])
        for row in data.retain
    ]
    mean = torch.stack([flat(one.tensors) for one in singles]).mean(0)
    assert (mean - flat(whole.tensors)).abs().max() > 1e-4
