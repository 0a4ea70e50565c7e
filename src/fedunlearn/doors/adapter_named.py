"""What the command line of scripts/adapter.py names: adapters, bases, folders that are to be made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from fedunlearn.config.model import Dtype, ModelArgs
from fedunlearn.errors import UserError
from fedunlearn.models.adapter_files import load_adapter, read_folder
from fedunlearn.models.base import load_base
from fedunlearn.models.belongs import check_belongs
from fedunlearn.models.export import export
from fedunlearn.models.source import FACTORS, adapter_folder, base_of_adapter, find_base
from fedunlearn.records.adapter import Adapter

Device = Literal["auto", "cpu", "cuda"]
PROBE_ROWS, PROBE_LENGTH = 2, 12


@dataclass(frozen=True, kw_only=True)
class OnBase:
    """An adapter and the base it belongs on: base_name as the adapter or the user calls it, base its folder."""

    folder: Path
    adapter: Adapter
    base_name: str
    base: Path


@dataclass(frozen=True, kw_only=True)
class BaseArgs:
    """--base, --trust-base, --pocket, --device. base: None for what the adapter names."""

    base: str | None = None
    trust: bool = False
    pocket_dir: Path = Path("saves/pocket")
    device: Device = "cpu"


def read_adapter(path: Path, sound: bool = True) -> tuple[Path, Adapter]:
    """Reads a PEFT folder, a run's result, or one of its rounds; a round with a side-car is given as one stack.

    sound: what no adapter can be (models.soundness) is refused too. Raises UserError for what is none.
    """
    place = path.expanduser()
    if (place / FACTORS / "adapter_config.json").is_file():
        return place, _stacked_round(place)
    folder = adapter_folder(place, "adapter")
    if folder is None:
        raise UserError(
            f"adapter={str(path)!r} is a full model, no adapter: name a PEFT folder, a run's folder or one of its rounds"
        )
    return folder, (load_adapter if sound else read_folder)(folder)[0]


def _stacked_round(place: Path) -> Adapter:
    from fedunlearn.federation.block_store import FOLDER, BlockStore  # with Flower behind it: seconds, for rounds alone
    from fedunlearn.federation.checkpoint import read_checkpoint

    own = load_adapter(place / FACTORS)[0]
    beside = BlockStore(place.resolve().parent.parent / FOLDER).read(read_checkpoint(place).blocks)
    return export(Adapter(own.tensors, own.peft_config, own.base_fingerprint, beside), "exact")[0]


def on_base(path: Path, args: BaseArgs, sound: bool = True) -> OnBase:
    """Reads an adapter and finds its base. sound: see read_adapter. Raises UserError where the base is another, or cannot be found."""
    folder, adapter = read_adapter(path, sound)
    named = _named_base(folder, adapter)
    base_name = args.base or named
    base = find_base(
        base_name, args.pocket_dir, "--base" if args.base else f"the base of {str(folder)!r}, base_model_name_or_path"
    )
    if not args.trust and (adapter.base_fingerprint is not None or base_name != named):
        check_belongs(adapter, base)
    return OnBase(folder=folder, adapter=adapter, base_name=base_name, base=base)


def _named_base(folder: Path, adapter: Adapter) -> str:
    named = adapter.peft_config.get("base_model_name_or_path")
    return str(named) if named else base_of_adapter(folder)


def new_folder(path: Path) -> Path:
    """Gives a folder that is to be made. Raises UserError where it is there already."""
    if path.expanduser().exists():
        raise UserError(f"--to {str(path)!r} is there already: name a folder that is to be made")
    return path.expanduser()


def load(base: Path, dtype: Dtype, device: Device) -> PreTrainedModel:
    """Loads a base, frozen. Raises UserError where it cannot be loaded."""
    args = ModelArgs(pretrained_model_name_or_path=str(base), torch_dtype=dtype, use_lora=False, device=device)
    return load_base(base, args)


@torch.no_grad()
def few_logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """Gives logits of 2 fixed rows of 12 ids, float32 on the CPU."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(PROBE_ROWS * PROBE_LENGTH).reshape(PROBE_ROWS, PROBE_LENGTH) * 7919 % vocabulary
    device = next(model.parameters()).device
    logits: torch.Tensor = model(input_ids=ids.to(device)).logits
    return logits.float().cpu()


def largest_difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Gives the largest difference over the largest logit."""
    return float((found - wanted).abs().max() / wanted.abs().max())
