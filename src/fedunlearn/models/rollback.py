"""A model is as it was where putting an adapter onto it failed half-way."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def rolled_back(model: nn.Module) -> Iterator[None]:
    """Whatever is raised inside the block, the model then has the modules, parameters, hooks, modes and gradients' flags that it had before; values of tensors are not looked at.

    PEFT's own way back puts copies of saved modules in place of the base's, and leaves layers that it made before it failed.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = [(vars(module), dict(vars(module)), _contents(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for attributes, known, contents in before:
            attributes.clear()
            attributes.update(known)
            for container, content in contents:
                _refill(container, content)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        raise


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    return [(value, value.copy()) for value in vars(module).values() if isinstance(value, dict | list | set)]


def _refill(container: Any, content: Any) -> None:
    """In place: whoever else holds the container (a hook's handle) goes on with it."""
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)
