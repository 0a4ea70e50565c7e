"""A client's side of a run in this process: its config, data and the resident model, kept between messages."""

from dataclasses import dataclass
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
from fedunlearn.models.lora import hold_reference
from fedunlearn.models.resident import Resident, resident
from fedunlearn.models.source import resolve_source
from fedunlearn.records.adapter import Tensors, hash_tensors
from fedunlearn.records.partition import OwnedRows, Partition
from fedunlearn.records.rounds import ClientTask, Role
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

    def work(self, task: ClientTask, owned: OwnedRows, start: Tensors, reference: Tensors | None) -> LocalResult:
        """Trains on one client's rows for one round. reference: the adapter that unlearning began with, where reference_needs names it."""
        run = self.run
        sums = None
        needs = reference_needs(run) if task.role is Role.UNLEARN else frozenset()
        data = LocalData(forget=self.encode(owned.forget), retain=self.encode(owned.retain))
        if reference is not None and Need.REFERENCE_SUMS in needs:
            sums = reference_sums(
                self.made,
                reference,
                hash_tensors(reference),
                data.forget,
                Path(run.paths.cache_dir),
                run.trainer.args.bf16,
            )
        if reference is not None and Need.REFERENCE_LOGITS in needs:
            hold_reference(self.made.model, reference)
        settings = LocalSettings(
            args=run.trainer.args,
            collator=run.collator,
            method=run.method,
            retain_per_forget=run.data.retain_per_forget,
            mu=run.strategy.client_mu,
        )
        data = LocalData(forget=data.forget, retain=data.retain, reference_sums=sums)
        return client_update(self.made, start, data, task, settings)


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
