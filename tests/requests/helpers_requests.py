"""What clients' optimiser steps really read, row by row, and runs of several requests through the doors."""

from dataclasses import dataclass, field

from helpers_runs import tiny

from fedunlearn.doors.sequence import run_served
from fedunlearn.federation.site import Site
from fedunlearn.training import loop

ROWS = 80
"""The tiny pocket: 20 authors x 4 rows; author k is rows 4 k to 4 k + 3, over four clients in turn: author k is client k mod 4's."""


def author(*numbers):
    """The rows of authors."""
    return {4 * number + i for number in numbers for i in range(4)}


def client_rows(client):
    """The rows of a client's authors in the pocket's partition."""
    return author(*range(client, 20, 4))


@dataclass
class Seen:
    """rows: (task name, client, role) -> numbers of `full` that went through the model with gradient, whether to forget or to retain."""

    rows: dict[tuple[str, int, str], set[int]] = field(default_factory=dict)

    def of(self, task, client=None, role=None):
        """Rows of a run, or of one client or role in it."""
        return {
            row
            for (name, k, what), rows in self.rows.items()
            if name == task and client in (None, k) and role in (None, what)
            for row in rows
        }

    def roles(self, task):
        """(client, role) of a run, in order."""
        return sorted((k, what) for name, k, what in self.rows if name == task)


def watch(monkeypatch):
    """Notes the rows of every batch of every client from now on, at the collator: the last place before the model."""
    seen, at, numbers = Seen(), [], {}
    work, collate = Site.work, loop.collate

    def watched_work(self, task, owned, *rest):
        numbers.update((row.input_ids, number) for number, row in enumerate(self.encode(tuple(range(ROWS)))))
        assert len(numbers) == ROWS
        at[:] = [(self.run.task_name, task.client_id, task.role.value)]
        return work(self, task, owned, *rest)

    def watched_collate(rows, *rest):
        seen.rows.setdefault(at[0], set()).update(numbers[row.input_ids] for row in rows)
        return collate(rows, *rest)

    monkeypatch.setattr(Site, "work", watched_work)
    monkeypatch.setattr(loop, "collate", watched_collate)
    return seen


def serve(pocket, saves, start, task, *overrides):
    """Unlearning as the door runs it, once for each request; gives the last folder."""
    named = f"model.model_args.pretrained_model_name_or_path={start}"
    return run_served(tiny(pocket, saves, "unlearn", task, named, *overrides))[0]
