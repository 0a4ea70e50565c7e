"""A client's side of a run in this process: its config, data and the resident model, kept between messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

import fedunlearn
from fedunlearn.config.parallel import parallel_args
from fedunlearn.config.run import EvalRun, TrainRun
from fedunlearn.data.alternates import given_alternates
from fedunlearn.data.benchmark import Benchmark
from fedunlearn.data.chat import EncodedRow
from fedunlearn.data.opened import open_benchmark
from fedunlearn.data.ownership import FILE, owned_rows, read_partition
from fedunlearn.data.requests import own_request
from fedunlearn.data.tofu import QaRow, as_tofu
from fedunlearn.errors import UserError
from fedunlearn.evals.dataset import drawn_rows
from fedunlearn.evals.scoring import score_rows
from fedunlearn.federation.start import counted
from fedunlearn.methods.alternates import Sampled
from fedunlearn.methods.tokens import Need
from fedunlearn.models.adapter_tensors import ACTIVE, write_tensors
from fedunlearn.models.base import choose_device
from fedunlearn.models.fingerprint import fingerprint_base
from fedunlearn.models.lora import hold_reference
from fedunlearn.models.ranks import cut, padded, scaled_for
from fedunlearn.models.resident import Resident, resident
from fedunlearn.models.sidecar import put_sidecar
from fedunlearn.models.source import resolve_source
from fedunlearn.records.adapter import Adapter, Tensors, Weights
from fedunlearn.records.evaluation import AnswerScore, Detail
from fedunlearn.records.partition import OwnedRows, Partition
from fedunlearn.records.requests import ReleasedRow, Request
from fedunlearn.records.rounds import ClientRows, ClientTask, Role
from fedunlearn.records.shape import ClientShape
from fedunlearn.reporting.run_folder import run_path
from fedunlearn.training.able import check_able
from fedunlearn.training.charges import Charges
from fedunlearn.training.client_update import client_update
from fedunlearn.training.forward import OF_REFERENCE
from fedunlearn.training.local import LocalData, LocalResult, LocalSettings, OtherAnswers
from fedunlearn.training.parallel.team import Team, make_team
from fedunlearn.training.reference import ReferenceSums
from fedunlearn.training.sampling import sampled_alternates


@dataclass(frozen=True, kw_only=True)
class OwnScores:
    """Means over a client's own rows (0 where it has none), and over how many of each kind."""

    num_forget: int = 0
    num_retain: int = 0
    forget_loss: float = 0.0
    forget_prob: float = 0.0
    retain_loss: float = 0.0
    retain_prob: float = 0.0


