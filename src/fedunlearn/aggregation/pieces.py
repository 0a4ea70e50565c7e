"""Plain tensors of every client piece by piece: a saved head of all of them at once, in float64, would be the largest thing in the server."""

from collections.abc import Iterator, Sequence

import torch

ENTRIES = 2**22
"""How many entries of all tensors together are taken at once: 32 MiB in float64."""


def in_pieces(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Gives the same entries of tensors of one shape, flat, part after part, each in its own dtype; they share storage with contiguous ones."""
    size = max(ENTRIES // len(tensors), 1)
    return zip(*(torch.split(tensor.reshape(-1), size) for tensor in tensors), strict=True)
