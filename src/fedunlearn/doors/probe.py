"""Does an unlearning hold? Every model attacked alike, beside the oracle: relearning, casts of the weights, more rounds, the difference of two adapters."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import cast

from rich.console import Console

from fedunlearn.aggregation.factors import plain_of, side_by_side
from fedunlearn.config.probe import BESIDE, CASTS, MEASURED, UTILITY, Attack, ProbeRun
from fedunlearn.config.run import TrainRun
from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.data.opened import open_tofu
from fedunlearn.data.requests import evaluated_request
from fedunlearn.data.tofu import Tofu
from fedunlearn.doors.compose import ComposedConfig, changed, model_from
from fedunlearn.doors.measure import store_of
from fedunlearn.doors.prepare import at_model, load_model, tried
from fedunlearn.doors.stages import run_federated
from fedunlearn.errors import UserError
from fedunlearn.evals.dataset import Sets
from fedunlearn.evals.evaluation import evaluate_sets
from fedunlearn.evals.evidence import Passes
from fedunlearn.evals.store import EvalStore
from fedunlearn.evals.suites import read_suite
from fedunlearn.federation.site import set_threads
from fedunlearn.files import write_json
from fedunlearn.metrics.base import in_order
from fedunlearn.models.adapter_files import load_adapter, saved_hash
from fedunlearn.models.adapter_tensors import ACTIVE, read_tensors, write_tensors
from fedunlearn.models.casts import cast_of, merge_and_cast
from fedunlearn.models.export import unit_scaled
from fedunlearn.models.layers import layers_of
from fedunlearn.models.resident import Resident, release
from fedunlearn.models.sidecar import put_sidecar
from fedunlearn.models.skeleton import skeleton
from fedunlearn.models.source import ModelSource, resolve_source
from fedunlearn.records.adapter import Adapter, Tensors
from fedunlearn.records.probe import Figures, Leak, Probed, Subject
from fedunlearn.records.rounds import ClientTask, Role
from fedunlearn.reporting.probes import probe_json, show_probe, write_tables
from fedunlearn.reporting.run_folder import DONE, config_hash, judge_folder, make_folder, provenance, run_path
from fedunlearn.reporting.run_lock import run_lock
from fedunlearn.seeds import seed_of
from fedunlearn.training.client_update import client_update
from fedunlearn.training.local import LocalData, LocalSettings

log = logging.getLogger(__name__)
FILE = "PROBE.json"
FORGET_PROB = MEASURED[0]


def run_probe(composed: ComposedConfig) -> Probed:
    """Attacks every model that the config names and leaves figures and tables in saves/probe/<task_name>/.

    Raises UserError with nothing written for a folder that holds another probe, a path that is no model, and a backend that is not there.
    """
    run = composed.run
    if not isinstance(run, ProbeRun):
        raise UserError(f"mode={run.mode!r} is no probe: give --config-name=probe.yaml")
    with run_lock(run_path(run)):
        return _probe(composed, run)


def _probe(composed: ComposedConfig, run: ProbeRun) -> Probed:
    set_threads(run)
    prober = Prober(composed, run)
    prober.check()
    found = prober.probed()
    hashes = {name: saved_hash(prober.source(path).adapter) for name, path in run.probe.subjects.items() if path}

    def fill(place: Path) -> None:
        write_json(place / "provenance.json", {**provenance(run, hashes), "config_hash": config_hash(composed.plain)})
        write_json(place / FILE, probe_json(found))
        write_tables(found, place)
        write_json(place / DONE, {})

    make_folder(run, composed.plain, composed.text, fill)
    return found


def tell_probe(composed: ComposedConfig) -> None:
    """Runs a probe, prints its tables and says where they lie."""
    found, console = run_probe(composed), Console(highlight=False)
    show_probe(found, console)
    console.print(f"result: {run_path(composed.run)}", soft_wrap=True)


@dataclass(frozen=True, eq=False)
class Prober:
    """One probe under way. A model is loaded for each attack anew: an attack leaves nothing of itself to the next."""

    composed: ComposedConfig
    run: ProbeRun

    def check(self) -> None:
        """Raises UserError, all faults at once, for what is known before a model is loaded."""
        chosen, faults = self.run.probe, list[str]()
        works: list[Callable[[], object]] = [lambda: judge_folder(self.run, self.composed.plain), lambda: self.sets]
        named = (*chosen.subjects.values(), chosen.finetuned, chosen.control)
        works += [partial(self._whole, path) for path in named if path]
        works += [partial(cast_of, name, chosen.backend) for name in CASTS if name in chosen.attacks]
        for work in works:
            tried(faults, work)
        if faults:
            raise UserError(*dict.fromkeys(faults))

    def _whole(self, path: str) -> None:
        """Raises UserError for a path that names nothing, an adapter that is damaged, and for `difference` where it is none."""
        source = self.source(path)
        self._check_casts(path, source)
        folder = source.adapter
        if folder is not None:
            plain = plain_of(load_adapter(folder)[0].tensors)
            if plain and "difference" in self.run.probe.attacks:
                raise UserError(
                    f"probe.attacks has difference, which compares products, and {path!r} has tensors that are none (first: {plain[0]!r}): leave it out"
                )
        elif "difference" in self.run.probe.attacks:
            raise UserError(
                f"probe.attacks has difference, and {path!r} is no adapter, of which two are compared: leave it out"
            )

    def _check_casts(self, path: str, source: ModelSource) -> None:
        casts = [attack for attack in self.run.probe.attacks if attack in CASTS]
        experts = layers_of(skeleton(source.base)).experts if casts else {}
        if experts:
            raise UserError(
                f"probe.attacks={casts} beside {path!r}, whose base has fused experts ({min(experts)}): linear layers are cast, those are none; leave these attacks out"
            )

    def probed(self) -> Probed:
        """Runs every attack on every model."""
        subjects = [self._subject(name, path) for name, path in self.run.probe.subjects.items()]
        start = subjects[0].before[FORGET_PROB] or 0.0
        marked = [replace(one, below=(one.before[FORGET_PROB] or 0.0) < start) for one in subjects]
        return Probed(subjects=tuple(marked), leaks=tuple(self._leaks()))

    def _subject(self, name: str, path: str | None) -> Subject:
        log.info("%s: before any attack", name)
        before = self._measured(self._loaded(path), (*MEASURED, *BESIDE, UTILITY), keep=True)
        after: dict[str, Figures] = {}
        for attack in self.run.probe.attacks:
            if attack != "difference":
                log.info("%s: %s", name, attack)
                after[attack] = self._measured(self._attacked(name, path, attack), (*MEASURED, *BESIDE))
        return Subject(name=name, before=before, after=after)

    def _attacked(self, name: str, path: str | None, attack: Attack) -> Resident:
        """The model after an attack."""
        if attack == "rounds":
            return self._loaded(str(self._more_rounds(name, path)))
        made = self._loaded(path)
        if attack == "bfloat16" or attack == "int8" or attack == "nf4":
            release()  # its base is about to be spoilt: whoever needs one loads it again
            merge_and_cast(made.model, cast_of(attack, self.run.probe.backend))
        else:
            self._relearn(made, self._rows_of(attack, made.chat))
        return made

    def _relearn(self, made: Resident, rows: tuple[EncodedRow, ...]) -> None:
        """Trains the adapter on rows with fine-tuning's own arguments and a fresh optimiser; the same rows and seeds for every model."""
        run, start = self.run, read_tensors(made.model)
        task = ClientTask(
            client_id=0,
            role=Role.FINETUNE,
            epochs=run.probe.relearn_epochs,
            lr_scale=1.0,
            seed=seed_of("relearn", run.trainer.args.seed),
        )
        settings = LocalSettings(args=run.trainer.args, collator=run.collator, method=None, guard=run.trainer.guard)
        done = client_update(made, start, LocalData(forget=(), retain=rows), task, settings)
        write_tensors(made.model, done.tensors)

    def _rows_of(self, attack: Attack, chat: ChatFormat) -> tuple[EncodedRow, ...]:
        """The forget rows; or for unrelated text real authors and world facts."""
        tofu = self.tofu
        if attack == "relearn_forget":
            request = evaluated_request(self.run, None, tofu)
            return tofu.encode(chat, tofu.forget_rows(self.run.forget_split) if request is None else request.rows)
        return tuple(
            chat.encode(row.question, row.answer, f"{split} row {i}")
            for split in ("real_authors", "world_facts")
            for i, row in enumerate(tofu.perturbed(split))
        )

    def _more_rounds(self, name: str, path: str | None) -> Path:
        """Goes on with ordinary federation on the retain rows; gives the run's folder."""
        plain = {key: value for key, value in self.composed.plain.items() if key != "probe"}
        trainer = cast("Mapping[str, Mapping[str, object]]", plain["trainer"])
        changes: dict[str, object] = {
            "mode": "train",
            "task_name": f"{self.run.task_name}.{name}",
            "trainer": {**trainer, "federated": {**trainer["federated"], "num_rounds": self.run.probe.rounds}},
            "eval": {**cast("Mapping[str, object]", plain["eval"]), "at_end": False},
            "overwrite": True,
            "resume": False,
        }
        if path is not None:
            changes["model"] = model_from(plain, path)
        leg = changed(replace(self.composed, plain=plain), changes)
        run_federated(leg)
        return Path(leg.run.paths.saves_dir) / "finetune" / leg.run.task_name

    def _leaks(self) -> list[Leak]:
        chosen = self.run.probe
        if chosen.finetuned is None:
            return []
        pairs = {**chosen.unlearned, **({} if chosen.control is None else {"control": chosen.control})}
        return [self._leak(name, path, chosen.finetuned) for name, path in pairs.items()]

    def _leak(self, name: str, after: str, before: str) -> Leak:
        """Puts U = s (B_after A_after - B_before A_before), both as exact stacks, beside a base whose own adapter adds nothing."""
        log.info("%s: difference", name)
        stacks = [unit_scaled(self._adapter(path)) for path in (after, before)]
        gained = side_by_side([stacks[0], _negated(stacks[1])])
        made = self._loaded(None)
        figures = []
        for stack in ({}, _negated(gained), gained):
            put_sidecar(made.model, stack, ACTIVE)
            figures.append(self._measured(made, (FORGET_PROB, *BESIDE)))
        put_sidecar(made.model, {}, ACTIVE)
        return Leak(name=name, base=figures[0], minus=figures[1], plus=figures[2])

    def _adapter(self, path: str) -> Adapter:
        folder = self.source(path).adapter
        if folder is None:
            raise UserError(f"{path!r} is a model without an adapter, and difference compares two adapters: name a run")
        return load_adapter(folder)[0]

    def _measured(self, made: Resident, names: tuple[str, ...], keep: bool = False) -> Figures:
        """Gives metrics of the model as it is. keep: what it says is kept, and read again, under what it depends on."""
        metrics = self.run.eval.metrics
        settings = replace(self.run.eval, metrics={name: metrics[name] for name in in_order(metrics, names)})
        store = store_of(made, made.start, Path(self.run.paths.cache_dir), settings.compat) if keep else EvalStore(None)
        found = evaluate_sets(Passes(made.model, made.chat, settings, store), self.sets, None, {})
        return {name: found[name].agg_value for name in names}

    def _loaded(self, path: str | None) -> Resident:
        made = load_model(self._run_at(path), self.source(path))
        if made.start is None:
            raise UserError("model.model_args.use_lora=false: a probe relearns by LoRA; set it to true")
        return made

    def source(self, path: str | None) -> ModelSource:
        """Finds a model's files. Raises UserError where there are none."""
        return resolve_source(self._run_at(path).model.model_args, Path(self.run.paths.pocket_dir))

    def _run_at(self, path: str | None) -> TrainRun:
        return self.run if path is None else at_model(self.run, path)

    @cached_property
    def tofu(self) -> Tofu:
        """The data."""
        tofu = open_tofu(str(self.run.tofu_path), Path(self.run.paths.pocket_dir))
        tofu.check_splits(self.run.forget_split, self.run.retain_split)
        return tofu

    @cached_property
    def sets(self) -> Sets:
        """The data sets that are measured."""
        request = evaluated_request(self.run, None, self.tofu)
        return read_suite(self.tofu, self.run.forget_split, self.run.eval, request).sets


def _negated(stack: Tensors) -> Tensors:
    return {name: -tensor if ".lora_B." in name else tensor for name, tensor in stack.items()}
