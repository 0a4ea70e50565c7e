"""The classes that `_target_` names: ours, or a user's own, looked up by import path."""

import dataclasses
import importlib

from fedunlearn.errors import did_you_mean


def component_class(target: object, base: type, key: str) -> type | str:
    """Gives the dataclass that the dotted name `target` means, a subclass of `base`; or the fault, as one sentence about `key`.

    Importing runs the module's own code: an error in there, other than a failed import, is not caught.
    """
    way_out = f"give the import path of a frozen dataclass that subclasses {base.__module__}.{base.__name__}"
    if not isinstance(target, str) or target == "???":
        return f"{key} is missing: {way_out}, or choose a member of the group"
    said = f"{key}={target!r}"
    module_name, _, name = target.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in target.split(".")):
        return f"{said} is no import path (package.module.Class): {way_out}"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        return f"{said} cannot be imported ({error}): {way_out}"
    found = getattr(module, name, None)
    if found is None:
        near = did_you_mean(name, [word for word in vars(module) if not word.startswith("_")])
        return f"{said}: {module_name} has no {name!r}{near or ';'} {way_out}"
    if not (isinstance(found, type) and issubclass(found, base) and dataclasses.is_dataclass(found)):
        return f"{said} is not a {base.__name__}: {way_out}"
    return found
