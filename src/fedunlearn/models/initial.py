"""What a fresh adapter begins with."""

import torch
from peft import PeftModel

from fedunlearn.aggregation.factors import fresh_a
from fedunlearn.models.adapter_tensors import live_parameters
from fedunlearn.records.adapter import A, B
from fedunlearn.seeds import seed_of


def draw_fresh(model: PeftModel, seed: int) -> None:
    """Gives the active adapter fresh values: A uniform in +-1/sqrt(d_in), as PEFT draws it, B zero.

    Drawn on the CPU from a generator of its own, so that device and global random state do not matter. Raises ValueError for
    a tensor that is neither A nor B.
    """
    generator = torch.Generator().manual_seed(seed_of("lora init", seed))
    with torch.no_grad():
        for name, parameter in live_parameters(model).items():
            if name.endswith(A):
                parameter.copy_(fresh_a(parameter.shape, generator))
            elif name.endswith(B):
                parameter.zero_()
            else:
                raise ValueError(f"adapter tensor {name!r} is neither A nor B")
