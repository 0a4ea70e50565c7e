"""A tiny resident model in memory, rows of unequal lengths, and one round of one client in one call."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from helpers_eval import tiny_chat, tiny_llama
from peft import LoraConfig

from fedunlearn.config.data import CollatorConfig
from fedunlearn.config.trainer import TrainArgs
from fedunlearn.data.chat import EncodedRow
from fedunlearn.methods.altpo import AltPO
from fedunlearn.methods.base import Method
from fedunlearn.methods.ceu import CEU
from fedunlearn.methods.dpo import DPO
from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.methods.idk_dpo import IdkDPO
from fedunlearn.methods.ihl import IHL
from fedunlearn.methods.npo import NPO
from fedunlearn.methods.pdu import PDU
from fedunlearn.methods.rmu import RMU
from fedunlearn.methods.satimp import SatImp
from fedunlearn.methods.simnpo import SimNPO
from fedunlearn.methods.uce import UCE
from fedunlearn.methods.undial import UNDIAL
from fedunlearn.methods.wga import WGA
from fedunlearn.models.adapter_tensors import read_tensors, write_tensors
from fedunlearn.models.initial import draw_fresh
from fedunlearn.models.lora import attach_lora
from fedunlearn.models.lora_config import plain_config
from fedunlearn.models.resident import Resident
from fedunlearn.records.adapter import Adapter
from fedunlearn.records.rounds import ClientTask, Role, Trained
from fedunlearn.training.client_update import client_update
from fedunlearn.training.local import LocalData, LocalResult, LocalSettings, OtherAnswers

RATE = (
    1024.0  # with SGD, the step divided by it is the gradient: a power of two, large beside the weights, loses no digit
)
GRADIENT = {
    "learning_rate": RATE,
    "optim": "sgd",
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
}


def made_model(
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    targets: object = "all-linear",
    rank: int = 2,
    alpha: float = 4,
    device: str = "cpu",
) -> Resident:
    """A tiny Llama with an adapter whose B is not zero, so that A has a gradient."""
    base = tiny_llama().to(dtype).requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM")
    base.name_or_path = "base"
    model = attach_lora(base, config)
    draw_fresh(model, 0)
    generator = torch.Generator().manual_seed(3)
    write_tensors(
        model, {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in read_tensors(model).items()}
    )
    start = Adapter(read_tensors(model), plain_config(config), "print")
    return Resident(model.to(device).eval(), tiny_chat(), "print", "a tiny base", torch.device(device), start)


def rows(count: int, seed: int = 0) -> tuple[EncodedRow, ...]:
    """Rows of 2 to 6 prompt ids and 1 to 7 labels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        prompt, labels = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((2, 7), (1, 8)))
        ids = torch.randint(0, 256, (prompt + labels,), generator=generator).tolist()
        made.append(EncodedRow(tuple(ids), prompt))
    return tuple(made)


class FixedSums:
    """Sums of rows as a test wants them, in the place of the reference's."""

    def __init__(self, sums: torch.Tensor, of_rows: tuple[EncodedRow, ...] | None = None):
        self.sums, self.of_rows, self.tokens = sums, of_rows, 0

    def prepare(self, rows):
        """Nothing is computed."""

    def of(self, rows):
        known = FORGET if self.of_rows is None else self.of_rows
        return torch.stack([self.sums[known.index(row)] for row in rows])


FORGET, RETAIN = rows(8, 1), rows(5, 2)
SUMS = torch.tensor([float(6 * row.num_labels) for row in FORGET])
DATA = LocalData(forget=FORGET, retain=RETAIN, reference=FixedSums(SUMS))
OTHERS = tuple(rows(3, 50 + place) for place in range(8))
"""Three alternates of each forget row; their prompts differ from its own, which no loss can tell."""


def with_alternates(
    encode: Callable[[int, int], EncodedRow] = lambda place, choice: OTHERS[place][choice],
    counts: tuple[int, ...] = (3,) * 8,
) -> LocalData:
    """DATA with alternates, and sums of all rows and alternates in the reference's place."""
    known = (*FORGET, *(row for others in OTHERS for row in others))
    sums = torch.tensor([float(5 * row.num_labels) for row in known])
    return replace(DATA, alternates=OtherAnswers(counts=counts, encode=encode), reference=FixedSums(sums, known))


