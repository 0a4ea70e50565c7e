"""What trainer.parallel, and an evaluation's parallel, do not go together with."""

from fedunlearn.config.evaluation import EvalConfig
from fedunlearn.config.launcher import Launcher, RayLauncher
from fedunlearn.config.lm_eval import LmEvalConfig
from fedunlearn.config.parallel import NO_TP_TRAINING, Parallel, parallel_args
from fedunlearn.config.trainer import TrainerConfig
from fedunlearn.metrics.base import Part

Rule = tuple[bool, str]


def training_rules(trainer: TrainerConfig, mode: str, launcher: Launcher, by_hand: bool) -> list[Rule]:
    """Rules of a run that trains. by_hand: whether clients change gradients or parameters beside what the optimiser does."""
    args = parallel_args(trainer.parallel)
    parallel, at = args.kind != "none", f"trainer.parallel={args.kind}"
    return [
        (args.kind != "tp", NO_TP_TRAINING),
        (
            not parallel or mode != "probe",
            f"{at} beside mode='probe': a probe relearns in its own process; leave it at none",
        ),
        (
            not parallel or not isinstance(launcher, RayLauncher),
            f"{at} beside launcher=ray: every actor would start processes of its own on the same devices, with shards of a base each, and Ray knows nothing of "
            "their memory; choose launcher=local, whose clients share one set of processes, or launcher=superlink, one machine a client",
        ),
        (
            not parallel or not trainer.args.torch_compile,
            f"{at} beside trainer.args.torch_compile=true: blocks whose weights are gathered from other processes are not compiled here; set it to false",
        ),
        (
            args.kind != "deepspeed" or not by_hand,
            f"{at} beside strategy=fedprox, or a method that bounds how far a client may go: both work on gradients and parameters that DeepSpeed keeps in shards; "
            "choose trainer.parallel=fsdp",
        ),
    ]


def evaluation_rules(said: Parallel, settings: EvalConfig, lm_eval: LmEvalConfig | None) -> list[Rule]:
    """Rules of an evaluation."""
    kind = parallel_args(said).kind
    beside = [
        key
        for key, there in {
            "lm_eval": lm_eval,
            "eval.reference_model_path": settings.reference_model_path,
        }.items()
        if there is not None
    ]
    wanting = [
        name
        for name, metric in settings.metrics.items()
        if any(reading.part is Part.GRADNORM for reading in metric.reads)
    ]
    return [
        (
            kind != "tp" or not wanting,
            f"parallel=tp beside {', '.join(wanting)}: gradients are not taken through split layers; take it out (~eval.metrics.{''.join(wanting[:1])}), or "
            "parallel=none",
        ),
        (
            kind in ("none", "tp"),
            f"parallel={kind}: an evaluation is carried out by one process, or over layers split among several: none or tp; fsdp and deepspeed are "
            "trainer.parallel, for training",
        ),
        (
            kind != "tp" or not beside,
            f"parallel=tp beside {' and '.join(beside)}: both want a model that is whole in one process; leave them null, or parallel=none",
        ),
    ]
