"""Plain curves of a run in tensorboard, where trainer.args.report_to asks for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fedunlearn.errors import UserError
from fedunlearn.records.rounds import RoundResult


class Curves:
    """Takes round results; writes them to a SummaryWriter, or nowhere where there is none."""

    def __init__(self, writer: Any | None) -> None:
        self._writer = writer

    def add(self, result: RoundResult) -> None:
        """Adds one round: its metrics, its evaluation, and the bytes of all its messages."""
        if self._writer is None:
            return
        for name, value in result.metrics.items():
            self._writer.add_scalar(name, value, result.round)
        for name, figure in result.evaluation.items():
            if figure is not None:
                self._writer.add_scalar(f"eval/{name}", figure, result.round)
        if result.aggregation_error is not None:
            self._writer.add_scalar("aggregation_error", result.aggregation_error, result.round)
        total = sum(c.bytes_down + c.bytes_down_reference + c.bytes_up for c in result.clients)
        self._writer.add_scalar("bytes", total, result.round)


@contextmanager
def open_curves(folder: Path, report_to: Literal["none", "tensorboard"]) -> Iterator[Curves]:
    """Opens <folder>/tensorboard for `tensorboard`, nothing for `none`. Raises UserError where the package is missing."""
    if report_to == "none":
        yield Curves(None)
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "trainer.args.report_to='tensorboard' needs the package: pip install 'fedunlearn[tensorboard]', or set none"
        ) from error
    with SummaryWriter(folder / "tensorboard") as writer:
        yield Curves(writer)
