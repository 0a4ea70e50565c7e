"""scripts/adapter.py: adapters as files. The command line, and which door answers what."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fedunlearn.config.lora import LoraArgs
    from fedunlearn.doors.adapter_named import BaseArgs


def parser() -> argparse.ArgumentParser:
    """Gives the command line's parser; building it imports no torch."""
    made = argparse.ArgumentParser(
        description="Adapters as files: count, merge, compare, add, verify.", allow_abbrev=False
    )
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")
    one = partial(_verb, verbs)
    summary = one(
        "summary", "parameters and sizes of an adapter, a run, a model or a bare config.json", "path", base="named"
    )
    summary.add_argument("--r", type=int, help="rank of an adapter that is to be")
    summary.add_argument("--alpha", type=float, help="its lora_alpha; 2 r where it is not given")
    summary.add_argument("--targets", nargs="+", metavar="NAME", help="its target_modules")
    summary.add_argument("--rslora", action="store_true", help="scale by the root of r")
    merge = one("merge", "an adapter into its base: a full model", "adapter", to=True)
    merge.add_argument("--dtype", choices=["fp32", "bf16"], help="of the model; the base's own where it is not given")
    merge.add_argument(
        "--keep", action="store_true", help="keep what is overwritten, so that unmerge can give the base back"
    )
    unmerge = one("unmerge", "the base out of a merged model, bit by bit", "merged", to=True, base=None)
    unmerge.add_argument("--adapter", type=Path, help="must be the one that was merged")
    export = one(
        "export", "an adapter, or a round with its side-car, as one PEFT folder or a full model", "adapter", to=True
    )
    export.add_argument("--as", dest="kind", choices=["peft", "model"], default="peft")
    export.add_argument("--rank", type=int, help="its best approximation of that rank (peft)")
    export.add_argument("--dtype", choices=["fp32", "bf16"], help="of the model (model)")
    diff = one("diff", "two adapters, module by module", "first", base=None)
    diff.add_argument("second", type=Path)
    add = one("add", "a weighted sum of adapters as one adapter", None, to=True, base=None)
    add.add_argument("adapters", nargs="+", type=Path, metavar="ADAPTER")
    add.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one for each, in order; 1 each where they are not given"
    )
    add.add_argument(
        "--rank", type=int, help="the best approximation of that rank; without it the sum is exact, of rank sum r"
    )
    scale = one("scale", "an adapter times a number", "adapter", to=True, base=None)
    scale.add_argument("--by", type=float, required=True, metavar="FACTOR")
    one("negate", "an adapter times -1", "adapter", to=True, base=None)
    one("verify", "hash, base, numbers, and that plain PEFT reads it alike", "adapter")
    card = one("card", "the adapter's README.md, with provenance and metrics of its run", "adapter", base=None)
    card.add_argument("--to", type=Path, help="the file; README.md in the adapter's folder where it is not given")
    card.add_argument("--overwrite", action="store_true")
    return made


