"""The strict reader: plain dicts, lists and scalars into frozen records, with every fault told at once.

Types are read from the records' own hints, so that a new field, or a user's own method, needs nothing here. It knows no record of a run
and imports no torch: what a machine says of itself is read with it as well.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, Union, cast, get_args, get_origin

from fedunlearn.config.components import Adopter, component_class, is_adopter, is_component, not_wanted
from fedunlearn.errors import UserError, did_you_mean

MISSING = "???"
TARGET = "_target_"

_EXPECTED: Mapping[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text (quote it: key=\"'...'\")",
    type(None): "null",
}


_LISTS = (tuple, list)


class _Bad:
    """Stands for a value that had a fault."""


_BAD = _Bad()


class Reader:
    """Walks data and hints side by side and collects what does not fit.

    refused: for a record, keys that it does not know and whose reason is worth saying. give: how a missing key is given, `{key}` standing for
    its name. faults: one sentence a fault; whatever `record` and `value` give counts only where there is none.
    """

    def __init__(
        self,
        refused: Mapping[type, Mapping[str, str]] = MappingProxyType({}),
        give: str = "give {key}=VALUE on the command line or set it in a YAML of yours",
    ) -> None:
        self.faults: list[str] = []
        self._refused = refused
        self._give = give

    def record(self, cls: type, data: Mapping[str, object], key: str) -> object:
        """Gives an instance of the dataclass `cls`, or _BAD with the faults noted."""
        before = len(self.faults)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        known = [name for name, field in fields.items() if field.init]
        self.faults += [
            self._unknown(cls, fields, key, str(name), value) for name, value in data.items() if name not in known
        ]
        try:
            hints = typing.get_type_hints(cls)
        except Exception as error:  # names that a user's own module does not know, and whatever else they run into
            return self._bad(
                f"{_target(key, cls)}: its type hints cannot be read ({type(error).__name__}: {error}); correct them"
            )
        given = {name: data[name] for name in known if name in data and data[name] != MISSING}
        self.faults += [
            f"{_join(key, name)} is missing and has no default: {self._give.format(key=_join(key, name))}"
            for name in known
            if name not in given and (name in data or _required(fields[name]))
        ]
        values = {name: self.value(hints[name], value, _join(key, name)) for name, value in given.items()}
        return self._built(lambda: cls(**values), key, cls) if len(self.faults) == before else _BAD

    def _unknown(
        self, cls: type, fields: Mapping[str, dataclasses.Field[object]], key: str, name: str, value: object
    ) -> str:
        said = f"{_join(key, name)}={value!r}"
        if name in fields:
            return f"{said} cannot be set: {cls.__name__} fixes it at {fields[name].default!r}; leave it out"
        if name in self._refused.get(cls, {}):
            return f"{said} is refused: {self._refused[cls][name]}"
        known = [name for name, field in fields.items() if field.init]
        listed = f"Known: {', '.join(sorted(known))}" if known else f"{cls.__name__} has no parameters"
        return f"{said} is an unknown key{did_you_mean(name, known) or '.'} {listed}. Correct it or leave it out"

    def _built(self, build: Callable[[], object], key: str, cls: type) -> object:
        try:
            return build()
        except UserError as error:
            self.faults += error.faults
        except Exception as error:  # ours raise no other; a user's own class may raise anything
            if not key:  # the run itself
                raise
            return self._bad(
                f"{_target(key, cls)} cannot be built ({type(error).__name__}: {error}): correct {key}.*, or choose another member"
            )
        return _BAD

    def _bad(self, fault: str) -> object:
        self.faults.append(fault)
        return _BAD

    def value(self, hint: object, value: object, key: str) -> object:
        """Gives the value as the hint wants it, or _BAD with the faults noted."""
        options = _options(hint)
        records = [cast("type", option) for option in options if _is_record(option)]
        if records and isinstance(value, Mapping):
            return self._component(records, value, key)
        for option in options:
            if get_origin(option) in _LISTS and isinstance(value, list | tuple):
                return self._items(option, value, key)
            if get_origin(option) is dict and isinstance(value, Mapping):
                return self._entries(get_args(option), value, key)
            read = _scalar(option, value)
            if read is not _BAD:
                return read
        self.faults.append(_wrong(options, value, key))
        return _BAD

    def _items(self, hint: object, values: list[object] | tuple[object, ...], key: str) -> object:
        of_each = get_args(hint)[0]
        read = [self.value(of_each, value, f"{key}[{index}]") for index, value in enumerate(values)]
        return _BAD if _BAD in read else cast("type", get_origin(hint))(read)

    def _entries(self, hints: tuple[object, ...], values: Mapping[object, object], key: str) -> object:
        """A mapping; whole numbers as keys may come as text, for YAML and JSON make it so."""
        before = len(self.faults)
        read = {
            self.value(hints[0], _whole(name), f"{key} (its key)"): self.value(hints[1], value, f"{key}.{name}")
            for name, value in values.items()
        }
        return read if len(self.faults) == before else _BAD

    def _component(self, options: Sequence[type], data: Mapping[str, object], key: str) -> object:
        """A record; or where the first option is an interface, what `_target_` names: a dataclass of it, or what an adopter takes."""
        base = options[0]
        if dataclasses.is_dataclass(base):
            return self.record(base, data, key)
        target, adopters = data.get(TARGET, MISSING), [option for option in options if is_adopter(option)]
        found = component_class(target, base, _join(key, TARGET), adopters)
        if isinstance(found, str):
            self.faults.append(found)
            return _BAD
        parameters = {name: value for name, value in data.items() if name != TARGET}
        if is_component(found, base):
            return self.record(found, parameters, key)
        adopted = self._built(lambda: _adopted(adopters, str(target), found, parameters, key), key, found)
        if adopted is None:
            self.faults.append(not_wanted(target, base, _join(key, TARGET), adopters))
            return _BAD
        return adopted


def _adopted(
    adopters: Sequence[type[Adopter]], target: str, found: type, parameters: Mapping[str, object], key: str
) -> object:
    """Gives the first record that takes the class in, None where none does."""
    taken = (adopter.adopt(target, found, parameters, key) for adopter in adopters)
    return next((record for record in taken if record is not None), None)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _target(key: str, cls: type) -> str:
    return f"{_join(key, TARGET)}={cls.__module__ + '.' + cls.__qualname__!r}"


def _required(field: dataclasses.Field[object]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _options(hint: object) -> tuple[object, ...]:
    """The members of a union, or the hint itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_record(option: object) -> bool:
    return isinstance(option, type) and option not in _EXPECTED and get_origin(option) is None


