"""Partitions, rounds and evaluation records: what they promise by themselves."""

import hashlib
from dataclasses import replace

import pytest

from fedunlearn.records.evaluation import AnswerScore, Generations, MetricResult, ScoreTable, definition_of
from fedunlearn.records.partition import Partition
from fedunlearn.records.rounds import ClientTask, Role, Trained
from fedunlearn.records.shape import ClientShape, lora_scale

PARTITION = Partition(
    clients=((0, 1), (2, 3)), rows_per_author=2, data_hash="data", scheme={"name": "ByAuthor", "seed": None}
)
SCORE = AnswerScore(0.5, 0.6, 3)


def test_a_partition_s_hash_by_hand():
    """sha256 of the JSON text of owners, author size and data hash."""
    text = b'[[[0, 1], [2, 3]], 2, "data"]'
    assert PARTITION.hash == hashlib.sha256(text).hexdigest()
    assert PARTITION.num_clients == 2


def test_a_partition_s_hash_sees_who_owns_what_in_which_data_and_not_the_scheme():
    assert replace(PARTITION, scheme={"name": "RoundRobin"}).hash == PARTITION.hash
    assert replace(PARTITION, clients=((2, 3), (0, 1))).hash != PARTITION.hash
    assert replace(PARTITION, clients=((1, 0), (2, 3))).hash != PARTITION.hash
    assert replace(PARTITION, clients=((0, 1, 2, 3),)).hash != PARTITION.hash
    assert replace(PARTITION, rows_per_author=1).hash != PARTITION.hash
    assert replace(PARTITION, data_hash="other").hash != PARTITION.hash


def test_roles_travel_as_their_words():
    assert [Role(word) for word in ("finetune", "unlearn", "idle")] == [Role.FINETUNE, Role.UNLEARN, Role.IDLE]
    with pytest.raises(ValueError, match="'repair' is not a valid Role"):
        Role("repair")


def test_the_definition_in_force_is_named():
    assert definition_of(None) == "log-space"
    assert definition_of("open-unlearning") == "open-unlearning"


def test_tables_of_unequal_lengths_are_our_own_fault():
    assert not ScoreTable(plain=(SCORE,)).compares
    for part in ({"perturbed": ((),)}, {"paraphrased": (SCORE,)}, {"gradnorms": (1.0,)}, {"label_texts": ("a",)}):
        with pytest.raises(AssertionError, match="one entry for every row, or none"):
            ScoreTable(plain=(SCORE, SCORE), **part)
    with pytest.raises(AssertionError, match="three texts a row"):
        Generations(inputs=("a",), ground_truths=("b",), generations=())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_no_metric_holds_nan_or_infinity(bad):
    for make in (
        lambda: MetricResult(bad, "log-space"),
        lambda: MetricResult(0.0, "log-space", ({"prob": bad},)),
        lambda: MetricResult(0.0, "log-space", ({"prob": 1.0}, {"losses": (0.0, bad)})),
    ):
        with pytest.raises(ValueError, match="a metric holds NaN or infinity"):
            make()


def test_a_metric_without_aggregate_is_allowed_and_columns_are_read_by_name():
    result = MetricResult(None, "log-space", ({"prob": 0.5, "text": "words"}, {"prob": 0.25, "text": "more"}))
    assert result.column("prob") == (0.5, 0.25)
    with pytest.raises(KeyError, match="score"):
        result.column("score")
    with pytest.raises(ValueError, match="words"):
        result.column("text")


def test_a_column_of_lists_is_no_number():
    with pytest.raises(ValueError, match="losses"):
        MetricResult(None, "log-space", ({"losses": (1.0, 2.0)},)).column("losses")


def test_trained_factors_travel_as_their_words_and_cover_their_tensors():
    names = ["base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight"]
    assert {Trained(word): [Trained(word).covers(name) for name in names] for word in ("both", "a", "b")} == {
        Trained.BOTH: [True, True],
        Trained.A: [True, False],
        Trained.B: [False, True],
    }
    with pytest.raises(ValueError, match="'alternate' is not a valid Trained"):
        Trained("alternate")


def test_a_task_without_more_trains_both_factors_and_has_no_proximal_term():
    task = ClientTask(client_id=0, role=Role.FINETUNE, epochs=1.0, lr_scale=1.0, seed=0)
    assert (task.mu, task.trained) == (0.0, Trained.BOTH)


def test_scales_by_hand():
    """alpha / r = 16 / 4 = 4; with rsLoRA alpha / sqrt(r) = 16 / 2 = 8."""
    assert ClientShape(rank=4, lora_alpha=16.0).scale == lora_scale(16.0, 4, False) == 4.0
    assert ClientShape(rank=4, lora_alpha=16.0, use_rslora=True).scale == lora_scale(16.0, 4, True) == 8.0
