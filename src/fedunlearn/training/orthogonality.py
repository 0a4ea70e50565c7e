"""AdaLoRA's penalty on factors that are not orthonormal (Zhang et al. 2023, arXiv:2303.10512, eq. 4, in PEFT's form)."""

from collections.abc import Iterable, Mapping

import torch
from torch.nn import Parameter

from fedunlearn.aggregation.adalora import triplets_of


def orthogonality(factors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Gives the mean of ||P P^T - I||_F over factors P [r, d], rows to be orthonormal, as PEFT's AdaLoraModel does (the paper squares it). A scalar.

    Raises ValueError for no factor.
    """
    norms = [torch.linalg.norm(p @ p.T - torch.eye(len(p), dtype=p.dtype, device=p.device)) for p in factors]
    if not norms:
        raise ValueError("a penalty of no factors")
    return torch.stack(norms).mean()


def pull_to_orthogonal(live: Mapping[str, Parameter], weight: float) -> None:
    """Adds the gradient of weight * orthogonality, over all A and all B^T of an AdaLoRA adapter, to those of the step; nothing for weight 0.

    live: the adapter's trainable parameters by the names of the wire. The step's loss stays the method's own, as beside FedProx's term.
    """
    if weight == 0:
        return
    modules = triplets_of(live)
    factors = (factor for module in modules for factor in (live[module.a], live[module.b].T))
    (weight * orthogonality(factors)).backward()  # type: ignore[no-untyped-call]
