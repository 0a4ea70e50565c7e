"""all_clients: everyone unlearns, those who own no forget rows with the rows that their owners released."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedunlearn.errors import UserError
from fedunlearn.protocols.base import Assignment, Protocol, Stage, idle, unlearn
from fedunlearn.records.rounds import ClientRows


@dataclass(frozen=True, kw_only=True)
class AllClients(Protocol):
    """The one protocol in which more than adapters leaves the server: question and answer of the request's rows, in each task of a non-owner.

    released: must be true, which says that the rows' owners agreed; nothing is sent without it. A client without retain rows stands idle,
    unless it owns forget rows.
    """

    released: bool = False

    def __post_init__(self) -> None:
        if not self.released:
            raise UserError(
                "protocol.released=false: with all_clients the server sends the request's rows, as text, to clients that do not own them; "
                "set protocol.released=true where their owners agreed, or choose in_round, target_then_repair or owners_only"
            )

    @property
    def unlearns(self) -> bool:
        """A request is served."""
        return True

    @property
    def releases(self) -> bool:
        """The request's rows are sent."""
        return True

    def assign(self, stage: Stage, cohort: Sequence[ClientRows], epochs: float) -> tuple[Assignment, ...]:
        """See Protocol.assign."""
        return tuple(unlearn(rows, epochs) if rows.num_forget or rows.num_retain else idle(rows) for rows in cohort)
