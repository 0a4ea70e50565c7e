"""A tiny resident model in memory, rows of unequal lengths, and one round of one client in one call."""

from dataclasses import replace

import torch
from helpers_eval import tiny_chat, tiny_llama
from peft import LoraConfig

from fedunlearn.config.data import CollatorConfig
from fedunlearn.config.trainer import TrainArgs
from fedunlearn.data.chat import EncodedRow
from fedunlearn.methods.base import Method
from fedunlearn.models.lora import attach_lora, draw_fresh, plain_config, read_tensors, write_tensors
from fedunlearn.models.resident import Resident
from fedunlearn.records.adapter import Adapter
from fedunlearn.records.rounds import ClientTask, Role, Trained
from fedunlearn.training.client_update import LocalData, LocalResult, LocalSettings, client_update

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
    return Resident(model.eval(), tiny_chat(), "print", "a tiny base", torch.device("cpu"), start)


def rows(count: int, seed: int = 0) -> tuple[EncodedRow, ...]:
    """Rows of 2 to 6 prompt ids and 1 to 7 labels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        prompt, labels = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((2, 7), (1, 8)))
        ids = torch.randint(0, 256, (prompt + labels,), generator=generator).tolist()
        made.append(EncodedRow(tuple(ids), prompt))
    return tuple(made)


FORGET, RETAIN = rows(8, 1), rows(5, 2)
SUMS = torch.tensor([float(6 * row.num_labels) for row in FORGET])
DATA = LocalData(forget=FORGET, retain=RETAIN, reference_sums=SUMS)


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
    trained: Trained = Trained.BOTH,
    **args: object,
) -> LocalResult:
    """One round of one client from made.start: unlearning where there is a method, else fine-tuning."""
    chosen = role or (Role.UNLEARN if method else Role.FINETUNE)
    task = ClientTask(client_id=1, role=chosen, epochs=epochs, lr_scale=lr_scale, seed=seed, mu=mu, trained=trained)
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
