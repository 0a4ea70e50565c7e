"""A client's work over two processes: the same adapter as one process, shards of the base only, one clear error where a process is lost."""

import os
import signal
import time

import psutil
import pytest
import torch
from helpers_training import EVERY, FORGET, GRADIENT, RETAIN, flat, made_model, name_of, train_args, with_alternates

from fedunlearn.config.data import CollatorConfig
from fedunlearn.config.parallel import ParallelArgs
from fedunlearn.errors import UserError
from fedunlearn.methods.dpo import DPO
from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.methods.npo import NPO
from fedunlearn.methods.rmu import RMU
from fedunlearn.models.adapter_tensors import ACTIVE
from fedunlearn.models.lora import hold_reference
from fedunlearn.models.ranks import scaled_for
from fedunlearn.models.sidecar import put_sidecar
from fedunlearn.records.adapter import Weights
from fedunlearn.records.rounds import ClientTask, Role
from fedunlearn.records.shape import ClientShape
from fedunlearn.training.client_update import client_update
from fedunlearn.training.local import LocalSettings
from fedunlearn.training.parallel.group import GroupError
from fedunlearn.training.parallel.team import Team
from fedunlearn.training.reference import row_sums_of

METHODS = [
    pytest.param(None, 3, id="finetune"),
    pytest.param(None, 1, id="finetune, one process with nothing to do"),
    pytest.param(NPO(), 3, id="npo"),
    pytest.param(GradDiff(retain="kl"), 3, id="grad_diff kl"),
    pytest.param(DPO(), 3, id="dpo"),
    pytest.param(RMU(layer=0), 3, id="rmu"),
]


@pytest.fixture(scope="module")
def made():
    """A tiny Llama, and a reference beside the adapter that is not the start."""
    model = made_model()
    hold_reference(model.model, Weights({n: 0.5 * t for n, t in model.start.tensors.items()}))
    return model


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("teams")


@pytest.fixture(scope="module")
def team(made, scratch):
    """Two processes, started by the first test that asks them for something."""
    team = Team(made, ParallelArgs(kind="fsdp", processes=2), device="cpu", timeout=120.0, scratch=scratch)
    yield team
    team.close()


def work(made, carry_out, method=None, batch=3, mu=0.0, **args):
    """Two epochs, two micro-batches a step, AdamW at 1e-3."""
    settings = LocalSettings(
        args=train_args(**{"gradient_accumulation_steps": 2, "per_device_train_batch_size": batch, **args}),
        collator=CollatorConfig(),
        method=method,
    )
    role, memory = (Role.UNLEARN, method.memory()) if method else (Role.FINETUNE, {})
    task = ClientTask(client_id=1, role=role, epochs=2, lr_scale=1.0, seed=7, memory=memory, mu=mu)
    return client_update(made, made.start.tensors, with_alternates(), task, settings, carry_out)


def away(first, second):
    """The largest difference of two results' adapters."""
    return float((flat(first.tensors) - flat(second.tensors)).abs().max())


@pytest.mark.parametrize(("method", "batch"), METHODS)
def test_two_processes_give_the_adapter_of_one(made, team, method, batch):
    together, alone = work(made, team.carry_out, method, batch), work(made, None, method, batch)
    assert away(together, alone) < 1e-5
    assert float((flat(alone.tensors) - flat(made.start.tensors)).abs().max()) > 1e-3
    assert together.loss == pytest.approx(alone.loss, abs=1e-4, rel=1e-5)
    for count in ("num_trained", "num_steps", "num_tokens", "num_reference_tokens", "stopped"):
        assert getattr(together, count) == getattr(alone, count), count


@pytest.mark.parametrize("method", EVERY, ids=name_of)
def test_every_methods_gradient_is_that_of_one_process(made, team, method):
    """To 5e-6 of its largest entry, one step by SGD: rows are summed in another order. Adam divides by what may be rounding itself, and makes up to 1e-4 of it."""
    whole = {**GRADIENT, "gradient_accumulation_steps": 1}
    together, alone = work(made, team.carry_out, method, 8, **whole), work(made, None, method, 8, **whole)
    start = flat(made.start.tensors)
    found, wanted = flat(together.tensors) - start, flat(alone.tensors) - start
    assert float((found - wanted).abs().max()) < 5e-6 * float(wanted.abs().max())


