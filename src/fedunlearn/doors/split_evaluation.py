"""An evaluation whose model is too large for one device: merged, and its layers split among several processes by the architecture's own plan.

transformers' tensor parallelism (`tp_plan`), for forwards alone. Every process runs the whole evaluation on the same rows, each with its part of every
layer; the first one's account counts.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from fedunlearn.config.parallel import parallel_args, settled
from fedunlearn.config.parse import parse_config
from fedunlearn.config.run import EvalRun
from fedunlearn.data.benchmark import Benchmark
from fedunlearn.data.chat import ChatFormat
from fedunlearn.data.requests import evaluated_request
from fedunlearn.doors.measure import known_of
from fedunlearn.doors.prepare import open_data
from fedunlearn.errors import UserError
from fedunlearn.evals.evaluation import evaluate_suite
from fedunlearn.evals.files import FILES_OF, read_log, write_log
from fedunlearn.evals.suites import read_suite
from fedunlearn.models.base import choose_device, load_tokenizer
from fedunlearn.models.merge import merged_base
from fedunlearn.models.resident import Resident, release
from fedunlearn.models.source import resolve_source
from fedunlearn.records.evaluation import EvalLog
from fedunlearn.training.parallel.group import Group, GroupError
from fedunlearn.training.parallel.job import Frame
from fedunlearn.training.parallel.serving import Place, join

log = logging.getLogger(__name__)
MODEL, TOKENIZER, FOUND = "model", "tokenizer", "found"
SECONDS = 24 * 3600.0


def split_evaluation(
    run: EvalRun, plain: Mapping[str, object], load: Callable[[], Resident], config_sha: str
) -> EvalLog:
    """Loads the model, merges the adapter, hands the result to run.parallel's processes and gives what they found.

    The merged weights have the base's dtype. load: gives the model, spoilt by the merge, to nobody but this function, which lets it go before the processes
    begin. Raises UserError where the model has no plan, cannot be split into that many parts, or the devices are too few.
    """
    args = settled(parallel_args(run.parallel), choose_device(run.model.model_args).type, torch.cuda.device_count())
    world = args.processes or 0
    made = load()
    check_plan(made, world)
    group = Group(
        f"{__name__}:{Splitter.__qualname__}", world, device=choose_device(run.model.model_args).type, timeout=SECONDS
    )
    scratch = Path(run.paths.cache_dir) / "teams"
    scratch.mkdir(parents=True, exist_ok=True)
    attention = str(made.model.config._attn_implementation)
    provenance = dict(known_of(run, made, made.start, config_sha))
    with tempfile.TemporaryDirectory(prefix="split", dir=scratch) as place:
        folder = Path(place)
        _write_merged(made, folder)
        del made
        release()
        try:
            ready = group.start(folder, {"config": dict(plain), "attention": attention})
            log.info(
                "%d processes hold %s MB of the merged model",
                world,
                "/".join(f"{said['held'] / 1e6:.1f}" for said in ready),
            )
            group.ask(Frame({"provenance": provenance, "to": str(folder / FOUND)}, {}))
        except GroupError as error:
            raise UserError(
                f"parallel=tp: {error}; nothing was evaluated: mend the cause, or set parallel=none"
            ) from error
        finally:
            group.close()
        found = read_log(folder / FOUND, FILES_OF[run.eval.name])
    return EvalLog(found.metrics, found.provenance)


def check_plan(made: Resident, world: int) -> None:
    """Raises UserError for a model that tells no plan, or whose heads do not come out even."""
    base = made.model.get_base_model() if made.start is not None else made.model
    config = base.config.get_text_config()
    kind = type(base).__name__
    if getattr(base, "hf_quantizer", None) is not None:
        raise UserError(
            "parallel=tp beside a quantised base: its packed weights cannot be merged or split; choose parallel=none"
        )
    if not base.supports_tp_plan:
        raise UserError(f"parallel=tp: transformers has no tensor-parallel plan for {kind}: choose parallel=none")
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count = getattr(config, key, None)
        if isinstance(count, int) and count % world:
            raise UserError(
                f"parallel.processes={world} does not divide {kind}'s {key}={count}: choose a number that does, or parallel=none"
            )


def _write_merged(made: Resident, folder: Path) -> None:
    """Raises UserError for an adapter that cannot be merged."""
    model = made.model
    if made.start is not None:
        try:
            model, loss = merged_base(model, model.dtype)
        except UserError as error:
            way_out = "parallel=tp merges the adapter first: set parallel=none, which evaluates it beside the base"
            raise UserError(*error.faults, way_out) from error
        log.info("the adapter merged in %s: relative error %.1e", model.dtype, loss.error)
    model.save_pretrained(folder / MODEL)
    made.chat.tokenizer.save_pretrained(folder / TOKENIZER)


class Splitter:
    """One of the processes (serving.Member): its part of every layer, and the run's own data."""

    def __init__(self, place: Place, *, config: Mapping[str, Any], attention: str) -> None:
        run = parse_config(config)
        assert isinstance(run, EvalRun)
        self._run, self._first, folder = run, place.rank == 0, Path(place.folder)
        join(place)
        numbers = {"RANK": place.rank, "LOCAL_RANK": place.rank, "WORLD_SIZE": place.world}
        os.environ.update({name: str(number) for name, number in numbers.items()})  # transformers reads them
        self._chat = ChatFormat(load_tokenizer(folder / TOKENIZER), run.model.template_args, run.max_length)
        self._model = _load_split(folder / MODEL, run, attention, place.world)
        parameters = [p.to_local() if isinstance(p, DTensor) else p for p in self._model.parameters()]
        self.ready = {"held": sum(p.numel() * p.element_size() for p in parameters)}

    def do(self, job: Frame) -> Frame:
        """Evaluates; the first process writes the log where the job says."""
        run = self._run
        data, retain_log = open_data(run)
        suite = read_suite(data, run.forget_split, run.eval, _request(run, data))
        found = evaluate_suite(self._model, self._chat, suite, run.eval, retain_log, job.said["provenance"])
        if self._first:
            write_log(found, Path(job.said["to"]), FILES_OF[run.eval.name])
        return Frame({}, {})


def _request(run: EvalRun, data: Benchmark) -> Any:
    source = resolve_source(run.model.model_args, Path(run.paths.pocket_dir), fetch=False)
    return evaluated_request(run, source.run, data)


def _load_split(folder: Path, run: EvalRun, attention: str, world: int) -> Any:
    from transformers.distributed import DistributedConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, run.model.model_args.torch_dtype),
        attn_implementation=attention,
        distributed_config=DistributedConfig(tp_size=world),
    )
    return model.requires_grad_(False).eval()