EVERY: tuple[Method, ...] = (
    GradAscent(),
    GradDiff(gamma=0.5, alpha=2.0),
    GradDiff(retain="kl"),
    NPO(),
    SimNPO(beta=1.0, delta=6.0),
    DPO(),
    IdkDPO(),
    AltPO(),
    RMU(layer=0),
    RMU(layer=1, alpha=3.0),
    RMU(layer=0, retain="kl"),
    RMU(layer=0, retain="nll"),
    UNDIAL(),
    UNDIAL(alpha=1.0, retain="nll"),
    CEU(),
    WGA(beta=0.1),
    SatImp(beta1=0.1, beta2=1.0),
    PDU(eps=0.3, warmup=0),
    IHL(),
    UCE(),
)
"""Every member, and each kind of retain term once; settings under which no gradient is next to nothing."""


def name_of(method: Method) -> str:
    """A short name for a test's id."""
    return f"{type(method).__name__}-{method.retain}{getattr(method, 'layer', '')}"


@dataclass(frozen=True)
class Forward:
    """One forward of the model: with gradient or not, by which adapter, in train mode or not, how many rows, which blocks ran, and whether the head did."""

    gradient: bool
    adapter: str
    training: bool
    num_rows: int
    blocks: tuple[int, ...]
    head: bool


@contextmanager
def forwards(made: Resident) -> Iterator[list[Forward]]:
    """Inside the block every forward of the model is listed."""
    base, seen = made.model.get_base_model(), []

    def begin(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        adapter = made.model.active_adapter
        seen.append(Forward(torch.is_grad_enabled(), adapter, module.training, len(ids), (), False))

    def block(number: int) -> Callable[..., None]:
        def ran(*_: object) -> None:
            seen[-1] = replace(seen[-1], blocks=(*seen[-1].blocks, number))

        return ran

    def head(*_: object) -> None:
        seen[-1] = replace(seen[-1], head=True)

    handles = [
        base.model.register_forward_pre_hook(begin, with_kwargs=True),
        base.lm_head.register_forward_hook(head),
        *(b.mlp.register_forward_hook(block(number)) for number, b in enumerate(base.model.layers)),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def train_args(**changed: object) -> TrainArgs:
    """AdamW at 1e-3, micro-batches of 4, no schedule but a warm-up where one is given."""
    usual = {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant_with_warmup"}
    return TrainArgs(**{**usual, **changed})


def train(
    made: Resident,
    method: Method | None = None,
    data: LocalData = DATA,
    role: Role | None = None,
    seed: int = 7,
    epochs: float = 1.0,
    settings: dict | None = None,
    lr_scale: float = 1.0,
    mu: float = 0.0,
    radius: float = 0.0,
    trained: Trained = Trained.BOTH,
    memory: Mapping[str, float] | None = None,
    **args: object,
) -> LocalResult:
    """One round of one client from made.start: unlearning where there is a method, else fine-tuning. memory: a fresh one of the method's by default."""
    chosen = role or (Role.UNLEARN if method else Role.FINETUNE)
    known = (method.memory() if method else {}) if memory is None else memory
    task = ClientTask(
        client_id=1,
        role=chosen,
        epochs=epochs,
        lr_scale=lr_scale,
        seed=seed,
        mu=mu,
        radius=radius,
        trained=trained,
        memory=known,
    )
    local = LocalSettings(args=train_args(**args), collator=CollatorConfig(), method=method)
    return client_update(made, made.start.tensors, data, task, replace(local, **(settings or {})))


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All entries in name order."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def gradient(made: Resident, method: Method | None = None, **changed: object) -> torch.Tensor:
    """The gradient of the first optimiser step, as the adapter moved by it."""
    result = train(made, method, **{**GRADIENT, **changed})
    return (flat(made.start.tensors) - flat(result.tensors)) / RATE


def equal(first: LocalResult, second: LocalResult) -> bool:
    """Whether two results hold the same bits."""
    return bool(torch.equal(flat(first.tensors), flat(second.tensors)))
