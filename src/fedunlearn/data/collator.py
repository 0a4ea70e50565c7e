"""Rows become a batch: padded, masked by length, with the label tokens listed row after row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedunlearn.config.data import CollatorConfig
from fedunlearn.data.chat import EncodedRow


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of one padded length T, with N label tokens in all.

    input_ids, attention_mask: [B, T] int64. positions: [B, T] bool, where a label is predicted (the place before it).
    labels: [N] int64; row: [N] int64, the label's row; both in the order of `positions` flattened. num_labels: [B] int64.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    row: torch.Tensor
    num_labels: torch.Tensor

    @property
    def own_positions(self) -> torch.Tensor:
        """[B, T] bool, where the labels themselves stand; in the order of `labels` too."""
        return self.positions.roll(1, dims=1)  # a last position predicts nothing, so none comes round


def collate(rows: Sequence[EncodedRow], config: CollatorConfig, pad_id: int, device: torch.device) -> Batch:
    """Pads rows (at least one) to one length. The mask goes by length, so a pad id that is also a real token hides nothing."""
    length = max(len(row.input_ids) for row in rows)
    multiple = config.pad_to_multiple_of or 1
    length = -(-length // multiple) * multiple
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    positions = torch.zeros_like(input_ids, dtype=torch.bool)
    for index, row in enumerate(rows):
        size = len(row.input_ids)
        start = length - size if config.padding_side == "left" else 0
        input_ids[index, start : start + size] = torch.tensor(row.input_ids)
        attention_mask[index, start : start + size] = 1
        positions[index, start + row.num_prompt - 1 : start + size - 1] = True
    labels = torch.tensor([token for row in rows for token in row.input_ids[row.num_prompt :]])
    num_labels = torch.tensor([len(row.input_ids) - row.num_prompt for row in rows])
    row_of = torch.arange(len(rows)).repeat_interleave(num_labels)
    return Batch(*(tensor.to(device) for tensor in (input_ids, attention_mask, positions, labels, row_of, num_labels)))
