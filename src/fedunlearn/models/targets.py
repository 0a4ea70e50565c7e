"""What the names of target modules mean in one base: which linear layers and which fused experts get a pair of factors, and what never does."""

import copy
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedunlearn.config.lora import AT
from fedunlearn.errors import UserError
from fedunlearn.models.layers import PEFT_REWRITES, PIECES, Layers, end_of, ends_in, layers_of
from fedunlearn.models.saved_rules import inside, saved_faults, saved_lines
from fedunlearn.once import say_once

KINDS = ("attention", "mlp", "all-linear")


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a config means in one base, by full names. modules: linear layers, a pair each; experts: fused parameters, a pair an expert.

    said_modules, said_experts: what PEFT is told, as short as it can be with layers_to_transform and said_excluded beside it: what of
    exclude_modules concerns modules, for PEFT applies it to them alone. fan_in_fan_out: whether the modules store their weights [in, out].
    """

    modules: frozenset[str]
    experts: frozenset[str]
    said_modules: frozenset[str] | str
    said_experts: tuple[str, ...]
    said_excluded: frozenset[str] | str | None
    fan_in_fan_out: bool


@dataclass(frozen=True, kw_only=True)
class _Hit:
    """What one word of target_modules names: linear layers, fused experts, parts of some (container and old name), or why it is refused."""

    modules: frozenset[str] = frozenset()
    experts: frozenset[str] = frozenset()
    pieces: frozenset[tuple[str, str]] = frozenset()
    fault: str = ""


def find_targets(base: nn.Module, config: LoraConfig, at: str = AT) -> Targets:
    """Gives what the config's names mean in a base (its weights may be on the meta device); a base that has an adapter already is none.

    at: how messages call the config. Raises UserError, all faults at once, for a word that matches nothing, something that is no linear
    layer, a router, an embedding or a head tied to it, a part of fused experts, a filter that does nothing, and filters that leave nothing; before these
    for a text that is no regular expression.
    """
    _check_patterns(config, at)
    layers = layers_of(base)
    words = _words(config.target_modules)
    hits = [_hit(layers, word, isinstance(config.target_modules, str), at) for word in words]
    named = frozenset[str]().union(*(hit.modules for hit in hits))
    experts, faults = _whole_experts(layers, hits, at)
    experts |= _own_parameters(layers, config.target_parameters or (), faults, at)
    faults = [hit.fault for hit in hits if hit.fault] + faults
    saved = config.modules_to_save or ()
    faults += saved_faults(layers, saved, at)
    kept = _filtered(named | experts, config, faults, at)
    if not faults and not kept:
        faults.append(f"{at}target_modules={config.target_modules!r}: nothing is left of them after {_filters(config)}")
    if faults:
        raise UserError(*faults)
    for line in saved_lines(layers, saved, [name for name in named | experts if inside(name, saved)]):
        say_once(line)
    return _told(layers, config, named, kept & experts, kept & named, at)


def with_targets(config: LoraConfig, found: Targets) -> LoraConfig:
    """Gives a copy of the config that names what was found, in words that mean the same to PEFT by itself."""
    made = copy.copy(config)
    made.target_modules = found.said_modules if isinstance(found.said_modules, str) else set(found.said_modules)
    made.target_parameters = list(found.said_experts) or None
    made.exclude_modules = set(said) if isinstance(said := found.said_excluded, frozenset) else said
    made.fan_in_fan_out = found.fan_in_fan_out
    return made


def matches(name: str, target: str, is_pattern: bool) -> bool:
    """PEFT's rule: a text is a pattern for the whole name, an entry of a list is a name or its end."""
    if not is_pattern:
        return ends_in(name, target)
    return re.fullmatch(target, name) is not None


def _check_patterns(config: LoraConfig, at: str) -> None:
    texts = {key: getattr(config, key) for key in ("target_modules", "exclude_modules")}
    said = [(key, text, text) for key, text in texts.items() if isinstance(text, str)]
    said += [("layers_pattern", word, _numbered(word)) for word in _words(config.layers_pattern)]
    faults = []
    for key, text, whole in said:
        try:
            groups = re.compile(whole).groups
        except re.error as error:
            faults.append(f"{at}{key}={text!r} is no regular expression ({error})")
            continue
        if key == "layers_pattern" and groups > 1:
            faults.append(
                f"{at}{key}={text!r} has a group, which PEFT would read the layer's number from: write (?:...) for (...)"
            )
    if faults:
        raise UserError(*faults)


