"""Runs on the tiny pocket through the doors' own functions, and what tests read from their folders."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from fedunlearn.data.pocket.build import PocketPaths
from fedunlearn.doors.compose import ComposedConfig, compose
from fedunlearn.doors.stages import run_central, run_federated

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SMALL = (
    "trainer.federated.num_clients=4",
    "trainer.federated.num_rounds=2",
    "trainer.args.num_train_epochs=1",
    "trainer.args.per_device_train_batch_size=8",
    "model.model_args.lora_config.r=4",
    "eval.at_end=false",
)


def tiny(pocket: PocketPaths, saves: Path, kind: str, task: str, *overrides: str) -> ComposedConfig:
    """Composes experiment={finetune,retrain,unlearn}/tofu/pocket for the tiny pocket; later overrides win."""
    name = "unlearn-lora.yaml" if kind == "unlearn" else "train-lora.yaml"
    return compose(CONFIGS, name, [f"experiment={kind}/tofu/pocket", *places(pocket, saves, task), *SMALL, *overrides])


def places(pocket: PocketPaths, saves: Path, task: str) -> tuple[str, ...]:
    """Overrides that put a run into `saves`, on the tiny pocket."""
    return (
        f"tofu_path={pocket.data}",
        f"model.model_args.pretrained_model_name_or_path={pocket.model}",
        f"paths.saves_dir={saves}",
        f"paths.cache_dir={saves}/cache",
        f"paths.pocket_dir={saves}/pocket",
        f"task_name={task}",
    )


def finetune(pocket: PocketPaths, saves: Path, task: str = "ft", *overrides: str) -> Path:
    """Fine-tunes in the federation and gives the run's folder."""
    run_federated(tiny(pocket, saves, "finetune", task, *overrides))
    return saves / "finetune" / task


def unlearn(pocket: PocketPaths, saves: Path, start: Path | None, task: str = "un", *overrides: str) -> Path:
    """Unlearns from a run (None: from a fresh adapter) and gives the run's folder."""
    named = () if start is None else (f"model.model_args.pretrained_model_name_or_path={start}",)
    run_federated(tiny(pocket, saves, "unlearn", task, *named, *overrides))
    return saves / "unlearn" / task


def central(pocket: PocketPaths, saves: Path, kind: str, task: str, *overrides: str) -> Path:
    """Runs the central baseline and gives its folder."""
    run_central(tiny(pocket, saves, kind, task, *overrides))
    return saves / ("unlearn" if kind == "unlearn" else "finetune") / task


def adapter_bytes(run: Path) -> bytes:
    """The result's weights file, as bytes."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def adapter_tensors(run: Path) -> dict[str, torch.Tensor]:
    """The result's weights by name."""
    return load_file(run / "adapter" / "adapter_model.safetensors")


def history(run: Path) -> list[dict]:
    """history.jsonl as a list of objects."""
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
