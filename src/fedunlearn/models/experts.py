"""Fused experts: one pair of tensors in PEFT, a pair an expert in an Adapter.

PEFT keeps the factors of a 3-d parameter [E, ...] as lora_A [E r, d_in], expert-major, and lora_B [d_out, r E], rank-major: expert e has
A.view(E, r, d_in)[e] and B.view(d_out, r, E)[:, :, e]. A plain B A of the two would run, and be wrong.
"""

import re
from collections.abc import Iterable, Mapping

import torch

from fedunlearn.errors import UserError
from fedunlearn.models.layers import ends_in
from fedunlearn.records.adapter import A, B, Tensors

EXPERT = re.compile(r"^(?P<path>.+)\.(?P<expert>\d+)$")


def expert_views(name: str, tensor: torch.Tensor, fused: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Gives a fused factor as one view an expert, `<path>.<e>.lora_A.weight`; any other tensor under its own name. fused: path -> number of experts."""
    for end in (A, B):
        path = name.removesuffix(end)
        if path != name and path in fused:
            return {f"{path}.{e}{end}": view for e, view in enumerate(_views(tensor, end, fused[path]))}
    return {name: tensor}


def _views(tensor: torch.Tensor, end: str, experts: int) -> Iterable[torch.Tensor]:
    if end == A:
        return tensor.view(experts, -1, tensor.shape[1]).unbind(0)
    return tensor.view(tensor.shape[0], -1, experts).unbind(2)


def split_experts(tensors: Tensors, peft_config: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Gives what a PEFT folder holds with fused experts apart, contiguous. Raises UserError where their ranks are not the config's r."""
    containers = _containers(peft_config)
    if not containers:
        return dict(tensors)
    rank = int(str(peft_config["r"]))
    paths = {
        name.removesuffix(A) for name in tensors if name.endswith(A) and _is_fused(name.removesuffix(A), containers)
    }
    fused = {path: _number(path, tensors[path + A], rank, peft_config) for path in paths}
    views = {key: view for name, tensor in tensors.items() for key, view in expert_views(name, tensor, fused).items()}
    return {key: views[key].contiguous() for key in sorted(views)}


def join_experts(tensors: Tensors, peft_config: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Gives them as PEFT's folder holds them."""
    containers, joined = _containers(peft_config), dict(tensors)
    parts: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for name in tensors:
        end = A if name.endswith(A) else B
        found = EXPERT.match(name.removesuffix(end))
        if containers and name.endswith((A, B)) and found and _is_fused(found["path"], containers):
            parts.setdefault((found["path"], end), {})[int(found["expert"])] = joined.pop(name)
    for (path, end), ones in parts.items():
        ordered = [ones[e] for e in range(len(ones))]
        whole = torch.cat(ordered) if end == A else torch.stack(ordered, dim=2).flatten(1)
        joined[path + end] = whole.contiguous()
    return {name: joined[name] for name in sorted(joined)}


def _containers(peft_config: Mapping[str, object]) -> frozenset[str]:
    """The modules whose parameters are targeted by themselves, as `mlp.experts` of `mlp.experts.down_proj`."""
    targets = peft_config.get("target_parameters") or ()
    assert isinstance(targets, list | tuple | set)
    return frozenset(str(target).rpartition(".")[0] for target in targets)


def _is_fused(path: str, containers: frozenset[str]) -> bool:
    bare = re.sub(r"(\.base_layer)+$", "", path)
    return any(ends_in(bare, container) for container in containers)


def _number(path: str, a: torch.Tensor, rank: int, peft_config: Mapping[str, object]) -> int:
    """How many experts a fused A has. PEFT's own conversion of names gives some of them another rank, by a pattern on a parameter that the tensor's name does not tell."""
    patterns = {**dict(peft_config.get("rank_pattern") or {}), **dict(peft_config.get("alpha_pattern") or {})}  # type: ignore[call-overload]
    if patterns or len(a) % rank:
        raise UserError(
            f"the adapter's fused experts ({path}) have ranks by pattern ({', '.join(patterns) or 'none is named'}), and which rank is whose cannot be told from the files: "
            "only experts of one rank r are read; train it again with target_parameters"
        )
    return len(a) // rank
