"""Every name of transformers' TrainingArguments is honoured or refused by name."""

import inspect
from dataclasses import fields

import pytest
from peft.optimizers import create_loraplus_optimizer
from transformers import TrainingArguments

from fedunlearn.config.refused import REFUSED
from fedunlearn.config.trainer import TrainArgs

THEIRS = sorted(field.name for field in fields(TrainingArguments))
OURS = {field.name for field in fields(TrainArgs)}


@pytest.mark.parametrize("name", THEIRS)
def test_each_of_their_names_is_honoured_or_refused(name):
    assert (name in OURS) != (name in REFUSED)


def test_a_refusal_says_why_and_what_to_do():
    assert all(len(reason.split(": ", 1)) == 2 or reason.startswith("set ") for reason in REFUSED.values())


def test_our_own_names_are_theirs_but_for_the_epochs_of_warm_up_and_peft_s_ratio():
    assert OURS - set(THEIRS) == {"warmup_epochs", "loraplus_lr_ratio"}
    assert "loraplus_lr_ratio" in inspect.signature(create_loraplus_optimizer).parameters


def test_names_of_older_releases_are_refused_with_the_new_one():
    assert "warmup_steps" in REFUSED["warmup_ratio"]
    assert "device=cpu" in REFUSED["no_cuda"]
    assert "eval." in REFUSED["evaluation_strategy"]
