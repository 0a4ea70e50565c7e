"""Whether what an adapter's folder holds can be an adapter at all: judged where it is read, before anything computes with it."""

from collections.abc import Mapping

import torch

from fedunlearn.aggregation.factors import plain_of
from fedunlearn.errors import UserError
from fedunlearn.records.adapter import MAGNITUDE, A, Adapter, B, Tensors

WIDEST = torch.finfo(torch.float32).max
_CONFIG = "adapter_config.json"
RANK, ALPHA = "no rank: a whole number from 1", f"no scale: a finite number above 0 (at most {WIDEST:.1e})"
AS_TRAINED = "write there what the adapter was trained with, or copy the folder again"


def check_sound(adapter: Adapter, where: str) -> None:
    """Raises one UserError with all faults of form and numbers. where: the folder, as the user knows it."""
    faults = [*faults_of_form(adapter.tensors, adapter.peft_config), *faults_of_numbers(adapter.tensors)]
    if faults:
        raise UserError(*(f"adapter {where!r}: {fault}" for fault in faults))


def faults_of_form(tensors: Tensors, peft_config: Mapping[str, object]) -> list[str]:
    """Says what is wrong with the config's kind, ranks and scales, and with which tensors there are and their shapes; no value of theirs is looked at.

    tensors: fused experts apart (models.experts). Another kind than LORA is one fault: what else it should hold is not known.
    """
    kind = fault_of_kind(peft_config)
    if kind:
        return [kind]
    numbers = faults_of_config(peft_config)
    pairs = faults_of_pairs(tensors)
    ranks = [] if numbers or pairs else _faults_of_ranks(tensors, peft_config)
    return [
        *numbers,
        *pairs,
        *ranks,
        *_faults_of_magnitudes(tensors, peft_config),
        *_faults_of_saved(tensors, peft_config),
    ]


def faults_of_numbers(tensors: Tensors) -> list[str]:
    """Says which tensors hold what is no finite floating-point number; the first of a kind is named, and how many there are."""
    whole = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    odd = not_finite({name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()})
    faults = []
    if whole:
        faults.append(
            f"tensor {whole[0]!r} is {tensors[whole[0]].dtype} ({_of(whole, tensors)}): an adapter's tensors are floating point; save it again as float32 or bfloat16"
        )
    if odd:
        faults.append(
            f"tensor {odd[0]!r} holds NaN or infinity ({_of(odd, tensors)}): its training diverged, or the file is damaged; take an earlier round, or copy it again"
        )
    return faults


def not_finite(tensors: Tensors) -> list[str]:
    """Gives the names of those that hold NaN or infinity, in one pass."""
    return [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]


def _of(names: list[str], tensors: Tensors) -> str:
    return f"{len(names)} of {len(tensors)} tensors"


def fault_of_kind(peft_config: Mapping[str, object]) -> str:
    """Says why a PEFT config is none of LoRA; empty where it is."""
    kind = peft_config.get("peft_type")
    if kind == "ADALORA":
        return (
            f"{_CONFIG} has peft_type='ADALORA': a checkpoint of AdaLoRA (or a foreign adapter of that kind) holds all ranks, masked ones among them; "
            "name the run's own folder, whose adapter/ is plain LoRA"
        )
    if kind != "LORA":
        said = f"has peft_type={kind!r}" if "peft_type" in peft_config else "lacks peft_type"
        return f"{_CONFIG} {said}: only LORA is understood"
    return ""


def faults_of_config(peft_config: Mapping[str, object]) -> list[str]:
    """Says which ranks, scales and switches of a PEFT config are none, by key."""
    faults = []
    for key, holds, told in (("r", _is_rank, RANK), ("lora_alpha", _is_scale, ALPHA)):
        if key not in peft_config:
            faults.append(f"{_CONFIG} lacks {key}: {AS_TRAINED}")
        elif not holds(peft_config[key]):
            faults.append(f"{_CONFIG} has {key}={peft_config[key]!r}, which is {told}; {AS_TRAINED}")
    for key, holds, told in (("rank_pattern", _is_rank, RANK), ("alpha_pattern", _is_scale, ALPHA)):
        pattern = peft_config.get(key) or {}
        if not isinstance(pattern, Mapping):
            faults.append(f"{_CONFIG} has {key}={pattern!r}, which is no mapping of modules to numbers; {AS_TRAINED}")
            continue
        odd = [(name, value) for name, value in pattern.items() if not holds(value)]
        faults += [f"{_CONFIG} has {key}[{name!r}]={value!r}, which is {told}; {AS_TRAINED}" for name, value in odd[:1]]
    faults += [
        f"{_CONFIG} has {key}={peft_config[key]!r}: true or false; {AS_TRAINED}"
        for key in ("use_dora", "use_rslora", "lora_bias")
        if not isinstance(peft_config.get(key) or False, bool)
    ]
    parameters = peft_config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        faults.append(f"{_CONFIG} has target_parameters={parameters!r}: a list of names, or null; {AS_TRAINED}")
    return faults


