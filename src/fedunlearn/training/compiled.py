"""Decoder blocks compiled by torch while they train; what surrounds them, hooks included, stays as it is."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from fedunlearn.models.hidden_states import decoder_blocks


@contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """Inside the block every decoder block's forward runs compiled, for rows of any length; afterwards as before.

    The forward, not the call: hooks on a block (models.hidden_states) and checkpointing's own wrapper stay outside. Hooks inside it, a side-car's, are part of what is compiled, so
    their coming and going is watched, which torch by itself would not do. Dropout draws other numbers than uncompiled.
    """
    config: Any = torch._dynamo.config
    blocks = list(decoder_blocks(model))
    with ExitStack() as stack:
        stack.enter_context(config.patch(skip_nnmodule_hook_guards=False))
        for block in blocks:
            block.forward = torch.compile(block.forward, dynamic=True)
            stack.callback(delattr, block, "forward")
        yield