def _scalar(option: object, value: object) -> object:
    if get_origin(option) is Literal:
        same = [allowed for allowed in get_args(option) if allowed == value and type(allowed) is type(value)]
        return same[0] if same else _BAD
    if option is float:
        return _number(value)
    return value if option in _EXPECTED and type(value) is option else _BAD


def _whole(name: object) -> object:
    return int(name) if isinstance(name, str) and name.isdecimal() else name


def _number(value: object) -> float | _Bad:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _BAD
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return _BAD
    return number if math.isfinite(number) else _BAD


def _wrong(options: tuple[object, ...], value: object, key: str) -> str:
    allowed = [str(word) for option in options if get_origin(option) is Literal for word in get_args(option)]
    near = did_you_mean(str(value), allowed)
    if value is None:
        return f"{key}=null is not allowed; allowed: {' or '.join(_expected(option) for option in options)}"
    return f"{key}={value!r} does not fit{near or ';'} allowed: {' or '.join(_expected(option) for option in options)}"


def _expected(option: object) -> str:
    if get_origin(option) is Literal:
        return ", ".join(map(str, get_args(option)))
    if get_origin(option) in _LISTS:
        return f"a list, each {_expected(get_args(option)[0])}"
    if get_origin(option) is dict:
        names, values = (_expected(part) for part in get_args(option))
        return f"a mapping of {names} to {values}"
    if get_origin(option) is not None:
        return f"{option}, which a config cannot hold"
    if option in _EXPECTED:
        return _EXPECTED[option]
    if is_adopter(option):
        return f"{option.described}: {TARGET} and its parameters"
    name = getattr(option, "__name__", str(option))
    return (
        f"the keys of a {name}"
        if dataclasses.is_dataclass(option)
        else f"a {name}: {TARGET} and its parameters (choose a member of the group)"
    )
