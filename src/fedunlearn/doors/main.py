"""What every door calls: Hydra's command line in, one run (or a sweep of them) out, faults as messages and exit codes."""

import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedunlearn.doors.environment import set_environment
from fedunlearn.errors import UserError

if TYPE_CHECKING:
    from fedunlearn.doors.command_line import CommandLine
    from fedunlearn.doors.compose import ComposedConfig

USER_ERROR = 2
INTERRUPTED = 130
GO_ON = "the same command with resume=true goes on where the last whole round ended"
_DISK_FAULTS = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
    )
)
"""What the machine refuses and no code of ours can mend; told without a traceback wherever it comes from."""

Run = Callable[["ComposedConfig"], None]


def hydra_door(config_dir: Path, default_config: str, run: Run, argv: Sequence[str] | None = None) -> int:
    """Composes what the command line asks for and runs it; gives the exit code.

    config_dir: the folder of YAMLs. default_config: the primary file where no --config-name is given. run: the work; what it
    imports at its top is imported before the environment is set, so it imports torch inside itself. argv: sys.argv[1:].
    0: done. 2: a UserError, told on stderr without a traceback. 130: interrupted. Any other exception passes through.
    --cfg, --help, --info and the like are answered by Hydra; --multirun checks every job before it runs the first.
    """
    set_environment()
    return guarded(lambda: _serve(config_dir, default_config, run, list(sys.argv[1:] if argv is None else argv)))


def guarded(work: Callable[[], object]) -> int:
    """Does the work and gives the exit code: 0, 2 for a UserError told on stderr without a traceback, 130 for an interrupt.

    A KeyboardInterrupt may carry the way on as its text; else GO_ON is told.
    """
    try:
        work()
    except UserError as error:
        _tell(*(f"error: {fault}" for fault in error.faults))
        return USER_ERROR
    except KeyboardInterrupt as stop:
        _tell(f"interrupted: {str(stop) or GO_ON}")
        return INTERRUPTED
    except OSError as error:
        if error.errno not in _DISK_FAULTS:
            raise
        _tell(f"error: {_disk_fault(error)}")
        return USER_ERROR
    return 0


def _disk_fault(error: OSError) -> str:
    from fedunlearn.files import disk_fault

    return str(disk_fault(error, Path(str(error.filename)) if error.filename else Path("a file")))


def _serve(config_dir: Path, default_config: str, run: Run, argv: list[str]) -> None:
    from fedunlearn.doors.command_line import jobs, read_command_line
    from fedunlearn.doors.compose import compose

    line = read_command_line(argv, config_dir, default_config)
    if line.informs:
        _ask_hydra(line, argv)
        return
    if not line.multirun:
        _run_one(run, compose(line.config_dir, line.config_name, line.overrides))
        return
    for job in _compose_all(line, jobs(line.overrides)):
        _tell(f"job: {job.run.task_name}")
        _run_one(run, job)


def _run_one(run: Run, composed: "ComposedConfig") -> None:
    """Runs one job; an interrupt that says nothing itself is given the way on that fits the job."""
    try:
        run(composed)
    except KeyboardInterrupt as stop:
        if stop.args:
            raise
        if composed.run.mode == "eval":
            raise KeyboardInterrupt("nothing was written; the same command starts it again") from stop
        if composed.run.overwrite:
            raise KeyboardInterrupt(f"{GO_ON} (and without overwrite=true)") from stop
        raise


def _compose_all(line: "CommandLine", jobs: Sequence[Sequence[str]]) -> "list[ComposedConfig]":
    """Composes every job; raises UserError with the faults of all, each told once."""
    from fedunlearn.doors.compose import compose

    composed: list[ComposedConfig] = []
    faults: list[str] = []
    for job in jobs:
        try:
            composed.append(compose(line.config_dir, line.config_name, job))
        except UserError as error:
            faults += error.faults
    names = [job.run.task_name for job in composed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        faults.append(
            f"task_name={twice[0]!r} is shared by jobs of this sweep: let it vary with them, as in task_name='{twice[0]}_${{trainer.args.seed}}'"
        )
    if faults:
        raise UserError(*dict.fromkeys(faults))
    return composed


def _ask_hydra(line: "CommandLine", argv: Sequence[str]) -> None:
    """Lets Hydra show what it is asked for (it reads sys.argv); a faulty command line is told our way first."""
    import hydra

    from fedunlearn.doors.compose import checked_overrides

    overrides = line.overrides
    if line.shows_config:
        overrides = checked_overrides(line.config_dir, line.config_name, overrides)
    options = {"version_base": "1.3", "config_path": str(line.config_dir.resolve()), "config_name": line.config_name}
    show = hydra.main(**options)(_never)
    flags = [word for word in argv if word not in line.overrides]
    before, sys.argv = sys.argv, [sys.argv[0], *flags, *overrides, f"hydra.job.name={Path(sys.argv[0]).stem}"]
    try:
        show()
    finally:
        sys.argv = before


def _never(config: object) -> None:
    raise AssertionError("Hydra was asked to show something, not to run")


def _tell(*lines: str) -> None:
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stderr.flush()
