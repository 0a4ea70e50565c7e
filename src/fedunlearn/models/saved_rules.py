"""What modules_to_save may name in one base: PEFT trains whatever ends with the word, in the middle of a name too, and says nothing of what that is."""

import re
from collections.abc import Collection, Iterable

from fedunlearn.models.layers import Layers, ends_in


def saved_faults(layers: Layers, words: Iterable[str], at: str) -> list[str]:
    """Gives a sentence for every word that PEFT would take for more than it says, for a router, and for what has no parameters. A word that matches nothing is check_saved's."""
    faults = []
    for word in words:
        named = {name for name in layers.modules if ends_in(name, word)}
        more = {name for name in layers.modules if name.endswith(word)} - named
        routers = sorted(router for router in layers.routers for name in named if inside(router, {name}))
        said = f"{at}modules_to_save: {word!r}"
        if more and named:
            faults.append(
                f"{said} names {min(named)}, but PEFT would train {min(more)} too, which ends alike: give the whole name, {min(named)!r}"
            )
        elif more:
            faults.append(f"{said} is no module's name, only the end of one ({min(more)}): give whole names")
        elif routers:
            faults.append(
                f"{said} holds {routers[0]}, the router, which is never trained: an update of it would send tokens to other experts"
            )
        elif named and not any(True for name in named for _ in layers.modules[name].parameters()):
            faults.append(f"{said} has no parameters ({min(named)}): nothing would be trained; leave it out")
    return faults


def saved_lines(layers: Layers, words: Collection[str], left_out: Collection[str]) -> list[str]:
    """Gives a line for what a user may not have meant: targets that lose their pairs to a module trained whole, and one of two tied weights. left_out: those targets."""
    lines = []
    if left_out:
        lines.append(
            f"modules_to_save={sorted(words)}: what is trained whole has no pair; {len(left_out)} of target_modules lie in there ({min(left_out)})"
        )
    tied = sorted(word for word in words if layers.tied and layers.head and _holds_tied(layers, word))
    if tied:
        lines.append(
            f"modules_to_save={tied}: its weight is one with the {'embedding' if tied == [layers.head] else 'head'}'s in this base; from here on the two part, and the other stays as it is stored"
        )
    return lines


def inside(name: str, holders: Iterable[str]) -> bool:
    """Whether a module is one of these words' modules, or lies in one."""
    return any(re.match(rf"(^|.*\.){re.escape(holder)}($|\..*)", name) for holder in holders)


def _holds_tied(layers: Layers, word: str) -> bool:
    weight = getattr(layers.modules[layers.head or ""], "weight", None)
    return any(
        parameter is weight
        for name, module in layers.modules.items()
        if ends_in(name, word)
        for parameter in module.parameters()
    )