@dataclass(frozen=True, eq=False)
class Site:
    """What clients of this process share: one base model and the data, each row tokenised once. Everything is made on first use.

    max_steps: optimiser steps that a task may ask for at most.
    """

    run: TrainRun
    max_steps: int | None = None

    @cached_property
    def made(self) -> Resident:
        """The resident model; loading it proves adapter and base."""
        run = self.run
        pocket_dir = Path(run.paths.pocket_dir)
        source = resolve_source(run.model.model_args, pocket_dir)
        seed, max_length = run.trainer.args.seed, run.data.max_length
        try:
            return resident(run.home, source, seed=seed, max_length=max_length, pocket_dir=pocket_dir, sent=True)
        except UserError as error:
            found = fingerprint_base(source.base)[:12]
            raise UserError(
                f"the base {source.base_name!r} here (fingerprint {found}..) is refused", *error.faults
            ) from error

    @cached_property
    def team(self) -> Team | None:
        """The processes that share each task, where trainer.parallel asks for some; they are started by the first task and end with this object."""
        run = self.run
        if parallel_args(run.trainer.parallel).kind == "none":
            return None
        return make_team(
            self.made,
            parallel_args(run.trainer.parallel),
            choose_device(run.model.model_args),
            timeout=run.trainer.federated.round_timeout,
            scratch=Path(run.paths.cache_dir) / "teams",
        )

    def check_able(self) -> None:
        """Raises UserError where this machine and its model cannot do what trainer.args and trainer.parallel ask for."""
        check_able(self.made, self.run.trainer.args, choose_device(self.run.model.model_args))
        _ = self.team

    @cached_property
    def data(self) -> Benchmark:
        """The data."""
        return open_benchmark(self.run)

    @cached_property
    def partition(self) -> Partition:
        """The run's partition, read from its folder. Raises UserError where it was made for other data than are here."""
        partition = read_partition(run_path(self.run) / FILE)
        if partition.data_hash != self.data.hash("full"):
            raise UserError(
                f"the data here are not those that the partition was made for (sha256 {self.data.hash('full')[:12]}, the partition names {partition.data_hash[:12]})"
            )
        return partition

    @cached_property
    def request(self) -> Request:
        """What is to be forgotten, read from the run's folder."""
        return own_request(run_path(self.run))

    @cached_property
    def owned(self) -> tuple[OwnedRows, ...]:
        """Every client's rows for this run."""
        return owned_rows(self.run.data.rows, self.partition, self.request, replays=self.run.replays)

    def encode(self, numbers: tuple[int, ...]) -> tuple[EncodedRow, ...]:
        """Gives rows of `full` as examples. Raises UserError naming a row that does not fit."""
        return self.data.encode(self.made.chat, numbers)

    def counted(self, client: int) -> ClientRows:
        """How many examples a client has, all of them tokenised. Raises UserError as `encode` does."""
        return counted(self.owned[client], lambda numbers: len(self.encode(numbers)))

    @cached_property
    def shapes(self) -> tuple[ClientShape, ...]:
        """Every client's LoRA rank and alpha: its own where the partition gives it one, else the model's."""
        return client_shapes(self.run, self.start.peft_config)

    @property
    def start(self) -> Adapter:
        """What the resident model's adapter began with here; fresh values are the server's to send."""
        if self.made.start is None:
            raise ValueError("a federated run has an adapter")
        return self.made.start

    def work(
        self,
        task: ClientTask,
        owned: OwnedRows,
        start: Weights,
        reference: Weights | None,
        charges: Charges,
        released: Sequence[ReleasedRow] = (),
    ) -> LocalResult:
        """Trains on one client's rows for one round and gives the factors it trained, at its own rank, in the wire's dtype.

        start, reference (the adapter that unlearning began with, where it is read): as they came over the wire.
        charges: of this client in this run. released: rows of others to unlearn, where the client owns none of the request.
        """
        run, model = self.run, self.made.model
        shape = self.shapes[task.client_id] if run.ranks_differ else None
        inside = Weights(self._inside(start.factors), start.sidecar)
        before = None if reference is None else Weights(self._inside(reference.factors), reference.sidecar)
        put_sidecar(model, inside.sidecar, ACTIVE)
        if before is not None and task.role is Role.UNLEARN and needs_of(run) & OF_REFERENCE:
            hold_reference(model, before)  # outside the block: the second adapter is made with the model's own scale
        with scaled_for(model, shape):
            if task.role.on_forget_rows:
                data = self._forget_data(owned, before, charges, released)
            else:
                data = self._retain_data(owned)
            carry_out = None if self.team is None else self.team.carry_out
            done = client_update(self.made, inside.factors, data, task, self._settings(), carry_out)
        sent = done.tensors if shape is None else cut(done.tensors, shape.rank)
        dtype = WIRE_DTYPES[run.trainer.federated.wire_dtype]
        trained = {name: tensor.to(dtype) for name, tensor in sent.items() if task.trained.covers(name)}
        return replace(done, tensors=trained)

    def scores(self, client: int, adapter: Weights, wanted: int | None, seed: int) -> OwnScores:
        """Scores an adapter, as it came over the wire, on a client's own rows: so many forget and retain rows, by the seed (None: all)."""
        owned, model = self.owned[client], self.made.model
        write_tensors(model, self._inside(adapter.factors))
        put_sidecar(model, adapter.sidecar, ACTIVE)
        shape = self.shapes[client] if self.run.ranks_differ else None
        every = [self.encode(numbers) for numbers in (owned.forget, owned.retain)]
        kinds = [[rows[i] for i in drawn_rows(len(rows), wanted, seed, client)] for rows in every]
        with scaled_for(model, shape):
            found = score_rows(
                model,
                dict.fromkeys((row for rows in kinds for row in rows), Detail.LOSS),
                pad_id=self.made.chat.pad_id,
                batch_tokens=self.run.eval.batch_tokens,
            )
        (forget_loss, forget_prob), (retain_loss, retain_prob) = (
            _means([found[row] for row in rows]) for rows in kinds
        )
        return OwnScores(
            num_forget=len(kinds[0]),
            num_retain=len(kinds[1]),
            forget_loss=forget_loss,
            forget_prob=forget_prob,
            retain_loss=retain_loss,
            retain_prob=retain_prob,
        )

    def _inside(self, factors: Tensors) -> Tensors:
        """Factors as the model holds them: its rank, float32."""
        return {name: tensor.float() for name, tensor in padded(self.made.model, factors).items()}

    def _settings(self) -> LocalSettings:
        run = self.run
        return LocalSettings(
            args=run.trainer.args,
            collator=run.collator,
            method=run.local_method,
            retain_per_forget=run.data.retain_per_forget,
            guard=run.trainer.guard,
            max_steps=self.max_steps,
        )

    def _retain_data(self, owned: OwnedRows) -> LocalData:
        return LocalData(forget=(), retain=self.encode(owned.retain))

    def _forget_data(
        self, owned: OwnedRows, reference: Weights | None, charges: Charges, released: Sequence[ReleasedRow]
    ) -> LocalData:
        """The client's rows, with the reference's sums and the alternates that the method reads."""
        run, cache, sums = self.run, Path(self.run.paths.cache_dir), None
        if reference is not None and Need.REFERENCE_SUMS in needs_of(run):
            sums_of = None if self.team is None else self.team.sums_of
            sums = ReferenceSums(self.made, reference, cache, run.trainer.args.bf16, charges, sums_of)
        lent = {row.number: QaRow(row.question, row.answer) for row in (() if owned.forget else released)}
        alternates, tokens = self._alternates(lent, owned, reference, charges, cache)
        encode = self.made.chat.encode
        borrowed = (encode(row.question, row.answer, f"full row {number}") for number, row in lent.items())
        return LocalData(
            forget=(*self.encode(owned.forget), *borrowed),
            retain=self.encode(owned.retain),
            alternates=alternates,
            reference=sums,
            tokens=tokens,
        )

    def _alternates(
        self, lent: Mapping[int, QaRow], owned: OwnedRows, reference: Weights | None, charges: Charges, cache: Path
    ) -> tuple[OtherAnswers | None, int]:
        """Gives the forget rows' alternates (the client's own, or what it was lent), and the tokens that making them cost."""
        run = self.run
        wanted = "none" if run.local_method is None else run.local_method.alternates
        if wanted == "none":
            return None, 0
        tofu = as_tofu(self.data)
        rows = {number: tofu.row(number) for number in owned.forget} or lent
        numbers, tokens = tuple(rows), 0
        if not isinstance(wanted, Sampled):
            texts = given_alternates(run.data, numbers)
        elif reference is None:
            raise ValueError("alternates are sampled from the reference, which was not sent")
        else:
            drawn = sampled_alternates(
                self.made, reference, rows, wanted, seed=run.trainer.args.seed, cache=cache, charges=charges
            )
            texts, tokens = drawn.texts, drawn.tokens

        def encode(place: int, choice: int) -> EncodedRow:
            number = numbers[place]
            return self.made.chat.encode(
                rows[number].question, texts[number][choice], f"alternate of full row {number}"
            )

        return OtherAnswers(counts=tuple(len(texts[number]) for number in numbers), encode=encode), tokens


