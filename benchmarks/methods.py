"""What unlearning steps cost beside fine-tuning steps: memory by the allocator's events, CPU time in pairs, reference forwards counted.

    python benchmarks/methods.py [--json] [--repeats 9] [--threads 1]

A random Llama of 10 M parameters, LoRA of rank 16 on every linear layer, rows of 24 prompt and 40 label tokens. Exit code 1 where a bound is passed:
an NPO step on 8 forget and 8 retain rows peaks at 1.25 times a fine-tuning step on 8 rows; NPO with kept sums takes 0.95 times the CPU time of NPO with a reference
forward each step (0.80 without a retain term; the floors are 0.8 and 0.67, a forward being a third of a step); each forget row has one reference forward a run;
RMU leaves the base as it was. About a minute.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedunlearn.config.data import CollatorConfig
from fedunlearn.config.model import TemplateArgs
from fedunlearn.config.trainer import TrainArgs
from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.methods.base import Method
from fedunlearn.methods.npo import NPO
from fedunlearn.methods.rmu import RMU
from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses
from fedunlearn.models.adapter_tensors import read_tensors
from fedunlearn.models.initial import draw_fresh
from fedunlearn.models.lora import attach_lora, hold_reference
from fedunlearn.models.lora_config import plain_config
from fedunlearn.models.resident import Resident
from fedunlearn.records.adapter import Adapter, Weights, hash_tensors
from fedunlearn.records.rounds import ClientTask, Role
from fedunlearn.training.charges import Charges
from fedunlearn.training.client_update import client_update
from fedunlearn.training.local import LocalData, LocalResult, LocalSettings
from fedunlearn.training.reference import ReferenceSums

VOCAB, PROMPT, LABELS, ROWS = 8_000, 24, 40, 8
BOUNDS = {"memory": 1.25, "cached": 0.95, "cached_alone": 0.80}


@dataclass(frozen=True, kw_only=True)
class LiveNPO(NPO):
    """NPO whose reference is run again in every step: the way that is compared with."""

    @property
    def needs(self) -> frozenset[Need]:
        """Token losses, and the reference's logits."""
        return frozenset({Need.NLL, Need.REFERENCE_LOGITS})

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """NPO's, on sums made of these logits."""
        nll = F.cross_entropy(batch.the(Need.REFERENCE_LOGITS), batch.labels, reduction="none")
        margin = self.beta * (batch.row_sums() - batch.sum_by_row(nll))
        return -(2.0 / self.beta) * F.logsigmoid(margin).sum() / totals.num_rows


@dataclass(frozen=True, kw_only=True)
class Measured:
    """memory: peak of an NPO step over that of a fine-tuning step. cached, cached_alone: CPU time of NPO with kept sums over NPO with a reference forward
    each step, with and without retain term. reference_forwards: rows run through the reference in two rounds, over forget rows. base_unchanged: under RMU.
    """

    memory: float
    npo_mib: float
    finetune_mib: float
    cached: float
    cached_alone: float
    reference_forwards: float
    base_unchanged: bool

    @property
    def faults(self) -> list[str]:
        """What passes its bound."""
        found = [
            f"{key}={getattr(self, key):.3f} > {bound}" for key, bound in BOUNDS.items() if getattr(self, key) > bound
        ]
        found += [f"reference_forwards={self.reference_forwards} a row"] if self.reference_forwards != 1 else []
        return found + ([] if self.base_unchanged else ["RMU changed the base"])


