"""trainer.parallel and an evaluation's parallel: both forms of it, and what is refused before a model loads."""

import pytest
from test_parse import PLAIN

from fedunlearn.config.parallel import ParallelArgs, parallel_args, settled
from fedunlearn.config.parse import parse_config
from fedunlearn.errors import UserError

RAY = {"launcher": {"_target_": "fedunlearn.config.launcher.RayLauncher"}}
FEDPROX = {"strategy": {"_target_": "fedunlearn.aggregation.fedprox.FedProx", "mu": 0.1}}


def run(parallel, **others):
    """The run of PLAIN with this trainer.parallel, and other groups in the place of its own."""
    return parse_config({**PLAIN, "trainer": {**PLAIN["trainer"], "parallel": parallel}, **others})


def test_a_word_and_a_record_say_the_same():
    assert parallel_args(run("fsdp").trainer.parallel) == ParallelArgs(kind="fsdp")
    assert run({"kind": "fsdp"}).trainer.parallel == ParallelArgs(kind="fsdp")
    stated = run({"kind": "deepspeed", "processes": 4}).trainer.parallel
    assert stated == ParallelArgs(kind="deepspeed", processes=4)


def test_without_it_a_client_is_one_process_on_its_own_device():
    assert parse_config(PLAIN).trainer.parallel == "none"
    assert parse_config(PLAIN).home == parse_config(PLAIN).model


def test_the_clients_own_process_holds_the_base_on_the_cpu():
    asked = run("fsdp")
    assert asked.model.model_args.device == "auto"
    assert asked.home.model_args.device == "cpu"


@pytest.mark.parametrize(
    ("parallel", "others", "said"),
    [
        ("ddp", {}, r"trainer\.parallel='ddp' does not fit"),
        ({"kind": "fsdp", "processes": 1}, {}, r"processes=1 must lie between 2 and 1024.*one process is parallel=none"),
        ({"kind": "none", "processes": 2}, {}, r"processes=2 beside kind=none"),
        ({"kind": "deepspeed", "zero_stage": 3}, {}, r"trainer\.parallel\.zero_stage=3 is refused: .*DeepSpeed .* cuts the adapter into shards beside the base.*choose kind=fsdp"),
        ({"kind": "fsdp", "ranks": 2}, {}, r"trainer\.parallel\.ranks=2 is an unknown key"),
        ("tp", {}, r"LoRA cannot be trained over layers split .* Choose trainer\.parallel=fsdp"),
        ("fsdp", RAY, r"trainer\.parallel=fsdp beside launcher=ray: every actor would start processes of its own"),
        ("deepspeed", FEDPROX, r"trainer\.parallel=deepspeed beside strategy=fedprox"),
    ],
)  # fmt: skip
def test_what_has_no_sense_is_refused(parallel, others, said):
    with pytest.raises(UserError, match=said):
        run(parallel, **others)


def test_compiled_blocks_are_refused_beside_it_and_taken_without():
    trainer = {**PLAIN["trainer"], "args": {**PLAIN["trainer"]["args"], "torch_compile": True}}
    assert parse_config({**PLAIN, "trainer": trainer}).trainer.args.torch_compile
    with pytest.raises(UserError, match=r"trainer\.parallel=fsdp beside trainer\.args\.torch_compile=true"):
        parse_config({**PLAIN, "trainer": {**trainer, "parallel": "fsdp"}})


def test_fsdp_takes_the_proximal_term():
    assert run("fsdp", **FEDPROX).strategy.mu == 0.1


@pytest.mark.parametrize(
    ("asked", "device", "devices", "processes"),
    [(None, "cpu", 0, 2), (3, "cpu", 0, 3), (None, "cuda", 8, 8), (4, "cuda", 8, 4)],
)
def test_the_number_of_processes(asked, device, devices, processes):
    assert settled(ParallelArgs(kind="fsdp", processes=asked), device, devices).processes == processes


@pytest.mark.parametrize(
    ("args", "device", "devices", "said"),
    [
        (ParallelArgs(kind="fsdp", processes=4), "cuda", 2, r"4 processes wants a CUDA device for each, and there are 2"),
        (ParallelArgs(kind="fsdp"), "cuda", 1, r"2 processes wants a CUDA device for each, and there are 1.*device=cpu"),
        (ParallelArgs(kind="deepspeed"), "cpu", 0, r"deepspeed needs CUDA devices.*choose trainer\.parallel=fsdp"),
    ],
)  # fmt: skip
def test_processes_without_devices_are_refused(args, device, devices, said):
    with pytest.raises(UserError, match=said):
        settled(args, device, devices)
