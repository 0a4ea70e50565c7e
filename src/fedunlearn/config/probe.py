"""The record of a probe: does an unlearning hold? Everything a fine-tuning run has, and what is probed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedunlearn.config.run import TrainRun
from fedunlearn.errors import UserError
from fedunlearn.limits import LARGEST

Attack = Literal["relearn_forget", "relearn_unrelated", "rounds", "bfloat16", "int8", "nf4", "difference"]
TRAINING: tuple[Attack, ...] = ("relearn_forget", "relearn_unrelated", "rounds")
CASTS: tuple[Literal["bfloat16", "int8", "nf4"], ...] = ("bfloat16", "int8", "nf4")
MEASURED = (
    "forget_Q_A_Prob",
    "forget_Q_A_PARA_Prob",
    "forget_Q_A_ROUGE",
    "extraction_strength",
    "exact_memorization",
)
BESIDE = ("retain_Q_A_Prob",)
UTILITY = "model_utility"


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What is probed, and how.

    unlearned: name -> adapter or run. oracle: the retrain without the rows, whose gain is what relearning is compared with. finetuned: what unlearning began with, for
    `difference`. control: the same start tuned on without a forget loss, for the same. base: probe the model without any adapter too.
    attacks: `relearn_forget` and `relearn_unrelated` (relearn_epochs over the forget rows; over real authors and world facts), `rounds` (so many of ordinary
    federation on the retain rows), `bfloat16`, `int8`, `nf4` (the merged weights cast, by `backend`), `difference` (what the two adapters, before and after, give away).
    """

    unlearned: dict[str, str]
    oracle: str
    finetuned: str | None = None
    control: str | None = None
    base: bool = True
    attacks: tuple[Attack, ...] = (*TRAINING, *CASTS)
    relearn_epochs: float = 1.0
    rounds: int = 10
    backend: Literal["simulated", "bitsandbytes"] = "simulated"

    def __post_init__(self) -> None:
        faults = [fault for holds, fault in self._rules() if not holds]
        if faults:
            raise UserError(*faults)

    def _rules(self) -> list[tuple[bool, str]]:
        taken = [name for name in self.unlearned if name in ("oracle", "base", "control")]
        return [
            (bool(self.unlearned), "probe.unlearned={} names nothing to probe: give {name: path, ...}"),
            (not taken, f"probe.unlearned.{taken[0] if taken else ''} is a name of ours: choose another"),
            (bool(self.attacks), "probe.attacks=[] leaves nothing to do: name some, or leave it out"),
            (
                len(set(self.attacks)) == len(self.attacks),
                f"probe.attacks={list(self.attacks)} names one twice: give each once",
            ),
            (
                ("difference" in self.attacks) == (self.finetuned is not None),
                "probe.attacks: difference needs probe.finetuned, the adapter that unlearning began with, and nothing else reads it: give both, or neither",
            ),
            (
                self.control is None or self.finetuned is not None,
                f"probe.control={self.control!r} is read by difference alone: add it to probe.attacks, or leave it null",
            ),
            (
                0 < self.relearn_epochs <= LARGEST,
                f"probe.relearn_epochs={self.relearn_epochs} must be above 0, at most {LARGEST:g}",
            ),
            (self.rounds >= 1, f"probe.rounds={self.rounds} must be at least 1"),
            *self._unread(),
        ]

    def _unread(self) -> list[tuple[bool, str]]:
        """What is set beside attacks that do not read it."""
        readers: Mapping[str, tuple[Attack, ...]] = {
            "backend": CASTS,
            "relearn_epochs": ("relearn_forget", "relearn_unrelated"),
            "rounds": ("rounds",),
        }
        return [
            (
                getattr(self, key) == getattr(ProbeConfig, key) or bool(set(attacks) & set(self.attacks)),
                f"probe.{key}={getattr(self, key)} is read by {', '.join(attacks)} alone: add one to probe.attacks, or leave it at {getattr(ProbeConfig, key)}",
            )
            for key, attacks in readers.items()
        ]

    @property
    def subjects(self) -> Mapping[str, str | None]:
        """Name -> path of everything that is attacked, the oracle first; None: the model without an adapter."""
        base: dict[str, str | None] = {"base": None} if self.base else {}
        return {"oracle": self.oracle, **self.unlearned, **base}


@dataclass(frozen=True, kw_only=True)
class ProbeRun(TrainRun):
    """A probe goes to saves/probe/<task_name>/. trainer, partition and strategy are fine-tuning's own: relearning takes its learning rate and batch, `rounds` all of it."""

    probe: ProbeConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.muse_path is not None:
            raise UserError(
                f"muse_path={self.muse_path!r} beside mode='probe': a probe attacks what was forgotten of TOFU, and measures that; name tofu_path"
            )
        lacking = [name for name in (*MEASURED, *BESIDE, UTILITY) if name not in self.eval.metrics]
        if lacking:
            raise UserError(
                f"eval.metrics lacks {', '.join(lacking)}, which a probe measures: leave them in, or choose eval=tofu"
            )
        quantization, casts = self.model.model_args.quantization, [one for one in self.probe.attacks if one in CASTS]
        if quantization is not None and casts:
            raise UserError(
                f"probe.attacks={casts} beside model.model_args.quantization={quantization}: they cast the merged weights, and nothing is merged into a quantised base; "
                "set quantization=null, or leave them out"
            )
