"""What `adapter.py` answers, on a terminal."""

from functools import singledispatch

from rich.console import Console
from rich.table import Table

from fedunlearn.doors.adapter_arithmetic import Difference, Written
from fedunlearn.doors.adapter_card import CardWritten
from fedunlearn.doors.adapter_merge import Merged, Unmerged
from fedunlearn.doors.adapter_verify import Verified
from fedunlearn.errors import UserError
from fedunlearn.models.summary import Summary
from fedunlearn.reporting.adapters import difference_table, loss_text, summary_table

MARKS = {True: "yes", False: "NO", None: "–"}


def _say(*lines: str | Table) -> None:
    console = Console(highlight=False, markup=False)
    for line in lines:
        console.print(line, soft_wrap=isinstance(line, str))


@singledispatch
def show(found: object) -> None:
    """Prints what a subcommand found."""
    raise TypeError(f"{type(found).__name__} has no form")


@show.register
def _(found: Summary) -> None:
    _say(summary_table(found))


@show.register
def _(found: Merged) -> None:
    back = "; the base comes back with `unmerge`" if found.kept else ""
    _say(
        f"{found.folder}: {found.base} with the adapter in it, {found.dtype}{back}",
        loss_text(found.loss),
        f"merged logits differ from unmerged ones by at most {found.logits:.1e} of the largest",
    )


@show.register
def _(found: Unmerged) -> None:
    _say(f"{found.folder}: the base, bit by bit (fingerprint {found.fingerprint})")


@show.register
def _(found: Written) -> None:
    lost = "" if found.error is None else f"; {found.error:.2e} of the exact product was cut off"
    nothing = ["it is zero: it changes nothing of the base"] if found.zero else []
    _say(
        f"{found.folder}: rank {found.rank}, {found.parameters:,} parameters, hash {found.tensor_hash}{lost}", *nothing
    )


@show.register
def _(found: Difference) -> None:
    bases = {
        True: "the same base",
        False: "DIFFERENT BASES",
        None: "whether the base is the same is not known (a fingerprint is missing)",
    }
    config = Table("adapter_config.json", found.first, found.second)
    for key, (first, second) in found.config.items():
        config.add_row(key, str(first), str(second))
    _say(
        bases[found.same_base],
        difference_table(found.modules, found.whole),
        *([config] if found.config else ["their configs say the same"]),
    )


@show.register
def _(found: Verified) -> None:
    table = Table("check", "holds", "", title=f"{found.folder} on {found.base}")
    for check in found.checks:
        table.add_row(check.name, MARKS[check.holds], check.said)
    _say(table)


@show.register
def _(found: CardWritten) -> None:
    told = "no run is known" if found.run is None else f"of the run {found.run}"
    _say(f"{found.file}: {told}, {found.metrics} metrics")


def faults_of(found: object) -> None:
    """Raises UserError where what was verified does not hold."""
    if isinstance(found, Verified) and found.faults:
        raise UserError(*found.faults)