def _numbered(pattern: str) -> str:
    """What PEFT makes of an entry of layers_pattern: its one group is the layer's number."""
    return rf"(?:^|.*?\.){pattern}\.(\d+)\."


def _words(targets: Collection[str] | str | None) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else tuple(sorted(targets or ()))


def _hit(layers: Layers, word: str, is_pattern: bool, at: str) -> _Hit:
    if word in KINDS:
        found = layers.of_kind(word)
        if not found:
            return _Hit(fault=f"{at}target_modules: {word!r} is nothing that this base has; {layers.known}")
        return _Hit(modules=found - set(layers.experts), experts=found & set(layers.experts))
    modules = frozenset(name for name in layers.modules if matches(name, word, is_pattern))
    experts = frozenset(name for name in layers.experts if matches(name, word, is_pattern))
    containers = {name.rpartition(".")[0] for name in layers.experts}
    old = {piece for families in PIECES.values() for pieces in families for piece in pieces}
    pieces = frozenset((c, p) for c in containers for p in old if matches(f"{c}.{p}", word, is_pattern))
    if not modules and not experts and not pieces:
        return _Hit(fault=f"{at}target_modules: {word!r} matches no module of this base; {layers.known}")
    fault = next((_why_not(layers, name) for name in sorted(modules) if name not in layers.linear), "")
    return _Hit(
        modules=modules,
        experts=experts,
        pieces=pieces,
        fault=f"{at}target_modules: {word!r} matches {fault}; {layers.known}" if fault else "",
    )


def _why_not(layers: Layers, name: str) -> str:
    module = layers.modules[name]
    if name in layers.routers:
        return f"{name}, the router, which is never trained: an update of it would send tokens to other experts"
    if name == layers.head:
        return f"{name}, whose weight is the embedding's: an adapter on one of the two would part them"
    if isinstance(module, nn.Embedding):
        return f"{name}, an embedding: its rows are looked up, not multiplied (modules_to_save trains it whole)"
    return f"{type(module).__name__}, which is no linear layer"


def _whole_experts(layers: Layers, hits: Iterable[_Hit], at: str) -> tuple[frozenset[str], list[str]]:
    """Fused experts that were named as such or by all their parts; a fault for some that were named by a part."""
    hits = tuple(hits)
    experts = frozenset[str]().union(*(hit.experts for hit in hits))
    pieces = frozenset[tuple[str, str]]().union(*(hit.pieces for hit in hits))
    faults: dict[str, None] = {}
    for name in sorted(set(layers.experts) - experts):
        container, _, key = name.rpartition(".")
        for family in PIECES[key]:
            said = [piece for piece in family if (container, piece) in pieces]
            if len(said) == len(family):
                experts |= {name}
            elif said:
                lacking = ", ".join(piece for piece in family if piece not in said)
                faults[
                    f"{at}target_modules: {said[0]!r} without {lacking}: in this base's experts they are one fused parameter, {end_of(name)}; name both or neither"
                ] = None
    return experts, list(faults)


def _own_parameters(layers: Layers, targets: Iterable[str], faults: list[str], at: str) -> frozenset[str]:
    """Fused experts that target_parameters names; a fault for whatever else it names."""
    found: set[str] = set()
    for target in sorted(targets):
        hit = {name for name in layers.experts if matches(name, target, is_pattern=False)}
        if not hit:
            faults.append(
                f"{at}target_parameters: {target!r} names no fused experts of this base; linear layers belong in target_modules; {layers.known}"
            )
        found |= hit
    return frozenset(found)


def _filtered(named: frozenset[str], config: LoraConfig, faults: list[str], at: str) -> frozenset[str]:
    """What exclude_modules, modules_to_save and layers_to_transform leave; a fault for an entry of them that changes nothing."""
    kept = set(named)
    for word in _words(config.exclude_modules):
        out = {name for name in named if _is_out(name, word, isinstance(config.exclude_modules, str))}
        if named and not out:
            faults.append(f"{at}exclude_modules: {word!r} excludes nothing of what target_modules names; leave it out")
        kept -= out
    kept -= {name for name in named if inside(name, config.modules_to_save or ())}
    if config.layers_to_transform is None:
        return frozenset(kept)
    wanted = config.layers_to_transform
    numbers = {name: _layer_of(name, config.layers_pattern) for name in named}
    there = sorted({number for number in numbers.values() if number is not None})
    faults += [
        f"{at}layers_to_transform names layer {number}, which is none of this base's targets' ({_span(there)})"
        for number in ([wanted] if isinstance(wanted, int) else wanted)
        if named and number not in there
    ]
    chosen = {wanted} if isinstance(wanted, int) else set(wanted)
    return frozenset(name for name in kept if numbers[name] in chosen)


