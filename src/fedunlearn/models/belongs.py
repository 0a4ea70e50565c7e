"""Whether an adapter belongs on a base, and what a base's folder says of itself."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedunlearn.config.model import Dtype
from fedunlearn.errors import UserError
from fedunlearn.models.fingerprint import fingerprint_base
from fedunlearn.models.quantized import stored_as
from fedunlearn.records.adapter import Adapter

STORED: dict[str, Dtype] = {"BF16": "bfloat16"}


def check_belongs(adapter: Adapter, base: Path) -> None:
    """Compares fingerprints; an adapter without one must name this base. Raises UserError where they differ, or where neither can be told."""
    named = str(adapter.peft_config.get("base_model_name_or_path"))
    if adapter.base_fingerprint is not None:
        if not base.is_dir():
            raise UserError(
                f"the base's own folder is not known ({str(base)!r} is none), so the adapter's fingerprint cannot be compared: give base_folder, or trust_base=true"
            )
        found = fingerprint_base(base)
        if found != adapter.base_fingerprint:
            raise UserError(
                f"the adapter belongs to another base ({named!r}): its fingerprint is {adapter.base_fingerprint}, that of {str(base)!r} is {found}"
            )
    elif named != str(base) and Path(named).expanduser().resolve() != base.resolve():
        raise UserError(
            f"the adapter's adapter_config.json names another base, {named!r}, and it carries no fingerprint that would tell {str(base)!r} to be the same: "
            "name that base, or say that it is the same (trust_base=true, --trust-base)"
        )


def check_whole(base: Path) -> None:
    """Raises UserError for a base that is quantised: nothing can be merged into it."""
    try:
        kind = stored_as(base)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the base {str(base)!r} cannot be read ({error}): name a full model's folder as --base"
        ) from error
    if kind:
        raise UserError(
            f"the base {str(base)!r} is quantised ({kind}): an adapter is not merged into it; name the model it was quantised from as --base"
        )


def stored_dtype(base: Path) -> Dtype:
    """Gives the dtype in which a base is loaded without loss: bfloat16 where all its tensors are that, else float32."""
    kinds: set[str] = set()
    for file in sorted(base.glob("model*.safetensors")):
        try:
            with safe_open(file, framework="pt") as found:
                kinds |= {found.get_slice(name).get_dtype() for name in found.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{str(file)!r} is corrupt or truncated ({error}): fetch the model again") from error
    return STORED.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"