def _faults_of_saved(tensors: Tensors, peft_config: Mapping[str, object]) -> list[str]:
    saved = peft_config.get("modules_to_save") or []
    if not isinstance(saved, list | tuple) or not all(isinstance(name, str) for name in saved):
        return [f"{_CONFIG} has modules_to_save={saved!r}: a list of names, or null; {AS_TRAINED}"]
    missing = [name for name in saved if not any(f".{name}." in tensor for tensor in tensors)]
    return [
        f"{_CONFIG} has modules_to_save={saved!r}, and no tensor of {name!r} is there: copy the folder again, or take the name out"
        for name in missing[:1]
    ]


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_scale(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= WIDEST


def faults_of_pairs(tensors: Tensors) -> list[str]:
    """Says which LoRA factors have no partner, or one of another rank, or are no matrices; the first of a kind. Fused experts may be together or apart."""
    firsts = {name.removesuffix(A) for name in tensors if name.endswith(A)}
    seconds = {name.removesuffix(B) for name in tensors if name.endswith(B)}
    if not firsts | seconds:
        some = next(iter(tensors), "none")
        return [
            f"no pair of LoRA factors (...{A}, ...{B}) is among its {len(tensors)} tensors (first: {some!r}): name a complete PEFT folder"
        ]
    lone = sorted(firsts ^ seconds)
    flat = [path + end for path in sorted(firsts & seconds) for end in (A, B) if tensors[path + end].dim() != 2]
    faults = [
        f"tensor {path + (A if path in firsts else B)!r} lacks its partner {path + (B if path in firsts else A)!r} ({len(lone)} factors do): copy the folder again"
        for path in lone[:1]
    ]
    faults += [f"tensor {name!r} has shape {tuple(tensors[name].shape)}, no matrix: save it again" for name in flat[:1]]
    if not flat:
        apart = [p for p in sorted(firsts & seconds) if tensors[p + A].shape[0] != tensors[p + B].shape[1]]
        faults += [
            f"tensors {path + A!r} and {path + B!r} have ranks {tensors[path + A].shape[0]} and {tensors[path + B].shape[1]}: a pair has one ({len(apart)} pairs do not)"
            for path in apart[:1]
        ]
    return faults


def _faults_of_ranks(tensors: Tensors, peft_config: Mapping[str, object]) -> list[str]:
    known = {peft_config["r"], *dict(peft_config.get("rank_pattern") or {}).values()}  # type: ignore[call-overload]
    odd = [name for name, tensor in tensors.items() if name.endswith(A) and tensor.shape[0] not in known]
    return [
        f"tensor {name!r} has rank {tensors[name].shape[0]} ({len(odd)} pairs do not fit), and {_CONFIG} has r={peft_config['r']!r} and rank_pattern={peft_config.get('rank_pattern') or {}}: {AS_TRAINED}"
        for name in odd[:1]
    ]


def _faults_of_magnitudes(tensors: Tensors, peft_config: Mapping[str, object]) -> list[str]:
    magnitudes = {name.split(MAGNITUDE)[0] for name in plain_of(tensors) if MAGNITUDE in name}
    without = [name for name in tensors if name.endswith(A) and name.removesuffix(A) not in magnitudes]
    if peft_config.get("use_dora") and without:
        return [
            f"{_CONFIG} has use_dora=true, but {without[0].removesuffix(A)!r} has no magnitude ({len(without)} pairs have none): copy the folder again"
        ]
    if magnitudes and not peft_config.get("use_dora"):
        return [
            f"tensor {min(magnitudes) + MAGNITUDE!r} is a magnitude of DoRA, and {_CONFIG} has use_dora={peft_config.get('use_dora', False)!r}: {AS_TRAINED}"
        ]
    return []
