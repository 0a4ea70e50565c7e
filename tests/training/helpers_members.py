"""Members of a group of processes (training.parallel.serving.Member) that do or tell what a test wants to see."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from fedunlearn.training.parallel.group import MALLOC
from fedunlearn.training.parallel.job import Frame
from fedunlearn.training.parallel.rank import Sharer
from fedunlearn.training.parallel.serving import Place, join
from fedunlearn.training.parallel.shards import WEIGHTS


class Lost:
    """The second process dies a moment after the first has told that something is wrong."""

    def __init__(self, place: Place) -> None:
        self._first, self.ready = place.rank == 0, {}

    def do(self, job: Frame) -> Frame:
        if self._first:
            raise ConnectionError("connection closed by peer")
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Wrong:
    """The first process meets an error and the second waits for it."""

    def __init__(self, place: Place) -> None:
        self._first, self.ready = place.rank == 0, {}

    def do(self, job: Frame) -> Frame:
        if self._first:
            raise ValueError("a fault of its own")
        time.sleep(60)
        raise AssertionError


class Split:
    """LoRA over layers that transformers' own plan has split among the processes."""

    def __init__(self, place: Place) -> None:
        join(place)
        numbers = {"RANK": place.rank, "LOCAL_RANK": place.rank, "WORLD_SIZE": place.world}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        base = AutoModelForCausalLM.from_pretrained(
            place.folder, distributed_config=DistributedConfig(tp_size=place.world)
        )
        lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
        self._model, self.ready = get_peft_model(base, lora), {}

    def do(self, job: Frame) -> Frame:
        self._model(torch.arange(10).view(2, 5)).logits.sum().backward()
        return Frame({}, {})


class Looked(Sharer):
    """A client's process that tells how its parameters lie, when it is ready and when it is asked to look."""

    def __init__(self, place: Place, **charge: Any) -> None:
        super().__init__(place, **charge)
        self.ready = {"held": {**self.ready["held"], "lie": self._lie()}}

    def do(self, job: Frame) -> Frame:
        if job.said["job"] == "memory":
            mapped = WEIGHTS in Path("/proc/self/maps").read_text()
            return Frame({"mapped": mapped, "malloc": {name: os.environ.get(name) for name in MALLOC}}, {})
        return Frame(self._lie(), {}) if job.said["job"] == "look" else super().do(job)

    def _lie(self) -> dict[str, Any]:
        return {name: _told(p) for name, p in self.made.model.named_parameters()}


def _told(parameter: Any) -> dict[str, Any]:
    """Whether it is a DTensor, how it is placed over how many processes, and how many numbers are here of how many."""
    if not isinstance(parameter, DTensor):
        return {"sharded": False, "here": parameter.numel(), "of": parameter.numel()}
    return {
        "sharded": True,
        "places": [str(place) for place in parameter.placements],
        "world": parameter.device_mesh.size(),
        "here": parameter.to_local().numel(),
        "of": parameter.numel(),
    }
