"""Clients of their own rank and scale in whole runs."""

import pytest
from helpers_runs import adapter_bytes, finetune, unlearn

from fedunlearn.models.resident import release

RANKS = ("aggregation=hetlora", "partition.ranks=[4,2,1,3]", "partition.lora_alphas=[8,2,16,1]")


@pytest.fixture(scope="module")
def tuned(pocket, tmp_path_factory):
    """A run whose clients had ranks of their own already."""
    return finetune(pocket, tmp_path_factory.mktemp("tuned"), "ft", *RANKS)


@pytest.mark.parametrize("retain", ["nll", "kl"])
def test_a_model_that_has_worked_before_gives_the_same_as_one_just_loaded(pocket, saves, tuned, retain):
    """The second adapter that KL wants is made by the first client that needs one: it must act with that client's scale too."""
    release()
    first = unlearn(pocket, saves, tuned, "first", f"method.retain={retain}", *RANKS)
    again = unlearn(pocket, saves, tuned, "again", f"method.retain={retain}", *RANKS)
    assert adapter_bytes(first) == adapter_bytes(again)
