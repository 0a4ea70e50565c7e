"""DeepSpeed's ZeRO-2: the configuration that is composed, and where DeepSpeed is, the adapter of one process."""

import importlib.util
import os

import pytest
import torch
from accelerate import Accelerator
from helpers_training import flat, made_model, train_args
from test_team import work

from fedunlearn.config.parallel import ParallelArgs
from fedunlearn.errors import UserError
from fedunlearn.methods.npo import NPO
from fedunlearn.training.parallel.team import Team, check_team
from fedunlearn.training.parallel.zero import Zero, check_deepspeed, tell_numbers, zero_config

there = importlib.util.find_spec("deepspeed") is not None


def test_the_configuration_says_what_the_loop_does():
    """Steps and clipping as TrainArgs says, no accumulation of its own, no optimiser of its own."""
    config = zero_config(train_args(per_device_train_batch_size=3, gradient_accumulation_steps=4, max_grad_norm=0.5), 4)
    assert config["zero_optimization"]["stage"] == 2
    assert (config["train_micro_batch_size_per_gpu"], config["train_batch_size"]) == (3, 12)
    assert (config["gradient_accumulation_steps"], config["managed_gradient_accumulation"]) == (1, False)
    assert config["gradient_clipping"] == 0.5
    assert not {"optimizer", "scheduler", "fp16", "bf16"} & set(config)


def test_accelerate_takes_the_configuration():
    """Its plugin, which reads and completes it; this much of it runs without DeepSpeed."""
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    read = HfDeepSpeedConfig(zero_config(train_args(), 2))
    assert (read.is_zero2(), read.is_zero3(), read.is_offload()) == (True, False, False)


def test_each_process_is_told_its_place():
    told = {}
    tell_numbers(told, 1, 4)
    assert {name: told[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} == {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}  # fmt: skip


def test_without_devices_it_is_refused():
    with pytest.raises(UserError, match=r"deepspeed needs CUDA devices.*choose trainer\.parallel=fsdp"):
        check_team(made_model(), ParallelArgs(kind="deepspeed"), torch.device("cpu"))


@pytest.mark.skipif(there, reason="DeepSpeed is installed")
def test_without_deepspeed_it_is_refused():
    with pytest.raises(UserError, match=r"DeepSpeed, and it is not installed: pip install 'deepspeed>=0\.19\.0'"):
        check_deepspeed()


@pytest.mark.gpu
@pytest.mark.skipif(not there, reason="DeepSpeed is not installed")
def test_two_processes_give_the_adapter_of_one(tmp_path):
    """On two devices where there are two; DS_ACCELERATOR=cpu lets it run over gloo. Two tasks after one another, each with a fresh engine."""
    made, device = made_model(), "cuda" if torch.cuda.device_count() > 1 else "cpu"
    team = Team(made, ParallelArgs(kind="deepspeed", processes=2), device=device, timeout=400.0, scratch=tmp_path)
    try:
        for method in (None, NPO()):
            together, alone = work(made, team.carry_out, method), work(made, None, method)
            assert float((flat(together.tensors) - flat(alone.tensors)).abs().max()) < 1e-5
    finally:
        team.close()


def test_a_task_leaves_nothing_in_accelerate_s_lists(monkeypatch):
    """Accelerate's own accounts, over its own prepare; without DeepSpeed no engine comes of it, which is refused after it is listed."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    zero = Zero(0, 1, torch.device("cpu"))
    zero._accelerator = accelerator
    for _ in range(3):
        model = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match="made a Linear and no DeepSpeed engine"):
            zero.begin(model, torch.optim.SGD(model.parameters(), lr=0.1), train_args())
        assert [accelerator._models, len(accelerator._optimizers)] == [[model], 1]
    accelerator.free_memory()
