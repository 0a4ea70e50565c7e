"""Adapters that are more than pairs of factors, over two processes: DoRA, modules trained whole, trained biases, fused experts; and how all of it lies there."""

import os
import sys

import pytest
import torch
from helpers_eval import tiny_chat
from helpers_families import PROJECTIONS, TARGETS, base_of
from helpers_training import GRADIENT, flat, train_args, with_alternates
from peft import LoraConfig
from test_team import work

from fedunlearn.config.data import CollatorConfig
from fedunlearn.config.parallel import ParallelArgs
from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.methods.npo import NPO
from fedunlearn.methods.rmu import RMU
from fedunlearn.models.adapter_tensors import read_tensors, write_tensors
from fedunlearn.models.base_biases import stored_biases
from fedunlearn.models.initial import draw_fresh
from fedunlearn.models.lora import attach_lora, hold_reference
from fedunlearn.models.lora_config import plain_config
from fedunlearn.models.resident import Resident
from fedunlearn.records.adapter import Adapter, Weights
from fedunlearn.records.rounds import ClientTask, Role
from fedunlearn.training.client_update import client_update
from fedunlearn.training.local import LocalSettings
from fedunlearn.training.parallel.group import LARGE, MALLOC
from fedunlearn.training.parallel.job import Frame
from fedunlearn.training.parallel.team import ENTRY, Team

STEP = {**GRADIENT, "learning_rate": 1.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
"""One step by SGD over eight rows: the step is the gradient."""
FORMS = [
    pytest.param("llama", {"use_dora": True}, "magnitude", id="dora"),
    pytest.param("llama", {"modules_to_save": ["lm_head", "model.norm"]}, "lm_head", id="modules_to_save"),
    pytest.param("qwen2", {"bias": "lora_only"}, "bias", id="bias lora_only"),
    pytest.param("qwen2", {"bias": "all", "target_modules": ["o_proj"]}, "q_proj.bias", id="bias all"),
    pytest.param("qwen3_moe", {}, "experts.3.lora_B", id="fused experts"),
]


def resident_of(kind, dtype=torch.float32, **lora):
    """A family's tiny base, an adapter that acts, and a reference beside it that is not the start."""
    targets = TARGETS.get(kind, {"target_modules": PROJECTIONS})
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **targets, **lora})
    model = attach_lora(base_of(kind, dtype), config)
    draw_fresh(model, 0)
    generator = torch.Generator().manual_seed(3)
    start = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in read_tensors(model).items()}
    write_tensors(model, start)
    hold_reference(model, Weights({n: 0.9 * t for n, t in start.items()}))
    kept = Adapter(start, plain_config(config), "print")
    return Resident(model.eval(), tiny_chat(), "print", "a tiny base", torch.device("cpu"), kept)


def one_step(made, carry_out, method):
    """One step of one client."""
    settings = LocalSettings(args=train_args(**STEP), collator=CollatorConfig(), method=method)
    role, memory = (Role.UNLEARN, method.memory()) if method else (Role.FINETUNE, {})
    task = ClientTask(client_id=1, role=role, epochs=1, lr_scale=1.0, seed=7, memory=memory)
    return client_update(made, made.start.tensors, with_alternates(), task, settings, carry_out)


@pytest.fixture
def team_of(tmp_path):
    """Makes two processes for a model; they end with the test."""
    made = []

    def start(resident, entry=ENTRY):
        args = ParallelArgs(kind="fsdp", processes=2)
        made.append(Team(resident, args, device="cpu", timeout=120.0, scratch=tmp_path, entry=entry))
        return made[-1]

    yield start
    for team in made:
        team.close()


@pytest.mark.parametrize(("kind", "lora", "beyond"), FORMS)
def test_two_processes_give_the_adapter_of_one(team_of, kind, lora, beyond):
    """To 5e-6 of the largest change; each kind of tensor has moved. What is frozen of the biases' reference stays apart from what is trained."""
    made = resident_of(kind, **lora)
    team = team_of(made)
    for method in (None, NPO(), GradDiff(retain="kl"), RMU(layer=1)):
        together, alone = one_step(made, team.carry_out, method), one_step(made, None, method)
        moved = {n: float((t - made.start.tensors[n]).abs().max()) for n, t in alone.tensors.items()}
        assert together.tensors.keys() == alone.tensors.keys()
        assert float((flat(together.tensors) - flat(alone.tensors)).abs().max()) < 5e-6 * max(moved.values())
        acted = max(value for name, value in moved.items() if beyond in name) > 1e-4
        assert acted or (beyond == "lm_head" and isinstance(method, RMU))  # whose forward ends before the head
    assert stored_biases(made.model).keys() == {n for n, _ in made.model.named_parameters() if n.endswith("bias")}


def test_modules_of_a_16_bit_base_are_trained_in_float32_there_too(team_of):
    """As near one process as the same process is to itself with other micro-batches: 8 bits of a product are summed in another order."""
    made = resident_of("llama", torch.bfloat16, modules_to_save=["lm_head"])
    together, alone = one_step(made, team_of(made).carry_out, NPO()), one_step(made, None, NPO())
    start = flat(made.start.tensors)
    found, wanted = flat(together.tensors) - start, flat(alone.tensors) - start
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.999
    assert together.tensors["base_model.model.lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize(("kind", "lora"), [("llama", {}), ("qwen2", {"bias": "lora_only"}), ("qwen3_moe", {})])
def test_every_tensor_of_the_base_is_a_dtensor_in_two_shards(team_of, kind, lora):
    """Before a job and after it: accelerate would make DistributedDataParallel of it on the CPU, and say nothing. What is trained is whole on each."""
    made = resident_of(kind, **lora)
    team = team_of(made, "helpers_members:Looked")
    work(made, team.carry_out)
    before, after = [held["lie"] for held in team.held], [a.said for a in team.group.ask(Frame({"job": "look"}, {}))]
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad or ".reference." in name}
    assert before == after
    for name, lies in {name: [lie[name] for lie in after] for name in after[0]}.items():
        assert [lie["sharded"] for lie in lies] == [name not in trained] * 2, name
        if name not in trained:
            assert all((lie["places"], lie["world"]) == (["S(0)"], 2) for lie in lies), name
            assert sum(lie["here"] for lie in lies) == lies[0]["of"], name
            assert all(0 < lie["here"] < lie["of"] for lie in lies), name


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells what is mapped")
def test_no_process_keeps_the_whole_base_in_memory(team_of):
    """Not as the file either that it was read from: one view of it would keep all of it. A layer that is let go goes back to the system."""
    team = team_of(resident_of("qwen2", bias="lora_only"), "helpers_members:Looked")
    work(resident_of("qwen2", bias="lora_only"), team.carry_out)
    told = [answer.said for answer in team.group.ask(Frame({"job": "memory"}, {}))]
    assert [said["mapped"] for said in told] == [False, False]
    assert all(said["malloc"] == dict.fromkeys(MALLOC, os.environ.get(MALLOC[0], str(LARGE))) for said in told)
