"""The classes that `_target_` names: ours, or a user's own, looked up by import path."""

import dataclasses
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, Self, TypeGuard

from fedunlearn.errors import did_you_mean


class Adopter(Protocol):
    """A record that stands beside an interface in a union and takes in classes of other people's by their shape.

    described: what it takes, in words, with the article.
    """

    described: ClassVar[str]

    @classmethod
    def adopt(cls, target: str, found: type, parameters: Mapping[str, object], key: str) -> Self | None:
        """Gives a record that holds the class by its name, or None where it is not of the kind.

        Raises UserError where it is of the kind and cannot be used.
        """


def is_adopter(option: object) -> TypeGuard[type[Adopter]]:
    """Whether a member of a union takes in other people's classes."""
    return isinstance(option, type) and callable(getattr(option, "adopt", None))


def is_component(found: type, base: type) -> bool:
    """Whether the class is a member of the interface `base`."""
    return issubclass(found, base) and dataclasses.is_dataclass(found)


def component_class(target: object, base: type, key: str, adopters: Sequence[type[Adopter]] = ()) -> type | str:
    """Gives the class that the dotted name `target` means; or the fault, as one sentence about `key`.

    Without adopters it is a dataclass and a subclass of `base`, and never an abstract one. Importing runs the module's own code: whatever that
    raises is a fault too.
    """
    way_out = _way_out(base, adopters)
    if target == "???":
        return f"{key} is missing: {way_out}, or choose a member of the group"
    if not isinstance(target, str):
        return f"{key}={'null' if target is None else repr(target)} must be text: {way_out}"
    said = f"{key}={target!r}"
    module_name, _, name = target.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in target.split(".")):
        return f"{said} is no import path (package.module.Class): {way_out}"
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, name, None)
    except ImportError as error:
        return f"{said} cannot be imported ({error}): {way_out}"
    except (Exception, SystemExit) as error:  # a user's own module may raise anything
        return f"{said} cannot be imported ({type(error).__name__}: {error}): correct that module, or {way_out}"
    if found is None:
        near = did_you_mean(name, [word for word in vars(module) if not word.startswith("_")])
        return f"{said}: {module_name} has no {name!r}{near or ';'} {way_out}"
    if not (isinstance(found, type) and (adopters or is_component(found, base))):
        return not_wanted(target, base, key, adopters)
    if is_component(found, base) and inspect.isabstract(found):
        return (
            f"{said} is abstract: name a class that has {', '.join(sorted(getattr(found, '__abstractmethods__', ())))}"
        )
    return found


def not_wanted(target: object, base: type, key: str, adopters: Sequence[type[Adopter]] = ()) -> str:
    """The fault of a class that is neither a member of the interface nor taken in by an adopter."""
    article = "an" if base.__name__[0] in "AEIOU" else "a"
    wanted = " or ".join([f"{article} {base.__name__}", *(adopter.described for adopter in adopters)])
    return f"{key}={target!r} is not {wanted}: {_way_out(base, adopters)}"


def _way_out(base: type, adopters: Sequence[type[Adopter]]) -> str:
    ours = f"a frozen dataclass that subclasses {base.__module__}.{base.__name__}"
    return f"give the import path of {' or of '.join([ours, *(adopter.described for adopter in adopters)])}"
