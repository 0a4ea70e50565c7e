"""A client's side of a run in this process: its config, data and the resident model, kept between messages."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

import fedunlearn
from fedunlearn.config.run import EvalRun, TrainRun
from fedunlearn.data.chat import EncodedRow
from fedunlearn.data.ownership import FILE, encode_rows, open_tofu, owned_rows, read_partition
from fedunlearn.data.tofu import Tofu
from fedunlearn.methods.base import Need
from fedunlearn.methods.retain import retain_needs
from fedunlearn.models.lora import ACTIVE, hold_reference
from fedunlearn.models.ranks import cut, padded, scaled_for
from fedunlearn.models.resident import Resident, resident
from fedunlearn.models.sidecar import put_sidecar
from fedunlearn.models.source import resolve_source
from fedunlearn.records.adapter import Tensors, Weights
from fedunlearn.records.partition import OwnedRows, Partition
from fedunlearn.records.rounds import ClientTask, Role
from fedunlearn.records.shape import ClientShape
from fedunlearn.reporting.run_folder import run_path
from fedunlearn.training.client_update import LocalData, LocalResult, LocalSettings, client_update
from fedunlearn.training.reference import reference_sums


@dataclass(frozen=True, eq=False)
class Site:
    """What clients of this process share: one base model and the data, each row tokenised once. Everything is made on first use."""

    run: TrainRun

    @cached_property
    def made(self) -> Resident:
        """The resident model; loading it proves adapter and base."""
        run = self.run
        pocket_dir = Path(run.paths.pocket_dir)
        source = resolve_source(run.model.model_args, pocket_dir)
        return resident(
            run.model, source, seed=run.trainer.args.seed, max_length=run.data.max_length, pocket_dir=pocket_dir
        )

    @cached_property
    def tofu(self) -> Tofu:
        """The data."""
        return open_tofu(self.run.tofu_path, Path(self.run.paths.pocket_dir))

    @cached_property
    def partition(self) -> Partition:
        """The run's partition, read from its folder."""
        return read_partition(run_path(self.run) / FILE)

    @cached_property
    def owned(self) -> tuple[OwnedRows, ...]:
        """Every client's rows for this run."""
        return owned_rows(self.run, self.tofu, self.partition)

    def encode(self, numbers: tuple[int, ...]) -> tuple[EncodedRow, ...]:
        """Gives rows of `full` as tokens. Raises UserError naming a row that does not fit."""
        return encode_rows(self.made.chat, self.tofu, numbers)

    @cached_property
    def shapes(self) -> tuple[ClientShape, ...]:
        """Every client's LoRA rank and alpha: its own where the partition gives it one, else the model's."""
        return client_shapes(self.run, self.adapter_config)

    @property
    def adapter_config(self) -> Mapping[str, object]:
        """The PEFT config of the model's trainable factors."""
        if self.made.start is None:
            raise ValueError("a federated run has an adapter")
        return self.made.start.peft_config

    def work(self, task: ClientTask, owned: OwnedRows, start: Weights, reference: Weights | None) -> LocalResult:
        """Trains on one client's rows for one round and gives the factors it trained, at its own rank, in the wire's dtype.

        start, reference (the adapter that unlearning began with, where reference_needs names it): as they came over the wire.
        """
        run, model = self.run, self.made.model
        shape = self.shapes[task.client_id] if run.ranks_differ else None
        inside = Weights(self._inside(start.factors), start.sidecar)
        before = None if reference is None else Weights(self._inside(reference.factors), reference.sidecar)
        put_sidecar(model, inside.sidecar, ACTIVE)
        needs = reference_needs(run) if task.role is Role.UNLEARN else frozenset()
        if before is not None and Need.REFERENCE_LOGITS in needs:
            hold_reference(model, before)  # outside the block: the second adapter is made with the model's own scale
        with scaled_for(model, shape):
            data = self._data(owned, before if Need.REFERENCE_SUMS in needs else None)
            done = client_update(self.made, inside.factors, data, task, self._settings())
        sent = done.tensors if shape is None else cut(done.tensors, shape.rank)
        dtype = WIRE_DTYPES[run.trainer.federated.wire_dtype]
        trained = {name: tensor.to(dtype) for name, tensor in sent.items() if task.trained.covers(name)}
        return replace(done, tensors=trained)

    def _inside(self, factors: Tensors) -> Tensors:
        """Factors as the model holds them: its rank, float32."""
        return {name: tensor.float() for name, tensor in padded(self.made.model, factors).items()}

    def _settings(self) -> LocalSettings:
        run = self.run
        return LocalSettings(
            args=run.trainer.args,
            collator=run.collator,
            method=run.method,
            retain_per_forget=run.data.retain_per_forget,
        )

    def _data(self, owned: OwnedRows, reference: Weights | None) -> LocalData:
        """The client's rows; with the reference's sums of its forget rows where one is given."""
        run = self.run
        forget, sums = self.encode(owned.forget), None
        if reference is not None:
            sums = reference_sums(self.made, reference, forget, Path(run.paths.cache_dir), run.trainer.args.bf16)
        return LocalData(forget=forget, retain=self.encode(owned.retain), reference_sums=sums)


def client_shapes(run: TrainRun, adapter_config: Mapping[str, object]) -> tuple[ClientShape, ...]:
    """Gives each client's rank and alpha by the partition's config; null there means the model's."""
    count = run.trainer.federated.num_clients
    rank, alpha = int(str(adapter_config["r"])), float(str(adapter_config["lora_alpha"]))
    ranks, alphas = run.partition.ranks or (rank,) * count, run.partition.lora_alphas or (alpha,) * count
    rslora = bool(adapter_config.get("use_rslora"))
    return tuple(ClientShape(rank=r, lora_alpha=a, use_rslora=rslora) for r, a in zip(ranks, alphas, strict=True))


def reference_needs(run: TrainRun) -> frozenset[Need]:
    """What of the reference an unlearning client of this run reads: sums, logits, both, or nothing."""
    if run.method is None:
        return frozenset()
    needs = run.method.needs | retain_needs(run.method.retain)
    return needs & {Need.REFERENCE_SUMS, Need.REFERENCE_LOGITS}


def set_threads(run: TrainRun | EvalRun) -> None:
    """Sets torch's threads to launcher.threads: the same number on every side, or the bits differ."""
    threads: int | None = getattr(run.launcher, "threads", None)
    if threads is not None:
        torch.set_num_threads(threads)


VERSION = fedunlearn.__version__
WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
