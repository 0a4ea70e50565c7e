"""Runs of server-side methods, made once a file, and what clients sent in them."""

import pytest
from helpers_server_methods import Runs


@pytest.fixture(scope="module")
def runs(pocket, tmp_path_factory):
    return Runs(pocket, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def works(monkeypatch):
    """(client, role, start, what came back) of every client's work, in order."""
    from fedunlearn.federation.site import Site

    seen, real = [], Site.work

    def work(self, task, owned, start, reference, charges, released=()):
        done = real(self, task, owned, start, reference, charges, released)
        seen.append(
            (task.client_id, task.role.value, dict(start.factors), {n: t.clone() for n, t in done.tensors.items()})
        )
        return done

    monkeypatch.setattr(Site, "work", work)
    return seen
