"""Other people's server strategies: what the config holds where `strategy._target_` names a Flower strategy.

This floor knows no Flower: a class is judged by its shape and by its constructor's signature. federation.flower_strategy
builds the object itself.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from fedunlearn.errors import UserError, did_you_mean

FIXED: Mapping[str, float | int | str] = {
    "fraction_train": 1.0,
    "fraction_evaluate": 1.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
    "weighted_by_key": "num-examples",
    "arrayrecord_key": "arrays",
    "configrecord_key": "config",
    "train_loss_key": "train_loss",
}
_INSTEAD: Mapping[str, str] = {
    "fraction_train": "trainer.federated.fraction_train draws the clients",
    "min_train_nodes": "trainer.federated.min_clients says how many clients a round needs",
    "min_available_nodes": "trainer.federated.min_clients says how many clients a round needs",
    "fraction_evaluate": "eval.* says what is evaluated, on the server",
    "min_evaluate_nodes": "eval.* says what is evaluated, on the server",
}
_READS_LOSSES = "train_loss_key"
_UNSET = "???"
_METRICS_FN = "_metrics_aggr_fn"
_WRAPPED = "strategy"
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_PLAIN = (bool, int, float, str, type(None))
_OF_ANNOTATION: Mapping[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a finite number"),
    "str": ((str,), "text (quote it: key=\"'...'\")"),
}


@dataclass(frozen=True, kw_only=True)
class FlowerStrategy:
    """A strategy that is not one of ours: the import path of its class and what its constructor gets.

    parameters: plain values (numbers, text, true and false, null, lists of them), those that the user gave and no others. reads_losses: whether
    it averages by the clients' training losses (QFedAvg).
    """

    described: ClassVar[str] = "a Flower strategy (flwr.serverapp.strategy.*)"

    target: str
    parameters: Mapping[str, object] = field(default_factory=dict)
    reads_losses: bool = False

    @property
    def client_mu(self) -> float:
        """0: the mu that a strategy wants is read each round from what it configures."""
        return 0.0

    @classmethod
    def adopt(cls, target: str, found: type, parameters: Mapping[str, object], key: str) -> "FlowerStrategy | None":
        """Gives the record where `found` has the shape of a Flower strategy of the Message API, None where it has not.

        key: `strategy`, for the messages. Raises UserError with all faults: a class of Flower's legacy interface, an abstract
        one, one that wraps another strategy, and parameters that are unknown, missing, not plain or not the user's to set.
        """
        if not _has(found, "configure_train", "aggregate_train"):
            if _has(found, "configure_fit"):
                raise UserError(
                    f"{key}._target_={target!r} is a strategy of Flower's legacy interface (configure_fit): name its "
                    "like in flwr.serverapp.strategy, or write yours as a subclass of flwr.serverapp.strategy.Strategy"
                )
            return None
        fault = _class_fault(found)
        if fault:
            raise UserError(f"{key}._target_={target!r} {fault}")
        known, given = constructor_parameters(found), {k: value for k, value in parameters.items() if value != _UNSET}
        faults = [fault for name, value in given.items() if (fault := _fault(name, value, known, key))]
        unset = [*(name for name in parameters if name not in given), *_required(found)]
        faults += [_missing(name, key) for name in dict.fromkeys(unset) if name not in given]
        if faults:
            raise UserError(*faults)
        return cls(target=target, parameters=given, reads_losses=_READS_LOSSES in known)


def constructor_parameters(found: type) -> dict[str, inspect.Parameter]:
    """What a class's constructor takes by name; behind `**kwargs`, what the next constructor in line takes."""
    known: dict[str, inspect.Parameter] = {}
    for base in found.__mro__[:-1]:
        if "__init__" in vars(base):
            own = _own_parameters(base)
            known = {name: parameter for name, parameter in own.items() if parameter.kind in _BY_NAME} | known
            if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values()):
                break
    return known


def _own_parameters(found: type) -> dict[str, inspect.Parameter]:
    """Those of __init__ alone, without self."""
    return dict(list(inspect.signature(found.__init__).parameters.items())[1:])  # type: ignore[misc]


def _has(found: type, *methods: str) -> bool:
    return all(callable(getattr(found, method, None)) for method in methods)


def _class_fault(found: type) -> str:
    if inspect.isabstract(found):
        lacking = ", ".join(sorted(found.__abstractmethods__))  # type: ignore[attr-defined]
        return f"is abstract: name a class that has {lacking}"
    if _WRAPPED in constructor_parameters(found):
        return f"wraps another strategy (its parameter {_WRAPPED!r}), and a config holds one: name that strategy itself"
    return ""


def _fault(name: str, value: object, known: Mapping[str, inspect.Parameter], key: str) -> str:
    """One sentence about one parameter, empty where nothing is wrong with it."""
    said = f"{key}.{name}={value!r}"
    if name in _INSTEAD:
        return f"{said} is refused: {_INSTEAD[name]}; leave it out"
    if name in FIXED:
        return f"{said} is refused: it is fixed by us at {FIXED[name]!r}, the key our messages have; leave it out"
    if name.endswith(_METRICS_FN):
        return f"{said} is refused: fixed by us, history.jsonl holds every client's own figures; leave it out"
    settable = sorted(word for word, parameter in known.items() if _settable(word, parameter))
    if name not in known:
        listed = f"Known: {', '.join(settable)}" if settable else "This class has no parameters to set"
        return f"{said} is an unknown key{did_you_mean(name, settable) or '.'} {listed}. Correct it or leave it out"
    if name not in settable:
        return f"{said} is refused: it takes a function, which a config cannot hold; leave it out"
    return _value_fault(said, value, known[name].annotation)


def _settable(name: str, parameter: inspect.Parameter) -> bool:
    ours = name in FIXED or name.endswith(_METRICS_FN)
    return not ours and "Callable" not in str(parameter.annotation)


def _value_fault(said: str, value: object, annotation: object) -> str:
    """Judged by the annotation where it is a plain type: a constructor stores what it gets, and fails after a round of training."""
    if not _is_plain(value):
        return f"{said} does not fit; allowed: a finite number, text, true, false, null, or a list of those"
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    types, expected = _OF_ANNOTATION.get(name, (_PLAIN, ""))
    fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
    return "" if fits or not expected else f"{said} does not fit; allowed: {expected}"


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN) and not (isinstance(value, float) and not math.isfinite(value))


def _required(found: type) -> list[str]:
    """By the class's own constructor: what it hands on to the next in line it may fill in itself."""
    return [
        name
        for name, parameter in _own_parameters(found).items()
        if parameter.default is inspect.Parameter.empty and parameter.kind in _BY_NAME and name not in FIXED
    ]


def _missing(name: str, key: str) -> str:
    said = f"{key}.{name}"
    return f"{said} is missing and has no default: give {said}=VALUE on the command line or set it in a YAML of yours"
