"""What a run with peft_type=ADALORA does not go together with, beside its server's choices (aggregation.combinations)."""

from fedunlearn.config.ledger import LedgerConfig
from fedunlearn.config.lora import AT, LoraArgs
from fedunlearn.config.parallel import parallel_args
from fedunlearn.config.trainer import TrainerConfig

Rule = tuple[bool, str]


def adalora_rules(lora: LoraArgs | None, trainer: TrainerConfig, ledger: LedgerConfig, num_requests: int) -> list[Rule]:
    """Rules of a run that trains. num_requests: those that are served one after the other."""
    budget = None if lora is None else lora.adalora
    if budget is None:
        return []
    rounds, kind, at = trainer.federated.num_rounds, parallel_args(trainer.parallel).kind, "peft_type=ADALORA"
    ratio = trainer.args.loraplus_lr_ratio
    return [
        (
            budget.least_rounds <= rounds,
            f"{AT}tinit={budget.tinit} and tfinal={budget.tfinal} of trainer.federated.num_rounds={rounds}: at least one round must lie between them, in which ranks are given "
            f"up; lower them to {rounds - 1} together, or raise num_rounds to {budget.least_rounds}",
        ),
        (
            kind == "none",
            f"trainer.parallel={kind} beside {at}: its penalty is of whole factors, and would be counted once a process; set trainer.parallel=none, or peft_type=LORA",
        ),
        (
            ratio in (None, 1.0),
            f"trainer.args.loraplus_lr_ratio={ratio} beside {at}: LoRA+ quickens a B that begins at zero, and AdaLoRA's does not; leave it null, or set peft_type=LORA",
        ),
        (
            not ledger.enabled,
            f"ledger.enabled=true beside {at}: server-side methods add and take away products of pairs, and what AdaLoRA's clients send is none; set ledger.enabled=false, or "
            "peft_type=LORA",
        ),
        (
            num_requests <= 1,
            f"requests has {num_requests} entries beside {at}: from the second on the run goes on from the first one's adapter, and AdaLoRA begins with a fresh one; give one, "
            "or set peft_type=LORA",
        ),
    ]
