"""One of a client's processes: it holds its shards for the client's life and does what the client's own process asks."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer

from fedunlearn.config.model import TemplateArgs
from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.models.adapter_tensors import ACTIVE, write_tensors
from fedunlearn.models.base import load_tokenizer
from fedunlearn.models.lora import REFERENCE, hold_reference
from fedunlearn.models.resident import Resident
from fedunlearn.models.sidecar import put_sidecar, use_sidecar
from fedunlearn.records.adapter import Tensors, Weights, hash_tensors
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
    unpack_rows,
    unpack_settings,
    unpack_steps,
    unpack_task,
)
from fedunlearn.training.parallel.serving import Place, join
from fedunlearn.training.parallel.shards import TOKENIZER, held_by, sharded_model, whole_model
from fedunlearn.training.parallel.together import Together
from fedunlearn.training.parallel.zero import Zero
from fedunlearn.training.reference import ReferenceSums, row_sums_of


class Sharer:
    """A process of a client: its model and what it knows of the others. See serving.Member.

    template, max_length: of the client's ChatFormat. deepspeed: whether ZeRO-2 cuts gradients and optimiser; else FSDP2 the base.
    """

    def __init__(
        self, place: Place, *, attention: str, template: Mapping[str, Any], max_length: int, deepspeed: bool
    ) -> None:
        self._place = place
        device = join(place)
        folder = Path(place.folder)
        self.crew: Together = Together(place.rank, place.world, device)
        make = sharded_model
        if deepspeed:
            self.crew, make = Zero(place.rank, place.world, device), whole_model
        chat = ChatFormat(load_tokenizer(folder / TOKENIZER), TemplateArgs(**template), max_length)
        self.made = Resident(make(folder, attention, device), chat, "", "", device, None)
        self.ready = {"held": asdict(held_by(self.made.model))}

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
        own = replace(task, seed=seed_of("process", task.seed, self._place.rank))
        work = Work(self.made, data, own, settings, parts_of(job.tensors, START), rows, method, self.crew)
        tensors, tally = carry_out_here(work, unpack_steps(said["steps"]))
        tokens, reference_tokens = self.crew.total((tally.tokens, tally.reference_tokens))
        tally.tokens, tally.reference_tokens = int(tokens), int(reference_tokens)
        return self._reply({"tally": pack_tally(tally), "hash": hash_tensors(tensors)}, tensors)

    def _sums(self, job: Frame) -> Frame:
        """The sums of every world-th row; all run as many forwards, the last of them over a row that counts for nothing where there are too few."""
        model, rows = self.made.model, unpack_rows(job.said["rows"])
        world, rank = self._place.world, self._place.rank
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
        return Frame(said, tensors) if self._place.rank == 0 else Frame({"hash": said["hash"]}, {})


def _data(said: Mapping[str, Any]) -> LocalData:
    found = {(row, choice): rows for row, choice, *packed in said["others"] for rows in unpack_rows([packed])}

    def encode(place: int, choice: int) -> EncodedRow:
        return found[place, choice]

    return LocalData(
        forget=unpack_rows(said["forget"]),
        retain=unpack_rows(said["retain"]),
        alternates=OtherAnswers(counts=(), encode=encode),
        reference=cast("ReferenceSums", ToldSums(said["sums"])),  # the steps read nothing but its sums
    )
