"""The whole configuration of a run, as the doors hand it on: one frozen record a kind of run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedunlearn.aggregation.base import ServerOptimizer
from fedunlearn.aggregation.combinations import (
    Combination,
    Variant,
    combination_faults,
    variant_faults,
    variant_of,
)
from fedunlearn.aggregation.fedprox import FedProx
from fedunlearn.aggregation.flower import FlowerStrategy
from fedunlearn.aggregation.robust.base import Robust
from fedunlearn.aggregation.robust.off import Off
from fedunlearn.config.adalora_rules import adalora_rules
from fedunlearn.config.benchmark import benchmark_rules, raw_text_rules
from fedunlearn.config.data import CollatorConfig, DataConfig, PartitionConfig, PathsConfig, task_name_rule
from fedunlearn.config.evaluation import EvalConfig
from fedunlearn.config.launcher import Launcher
from fedunlearn.config.ledger import LedgerConfig
from fedunlearn.config.lm_eval import LmEvalConfig
from fedunlearn.config.lora import given
from fedunlearn.config.model import ModelConfig
from fedunlearn.config.parallel import Parallel, home_model
from fedunlearn.config.parallel_rules import evaluation_rules, training_rules
from fedunlearn.config.requests import RequestConfig
from fedunlearn.config.server import AggregationConfig, GateConfig
from fedunlearn.config.server_choices import combination_of, own_steps
from fedunlearn.config.server_rules import own_step_rules, server_method_rules, trim_rules
from fedunlearn.config.trainer import TrainerConfig
from fedunlearn.errors import UserError
from fedunlearn.methods.base import Method, Unlearner
from fedunlearn.protocols.base import Assignment, Protocol, Stage
from fedunlearn.records.rounds import ClientRows
from fedunlearn.server_methods.base import ServerMethod, ServerStep


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """Fine-tuning, the retrain oracle (mode `train`) or unlearning (mode `unlearn`); `probe`: see config.probe.ProbeRun.

    tofu_path: hub id, folder or `pocket:SEED`; muse_path: hub id or folder; one of the two. retain_logs_path: TOFU_EVAL.json or MUSE_EVAL.json of the oracle.
    task_name: folder under saves/<finetune|unlearn>/; a name, no path. requests: what is to be forgotten, in sequence; null: the rows of
    forget_split.
    """

    task_name: str
    mode: Literal["train", "unlearn", "probe"]
    tofu_path: str | None
    forget_split: str
    retain_split: str
    model: ModelConfig
    trainer: TrainerConfig
    strategy: ServerOptimizer | FlowerStrategy
    protocol: Protocol
    partition: PartitionConfig
    launcher: Launcher
    data: DataConfig
    method: Unlearner | None = None
    requests: tuple[RequestConfig, ...] | None = None
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    robust: Robust = field(default_factory=Off)
    gate: GateConfig = field(default_factory=GateConfig)
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    collator: CollatorConfig = field(default_factory=CollatorConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    retain_logs_path: str | None = None
    muse_path: str | None = None
    pocket_seed: int = 0
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        faults = [fault for holds, fault in (*self._rules(), *self._client_rules()) if not holds]
        faults += combination_faults(self._combination())
        lora = self.model.model_args.lora_config
        faults += [] if lora is None else self.variant_faults(variant_of(given(lora)))
        faults += self.protocol.faults(self.trainer.federated.num_rounds)
        if self.server_method is not None:
            faults += self.server_method.faults(self.trainer.federated.num_rounds)
        if faults:
            raise UserError(*faults)

    @property
    def server_method(self) -> ServerMethod | None:
        """The method, where it is the server's."""
        return self.method if isinstance(self.method, ServerMethod) else None

    @property
    def local_method(self) -> Method | None:
        """The loss that clients minimise where they unlearn; None where nobody does."""
        if isinstance(self.method, ServerMethod):
            return self.method.local
        return self.method if isinstance(self.method, Method) else None

    @property
    def home(self) -> ModelConfig:
        """The model as the client's own process holds it: on the CPU where others share the work, for it may be too large for a device."""
        return home_model(self.model, self.trainer.parallel)

    @property
    def total_rounds(self) -> int:
        """How many rounds there are: trainer.federated.num_rounds, but for methods that replay some of them."""
        num_rounds = self.trainer.federated.num_rounds
        return num_rounds if self.server_method is None else self.server_method.rounds(num_rounds)

    def origin_round(self, number: int) -> int:
        """The round whose seeds, draws, masks and learning rates a round has: its own, or where fine-tuning is replayed that one."""
        return number if self.server_method is None else self.server_method.origin_round(number)

    def draws_all(self, number: int) -> bool:
        """Whether a round asks every client that is there, whatever trainer.federated draws."""
        stage = Stage(round=number, num_rounds=self.total_rounds)
        return self.server_method is not None and self.server_method.draws_all(stage)

    def radius(self, number: int) -> float:
        """How far an owner's product may go in a round that it unlearns in; 0: no bound."""
        stage = Stage(round=number, num_rounds=self.total_rounds)
        return 0.0 if self.server_method is None else self.server_method.bound(stage)

    @property
    def round_deadline(self) -> float:
        """Seconds for all clients of a round together; infinite where the launcher keeps each client's time itself, or none."""
        return self.trainer.federated.round_timeout if self.launcher.clock == "round" else math.inf

    @property
    def replays(self) -> bool:
        """Whether its rounds are those of fine-tuning over again."""
        return self.server_method is not None and self.server_method.replays

    def assign(self, number: int, cohort: Sequence[ClientRows]) -> tuple[Assignment, ...]:
        """Gives the roles of a round."""
        who = self.protocol if self.server_method is None else self.server_method
        return who.assign(Stage(round=number, num_rounds=self.total_rounds), cohort, self.trainer.args.num_train_epochs)

    @property
    def ranks_differ(self) -> bool:
        """Whether clients have LoRA ranks or scales of their own."""
        return self.partition.ranks is not None or self.partition.lora_alphas is not None

    def variant_faults(self, variant: Variant) -> list[str]:
        """Gives a sentence for everything of this run beside which such an adapter would be wrong."""
        return variant_faults(self._combination(), variant, own_steps(self.server_method))

    def _combination(self) -> Combination:
        return combination_of(self.aggregation, self.strategy, self.robust, ranks_differ=self.ranks_differ)

    def _client_rules(self) -> list[tuple[bool, str]]:
        federated = self.trainer.federated
        rules = [
            (
                self.robust.min_updates <= federated.cohort_size,
                f"robust {type(self.robust).__name__} needs {self.robust.min_updates} updates a round, trainer.federated draws {federated.cohort_size} clients: "
                "draw more, lower robust.num_malicious, or choose robust=off",
            ),
            *trim_rules(self.aggregation, federated.cohort_size),
            (
                not federated.force_owners or self.mode == "unlearn",
                "trainer.federated.force_owners=true: nobody owns forget rows where nothing is unlearned; leave it false",
            ),
        ]
        joins = self.partition.joins or {}
        rules += [
            (
                all(
                    0 <= client < federated.num_clients and turn <= federated.num_rounds
                    for client, turn in joins.items()
                ),
                f"partition.joins={joins}: clients are 0 to {federated.num_clients - 1}, rounds 1 to {federated.num_rounds}",
            ),
            (
                federated.num_clients - sum(turn > 1 for turn in joins.values()) >= federated.min_clients,
                f"partition.joins={joins} leaves fewer clients in round 1 than trainer.federated.min_clients={federated.min_clients}: let more be there from the first",
            ),
        ]
        for key in ("ranks", "lora_alphas"):
            given = getattr(self.partition, key)
            rules.append(
                (
                    given is None or len(given) == federated.num_clients,
                    f"partition.{key} has {len(given or ())} entries, trainer.federated.num_clients={federated.num_clients}: give one a client, or null",
                )
            )
        return rules

    def _alternate_rules(self) -> list[tuple[bool, str]]:
        wanted = None if self.local_method is None else self.local_method.alternates
        name = type(self.method).__name__
        return [
            (
                (self.data.idk_path is not None) == (wanted == "idk"),
                f"method {name} needs refusals and data.idk_path is null: name a file of them, one a line, or data.idk_path=builtin (a short list of ours)"
                if wanted == "idk"
                else f"data.idk_path={self.data.idk_path!r} beside method {name}, which reads no refusals: leave it null, or choose method=idk_dpo",
            ),
            (
                (self.data.alternates_path is not None) == (wanted == "pairs"),
                f"method {name} needs alternate answers and data.alternates_path is null: name a file of JSON lines with row and alternate"
                if wanted == "pairs"
                else f"data.alternates_path={self.data.alternates_path!r} beside method {name}, which reads no such answers: leave it null, or choose method=dpo",
            ),
        ]

    def _request_rules(self) -> list[tuple[bool, str]]:
        several = self.requests is not None and len(self.requests) > 1
        return [
            (
                self.requests != (),
                "requests=[] asks for nothing: name at least one, or null (the rows of forget_split)",
            ),
            (
                self.requests is None or self.data.rows != "full",
                "requests are given, but fine-tuning on data.rows='full' leaves nothing out: they belong to unlearning, and to the oracle (data=retain)",
            ),
            (
                not (several and self.mode == "unlearn" and self.retain_logs_path),
                f"retain_logs_path={self.retain_logs_path!r} beside several requests: each has an oracle of its own; leave it null and evaluate each run with its own log",
            ),
        ]

    def _server_rules(self) -> list[tuple[bool, str]]:
        server = self.server_method
        if server is None:
            return []
        stages = (Stage(round=number, num_rounds=self.total_rounds) for number in range(1, self.total_rounds + 1))
        own = [server.step(stage) is ServerStep.OWN for stage in stages]
        return [
            *server_method_rules(server, self.protocol, self.strategy, len(self.requests or ()), self.ranks_differ),
            *own_step_rules(server, own, self.aggregation, self.strategy, self.robust),
        ]

    def _moves_by_hand(self) -> bool:
        """Whether clients change gradients or parameters beside what the optimiser does."""
        return isinstance(self.strategy, FedProx) or any(self.radius(n) for n in range(1, self.total_rounds + 1))

    def _rules(self) -> list[tuple[bool, str]]:
        unlearn = self.mode == "unlearn"
        want = "FederatedUnlearningTrainer" if unlearn else "FederatedTrainer"
        rows = ("forget_and_retain",) if unlearn else ("full", "retain")
        return [
            task_name_rule(self.task_name),
            (
                self.trainer.name == want,
                f"trainer.name={self.trainer.name!r} does not fit mode={self.mode!r}: choose trainer={want}, or the other --config-name",
            ),
            (
                self.data.rows in rows,
                f"data.rows={self.data.rows!r} does not fit mode={self.mode!r}: allowed here: {', '.join(rows)}",
            ),
            (
                (self.method is not None) == unlearn,
                "method must be given for unlearning (unlearn-lora.yaml) and only there",
            ),
            (
                self.protocol.unlearns == unlearn,
                f"protocol {type(self.protocol).__name__} does not fit mode={self.mode!r}",
            ),
            (
                not unlearn or not (isinstance(self.strategy, FlowerStrategy) and self.strategy.reads_losses),
                f"strategy {getattr(self.strategy, 'target', '')} averages by training losses, which unlearning may drive below 0: "
                "choose another strategy for mode='unlearn'",
            ),
            (
                self.model.model_args.use_lora,
                "model.model_args.use_lora=false in a federated run: only adapters travel; set use_lora=true",
            ),
            *benchmark_rules(self.tofu_path, self.muse_path, self.eval, self.requests),
            *raw_text_rules(self.muse_path, self.method, self.local_method, self.protocol),
            *self._alternate_rules(),
            *self._request_rules(),
            *self._server_rules(),
            *training_rules(self.trainer, self.mode, self.launcher, self._moves_by_hand()),
            *adalora_rules(
                self.model.model_args.lora_config, self.trainer, self.ledger, len(self.requests or ()) if unlearn else 1
            ),
            (
                not (self.overwrite and self.resume),
                "overwrite=true beside resume=true: choose one (start anew, or go on)",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class EvalRun:
    """Evaluation of a base, an adapter or a run; the result goes to saves/eval/<task_name>/.

    adapters: several instead of the one that the model names, one evaluation each (`<task_name>.1`, ...); null: that one.
    lm_eval: what lm-evaluation-harness asks besides; null: nothing. parallel: `tp` evaluates the merged model over several processes.
    """

    task_name: str
    mode: Literal["eval"]
    tofu_path: str | None
    forget_split: str
    retain_split: str
    model: ModelConfig
    launcher: Launcher
    requests: tuple[RequestConfig, ...] | None = None
    eval: EvalConfig = field(default_factory=EvalConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    retain_logs_path: str | None = None
    muse_path: str | None = None
    pocket_seed: int = 0
    overwrite: bool = False
    resume: bool = False
    max_length: int = 512
    adapters: tuple[str, ...] | None = None
    lm_eval: LmEvalConfig | None = None
    parallel: Parallel = "none"

    @property
    def home(self) -> ModelConfig:
        """See TrainRun.home."""
        return home_model(self.model, self.parallel)

    def __post_init__(self) -> None:
        rules = [
            task_name_rule(self.task_name),
            *benchmark_rules(self.tofu_path, self.muse_path, self.eval, self.requests),
            (
                self.adapters is None or bool(self.adapters),
                "adapters=[] names none: give their paths, or null (what the model names)",
            ),
            (
                len(set(self.adapters or ())) == len(self.adapters or ()),
                f"adapters={list(self.adapters or ())} names one twice: give each once",
            ),
            (
                self.adapters is None or self.model.model_args.lora_model_path is None,
                f"model.model_args.lora_model_path={self.model.model_args.lora_model_path!r} beside adapters, which stand in its place: name it among them, or leave it null",
            ),
            (
                bool(self.eval.metrics) or self.lm_eval is not None,
                "eval.metrics is empty and lm_eval null: nothing would be evaluated; name metrics, or choose eval=tofu",
            ),
            *evaluation_rules(self.parallel, self.eval, self.lm_eval),
            (self.max_length >= 2, f"max_length={self.max_length} must be at least 2 tokens"),
            (
                not self.eval.in_rounds,
                "eval.every_n_rounds and eval.clients_every_n_rounds: an evaluation has no rounds; leave them null",
            ),
        ]
        faults = [fault for holds, fault in rules if not holds]
        if faults:
            raise UserError(*faults)
