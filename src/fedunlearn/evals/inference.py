"""A model as it stands, looked at without training: eval mode, no gradients, and afterwards as it was before."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def inference(model: nn.Module) -> Iterator[torch.device]:
    """Gives the model's device; inside, every module is in eval mode and no gradient is recorded.

    Each module's own mode comes back, not the root's for all. no_grad and not inference_mode: a buffer that the model renews in
    there (rotary frequencies) would be of no use to a later backward pass.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module, mode in modes.items():
            module.training = mode
