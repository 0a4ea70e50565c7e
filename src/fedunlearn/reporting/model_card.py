"""An adapter's model card: what it was made of and how it did, as a README.md that model hubs read."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedunlearn.aggregation.factors import modules_of
from fedunlearn.records.adapter import Adapter

LORA_KEYS = (
    "r",
    "lora_alpha",
    "target_modules",
    "target_parameters",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "bias",
    "modules_to_save",
)
TRAINER_KEYS = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """run: the config.json of the adapter's run, empty for a foreign adapter. hashes: of provenance.json. account: what the run cost. metrics: name -> value."""

    name: str
    adapter: Adapter
    run: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    account: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def card_text(card: Card) -> str:
    """Gives the README.md; what is not known is left out."""
    return "\n".join([*_front(card), *_what(card), *_how(card), *_figures(card), *_provenance(card)]) + "\n"


def _is_central(card: Card) -> bool:
    """Whether its run was the central baseline: one loop over all rows, for which no federation's settings acted."""
    return card.run.get("door") == "central"


def _base(card: Card) -> str:
    return str(card.adapter.peft_config.get("base_model_name_or_path") or "not named")


def _front(card: Card) -> Iterator[str]:
    tags = ["lora"]
    if card.run and not _is_central(card):
        tags.append("federated-learning")
    if card.run.get("mode") == "unlearn":
        tags.append("machine-unlearning")
    yield from ("---", f"base_model: {json.dumps(_base(card))}", "library_name: peft", "pipeline_tag: text-generation")
    yield from ("tags:", *(f"- {tag}" for tag in tags), "---", "", f"# {card.name}", "")


def _what(card: Card) -> Iterator[str]:
    config, tensors = card.adapter.peft_config, card.adapter.tensors
    parameters = sum(tensor.numel() for tensor in tensors.values())
    yield f"A LoRA adapter of {parameters:,} parameters in {len(modules_of(tensors))} modules, on the base `{_base(card)}`."
    yield from ("", "| LoRA | value |", "|---|---|")
    yield from (
        f"| {key} | {_cell(config[key])} |" for key in LORA_KEYS if config.get(key) not in (None, False, [], {})
    )


def _how(card: Card) -> Iterator[str]:
    run = card.run
    if not run:
        yield from ("", "Its run is not known: nothing can be told of how it was trained.")
        return
    args = run["trainer"].get("args", {})
    rows: dict[str, object] = {
        "mode": run.get("mode"),
        "method": _named(run.get("method")),
        "forget_split": run.get("forget_split"),
        "retain_split": run.get("retain_split"),
        "requests": run.get("requests"),
        **({} if _is_central(card) else _federated(run)),
        **{key: args.get(key) for key in TRAINER_KEYS},
    }
    yield from ("", "## How it was made", "", "| key | value |", "|---|---|")
    yield from (f"| {key} | {_cell(value)} |" for key, value in rows.items() if value is not None)
    if card.account:
        spent, whose = card.account, "work" if _is_central(card) else "clients' work"
        yield from (
            "",
            f"It cost {spent['num_steps']} optimiser steps, {spent['num_tokens'] + spent['num_reference_tokens']:,} tokens and {spent['seconds']:.1f} s of {whose}.",
        )


def _federated(run: Mapping[str, Any]) -> Mapping[str, object]:
    federated = run["trainer"].get("federated", {})
    return {
        "protocol": _named(run.get("protocol")),
        "clients": federated.get("num_clients"),
        "rounds": federated.get("num_rounds"),
        "strategy": _named(run.get("strategy")),
        "aggregation": run.get("aggregation", {}).get("reducer"),
    }


def _figures(card: Card) -> Iterator[str]:
    if card.metrics:
        yield from ("", "## Evaluation", "", "| metric | value |", "|---|---|")
        yield from (f"| {name} | {value:.4g} |" for name, value in sorted(card.metrics.items()))
    elif card.run:
        yield from ("", "It has not been evaluated in its run.")


def _provenance(card: Card) -> Iterator[str]:
    rows = {
        "adapter (sha256 of its tensors)": card.adapter.tensor_hash,
        "base (fingerprint)": card.adapter.base_fingerprint,
        **{
            key: value
            for key, value in card.hashes.items()
            if key in ("data", "partition", "request", "source") and value != "none"
        },
        "git commit": card.git_commit,
        **card.versions,
    }
    yield from ("", "## Provenance", "", "| what | value |", "|---|---|")
    yield from (f"| {key} | {_cell(value)} |" for key, value in rows.items() if value)


def _named(block: object) -> str | None:
    """A `_target_` block in one line: the class and its own parameters."""
    if not isinstance(block, Mapping) or "_target_" not in block:
        return None
    own = [f"{key}={_cell(value)}" for key, value in block.items() if key != "_target_" and value is not None]
    return str(block["_target_"]).rpartition(".")[2] + (f" ({', '.join(own)})" if own else "")


def _cell(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    text = json.dumps(value, sort_keys=True) if isinstance(value, Mapping) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
