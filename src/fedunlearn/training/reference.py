"""The model as it was when unlearning began: rows' summed losses under it, each computed once and kept."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from fedunlearn.config.data import CollatorConfig
from fedunlearn.data.chat import EncodedRow
from fedunlearn.data.collator import collate
from fedunlearn.files import canonical_json, read_object, write_json
from fedunlearn.models.adapter_tensors import ACTIVE, read_tensors, write_tensors
from fedunlearn.models.lora import REFERENCE
from fedunlearn.models.resident import Resident, numbers_name
from fedunlearn.models.sidecar import put_sidecar, use_sidecar
from fedunlearn.records.adapter import Weights
from fedunlearn.training.charges import Charges
from fedunlearn.training.forward import batch_logits

log = logging.getLogger(__name__)
BATCH_ROWS = 16


@contextmanager
def as_reference(made: Resident, reference: Weights) -> Iterator[None]:
    """Inside the block the model is the reference, in eval mode and without gradients: its values in the trainable adapter, which gets its own back."""
    current = read_tensors(made.model)
    try:
        write_tensors(made.model, reference.factors)
        put_sidecar(made.model, reference.sidecar, REFERENCE)
        use_sidecar(made.model, REFERENCE)
        made.model.eval()
        with torch.no_grad():
            yield
    finally:
        write_tensors(made.model, current)
        use_sidecar(made.model, ACTIVE)


class ReferenceSums:
    """NLL_i of rows under the reference adapter: each row's forward is run once and its sum kept under `cache`, from round to round.

    bf16: under autocast, as the training forward is. sums_of: who runs the forwards (training.parallel); None: this process. tokens: input tokens of the rows that these charges had not met; what other runs left under `cache` costs no less.
    """

    def __init__(
        self,
        made: Resident,
        reference: Weights,
        cache: Path,
        bf16: bool,
        charges: Charges,
        sums_of: "SumsOf | None" = None,
    ) -> None:
        self._made, self._reference, self._bf16, self._charges = made, reference, bf16, charges
        self._sums_of = sums_of or row_sums_of
        self._folder = cache / "reference_sums" / numbers_name(made, reference, bf16)
        self.tokens = 0

    @cached_property
    def _known(self) -> dict[str, float]:
        known: dict[str, float] = {}
        for path in sorted(self._folder.glob("*.json")):
            known |= _read(path)
        return known

    def prepare(self, rows: Sequence[EncodedRow]) -> None:
        """Computes the sums that are not known yet, in batches of rows of like length. The active adapter keeps its values."""
        wanted = {row.hash: row for row in rows}
        self.tokens += sum(len(wanted[name].input_ids) for name in self._charges.due(wanted))
        lacking = {name: row for name, row in wanted.items() if name not in self._known}
        if not lacking:
            return
        with as_reference(self._made, self._reference):
            sums = self._sums_of(self._made, list(lacking.values()), self._bf16)
        new = dict(zip(lacking, sums.tolist(), strict=True))
        self._known.update(new)
        write_json(self._folder / f"{hashlib.sha256(canonical_json(sorted(new)).encode()).hexdigest()}.json", new)

    def of(self, rows: Sequence[EncodedRow]) -> torch.Tensor:
        """Gives the sums of rows that were prepared, [B] float32. Raises KeyError for any other."""
        return torch.tensor([self._known[row.hash] for row in rows], dtype=torch.float32)


def _read(path: Path) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in read_object(path).items()}
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s is damaged (%s): the reference sums in it are computed anew", path, error)
        path.unlink(missing_ok=True)
        return {}


SumsOf = Callable[[Resident, Sequence[EncodedRow], bool], torch.Tensor]
"""Gives NLL_i of rows under the model as it is, [rows] float32 on the CPU; the flag: under autocast to bfloat16."""


def row_sums_of(made: Resident, rows: Sequence[EncodedRow], bf16: bool) -> torch.Tensor:
    """See SumsOf. Batches rows of like length, for order does not matter here."""
    by_length = sorted(range(len(rows)), key=lambda index: (len(rows[index].input_ids), index))
    sums = torch.zeros(len(rows), dtype=torch.float32)
    for start in range(0, len(rows), BATCH_ROWS):
        chosen = by_length[start : start + BATCH_ROWS]
        batch = collate([rows[index] for index in chosen], CollatorConfig(), made.chat.pad_id, made.device)
        with torch.autocast(made.device.type, dtype=torch.bfloat16, enabled=bf16):
            nll = F.cross_entropy(batch_logits(made.model, batch), batch.labels, reduction="none")
        sums[chosen] = torch.zeros(len(chosen)).index_add(0, batch.row.cpu(), nll.float().cpu())
    return sums
