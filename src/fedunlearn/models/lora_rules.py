"""What of an adapter's config cannot stand on one base: patterns that name nothing or two things, and what fused experts do not take."""

import logging
import re
from collections.abc import Iterable, Mapping

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import nn

from fedunlearn.config.lora import AT, PRESET_DROPOUT, PRESET_TARGETS, LoraArgs
from fedunlearn.errors import UserError
from fedunlearn.models.adalora import is_adalora
from fedunlearn.models.layers import layers_of, sides_of
from fedunlearn.models.targets import KINDS, Targets
from fedunlearn.once import say_once

log = logging.getLogger(__name__)
FUSED_QUERIES = ("c_attn", "qkv_proj", "query_key_value", "Wqkv")
"""Linear layers that make queries, keys and values at once."""
ON_EXPERTS = "an expert's factors meet its weight before any input does; leave it out, or leave the experts out (target_modules=attention)"


def check_on_base(config: LoraConfig, found: Targets, at: str = AT) -> None:
    """Raises UserError, all faults at once, for a config that this base cannot take: see the file's first line."""
    faults = [
        *_pattern_faults("rank_pattern", config.rank_pattern, found, at),
        *_pattern_faults("alpha_pattern", config.alpha_pattern, found, at),
        *(_expert_faults(config, at) if found.experts else ()),
    ]
    if faults:
        raise UserError(*faults)


def settle_targets(config: LoraConfig, base: nn.Module, args: LoraArgs) -> None:
    """Puts a preset's own targets in a base's words, with one line, where it has no layers of those names; anybody else's stay, to be refused."""
    preset = args.preset
    if (
        preset is None
        or "target_modules" not in args.adapts
        or set(config.target_modules or ()) != set(PRESET_TARGETS[preset])
    ):
        return
    layers = layers_of(base)
    if all(layers.names(word) for word in PRESET_TARGETS[preset]):
        return
    fused = {word for word in FUSED_QUERIES if layers.names(word)}
    instead = "all-linear" if preset != "fast" else ", ".join(sorted(fused)) or "attention"
    config.target_modules = fused if instead not in KINDS else instead
    missing = ", ".join(PRESET_TARGETS[preset])
    say_once(f"lora={preset}: this base has no layers called {missing}; what stands for them is {instead}")


def settle_dropout(config: LoraConfig, found: Targets, args: LoraArgs) -> None:
    """Puts a preset's own dropout to 0, with one line, where fused experts are targeted; anybody else's stays, for check_on_base to refuse."""
    preset = args.preset
    own = preset is None or "lora_dropout" not in args.adapts or config.lora_dropout != PRESET_DROPOUT[preset]
    if found.experts and not own:
        say_once(
            f"lora={preset}: its lora_dropout={config.lora_dropout:g} is 0 here, for this base's experts are targeted and fused, and PEFT drops no input of theirs"
        )
        config.lora_dropout = 0.0


def rank_of(config: LoraConfig, module: str) -> int:
    """Gives the rank that a module has by r and rank_pattern."""
    patterns: Mapping[str, int] = config.rank_pattern or {}
    if is_adalora(config):
        return int(config.init_r)
    return patterns.get(get_pattern_key(list(patterns), module), config.r)


def warn_of_ranks(base: nn.Module, config: LoraConfig, found: Targets) -> None:
    """One warning where a rank is above the smaller side of the matrix it belongs to: the rest of it can hold nothing."""
    above = {name: min(sides) for name, sides in _sides(base, found).items() if rank_of(config, name) > min(sides)}
    if above:
        first = min(above)
        log.warning(
            "%s%s=%d is above the smaller side of %d of %d targets (%s has %d): what lies beyond adds parameters and no rank",
            AT,
            "r" if rank_of(config, first) == config.r else "init_r" if is_adalora(config) else "rank_pattern",
            rank_of(config, first),
            len(above),
            len(found.modules) + len(found.experts),
            first,
            above[first],
        )


def _sides(base: nn.Module, found: Targets) -> dict[str, tuple[int, int]]:
    sides = {name: sides_of(base.get_submodule(name)) for name in found.modules}
    shapes = {name: base.get_parameter(name).shape for name in found.experts}
    return {**sides, **{name: (int(shape[1]), int(shape[2])) for name, shape in shapes.items()}}


def _pattern_faults(key: str, patterns: Mapping[str, float] | None, found: Targets, at: str) -> Iterable[str]:
    hits: dict[str, tuple[str, float]] = {}
    for pattern, value in (patterns or {}).items():
        try:
            form = re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            yield f"{at}{key}: {pattern!r} is no regular expression ({error})"
            continue
        modules = [name for name in sorted(found.modules) if form.match(name)]
        if any(form.match(name) for name in found.experts):
            yield f"{at}{key}: {pattern!r} names fused experts, which have one rank and scale, r and lora_alpha: name linear layers only"
        elif not modules:
            yield f"{at}{key}: {pattern!r} matches none of the target modules; correct it or leave it out"
        for name in modules:
            other, known = hits.setdefault(name, (pattern, value))
            if known != value:
                yield f"{at}{key}: {name} is matched by {other!r} ({known:g}) and by {pattern!r} ({value:g}): which holds would hang on their order; let one of them match it"
                break


def _expert_faults(config: LoraConfig, at: str) -> Iterable[str]:
    initial = config.init_lora_weights
    rules = (
        (config.lora_dropout == 0, f"{AT}lora_dropout={config.lora_dropout:g}"),  # never a loaded adapter's
        (not config.use_dora, f"{at}use_dora=true"),
        (not config.lora_bias, f"{at}lora_bias=true"),
        (not is_adalora(config), f"{at}peft_type=ADALORA"),
        (not str(initial).startswith(("pissa", "olora")), f"{at}init_lora_weights={initial}"),
    )
    return [f"{said} beside fused experts: {ON_EXPERTS}" for holds, said in rules if not holds]
