"""Records of the key `requests`: what a run is asked to forget."""

from dataclasses import dataclass
from typing import Literal

from fedunlearn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RequestConfig:
    """One request: rows of `full`, authors, all of a client, or several of these together.

    target: what becomes of the owners of its rows: they `stay` and take part, or are `gone` (server-side methods only).
    """

    rows: tuple[int, ...] | None = None
    authors: tuple[int, ...] | None = None
    client: int | None = None
    target: Literal["stays", "gone"] = "stays"

    def __post_init__(self) -> None:
        if not self.rows and not self.authors and self.client is None:
            raise UserError(
                f"requests: one of them is empty (rows={_told(self.rows)}, authors={_told(self.authors)}, client=null): name rows of full, authors or a client"
            )


def _told(numbers: tuple[int, ...] | None) -> str:
    return "null" if numbers is None else str(list(numbers))