def _means(scores: Sequence[AnswerScore]) -> tuple[float, float]:
    """Mean loss and probability; 0 of none."""
    count = max(len(scores), 1)
    return sum(score.avg_loss for score in scores) / count, sum(score.prob for score in scores) / count


def client_shapes(run: TrainRun, adapter_config: Mapping[str, object]) -> tuple[ClientShape, ...]:
    """Gives each client's rank and alpha by the partition's config; null there means the model's."""
    count = run.trainer.federated.num_clients
    rank, alpha = int(str(adapter_config["r"])), float(str(adapter_config["lora_alpha"]))
    ranks, alphas = run.partition.ranks or (rank,) * count, run.partition.lora_alphas or (alpha,) * count
    rslora = bool(adapter_config.get("use_rslora"))
    pairs = tuple(zip(ranks, alphas, strict=True))
    made = {pair: ClientShape(rank=pair[0], lora_alpha=pair[1], use_rslora=rslora) for pair in set(pairs)}
    return tuple(made[pair] for pair in pairs)


def needs_of(run: TrainRun) -> frozenset[Need]:
    """What an unlearning client of this run computes beside rows and labels; nothing where nobody unlearns."""
    return frozenset() if run.local_method is None else run.local_method.needs | run.local_method.retain_needs


def reads_reference(run: TrainRun) -> bool:
    """Whether an unlearning client reads anything of the model that unlearning began with: numbers, or samples."""
    sampled = run.local_method is not None and isinstance(run.local_method.alternates, Sampled)
    return sampled or bool(needs_of(run) & {Need.REFERENCE_SUMS, *OF_REFERENCE})


def set_threads(run: TrainRun | EvalRun) -> None:
    """Sets torch's threads to launcher.threads: the same number on every side, or the bits differ."""
    threads: int | None = getattr(run.launcher, "threads", None)
    if threads is not None:
        torch.set_num_threads(threads)


VERSION = fedunlearn.__version__
WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
