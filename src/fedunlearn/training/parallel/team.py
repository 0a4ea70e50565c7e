"""A client's processes, as the client's own process sees them: started once, given jobs, ended together."""

import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import torch

from fedunlearn.config.parallel import ParallelArgs, settled
from fedunlearn.data.chat import EncodedRow
from fedunlearn.errors import UserError
from fedunlearn.models.adapter_tensors import ACTIVE, live_tensors, read_tensors
from fedunlearn.models.lora import REFERENCE
from fedunlearn.models.ranks import scales_in
from fedunlearn.models.resident import Resident
from fedunlearn.models.sidecar import held_sidecar
from fedunlearn.records.adapter import Tensors
from fedunlearn.training.loop import Tally, Work
from fedunlearn.training.parallel import job as jobs
from fedunlearn.training.parallel.job import Frame, named, pack_rows, pack_work, receive, send, unpack_tally
from fedunlearn.training.parallel.rank import Charge
from fedunlearn.training.parallel.shards import save_parts
from fedunlearn.training.steps import Step

log = logging.getLogger(__name__)

# The parent's sys.path comes first of all: this package, and a user's own modules, may be found through it alone.
_BOOT = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = json.loads(sys.argv[1])
from fedunlearn.training.parallel.rank import serve
serve(int(sys.argv[2]))
"""


class TeamError(RuntimeError):
    """A client's processes did not do a job: one of them raised, died or was late. All of them have been ended; the next job starts others."""


@dataclass(frozen=True, eq=False)
class _Process:
    rank: int
    process: "subprocess.Popen[bytes]"
    pipe: Connection


