"""The transformer beneath PEFT's wrapper."""

from typing import Any

from torch import nn


def inner_model(model: nn.Module) -> Any:
    """Gives the transformer itself: under PEFT the wrapped one, whose layers hold the adapter; else the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
