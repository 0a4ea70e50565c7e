"""The output of one decoder block, and forwards that end there."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn


class ForwardStopped(Exception):  # noqa: N818  it is no error: what was wanted has been computed
    """Raised inside a forward when the block's output is there; `block_output` catches it."""


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """Gives the decoder blocks. Raises ValueError where there is no telling which they are."""
    return _blocks(model)[0]


def num_blocks(model: nn.Module) -> int:
    """Gives how many decoder blocks the model has."""
    return len(_blocks(model)[0])


@contextmanager
def block_output(model: nn.Module, block: int, *, stop: bool) -> Iterator[list[torch.Tensor]]:
    """Inside the block of code each forward leaves the output [B, T, d] of decoder block `block` (from 0) in the list; stop: it ends there.

    It is read where the next module takes it in: inside the block itself gradient checkpointing would run the hook again in the backward.
    """
    blocks, last = _blocks(model)
    following = blocks[block + 1] if block + 1 < len(blocks) else last
    seen: list[torch.Tensor] = []

    def look(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])
        if stop:
            raise ForwardStopped

    handle = following.register_forward_pre_hook(look)
    try:
        yield seen
    except ForwardStopped:
        pass
    finally:
        handle.remove()


def _blocks(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """Gives the decoder blocks and the module that follows the last of them (the final norm). Raises ValueError where that is not to be told."""
    count = getattr(model.config, "num_hidden_layers", None)
    for parent in model.modules():
        children = list(parent.children())
        for place, child in enumerate(children):
            if isinstance(child, nn.ModuleList) and len(child) == count:
                norms = [other for other in (*children[place + 1 :], *children[:place]) if _is_norm(other)]
                if norms:
                    return child, norms[0]
    raise ValueError(f"{type(model).__name__}: no list of {count} decoder blocks with a norm beside it")


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm, one that is trained whole (modules_to_save) too."""
    own = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
    return "norm" in type(own).__name__.lower()