class Team:
    """The processes that share one client's work, or that of all clients of a process, one after another.

    made: the client's model, whole, on the CPU. args: with its number of processes. device: what the processes work on, `cpu` or `cuda`. timeout: seconds for one job, and
    for the start. scratch: where the base is written for the start, and taken away again. They are started by the first job.
    """

    def __init__(self, made: Resident, args: ParallelArgs, *, device: str, timeout: float, scratch: Path) -> None:
        self._made, self._args, self._device, self._timeout, self._scratch = made, args, device, timeout, scratch
        self._processes: list[_Process] = []
        self._finalizer: weakref.finalize[..., Any] | None = None
        self.held: tuple[Mapping[str, int], ...] = ()
        """What each process holds, in bytes (shards.Held), once they are started."""

    def carry_out(self, work: Work, steps: Sequence[Step]) -> tuple[Tensors, Tally]:
        """Makes the steps (see client_update.CarryOut). The client's model says scales, side-car and reference; its adapter is left as it is."""
        model, role = self._made.model, work.task.role
        tensors = {**named(jobs.START, work.start), **named(jobs.SIDECAR, held_sidecar(model, ACTIVE))}
        if REFERENCE in model.peft_config:
            tensors |= named(jobs.REFERENCE, live_tensors(model, REFERENCE))
            tensors |= named(jobs.REFERENCE_SIDECAR, held_sidecar(model, REFERENCE))
        log.info("%d processes %s for client %d", self._args.processes, role.value, work.task.client_id)
        done = self._ask(Frame({"job": "train", **pack_work(work, steps), **self._scales()}, tensors))
        return done.tensors, unpack_tally(done.said["tally"])

    def sums_of(self, made: Resident, rows: Sequence[EncodedRow], bf16: bool) -> torch.Tensor:
        """Gives NLL_i of rows under the model as it is (see reference.SumsOf)."""
        tensors = {
            **named(jobs.START, read_tensors(made.model)),
            **named(jobs.SIDECAR, held_sidecar(made.model)),
        }
        said = {"job": "sums", "rows": pack_rows(rows), "bf16": bf16, **self._scales()}
        return torch.tensor(self._ask(Frame(said, tensors)).said["sums"], dtype=torch.float32)

    def close(self) -> None:
        """Ends the processes and waits for them."""
        if self._finalizer is not None:
            self._finalizer()
        self._processes, self._finalizer = [], None

    def _scales(self) -> dict[str, object]:
        return {"scales": dict(scales_in(self._made.model))}

    def _ask(self, frame: Frame) -> Frame:
        """Gives the job to all processes, and the first one's answer. Raises TeamError, or UserError where that is what one of them met; all are ended then."""
        try:
            if not self._processes:
                self._start()
            for one in self._processes:
                send(one.pipe, frame)
            answers = self._answers()
            hashes = {answer.said["hash"] for answer in answers}
            if len(hashes) != 1:
                raise TeamError(
                    f"the client's processes came to {len(hashes)} different results: they no longer hold the same adapter"
                )
            return answers[0]
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise TeamError(
                    f"a process of the client cannot be reached ({error}): all of them were ended"
                ) from error
            raise

    def _answers(self) -> list[Frame]:
        deadline, waiting = time.monotonic() + self._timeout, {one.pipe: one for one in self._processes}
        found: dict[int, Frame] = {}
        while waiting:
            ready = wait(list(waiting), max(deadline - time.monotonic(), 0))
            if not ready:
                raise TeamError(
                    f"processes {sorted(one.rank for one in waiting.values())} of the client's {len(self._processes)} did not answer within {self._timeout:g} s "
                    "(trainer.federated.round_timeout): all of them were ended"
                )
            for pipe in ready:
                assert isinstance(pipe, Connection)
                one = waiting.pop(pipe)
                found[one.rank] = _read(one)
        return [found[rank] for rank in sorted(found)]

    def _start(self) -> None:
        self._scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="team", dir=self._scratch))
        try:
            save_parts(self._made, folder)
            self._finalizer = weakref.finalize(self, _end, self._processes)
            self._processes += [self._launch(rank, folder) for rank in range(self._args.processes or 0)]
            self.held = tuple(answer.said["held"] for answer in self._answers())
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        log.info(
            "%d processes hold the base: %s MB of it each, the adapter whole",
            len(self.held),
            "/".join(f"{held['shards'] / 1e6:.1f}" for held in self.held),
        )

    def _launch(self, rank: int, folder: Path) -> _Process:
        here, there = Pipe()
        with there:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(there.fileno())],
                pass_fds=[there.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
        here.send_bytes(json.dumps(asdict(self._charge(rank, folder))).encode())
        return _Process(rank, process, here)

    def _charge(self, rank: int, folder: Path) -> Charge:
        made, world = self._made, self._args.processes or 0
        return Charge(
            rank=rank,
            world=world,
            device=self._device,
            folder=str(folder.resolve()),
            threads=max(1, torch.get_num_threads() // world),
            timeout=self._timeout,
            attention=str(made.model.config._attn_implementation),
            template=asdict(made.chat.template),
            max_length=made.chat.max_length,
            log_level=logging.getLogger().getEffectiveLevel(),
        )


def _read(one: _Process) -> Frame:
    """Gives a process's answer. Raises UserError or TeamError where it is none."""
    try:
        answer = receive(one.pipe)
    except (EOFError, OSError) as error:
        with suppress(subprocess.TimeoutExpired):
            one.process.wait(5)
        code = one.process.returncode
        how = (
            "it hangs" if code is None else f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        )
        raise TeamError(f"process {one.rank} of the client died ({how}): all of them were ended") from error
    if "faults" in answer.said:
        raise UserError(*answer.said["faults"])
    if "error" in answer.said:
        raise TeamError(f"process {one.rank} of the client: {answer.said['error']}: all of them were ended")
    return answer


def _end(processes: list[_Process]) -> None:
    for one in processes:
        if one.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGKILL)
    for one in processes:
        one.process.wait()
        one.pipe.close()
    processes.clear()


def make_team(made: Resident, args: ParallelArgs, device: torch.device, *, timeout: float, scratch: Path) -> Team:
    """Gives a team that is not started yet. device: what a client would work on alone. Raises UserError as check_team does."""
    return Team(made, check_team(made, args, device), device=device.type, timeout=timeout, scratch=scratch)


def check_team(made: Resident, args: ParallelArgs, device: torch.device) -> ParallelArgs:
    """Gives args with its number of processes. Raises UserError where the devices are too few, DeepSpeed is not there, or the base cannot lie in shards."""
    known = settled(args, device.type, torch.cuda.device_count())
    if args.kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "trainer.parallel=deepspeed needs DeepSpeed: pip install deepspeed, or choose trainer.parallel=fsdp"
        )
    model = made.model
    if getattr(model.get_base_model(), "hf_quantizer", None) is not None:
        raise UserError(
            f"trainer.parallel={args.kind} beside a quantised base: its packed weights cannot be cut into shards; choose trainer.parallel=none, "
            "or a base that is not quantised"
        )
    odd = [name for name, p in model.named_parameters() if p.requires_grad and f".{ACTIVE}." not in f"{name}."]
    if odd:
        raise UserError(
            f"trainer.parallel={args.kind}: {odd[0]!r} is a parameter of the base that is trained (lora_config.bias), and the base lies in shards: set "
            "lora_config.bias=none, or trainer.parallel=none"
        )
    return known
