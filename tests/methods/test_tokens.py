"""What losses read of a micro-batch: sums by row."""

import torch
from helpers_token_losses import batch_of


def test_row_sums_carry_the_gradient_back_to_their_tokens():
    """Rows 1, 2 | 3 sum to 3 and 3; the gradient of 2 S_0 + 5 S_1 is 2, 2, 5."""
    batch, nll = batch_of([[1.0, 2.0], [3.0]])
    sums = batch.row_sums()
    (sums * torch.tensor([2.0, 5.0])).sum().backward()
    assert sums.tolist() == [3.0, 3.0]
    assert nll.grad.tolist() == [2.0, 2.0, 5.0]
