"""`adapter.py verify`: is an adapter what it says, and does plain PEFT read it as we do."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from fedunlearn.doors.adapter_named import BaseArgs, OnBase, few_logits, largest_difference, load, on_base
from fedunlearn.errors import UserError
from fedunlearn.models.adapter_files import CONFIG, PROOF, proves_config
from fedunlearn.models.belongs import stored_dtype
from fedunlearn.models.fingerprint import fingerprint_base
from fedunlearn.models.soundness import faults_of_form, faults_of_numbers
from fedunlearn.models.switch import put_adapter
from fedunlearn.records.adapter import A

TOLERANCE = 1e-5
"""Of the largest logit; both sides compute in the base's own dtype by the same kernels, so they are nearly always equal."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at. holds: None where there is nothing to compare with."""

    name: str
    holds: bool | None
    said: str


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was looked at of one adapter, in order."""

    folder: str
    base: str
    checks: tuple[Check, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """A sentence for each check that does not hold."""
        return tuple(f"{self.folder}: {check.name}: {check.said}" for check in self.checks if check.holds is False)


def verify(adapter: Path, args: BaseArgs) -> Verified:
    """Looks at hashes, base, form, numbers and plain PEFT. Raises UserError where the folder cannot be read at all, is not what was saved, or belongs to another base."""
    named = on_base(adapter, args, sound=False)
    if not (named.folder / CONFIG).is_file():
        raise UserError(
            f"adapter={str(adapter)!r} is a round with a side-car, no PEFT folder yet: write one with `adapter.py export`, and verify that"
        )
    sound = (_form(named), _finite(named))
    checks = (_hash(named), _config(named), _fingerprint(named), *sound, _acts(named))
    peft = _in_peft(named, args) if all(check.holds for check in sound) else ()
    return Verified(folder=str(named.folder), base=named.base_name, checks=(*checks, *peft))


def _hash(named: OnBase) -> Check:
    """read_folder has compared them by now."""
    proven = (named.folder / PROOF).is_file()
    said = (
        f"the tensors are those that were saved ({named.adapter.tensor_hash})"
        if proven
        else f"no {PROOF}: a foreign folder has no hash"
    )
    return Check(name="hash", holds=True if proven else None, said=said)


def _config(named: OnBase) -> Check:
    """read_folder has compared them by now."""
    proven = proves_config(named.folder)
    said = (
        f"{CONFIG} says what was saved"
        if proven
        else f"no hash of {CONFIG}: the folder is foreign, or of an earlier version"
    )
    return Check(name="config", holds=True if proven else None, said=said)


def _fingerprint(named: OnBase) -> Check:
    known = named.adapter.base_fingerprint
    if known is None:
        said = "none is written in the folder; the base is the one it names, or was trusted"
        return Check(name="base fingerprint", holds=None, said=said)
    found = fingerprint_base(named.base)
    said = (
        f"the base's is the adapter's ({known})"
        if found == known
        else f"not compared, the base is trusted: the adapter's is {known}, the base's {found}"
    )
    return Check(name="base fingerprint", holds=True if found == known else None, said=said)


def _form(named: OnBase) -> Check:
    odd = faults_of_form(named.adapter.tensors, named.adapter.peft_config)
    pairs = sum(name.endswith(A) for name in named.adapter.tensors)
    said = "; ".join(odd) or f"{pairs} pairs of factors, and {CONFIG} fits them"
    return Check(name="form", holds=not odd, said=said)


def _finite(named: OnBase) -> Check:
    odd = faults_of_numbers(named.adapter.tensors)
    said = "; ".join(odd) or f"all {len(named.adapter.tensors)} tensors are finite"
    return Check(name="finite", holds=not odd, said=said)


def _acts(named: OnBase) -> Check:
    acts = any(bool(t.any()) for name, t in named.adapter.tensors.items() if not name.endswith(A))
    return Check(
        name="acts",
        holds=acts or None,
        said="some B is not zero" if acts else "every B is zero: it changes nothing of the base",
    )


def _in_peft(named: OnBase, args: BaseArgs) -> tuple[Check, ...]:
    dtype = stored_dtype(named.base)
    ours = few_logits(put_adapter(load(named.base, dtype, args.device), named.adapter))
    with warnings.catch_warnings(record=True) as told, torch.random.fork_rng(devices=[]):
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(load(named.base, dtype, args.device), named.folder)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            return (Check(name="loads in plain PEFT", holds=False, said=str(error).splitlines()[0]),)
    lost = [str(one.message).split("\n")[0] for one in told if "adapter keys" in str(one.message)]
    loads = Check(
        name="loads in plain PEFT", holds=not lost, said=lost[0][:300] if lost else "every tensor finds its place"
    )
    apart = largest_difference(few_logits(model.eval()), ours)
    return (
        loads,
        Check(
            name="logits in plain PEFT",
            holds=apart <= TOLERANCE,
            said=f"apart by {apart:.1e} of the largest (allowed {TOLERANCE:g})",
        ),
    )
