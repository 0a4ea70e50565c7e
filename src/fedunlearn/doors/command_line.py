"""Hydra's command line: its options, its sweeps, and what of it is left to Hydra itself."""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedunlearn.doors.override import SEARCHPATH, parse_override
from fedunlearn.errors import UserError

MAX_JOBS = 1000


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """config_dir, config_name, overrides: what to compose. multirun: overrides may be sweeps. informs: a flag that only shows something."""

    config_dir: Path
    config_name: str
    overrides: tuple[str, ...]
    multirun: bool
    informs: bool
    shows_config: bool


def read_command_line(argv: Sequence[str], config_dir: Path, default_config: str) -> CommandLine:
    """Reads Hydra's options and overrides, in any order. An unknown option ends the program with argparse's usage and code 2."""
    options = _parser().parse_intermixed_args(list(argv))
    searched = [f"{SEARCHPATH}=['file://{Path(options.config_dir).resolve()}']"] if options.config_dir else []
    return CommandLine(
        config_dir=Path(options.config_path) if options.config_path else config_dir,
        config_name=options.config_name or default_config,
        overrides=(*searched, *options.overrides),
        multirun=options.multirun,
        informs=any(
            (options.help, options.hydra_help, options.version, options.cfg, options.info, options.shell_completion)
        ),
        shows_config=bool(options.cfg),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for flags in (
        ("--help", "-h"),
        ("--hydra-help",),
        ("--version",),
        ("--resolve",),
        ("--multirun", "-m"),
        ("--run", "-r"),
        ("--shell-completion", "-sc"),
    ):
        parser.add_argument(*flags, action="store_true")
    for flags in (("--config-name", "-cn"), ("--config-path", "-cp"), ("--config-dir", "-cd"), ("--package", "-p")):
        parser.add_argument(*flags)
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument(
        "--info",
        "-i",
        nargs="?",
        const="all",
        choices=["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"],
    )
    return parser


def jobs(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Gives the overrides of every job of a sweep, the last sweep varying fastest (`a=1,2 b=range(0,3)`: six jobs).

    glob() is refused, and more than MAX_JOBS jobs. Raises UserError with all faults.
    """
    choices = [_choices(text) for text in overrides]
    faults = [choice for choice in choices if isinstance(choice, str)]
    if faults:
        raise UserError(*faults)
    found = list(
        itertools.islice(
            itertools.product(*(choice for choice in choices if not isinstance(choice, str))), MAX_JOBS + 1
        )
    )
    if len(found) > MAX_JOBS:
        raise UserError(f"--multirun makes more than {MAX_JOBS} jobs: sweep over fewer values")
    return found


def _choices(text: str) -> list[str] | str:
    """The overrides that a sweep stands for, or the text itself alone; a fault is one sentence."""
    parsed = parse_override(text)
    if isinstance(parsed, str):
        return parsed
    if not parsed.is_sweep_override():
        return [text]
    if not parsed.is_discrete_sweep() or "glob(" in text:
        return f"{text!r} cannot be swept over: write the values, as in key=a,b or key=range(1,4)"
    return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]
