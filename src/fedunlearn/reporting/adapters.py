"""What `scripts/adapter.py` found, as tables for a terminal."""

from collections.abc import Sequence

from rich.table import Column, Table

from fedunlearn.aggregation.arithmetic import Apart
from fedunlearn.models.merge import CastLoss
from fedunlearn.models.summary import ModuleCount, Summary, by_kind

SHOWN = 24
"""Modules of a comparison that are shown, the farthest apart first."""


def summary_table(found: Summary) -> Table:
    """Gives one line a kind of module: how many of them, shape, rank, scale, parameters altogether."""
    title = f"{found.base}: {found.total:,} parameters, {found.trainable:,} trainable ({found.trainable / found.total:.3%}), {found.frozen:,} frozen"
    heads = ("count", "d_out x d_in", "r", "scale", "parameters")
    table = Table(Column("module", overflow="fold"), *heads, title=title, caption=_sizes(found))
    for one in by_kind(found.modules):
        table.add_row(*_count_cells(one))
    return table


def _sizes(found: Summary) -> str:
    parts = [f"base {mb(found.base_bytes)}"]
    parts += [f"adapter {mb(found.adapter_bytes)} in float32"] if found.trainable else []
    parts += [f"files here {mb(found.file_bytes)}"] if found.file_bytes is not None else []
    return ", ".join(parts)


def mb(size: int) -> str:
    """Gives bytes as MB, 10**6."""
    return f"{size / 1e6:,.1f} MB"


def _count_cells(one: ModuleCount) -> tuple[str, ...]:
    shape = "" if one.shape is None else " x ".join(map(str, one.shape))
    return (
        one.name,
        str(one.count),
        shape,
        _or_dash(one.rank, "d"),
        _or_dash(one.scale, "g"),
        f"{one.parameters * one.count:,}",
    )


def difference_table(modules: Sequence[Apart], whole: Apart) -> Table:
    """Gives the whole, then the modules that lie farthest apart."""
    rest = len(modules) - SHOWN
    heads = ("first", "second", "apart", "relative", "cosine")
    plain = "" if all(one.product for one in modules) else "; of other tensors as they are stored, which all leaves out"
    caption = f"Frobenius norms of s B A{plain}" + (f"; and {rest} modules more (--json has all)" if rest > 0 else "")
    table = Table(Column("module", overflow="fold"), *heads, caption=caption)
    for one in (whole, *sorted(modules, key=lambda one: -(one.difference or 0.0))[:SHOWN]):
        norms = (_or_dash(value, ".4g") for value in (one.first, one.second, one.difference))
        table.add_row(one.name, *norms, _or_dash(one.relative, ".3%"), _or_dash(one.cosine, ".4f"))
    return table


def loss_text(loss: CastLoss) -> str:
    """Gives what a cast cost in one sentence."""
    return f"the cast lost {loss.error:.2e} of the change; {loss.still:,} of {loss.entries:,} entries that were to move did not"


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
