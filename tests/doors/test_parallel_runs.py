"""Whole federations whose clients are two processes each: the adapter of clients that are one."""

import pytest
from helpers_runs import adapter_tensors, finetune, history, tiny, unlearn

from fedunlearn.doors.stages import run_federated
from fedunlearn.errors import UserError
from fedunlearn.federation.site import Site

PROCESSES = "trainer.parallel={kind:fsdp,processes:2}"
ISOLATED = ("launcher.isolate=true", "trainer.federated.round_timeout=300")
TWO = ("trainer.federated.num_clients=2", "trainer.args.per_device_train_batch_size=4")


def away(one, other):
    """The largest difference of two runs' adapters."""
    first, second = adapter_tensors(one), adapter_tensors(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.slow
def test_two_rounds_of_finetuning_and_two_of_unlearning_give_the_same_adapter(pocket, saves):
    """AdamW, two clients; both unlearnings start from the adapter of the one fine-tuning, one of them in a worker of its own."""
    whole, split = finetune(pocket, saves, "whole", *TWO), finetune(pocket, saves, "split", *TWO, PROCESSES)
    assert away(split, whole) < 1e-5
    forgot, forgot_split = (
        unlearn(pocket, saves, whole, name, *TWO, *said) for name, said in (("uw", ()), ("us", (PROCESSES, *ISOLATED)))
    )
    assert away(forgot_split, forgot) < 1e-5 < away(forgot, whole)
    assert len(history(split)) == len(history(whole)) == 2
    assert list((saves / "cache" / "teams").iterdir()) == []


@pytest.mark.slow
def test_a_preset_gives_the_same_adapter_without_its_dropout(pocket, saves):
    """lora=fast: its targets, rank and alpha. Dropout draws in each process for its own rows, so it is set to 0 for the comparison."""
    said = (*TWO, "lora=fast", "model.model_args.lora_config.lora_dropout=0.0")
    whole, split = finetune(pocket, saves, "whole", *said), finetune(pocket, saves, "split", *said, PROCESSES)
    assert away(split, whole) < 1e-5
    assert {name.split(".")[-3] for name in adapter_tensors(split)} == {"q_proj", "v_proj"}


def test_what_a_machine_cannot_do_is_told_before_a_round(pocket, saves):
    """Where the server is, and at a client's roll call, whose machine may be another."""
    run = tiny(pocket, saves, "finetune", "ds", *TWO, "trainer.parallel=deepspeed", "model.model_args.device=cpu")
    said = r"parallel=deepspeed needs CUDA devices.*choose trainer\.parallel=fsdp"
    with pytest.raises(UserError, match=said):
        run_federated(run)
    with pytest.raises(UserError, match=said):
        Site(run.run).check_able()
    assert not (saves / "finetune" / "ds" / "adapter").exists()