def made_model(**changes: int) -> Resident:
    """The model, its adapter and a tokenizer that nothing is tokenised with. changes: of its config."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    config = LlamaConfig(**{**sizes, **changes}, tie_word_embeddings=True)
    base = LlamaForCausalLM(config).requires_grad_(False)
    base.name_or_path = "made up"
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = attach_lora(base, lora)
    draw_fresh(model, 0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="a")
    tags = dict.fromkeys(("user_start_tag", "user_end_tag", "asst_start_tag", "asst_end_tag"), "")
    chat = ChatFormat(tokenizer, TemplateArgs(apply_chat_template=False, **tags), 128)
    start = Adapter(read_tensors(model), plain_config(lora), "made up")
    return Resident(model.eval(), chat, "made up", "made up", torch.device("cpu"), start)


def made_rows(seed: int) -> tuple[EncodedRow, ...]:
    """Eight rows of equal length."""
    ids = torch.randint(1, VOCAB, (ROWS, PROMPT + LABELS), generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(EncodedRow(tuple(row), PROMPT) for row in ids)


@dataclass(frozen=True, eq=False, kw_only=True)
class Bench:
    """One model, and steps of eight rows. cache: where sums are kept."""

    made: Resident
    cache: Path

    def train(self, method: Method | None, steps: int = 1, sums: ReferenceSums | None = None) -> LocalResult:
        """Trains for so many optimiser steps; with a method it unlearns."""
        start = self.made.start
        if start is None:
            raise ValueError("the model has no adapter")
        role = Role.FINETUNE if method is None else Role.UNLEARN
        task = ClientTask(client_id=0, role=role, epochs=1.0, lr_scale=1.0, seed=1)
        args = TrainArgs(
            learning_rate=1e-3, max_steps=steps, per_device_train_batch_size=ROWS, lr_scheduler_type="constant"
        )
        data = LocalData(forget=made_rows(1), retain=made_rows(2), reference=sums)
        settings = LocalSettings(args=args, collator=CollatorConfig(), method=method)
        return client_update(self.made, start.tensors, data, task, settings)

    def sums(self) -> ReferenceSums:
        """Sums under the start adapter, kept in the cache."""
        return ReferenceSums(self.made, self.reference, self.cache, False, Charges(None, 1))

    @property
    def reference(self) -> Weights:
        """The start adapter."""
        if self.made.start is None:
            raise ValueError("the model has no adapter")
        return self.made.start.weights


def peak_mib(work: Callable[[], object]) -> float:
    """Gives the highest sum of the allocator's events while `work` runs, MiB above where it stood."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        work()
    held = peak = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


@contextmanager
def silent_rows(made: Resident) -> Iterator[list[int]]:
    """Inside the block the rows of every forward without gradient are listed."""
    seen: list[int] = []

    def note(module: object, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        if not torch.is_grad_enabled():
            seen.append(len(kwargs["input_ids"]))

    handle = made.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def paired(first: Callable[[], object], second: Callable[[], object], repeats: int) -> float:
    """Gives CPU time of the first over that of the second, the best of each in interleaved pairs."""
    best = [float("inf"), float("inf")]
    for _ in range(repeats):
        for place, work in enumerate((first, second)):
            began = time.process_time()
            work()
            best[place] = min(best[place], time.process_time() - began)
    return best[0] / best[1]


def measure(bench: Bench, repeats: int) -> Measured:
    """Makes all measurements."""
    with silent_rows(bench.made) as ran:
        bench.train(NPO(), sums=bench.sums())
        bench.train(NPO(), steps=2, sums=bench.sums())  # a later round, in a process that knows the cache alone
    forwards = sum(ran) / len(made_rows(1))
    npo, tuned = peak_mib(lambda: bench.train(NPO(), sums=bench.sums())), peak_mib(lambda: bench.train(None))
    hold_reference(bench.made.model, bench.reference)
    steps = 3
    alone = {"alpha": 0.0, "retain": "none"}
    cached = paired(lambda: bench.train(NPO(), steps, bench.sums()), lambda: bench.train(LiveNPO(), steps), repeats)
    cached_alone = paired(
        lambda: bench.train(NPO(**alone), steps, bench.sums()), lambda: bench.train(LiveNPO(**alone), steps), repeats
    )
    before = base_hash(bench.made)
    bench.train(RMU(), steps=4)
    return Measured(
        memory=npo / tuned,
        npo_mib=npo,
        finetune_mib=tuned,
        cached=cached,
        cached_alone=cached_alone,
        reference_forwards=forwards,
        base_unchanged=before == base_hash(bench.made),
    )


def base_hash(made: Resident) -> str:
    """The sha256 of every parameter that is no adapter's."""
    return hash_tensors({name: p for name, p in made.model.named_parameters() if ".lora_" not in name})


def main() -> int:
    """Measures, tells, and gives 1 where a bound is passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of each comparison of times")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Bench(made=made_model(), cache=Path(folder)), args.repeats)
    if args.json:
        print(json.dumps({**asdict(found), "faults": found.faults}, indent=2))
    else:
        print(
            f"peak of an NPO step: {found.npo_mib:.1f} MiB, of a fine-tuning step {found.finetune_mib:.1f} MiB: {found.memory:.3f} (bound {BOUNDS['memory']})"
        )
        print(
            f"CPU time of NPO, kept sums over a reference forward each step: {found.cached:.3f} (bound {BOUNDS['cached']})"
        )
        print(f"the same without retain term: {found.cached_alone:.3f} (bound {BOUNDS['cached_alone']})")
        print(
            f"reference forwards a forget row and run: {found.reference_forwards:g}; RMU's base unchanged: {found.base_unchanged}"
        )
        print("\n".join(["FAIL " + fault for fault in found.faults] or ["all within bounds"]))
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
