"""The one model of a process: base, LoRA, tokenizer, kept between stages, rounds and clients."""

import gc
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from fedunlearn.aggregation.factors import plain_of
from fedunlearn.config.lora import LoraArgs
from fedunlearn.config.model import ModelConfig
from fedunlearn.data.chat import ChatFormat
from fedunlearn.errors import UserError
from fedunlearn.files import canonical_json
from fedunlearn.models.adapter_files import Probe, load_adapter, stacked_of
from fedunlearn.models.adapter_tensors import ACTIVE, read_tensors, write_tensors
from fedunlearn.models.base import choose_device, load_base, load_tokenizer
from fedunlearn.models.export import Stacked, plain_scaled, unit_scaled
from fedunlearn.models.fingerprint import fingerprint_base
from fedunlearn.models.initial import KEY, draw_fresh, from_base
from fedunlearn.models.label_logits import label_logits
from fedunlearn.models.lora import attach_lora
from fedunlearn.models.lora_config import lora_config_of, plain_config
from fedunlearn.models.ranks import module_scales, scales_in
from fedunlearn.models.sidecar import put_sidecar
from fedunlearn.models.skeleton import skeleton
from fedunlearn.models.source import ModelSource, find_base
from fedunlearn.records.adapter import Adapter, Weights

log = logging.getLogger(__name__)
PROBE_ROWS, PROBE_LENGTH, PROBE_IDS = 4, 16, 64
OVER = " over "
"""In a probe's dtype, what stands between the dtype of the logits and the quantisation of the base."""


@dataclass(frozen=True, eq=False)
class Resident:
    """A loaded base with its LoRA layers. base_name: what user or adapter call the base. start: the adapter it was loaded with (fresh or from a folder).

    model is the PeftModel, or the plain base where use_lora is false (then start is None). fingerprint: of the base as it is stored; quantization: what
    it was rounded to since, `none` where it was not.
    """

    model: PeftModel | PreTrainedModel
    chat: ChatFormat
    fingerprint: str
    base_name: str
    device: torch.device
    start: Adapter | None
    quantization: str = "none"

    def put(self, adapter: Adapter) -> None:
        """Makes these values the active adapter's. Raises UserError where they belong to another base or do not fit."""
        if adapter.base_fingerprint not in (None, self.fingerprint):
            raise UserError(
                f"adapter belongs to another base (fingerprint {adapter.base_fingerprint}; this one is {self.fingerprint})"
            )
        write_tensors(self.model, adapter.tensors)
        put_sidecar(self.model, adapter.sidecar, ACTIVE)

    def take(self) -> Adapter:
        """Gives a copy of the active adapter's factors, beside the side-car it began with."""
        if self.start is None:
            raise ValueError("a base without LoRA has no adapter")
        return self.start.replace(read_tensors(self.model))


def numbers_name(made: Resident, weights: Weights, bf16: bool) -> str:
    """Gives the sha256 of what a model's numbers depend on: base, how it is run (quantisation, dtype, attention, device, autocast to bf16), LoRA scales, adapter."""
    attention = str(made.model.config._attn_implementation)
    base = [made.fingerprint, made.quantization]
    model = [*base, str(made.model.dtype), attention, made.device.type, bf16, scales_in(made.model)]
    return hashlib.sha256(canonical_json([model, weights.hash]).encode()).hexdigest()


_held: dict[tuple[object, ...], Resident] = {}


def resident(
    config: ModelConfig, source: ModelSource, *, seed: int, max_length: int, pocket_dir: Path, sent: bool = False
) -> Resident:
    """Gives this process's model with its start adapter in place.

    sent: what training begins with comes over the wire, so that nothing is computed from the base's weights (pissa, olora): a fresh start is drawn.

    The base is loaded where none is held or another was; an old one is let go first, so there is never a second. The start
    adapter is that of `source`, proven, or a fresh one whose A is drawn from `seed`. A stacked adapter (models.export) becomes the
    side-car beneath fresh factors of the shape it was made with. Raises UserError for whatever cannot be loaded or does not prove itself.
    """
    args = config.model_args
    loaded, probe = load_adapter(source.adapter) if source.adapter else (None, None)
    stacked = stacked_of(source.adapter) if source.adapter else None
    _check_base(loaded, source)
    known = loaded if loaded is None or stacked is None else _as_it_was(loaded, stacked)
    lora, initial = None, _initial(args.lora_config, loaded, source)
    if args.lora_config and args.use_lora:
        lora = lora_config_of(args.lora_config, known, source.base_name, skeleton(source.base))
        if loaded is None:
            lora.init_lora_weights = True  # the base stays as it is: what is saved must not have PEFT change it
    plain = None if lora is None else plain_config(lora)
    bare = replace(
        args,
        pretrained_model_name_or_path=str(source.base.resolve()),
        lora_model_path=None,
        lora_config=None,
        use_lora=False,
    )
    key = (bare, config.tokenizer_args, config.template_args, json.dumps(plain), max_length)
    if key not in _held:
        release()
        _held[key] = _load(config, source, lora, max_length, pocket_dir)
    if lora is None:
        return _held[key]
    begin = Beginning(seed=seed, initial=True if sent and from_base(initial) else initial)
    made = _start(_held[key], loaded, stacked is not None, begin, plain or {})
    if loaded is not None:
        _prove(made, probe, source)
    return made


def release() -> None:
    """Lets the process's model go, and on CUDA its memory too."""
    _held.clear()
    gc.collect()
    torch.cuda.empty_cache()


