"""One of several processes, from its start: it joins the others, says that it is ready, and does what it is asked until it is let go."""

import importlib
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fedunlearn.errors import UserError
from fedunlearn.orphans import end_with_parent
from fedunlearn.reporting.console import set_logging
from fedunlearn.training.parallel.job import Frame, receive, send

log = logging.getLogger(__name__)
LAUNCHERS_OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and its kin set: these processes know their numbers otherwise, and accelerate would believe it."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands among the others. device: `cpu` or `cuda`; folder: what all of them can read while they start. timeout: seconds until a collective that lacks
    somebody is given up.
    """

    rank: int
    world: int
    device: str
    folder: str
    threads: int
    timeout: float
    log_level: int = logging.WARNING


class Member(Protocol):
    """What a process is for. It is made of its Place and of whatever else its maker is given, JSON values; `ready` is what it says then."""

    ready: Mapping[str, Any]

    def do(self, job: Frame) -> Frame:
        """Does one job; raises whatever it runs into."""


def serve(fd: int) -> None:
    """Reads from the socket `fd` what to be (`entry`: module:name of a Member's maker, `place`, `charge`), then does jobs until it closes, which also ends work under way."""
    end_with_parent(fd)
    pipe = Connection(fd)
    said = json.loads(pipe.recv_bytes())
    place = Place(**said["place"])
    set_logging()
    logging.getLogger().setLevel(place.log_level if place.rank == 0 else logging.ERROR)
    try:
        module, _, name = said["entry"].partition(":")
        make: Callable[..., Member] = getattr(importlib.import_module(module), name)
        member = make(place, **said["charge"])
        send(pipe, Frame(member.ready, {}))
        while True:
            send(pipe, member.do(receive(pipe)))
    except (EOFError, ConnectionError):
        return
    except UserError as error:
        send(pipe, Frame({"faults": list(error.faults)}, {}))
    except Exception as error:  # whatever it is, the one who asked is told, and ends the others
        log.debug("process %d", place.rank, exc_info=True)
        send(pipe, Frame({"error": f"{type(error).__name__}: {error}"}, {}))


def join(place: Place) -> torch.device:
    """Enters the group of processes, over a file and the loopback device, and gives the device of this one."""
    for name in LAUNCHERS_OWN:
        os.environ.pop(name, None)
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    torch.set_num_threads(place.threads)
    device = torch.device(place.device)
    if device.type == "cuda":
        device = torch.device("cuda", place.rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{place.folder}/rendezvous",
        rank=place.rank,
        world_size=place.world,
        timeout=timedelta(seconds=place.timeout),
    )
    return device
