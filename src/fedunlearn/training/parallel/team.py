"""A client's processes, as the client's own process sees them: started once, given jobs, ended together."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

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
from fedunlearn.training.parallel.group import Group, GroupError
from fedunlearn.training.parallel.job import Frame, named, pack_rows, pack_work, unpack_tally
from fedunlearn.training.parallel.rank import Sharer
from fedunlearn.training.parallel.shards import save_parts
from fedunlearn.training.parallel.zero import check_deepspeed
from fedunlearn.training.steps import Step

log = logging.getLogger(__name__)

ENTRY = f"{Sharer.__module__}:{Sharer.__qualname__}"


class Team:
    """The processes that share one client's work, or that of all clients of a process, one after another.

    made: the client's model, whole, on the CPU. args: with its number of processes. device: what the processes work on, `cpu` or `cuda`. timeout: seconds for one job, and
    for the start. scratch: where the base is written for the start, and taken away again. entry: what each of them is (see Group). They are started by the first job.
    """

    def __init__(
        self, made: Resident, args: ParallelArgs, *, device: str, timeout: float, scratch: Path, entry: str = ENTRY
    ) -> None:
        self._made, self._args, self._scratch = made, args, scratch
        self.group = Group(entry, args.processes or 0, device=device, timeout=timeout)
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
        self.group.close()

    def _scales(self) -> dict[str, object]:
        return {"scales": dict(scales_in(self._made.model))}

    def _ask(self, frame: Frame) -> Frame:
        """Gives the job to all processes, and the first one's answer. Raises as Group.ask."""
        if not self.group.pids:
            self._start()
        answers = self.group.ask(frame)
        hashes = {answer.said["hash"] for answer in answers}
        if len(hashes) != 1:
            self.close()
            raise GroupError(
                f"the client's processes came to {len(hashes)} different results: they do not hold the same adapter any more"
            )
        return answers[0]

    def _start(self) -> None:
        made = self._made
        charge = {
            "attention": str(made.model.config._attn_implementation),
            "template": asdict(made.chat.template),
            "max_length": made.chat.max_length,
            "deepspeed": self._args.kind == "deepspeed",
        }
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="team", dir=self._scratch) as folder:
            save_parts(made, Path(folder))
            self.held = tuple(said["held"] for said in self.group.start(Path(folder), charge))
        shards = "/".join(f"{held['shards'] / 1e6:.1f}" for held in self.held)
        log.info("%d processes hold %s MB of the base, and the adapter whole", len(self.held), shards)


def make_team(made: Resident, args: ParallelArgs, device: torch.device, *, timeout: float, scratch: Path) -> Team:
    """Gives a team that is not started yet. device: what a client would work on alone. Raises UserError as check_team does."""
    return Team(made, check_team(made, args, device), device=device.type, timeout=timeout, scratch=scratch)


def check_team(made: Resident, args: ParallelArgs, device: torch.device) -> ParallelArgs:
    """Gives args with its number of processes. Raises UserError where the devices are too few, DeepSpeed is not there, or the base cannot lie in shards."""
    known = settled(args, device.type, torch.cuda.device_count())
    if args.kind == "deepspeed":
        check_deepspeed()
    model = made.model
    if getattr(model.get_base_model(), "hf_quantizer", None) is not None:
        raise UserError(
            f"trainer.parallel={args.kind} beside a quantised base: its packed weights cannot be cut into shards; choose trainer.parallel=none, "
            "or a base that is not quantised"
        )
    return known