def test_clipping_and_the_proximal_term_see_the_whole_gradient(made, team):
    args = {"mu": 0.5, "max_grad_norm": 0.01, "optim": "sgd", "learning_rate": 10.0}
    assert away(work(made, team.carry_out, **args), work(made, None, **args)) < 1e-5


def test_side_car_and_own_scale_of_a_client_reach_the_processes(made, team):
    beside = {name: 0.3 * torch.randn(tensor.shape) for name, tensor in made.start.tensors.items()}
    plain = work(made, None)
    put_sidecar(made.model, beside, ACTIVE)
    try:
        with scaled_for(made.model, ClientShape(rank=1, lora_alpha=7.0)):
            together, alone = work(made, team.carry_out), work(made, None)
    finally:
        put_sidecar(made.model, {}, ACTIVE)
    assert away(together, alone) < 1e-5 < away(plain, alone)
    assert away(work(made, team.carry_out), plain) < 1e-5  # and it is gone again


def test_the_base_lies_in_shards_and_the_adapter_is_whole(made, team):
    """Every byte of the base is in one shard (rows do not divide evenly, so one may hold more); both adapters stand on each process."""
    work(made, team.carry_out)
    adapter = sum(tensor.numel() for tensor in made.start.tensors.values()) * 4
    base = sum(p.numel() * 4 for name, p in made.model.named_parameters() if "lora_" not in name)
    assert sum(held["shards"] for held in team.held) == base
    assert all(held["shards"] < 0.55 * base for held in team.held)
    assert [held["whole"] for held in team.held] == [2 * adapter, 2 * adapter]
    assert all(held["largest"] < base / 3 for held in team.held)


def test_reference_sums_come_from_the_processes(made, team):
    """An odd number of rows: one process has one less than the other."""
    asked = (*FORGET, *RETAIN)
    found = team.sums_of(made, asked, False)
    with torch.no_grad():
        assert torch.allclose(found, row_sums_of(made, asked, False), atol=1e-4)


def test_nothing_is_left_of_what_the_start_wrote(team, scratch, made):
    work(made, team.carry_out)
    assert list(scratch.iterdir()) == []


def test_what_is_refused_there_is_refused_here(made, team):
    with pytest.raises(UserError, match=r"method\.layer=9 of RMU: the model has blocks 0 to 1"):
        work(made, team.carry_out, RMU(layer=9))
    assert away(work(made, team.carry_out), work(made, None)) < 1e-5  # others were started


def alive(pids):
    """Which of the processes still run."""
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_a_process_that_dies_ends_the_task_and_all_the_others(made, team):
    work(made, team.carry_out)
    pids = team.group.pids
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(GroupError, match=r"process 1 died \(signal SIGKILL\)|cannot be reached"):
        work(made, team.carry_out)
    assert alive(pids) == []


def test_a_process_that_hangs_ends_the_task_at_the_deadline(made, team):
    work(made, team.carry_out)
    pids = team.group.pids
    os.kill(pids[1], signal.SIGSTOP)
    team.group.timeout, usual = 3.0, team.group.timeout
    try:
        with pytest.raises(GroupError, match=r"processes \[0, 1\] of 2 did not answer within 3 s"):
            work(made, team.carry_out)
    finally:
        team.group.timeout = usual
    assert alive(pids) == []


def test_processes_end_with_the_client_that_started_them(made, team):
    """Its end of the sockets closes, as it does when a process is killed."""
    work(made, team.carry_out)
    processes = [one.process for one in team.group._processes]
    for one in team.group._processes:
        one.pipe.close()
    deadline = time.monotonic() + 120
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [process.poll() for process in processes] == [-signal.SIGKILL] * 2
