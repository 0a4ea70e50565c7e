"""One of a client's processes: it holds its shards for the client's life and does what the client's own process asks."""

import json
import logging
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer

from fedunlearn.config.model import TemplateArgs
from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.errors import UserError
from fedunlearn.models.adapter_tensors import ACTIVE, write_tensors
from fedunlearn.models.base import load_tokenizer
from fedunlearn.models.lora import REFERENCE, hold_reference
from fedunlearn.models.resident import Resident
from fedunlearn.models.sidecar import put_sidecar, use_sidecar
from fedunlearn.records.adapter import Tensors, Weights, hash_tensors
from fedunlearn.reporting.console import set_logging
from fedunlearn.seeds import seed_of
from fedunlearn.training.client_update import carry_out_here
from fedunlearn.training.local import LocalData, OtherAnswers
from fedunlearn.training.loop import Work, unlearning_method
from fedunlearn.training.parallel.job import REFERENCE as REFERENCE_PART
from fedunlearn.training.parallel.job import (
    REFERENCE_SIDECAR,
    SIDECAR,
    START,
    Frame,
    ToldSums,
    pack_tally,
    parts_of,
    receive,
    send,
    unpack_rows,
    unpack_settings,
    unpack_steps,
    unpack_task,
)
from fedunlearn.training.parallel.shards import TOKENIZER, held_by, sharded_model
from fedunlearn.training.parallel.together import Together
from fedunlearn.training.reference import row_sums_of

log = logging.getLogger(__name__)
LAUNCHERS_OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and its kin set: these processes know their numbers otherwise, and accelerate would believe it."""


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What a process is started for. folder: see shards.save_parts. timeout: seconds until a collective that lacks somebody is given up."""

    rank: int
    world: int
    device: str
    folder: str
    threads: int
    timeout: float
    attention: str
    template: Mapping[str, Any]
    max_length: int
    log_level: int = logging.WARNING


def serve(fd: int) -> None:
    """Reads a Charge from the socket `fd`, answers READY, then does jobs until it closes, which also ends whatever work is under way."""
    end_with_parent(fd)
    pipe = Connection(fd)
    charge = Charge(**json.loads(pipe.recv_bytes()))
    set_logging()
    logging.getLogger().setLevel(charge.log_level if charge.rank == 0 else logging.ERROR)
    try:
        member = Member(charge)
        send(pipe, Frame({"held": asdict(held_by(member.made.model))}, {}))
        while True:
            send(pipe, member.do(receive(pipe)))
    except (EOFError, ConnectionError):
        return
    except UserError as error:
        send(pipe, Frame({"faults": list(error.faults)}, {}))
    except Exception as error:  # whatever it is, the client is told, and ends the others
        log.debug("process %d of a client", charge.rank, exc_info=True)
        send(pipe, Frame({"error": f"{type(error).__name__}: {error}"}, {}))


def end_with_parent(fd: int) -> None:
    """Ends this process's group when the other end of the socket `fd` is closed, as it is when the client's own process dies, however it does."""
    threading.Thread(target=_watch, args=(fd,), daemon=True).start()


def _watch(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, 0)  # POLLHUP is told unasked
    poll.poll()
    os.killpg(os.getpid(), signal.SIGKILL)


class Member:
    """A process of a client: its model, and what it knows of the others."""

    def __init__(self, charge: Charge) -> None:
        self._charge = charge
        device = _join(charge)
        self.crew = Together(charge.rank, charge.world, device)
        folder = Path(charge.folder)
        chat = ChatFormat(load_tokenizer(folder / TOKENIZER), TemplateArgs(**charge.template), charge.max_length)
        model = sharded_model(folder, charge.attention, device)
        self.made = Resident(model, chat, "", "", device, None)

    def do(self, job: Frame) -> Frame:
        """Does one job and gives what it came to; raises whatever it runs into."""
        kinds: Mapping[str, Callable[[Frame], Frame]] = {"train": self._train, "sums": self._sums}
        self._put(job)
        return kinds[job.said["job"]](job)

    def _put(self, job: Frame) -> None:
        """Makes the model what the client's is: scales, side-cars, and the reference where there is one."""
        model = self.made.model
        layers = dict(model.named_modules())
        for path, scale in job.said["scales"].items():
            layer = layers[path]
            assert isinstance(layer, LoraLayer)
            layer.scaling.update(dict.fromkeys((ACTIVE, REFERENCE), scale))
        put_sidecar(model, parts_of(job.tensors, SIDECAR), ACTIVE)
        use_sidecar(model, ACTIVE)
        reference = parts_of(job.tensors, REFERENCE_PART)
        if reference:
            hold_reference(model, Weights(reference, parts_of(job.tensors, REFERENCE_SIDECAR)))

    def _train(self, job: Frame) -> Frame:
        said, settings, task = job.said, unpack_settings(job.said["settings"]), unpack_task(job.said["task"])
        data = _data(said)
        method = unlearning_method(task, settings)
        rows = data.forget if task.role.on_forget_rows else data.retain
        own = replace(task, seed=seed_of("process", task.seed, self._charge.rank))
        work = Work(self.made, data, own, settings, parts_of(job.tensors, START), rows, method, self.crew)
        tensors, tally = carry_out_here(work, unpack_steps(said["steps"]))
        tokens, reference_tokens = self.crew.total((tally.tokens, tally.reference_tokens))
        tally.tokens, tally.reference_tokens = int(tokens), int(reference_tokens)
        return self._reply({"tally": pack_tally(tally), "hash": hash_tensors(tensors)}, tensors)

    def _sums(self, job: Frame) -> Frame:
        """The sums of every world-th row; all run as many forwards, the last of them over a row that counts for nothing where there are too few."""
        model, rows = self.made.model, unpack_rows(job.said["rows"])
        world, rank = self._charge.world, self._charge.rank
        write_tensors(model, parts_of(job.tensors, START))
        share = -(-len(rows) // world)
        mine = [rows[min(place, len(rows) - 1)] for place in range(rank, share * world, world)]
        with torch.no_grad():
            sums = row_sums_of(self.made, mine, job.said["bf16"])
        every = torch.zeros(share * world)
        every[rank::world] = sums
        whole = self.crew.total(every.tolist())
        return self._reply({"sums": whole[: len(rows)], "hash": str(whole)}, {})

    def _reply(self, said: Mapping[str, Any], tensors: Tensors) -> Frame:
        """The first process tells all, the others enough to see that they agree."""
        return Frame(said, tensors) if self._charge.rank == 0 else Frame({"hash": said["hash"]}, {})


def _join(charge: Charge) -> torch.device:
    """Enters the group of processes, over a file and the loopback device, and gives the device of this one."""
    for name in LAUNCHERS_OWN:
        os.environ.pop(name, None)
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    torch.set_num_threads(charge.threads)
    device = torch.device(charge.device)
    if device.type == "cuda":
        device = torch.device("cuda", charge.rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{charge.folder}/rendezvous",
        rank=charge.rank,
        world_size=charge.world,
        timeout=timedelta(seconds=charge.timeout),
    )
    return device


def _data(said: Mapping[str, Any]) -> LocalData:
    found = {(row, choice): rows for row, choice, *packed in said["others"] for rows in unpack_rows([packed])}

    def encode(place: int, choice: int) -> EncodedRow:
        return found[place, choice]

    return LocalData(
        forget=unpack_rows(said["forget"]),
        retain=unpack_rows(said["retain"]),
        alternates=OtherAnswers(counts=(), encode=encode),
        reference=ToldSums(said["sums"]),
    )
