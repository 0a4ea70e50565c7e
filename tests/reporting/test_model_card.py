"""A model card tells what made the adapter: a federation, or the central baseline, which had none."""

import pytest
import torch

from fedunlearn.records.adapter import Adapter
from fedunlearn.reporting.model_card import Card, card_text

ADAPTER = Adapter({"base_model.model.q.lora_A.weight": torch.ones(1, 2), "base_model.model.q.lora_B.weight": torch.ones(3, 1)}, {"peft_type": "LORA", "r": 1}, "print")  # fmt: skip
RUN = {
    "trainer": {"federated": {"num_clients": 4, "num_rounds": 3}, "args": {"learning_rate": 1e-3}},
    "strategy": {"_target_": "fedunlearn.aggregation.fedavg.FedAvg"},
    "protocol": {"_target_": "fedunlearn.protocols.in_round.InRound"},
    "aggregation": {"reducer": "factors"},
    "forget_split": "forget10",
}
COST = {"num_steps": 3, "num_tokens": 5, "num_reference_tokens": 0, "seconds": 1.0}


def lines(**run):
    return card_text(Card(name="x", adapter=ADAPTER, run={**RUN, **run}, account=COST)).splitlines()


@pytest.mark.parametrize("mode", ["train", "unlearn"])
def test_a_central_baseline_s_card_tells_of_no_federation(mode):
    told = lines(door="central", mode=mode)
    assert ("- machine-unlearning" in told) == (mode == "unlearn")
    assert "- federated-learning" not in told
    assert "- lora" in told
    assert not [
        line for line in told if line.startswith(("| clients", "| rounds", "| protocol", "| strategy", "| agg"))
    ]
    assert not [line for line in told if "clients" in line]
    assert {"| forget_split | forget10 |", "| learning_rate | 0.001 |"} <= set(told)


@pytest.mark.parametrize("mode", ["train", "unlearn"])
def test_a_federation_s_card_tells_of_it(mode):
    told = lines(mode=mode)
    assert ("- machine-unlearning" in told) == (mode == "unlearn")
    assert "- federated-learning" in told
    assert {
        "| clients | 4 |",
        "| rounds | 3 |",
        "| strategy | FedAvg |",
        "| protocol | InRound |",
        "| aggregation | factors |",
    } <= set(told)


def test_a_foreign_adapter_s_card_tells_of_neither():
    told = card_text(Card(name="x", adapter=ADAPTER)).splitlines()
    assert "- lora" in told
    assert not {"- federated-learning", "- machine-unlearning"} & set(told)
