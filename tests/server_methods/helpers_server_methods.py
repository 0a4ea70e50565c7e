"""Whole runs of server-side methods: made once by name, and what is measured of them as products outside the code that made them."""

import json
import math
import shutil

import pytest
from helpers_runs import adapter_tensors, finetune, history, unlearn

from fedunlearn.aggregation.factors import modules_of, scales_of
from fedunlearn.errors import UserError
from fedunlearn.federation.block_store import BlockStore
from fedunlearn.federation.checkpoint import Checkpoint, read_checkpoint
from fedunlearn.federation.ledger import Ledger
from fedunlearn.federation.start import load_start

FOUR = ("trainer.federated.num_rounds=4", "trainer.federated.keep_rounds=all")
KEPT = (*FOUR, "ledger.enabled=true")
REPLAY = ("experiment=replay/tofu/pocket", *FOUR)
LATE = ("partition.joins={3: 3}",)
KEEP = "ledger.purge=false"
EXACT = {
    "flora": ("aggregation=flora",),
    "fedex": ("aggregation=fedex",),
    "fedsvd": ("aggregation=fedsvd",),
    "ffa": ("aggregation=ffa",),
    "rolora": ("aggregation=rolora",),
    "prox": ("aggregation=flora", "strategy=fedprox"),
}
ONE = ("trainer.federated.num_rounds=1",)


class Runs:
    """Runs of a test module by name, each made once; no request purges the ledger that the next one reads."""

    def __init__(self, pocket, saves):
        self.pocket, self.saves = pocket, saves

    def tuned(self, name, *overrides):
        """A fine-tuning run, or an oracle."""
        made = self.saves / "finetune" / name
        return made if made.is_dir() else finetune(self.pocket, self.saves, name, *overrides)

    def unlearned(self, name, start, *overrides):
        """An unlearning run from another run."""
        made = self.saves / "unlearn" / name
        return made if made.is_dir() else unlearn(self.pocket, self.saves, start, name, KEEP, *overrides)

    def refused(self, start, *overrides, match=None):
        """The faults with which an unlearning run is refused; nothing of it is written."""
        folder = self.saves / "refused"
        shutil.rmtree(folder, ignore_errors=True)
        with pytest.raises(UserError, match=match) as caught:
            unlearn(self.pocket, folder, start, "x", KEEP, *overrides)
        assert not (folder / "unlearn").exists()
        return caught.value.faults


def hashes(run):
    """Round -> hash of the adapter after it."""
    return {line["round"]: line["adapter_hash"] for line in history(run)}


def roles(run, number):
    line = next(line for line in history(run) if line["round"] == number)
    return {client["client_id"]: client["role"] for client in line["clients"]}


def products(tensors, scales):
    """s B A by module path, float64."""
    return {m.name: scales[m.name] * tensors[m.b].double() @ tensors[m.a].double() for m in modules_of(tensors)}


def exported(run):
    """What a run's result adds to the base."""
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    tensors = adapter_tensors(run)
    return products(tensors, scales_of(config, tensors))


def run_scales(run):
    start = load_start(run).adapter
    return scales_of(start.peft_config, start.tensors)


def whole(run, checkpoint: Checkpoint):
    """What a checkpoint's factors and side-car add to the base."""
    scales = run_scales(run)
    blocks = BlockStore(run / "sidecar").read(checkpoint.blocks)
    beside = products(blocks, dict.fromkeys(scales, 1.0)) if blocks else dict.fromkeys(scales, 0.0)
    return {path: delta + beside[path] for path, delta in products(checkpoint.state.adapter, scales).items()}


def at_round(run, number):
    return whole(run, read_checkpoint(run / f"rounds/{number:04d}"))


def minus(one, other, share=1.0):
    return {path: one[path] - share * other[path] for path in one}


def norm(deltas):
    return math.sqrt(sum(float(delta.square().sum()) for delta in deltas.values()))


def apart(one, other):
    """The largest difference of any entry over the largest entry."""
    largest = max(float(delta.abs().max()) for delta in other.values())
    return max(float((one[path] - other[path]).abs().max()) for path in one) / largest


def contributions(run, clients):
    """sum over rounds of p_k U_k of these clients, from the ledger's tensors."""
    ledger, scales = Ledger(run), run_scales(run)
    total, old = dict.fromkeys(scales, 0.0), {}
    for entry in ledger.entries():
        if entry.kind == "global":
            old = ledger.read(entry)
        elif entry.kind == "update" and entry.client_id in clients:
            new = {**old, **ledger.read(entry)}
            moved = minus(products(new, scales), products(old, scales))
            total = {path: total[path] + entry.weight * moved[path] for path in total}
    return total