def _verb(
    verbs: Any,
    name: str,
    told: str,
    first: str | None,
    *,
    to: bool = False,
    base: Literal["loaded", "named"] | None = "loaded",
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = verbs.add_parser(name, help=told, description=told, allow_abbrev=False)
    if first is not None:
        made.add_argument(first, type=Path)
    if to:
        made.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder to be made")
    if base is not None:
        made.add_argument(
            "--base", help="the base, where it is not what the adapter names: a folder, a hub id, pocket:SEED"
        )
        made.add_argument("--pocket", type=Path, default=Path("saves/pocket"), help="folder of the built pocket models")
    if base == "loaded":
        made.add_argument(
            "--trust-base",
            action="store_true",
            help="the base is the adapter's, whatever it is called and whatever its fingerprint",
        )
        made.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda"])
    made.add_argument("--json", action="store_true", help="print JSON in place of a table")
    return made


def serve(args: argparse.Namespace) -> None:
    """Does what one command line asks for, and prints it. Raises UserError where it cannot be done, or a check does not hold."""
    from fedunlearn.doors.adapter_shown import faults_of, show

    found = _ANSWERS[args.verb](args)
    if args.json:
        sys.stdout.write(json.dumps(asdict(found), indent=2, allow_nan=False) + "\n")
    else:
        show(found)
    faults_of(found)


def _base(args: argparse.Namespace) -> "BaseArgs":
    from fedunlearn.doors.adapter_named import BaseArgs

    return BaseArgs(base=args.base, trust=args.trust_base, pocket_dir=args.pocket, device=args.device)


def _lora(args: argparse.Namespace) -> "LoraArgs | None":
    from fedunlearn.config.lora import LoraArgs
    from fedunlearn.errors import UserError

    if args.r is None and args.targets is None and args.alpha is None and not args.rslora:
        return None
    if args.r is None or args.targets is None:
        raise UserError(
            "an adapter that is to be needs --r and --targets (and --alpha, 2 r where it is not given; --rslora)"
        )
    return LoraArgs(
        r=args.r,
        lora_alpha=2.0 * args.r if args.alpha is None else args.alpha,
        target_modules=tuple(args.targets),
        use_rslora=args.rslora,
    )


def _summary(args: argparse.Namespace) -> object:
    from fedunlearn.doors.adapter_summary import summarise

    return summarise(args.path, _lora(args), args.base, args.pocket)


def _merge(args: argparse.Namespace) -> object:
    from fedunlearn.doors.adapter_merge import merge_into_folder

    return merge_into_folder(args.adapter, args.to, args.dtype, getattr(args, "keep", False), _base(args))


def _unmerge(args: argparse.Namespace) -> object:
    from fedunlearn.doors.adapter_merge import unmerge_into_folder

    return unmerge_into_folder(args.merged, args.adapter, args.to)


def _export(args: argparse.Namespace) -> object:
    from fedunlearn.doors.adapter_arithmetic import export_into_folder
    from fedunlearn.errors import UserError

    if args.kind == "model" and args.rank is not None:
        raise UserError(
            "--rank beside --as model: a full model holds all of the adapter; export as peft with --rank first, then that as model"
        )
    if args.kind == "peft" and args.dtype is not None:
        raise UserError("--dtype beside --as peft: an adapter keeps its own dtype; leave it out, or give --as model")
    if args.kind == "peft" and args.device != "cpu":
        raise UserError(
            f"--device {args.device} beside --as peft: no model is loaded for it; leave it out, or give --as model"
        )
    return _merge(args) if args.kind == "model" else export_into_folder(args.adapter, args.rank, args.to, _base(args))


def _diff(args: argparse.Namespace) -> object:
    from fedunlearn.doors.adapter_arithmetic import tell_difference

    return tell_difference(args.first, args.second)


def _add(args: argparse.Namespace) -> object:
    from fedunlearn.doors.adapter_arithmetic import add_into_folder

    return add_into_folder(args.adapters, args.weights, args.rank, args.to)


def _scale(args: argparse.Namespace) -> object:
    from fedunlearn.doors.adapter_arithmetic import scale_into_folder

    return scale_into_folder(args.adapter, getattr(args, "by", -1.0), args.to)


def _verify(args: argparse.Namespace) -> object:
    from fedunlearn.doors.adapter_verify import verify

    return verify(args.adapter, _base(args))


def _card(args: argparse.Namespace) -> object:
    from fedunlearn.doors.adapter_card import write_card

    return write_card(args.adapter, args.to, args.overwrite)


_ANSWERS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "summary": _summary,
    "merge": _merge,
    "unmerge": _unmerge,
    "export": _export,
    "diff": _diff,
    "add": _add,
    "scale": _scale,
    "negate": _scale,
    "verify": _verify,
    "card": _card,
}


def read(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads a command line; a faulty one ends the program with argparse's usage and code 2."""
    return parser().parse_args(argv)