def _is_out(name: str, word: str, is_pattern: bool) -> bool:
    """An expert's parameter goes with the module that holds it, of whose parameters PEFT knows nothing."""
    holder = name.rpartition(".")[0]
    return matches(name, word, is_pattern) or (name.split(".")[-1] in PIECES and matches(holder, word, is_pattern))


def _excluding(words: Collection[str] | str | None, modules: frozenset[str]) -> frozenset[str] | str | None:
    acting = {word for word in _words(words) if any(matches(name, word, isinstance(words, str)) for name in modules)}
    return (words if isinstance(words, str) else frozenset(acting)) if acting else None


def _layer_of(name: str, patterns: Collection[str] | str | None) -> int | None:
    """A layer's number as PEFT reads it: the first one behind any name, or behind one of layers_pattern."""
    listed = [patterns] if isinstance(patterns, str) else list(patterns or ())
    tried = [_numbered(pattern) for pattern in listed] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((hit for pattern in tried if (hit := re.match(pattern, name))), None)
    return None if found is None else int(found[1])


def _span(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "which stand in no numbered layer"


def _filters(config: LoraConfig) -> str:
    keys = ("exclude_modules", "modules_to_save", "layers_to_transform")
    return ", ".join(f"{key}={getattr(config, key)!r}" for key in keys if getattr(config, key) is not None)


def _told(
    layers: Layers, config: LoraConfig, named: frozenset[str], experts: frozenset[str], modules: frozenset[str], at: str
) -> Targets:
    words, said = config.target_modules, _said(layers, config, named)
    rewritten = sorted(PEFT_REWRITES & {word.rpartition(".")[2] for word in said}) if layers.experts else []
    if rewritten:
        raise UserError(
            f"{at}target_modules: {', '.join(rewritten)} name linear layers beside fused experts, and PEFT would take them for the experts': "
            "in this base leave them out (target_modules=attention)"
        )
    flipped = {isinstance(layers.modules[name], Conv1D) for name in modules}
    if len(flipped) > 1:
        raise UserError(
            f"{at}target_modules={words!r} names linear layers and Conv1D, which store their weights the other way round: name one sort"
        )
    found = Targets(
        modules=modules,
        experts=experts,
        said_modules=said,
        said_experts=_short_experts(layers, experts),
        said_excluded=_excluding(config.exclude_modules, named - experts),
        fan_in_fan_out=flipped == {True},
    )
    told = with_targets(config, found)
    seen = {name for name in layers.modules if _peft_matches(told, name)}
    assert seen == modules, sorted(seen ^ modules)[:3]
    return found


def _said(layers: Layers, config: LoraConfig, named: frozenset[str]) -> frozenset[str] | str:
    """Names stay as they are written, and a pattern where PEFT reads it as we do: not beside layers_to_transform, nor on a base with fused experts."""
    words = config.target_modules
    if isinstance(words, str):
        kept = words not in KINDS and not layers.experts and config.layers_to_transform is None
        return words if kept else _short(layers, named)
    plain = {word for word in words or () if word not in KINDS and _names_modules(layers, word)}
    kinds = [layers.of_kind(word) for word in words or () if word in KINDS]
    return frozenset(plain) | _short(layers, frozenset[str]().union(*kinds) - set(layers.experts))


def _peft_matches(config: LoraConfig, name: str) -> bool:
    return bool(config.target_modules) and bool(check_target_module_exists(config, name))


def _names_modules(layers: Layers, word: str) -> bool:
    return any(matches(name, word, is_pattern=False) for name in layers.linear)


def _short(layers: Layers, names: frozenset[str]) -> frozenset[str]:
    """The shortest ends of names that no other module has."""
    everywhere = Counter(end for name in layers.modules for end in _ends(name))
    ours = Counter(end for name in names for end in _ends(name))
    return frozenset(next(end for end in _ends(name) if everywhere[end] == ours[end]) for name in names)


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _short_experts(layers: Layers, names: frozenset[str]) -> tuple[str, ...]:
    """`mlp.experts.down_proj` where it is every layer's, else full names: PEFT filters no parameters by layer."""
    whole = {end: {name for name in layers.experts if end_of(name) == end} for end in map(end_of, names)}
    return tuple(sorted({end_of(name) if whole[end_of(name)] <= names else name for name in names}))
