"""Rollback: as if the targets had never come."""

from dataclasses import dataclass

from fedunlearn.server_methods.base import Beginning, ServerMethod


@dataclass(frozen=True, kw_only=True)
class Rollback(ServerMethod):
    """Goes back to the state before the targets' first contribution, round number and moments included, and on from there on retain rows.

    Exact: the same federation, seeds and draws without what is forgotten. Where a target was there from round 1 this is the retrain.
    """

    @property
    def beginning(self) -> Beginning:
        """The state before the targets' first contribution."""
        return "rollback"
