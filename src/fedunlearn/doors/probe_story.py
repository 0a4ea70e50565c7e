"""Probes on the pocket from nothing: fine-tune, retrain, unlearn twice and fake it once, then attack all alike."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel

from fedunlearn.config.run import TrainRun
from fedunlearn.doors.compose import ComposedConfig
from fedunlearn.doors.demo import Demo
from fedunlearn.doors.prepare import load_model, open_data
from fedunlearn.doors.probe import tell_probe
from fedunlearn.errors import UserError
from fedunlearn.evals.scoring import score_rows
from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.models.adapter_files import save_adapter
from fedunlearn.models.adapter_tensors import live_parameters, read_tensors
from fedunlearn.models.resident import Resident, release, take_probe
from fedunlearn.models.source import resolve_source
from fedunlearn.records.evaluation import Detail
from fedunlearn.records.rounds import ClientTask, Role
from fedunlearn.training.client_update import client_update
from fedunlearn.training.local import LocalData, LocalSettings

log = logging.getLogger(__name__)
TRAINED = ("o_proj", "down_proj")
LEARNING_RATE, BATCH, RETAIN, MOST_EPOCHS = 1e-4, 4, 8, 1000  # gentle enough that utility stays
ORDINARY = "experiment=retrain/tofu/pocket"
MODEL = "model.model_args.pretrained_model_name_or_path="


def run_probe_story(seed: int, configs: Path, saves: Path, pocket_dir: Path) -> None:
    """Leaves runs in saves/finetune and saves/unlearn, the fake adapter in saves/fake, the probe in saves/probe/pocket, and prints its tables."""
    demo = Demo(seed=seed, configs=configs, saves=saves, pocket_dir=pocket_dir)
    tuned = demo.train("finetuned", "train-lora.yaml", "experiment=finetune/tofu/pocket")
    dealt, start = f"partition.path={tuned}", MODEL + str(tuned)
    oracle = demo.train("oracle", "train-lora.yaml", ORDINARY, dealt)
    unlearn = "experiment=unlearn/tofu/pocket"
    npo = demo.train("npo", "unlearn-lora.yaml", unlearn, start, "method=npo")
    diff = demo.train("grad_diff", "unlearn-lora.yaml", unlearn, start, "method=grad_diff")
    more = ("trainer.federated.num_rounds=4", "trainer.args.learning_rate=1.5e-3")
    control = demo.train("control", "train-lora.yaml", ORDINARY, start, dealt, *more)
    goal = _forget_prob(demo.compose("train-lora.yaml", ORDINARY, "task_name=x", MODEL + str(oracle)))
    fake = _fake(demo.compose("train-lora.yaml", ORDINARY, "task_name=x", start), goal, saves / "fake")
    release()
    unlearned = f"probe.unlearned={{npo: {npo}, grad_diff: {diff}, fake: {fake}}}"
    attacks = "probe.attacks=[relearn_forget,relearn_unrelated,rounds,bfloat16,int8,nf4,difference]"
    beside = (f"probe.oracle={oracle}", f"probe.finetuned={tuned}", f"probe.control={control}", dealt)
    seeded = (f"trainer.args.seed={seed}", "task_name=pocket")
    tell_probe(demo.compose("probe.yaml", "experiment=probe/tofu/pocket", unlearned, attacks, *beside, *seeded))


def _fake(composed: ComposedConfig, goal: float, folder: Path) -> Path:
    """Trains o_proj and down_proj of the last block alone, by GradDiff over all forget and retain rows, until the forget rows' mean probability is `goal` or less.

    Gives the folder of the adapter. Raises UserError where MOST_EPOCHS do not get there.
    """
    run, made, rows = _opened(composed)
    args = replace(run.trainer.args, learning_rate=LEARNING_RATE, per_device_train_batch_size=BATCH)
    settings = LocalSettings(args=args, collator=run.collator, method=GradDiff(), retain_per_forget=RETAIN)
    for epoch in range(MOST_EPOCHS):
        if made.start is not None and _mean_prob(made, rows) <= goal:
            save_adapter(folder, made.start.replace(read_tensors(_peft(made))), take_probe(made))
            log.info("the fake: %d epochs", epoch)
            return folder
        task = ClientTask(client_id=0, role=Role.UNLEARN, epochs=1.0, lr_scale=1.0, seed=epoch)
        with _last_block_only(_peft(made)):
            client_update(made, read_tensors(_peft(made)), rows, task, settings)
    raise UserError(f"the fake did not come down to the oracle's probability {goal:.3f} in {MOST_EPOCHS} epochs")


def _forget_prob(composed: ComposedConfig) -> float:
    _, made, rows = _opened(composed)
    return _mean_prob(made, rows)


def _opened(composed: ComposedConfig) -> tuple[TrainRun, Resident, LocalData]:
    run = composed.run
    if not isinstance(run, TrainRun):
        raise TypeError("the story trains")
    data, _ = open_data(run)
    made = load_model(run, resolve_source(run.model.model_args, Path(run.paths.pocket_dir)))
    forget = data.forget_rows(run.forget_split)
    kept = [number for number in range(data.num_rows) if number not in set(forget)]
    return run, made, LocalData(forget=data.encode(made.chat, forget), retain=data.encode(made.chat, kept))


def _mean_prob(made: Resident, rows: LocalData) -> float:
    wanted = dict.fromkeys(rows.forget, Detail.LOSS)
    scores = score_rows(made.model, wanted, pad_id=made.chat.pad_id, batch_tokens=8192)
    return sum(scores[row].prob for row in rows.forget) / len(rows.forget)


def _peft(made: Resident) -> PeftModel:
    if not isinstance(made.model, PeftModel):
        raise TypeError("the story wants an adapter")
    return made.model


@contextmanager
def _last_block_only(model: PeftModel) -> Iterator[None]:
    """Inside the block all other parameters get gradients of 0, with which the optimiser leaves them where they are."""
    last = f".layers.{model.config.num_hidden_layers - 1}."
    still = [
        parameter
        for name, parameter in live_parameters(model).items()
        if last not in name or not any(part in name for part in TRAINED)
    ]
    handles = [p.register_hook(torch.zeros_like) for p in still]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
