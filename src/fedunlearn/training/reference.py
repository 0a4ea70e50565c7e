"""Reference sums: each forget row's summed loss under the adapter that unlearning began with, computed once and kept."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from fedunlearn.config.data import CollatorConfig
from fedunlearn.data.chat import EncodedRow
from fedunlearn.data.collator import collate
from fedunlearn.files import canonical_json, write_bytes
from fedunlearn.models.lora import ACTIVE, REFERENCE, read_tensors, write_tensors
from fedunlearn.models.ranks import scales_in
from fedunlearn.models.resident import Resident
from fedunlearn.models.sidecar import put_sidecar, use_sidecar
from fedunlearn.records.adapter import Weights
from fedunlearn.training.forward import batch_logits

log = logging.getLogger(__name__)
BATCH_ROWS = 16


def reference_sums(
    made: Resident, reference: Weights, rows: Sequence[EncodedRow], cache: Path, bf16: bool
) -> torch.Tensor:
    """Gives NLL_i of every row under the reference adapter, [rows] float32, in eval mode.

    bf16: under autocast, as the training forward is. Kept under `cache` by the hash of base, how it is run (dtype, attention,
    device, bf16), LoRA scales, reference and token ids (which hold the template); read again where it is there. The active adapter keeps its values.
    """
    attention = str(made.model.config._attn_implementation)
    model = [
        made.fingerprint,
        str(made.model.dtype),
        attention,
        made.device.type,
        bf16,
        scales_in(made.model),
    ]
    labels = [[list(row.input_ids), row.num_prompt] for row in rows]
    name = hashlib.sha256(canonical_json([model, reference.hash, labels]).encode()).hexdigest()
    path = cache / "reference_sums" / f"{name}.safetensors"
    kept = _read(path, len(rows))
    if kept is None:
        kept = _compute(made, reference, rows, bf16)
        write_bytes(path, safetensors.torch.save({"sums": kept}))
    return kept


def _read(path: Path, count: int) -> torch.Tensor | None:
    if not path.is_file():
        return None
    try:
        sums = safetensors.torch.load_file(path)["sums"]
        if sums.shape != (count,):
            raise ValueError(f"{tuple(sums.shape)} sums for {count} rows")
        return sums
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        log.warning("%s is damaged (%s): the reference sums are computed anew", path, error)
        return None


def _compute(made: Resident, reference: Weights, rows: Sequence[EncodedRow], bf16: bool) -> torch.Tensor:
    current = read_tensors(made.model)
    write_tensors(made.model, reference.factors)
    put_sidecar(made.model, reference.sidecar, REFERENCE)
    use_sidecar(made.model, REFERENCE)
    made.model.eval()
    try:
        return _sums_of(made, rows, bf16)
    finally:
        write_tensors(made.model, current)
        use_sidecar(made.model, ACTIVE)


def _sums_of(made: Resident, rows: Sequence[EncodedRow], bf16: bool) -> torch.Tensor:
    """Batches rows of like length, for order does not matter here."""
    by_length = sorted(range(len(rows)), key=lambda index: (len(rows[index].input_ids), index))
    sums = torch.zeros(len(rows), dtype=torch.float32)
    for start in range(0, len(rows), BATCH_ROWS):
        chosen = by_length[start : start + BATCH_ROWS]
        batch = collate([rows[index] for index in chosen], CollatorConfig(), made.chat.pad_id, made.device)
        with torch.no_grad(), torch.autocast(made.device.type, dtype=torch.bfloat16, enabled=bf16):
            nll = F.cross_entropy(batch_logits(made.model, batch), batch.labels, reduction="none")
        sums[chosen] = torch.zeros(len(chosen)).index_add(0, batch.row.cpu(), nll.float().cpu())
    return sums