def _check_base(loaded: Adapter | None, source: ModelSource) -> None:
    if loaded is None or loaded.base_fingerprint is None:
        return
    fingerprint = fingerprint_base(source.base)
    if loaded.base_fingerprint != fingerprint:
        raise UserError(
            f"adapter {str(source.adapter)!r} belongs to another base: its fingerprint is {loaded.base_fingerprint}, "
            f"that of {source.base_name!r} is {fingerprint}; name the base it was trained on"
        )


def _load(
    config: ModelConfig, source: ModelSource, lora: LoraConfig | None, max_length: int, pocket_dir: Path
) -> Resident:
    named = config.tokenizer_args.pretrained_model_name_or_path
    folder = (
        source.base
        if named is None
        else find_base(named, pocket_dir, "model.tokenizer_args.pretrained_model_name_or_path")
    )
    chat = ChatFormat(load_tokenizer(folder), config.template_args, max_length)
    fingerprint = fingerprint_base(source.base)
    base = load_base(source.base, config.model_args)
    model = base if lora is None else attach_lora(base, lora)
    args = config.model_args
    return Resident(
        model, chat, fingerprint, source.base_name, choose_device(args), None, quantization=args.quantization or "none"
    )


def _as_it_was(loaded: Adapter, stacked: Stacked) -> Adapter:
    """The stack with the PEFT config of the factors it was made of: what the yaml has to agree with."""
    config = {**loaded.peft_config, **vars(stacked), "rank_pattern": {}, "alpha_pattern": {}}
    return Adapter(loaded.tensors, config, loaded.base_fingerprint)


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a fresh adapter is made of. initial: see initial.draw_fresh."""

    seed: int
    initial: bool | str


def _initial(args: LoraArgs | None, loaded: Adapter | None, source: ModelSource) -> bool | str:
    """The initialisation of fresh factors; a loaded adapter needs none. Raises UserError where both are asked for."""
    asked = None if args is None else args.init_lora_weights
    if loaded is not None and asked not in (None, True):
        raise UserError(
            f"{KEY}={asked!r} beside the adapter {str(source.adapter)!r}, which brings its values along: set it to null, or leave the adapter out"
        )
    return True if asked is None else asked


def _start(
    held: Resident, loaded: Adapter | None, stacked: bool, begin: Beginning, plain: Mapping[str, object]
) -> Resident:
    if loaded is None:
        sidecar = draw_fresh(held.model, begin.seed, begin.initial)
    elif stacked:
        draw_fresh(held.model, begin.seed)
        whole = {**read_tensors(held.model), **{name: loaded.tensors[name] for name in plain_of(loaded.tensors)}}
        write_tensors(held.model, {**whole, **plain_scaled(whole, module_scales(held.model), by=-1)})
        sidecar = unit_scaled(loaded)
    else:
        write_tensors(held.model, loaded.tensors)
        sidecar = {}
    put_sidecar(held.model, sidecar, ACTIVE)
    return replace(held, start=Adapter(read_tensors(held.model), plain, held.fingerprint, sidecar))


def _prove(made: Resident, probe: Probe | None, source: ModelSource) -> None:
    where = str(source.adapter)
    tensors = (made.start.sidecar or made.start.tensors) if made.start else {}
    if not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name):
        log.warning("adapter %s: every B is zero, so it changes nothing of the base", where)
    if probe is None:
        log.warning(
            "adapter %s carries no proof of ours: its %d tensors fit in name and shape; whether it was trained on %s is not known",
            where,
            len(tensors),
            source.base_name,
        )
        return
    check_probe(probe, take_probe(made), where)


def take_probe(made: Resident) -> Probe:
    """Records logits of the model as it is now: last position of 4 fixed rows of 16 ids, at 64 fixed vocabulary ids."""
    vocabulary = made.model.get_output_embeddings().weight.shape[0]
    ids = torch.arange(PROBE_ROWS * PROBE_LENGTH).reshape(PROBE_ROWS, PROBE_LENGTH) * 7919 % vocabulary
    columns = torch.arange(PROBE_IDS) * 104_729 % vocabulary
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[:, -1] = True
    training = made.model.training
    made.model.eval()
    with torch.no_grad():
        device = made.device
        logits = label_logits(made.model, ids.to(device), torch.ones_like(ids).to(device), positions.to(device))
    made.model.train(training)
    rows = logits.float().cpu()[:, columns].tolist()
    kept = "" if made.quantization == "none" else f"{OVER}{made.quantization}"
    return Probe(dtype=f"{logits.dtype}{kept}", logits=tuple(tuple(row) for row in rows))


def check_probe(saved: Probe, now: Probe, where: str) -> None:
    """Raises UserError where logits differ from the recorded ones by more than 1e-5 (float32 both) or 2e-2 of the largest.

    A base quantised otherwise gives other logits by its nature: then nothing is compared, and one warning says so.
    """
    if saved.dtype.partition(OVER)[2] != now.dtype.partition(OVER)[2]:
        log.warning(
            "adapter %s: its logits were recorded in %s, this model has %s: the two are not compared",
            where,
            saved.dtype,
            now.dtype,
        )
        return
    old, new = torch.tensor(saved.logits), torch.tensor(now.logits)
    tolerance = 1e-5 if saved.dtype.partition(OVER)[0] == now.dtype.partition(OVER)[0] == "torch.float32" else 2e-2
    if old.shape != new.shape or not (old - new).abs().max() <= tolerance * old.abs().max():  # NaN fails too
        raise UserError(
            f"adapter {where!r} does not give the logits recorded with it (tolerance {tolerance:g} of the largest): the base, its dtype or a library differs"
        )
