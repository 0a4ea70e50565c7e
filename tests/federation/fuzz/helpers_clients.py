"""The real ClientApp of a recorded run, and what must hold of it whatever it is asked."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from flwr.app import Message, MessageType
from helpers_fuzz import NO_MEMORY, room_for, size_of
from helpers_oracle import blob_in, part_name, scalars_of, tensors_in
from helpers_recorded import CLIENTS, Recorded, alone, node_of
from helpers_watch import strayed, watched

from fedunlearn.federation.client_app import close_sites, make_client_app
from fedunlearn.federation.local_grid import call_client, context_of
from fedunlearn.federation.site import Site

NAMES = ("adapter", "sidecar", "reference", "reference_sidecar")


@dataclass(eq=False)
class Client:
    """The real ClientApp of a recorded run. worked: the weights that the last message was worked on with: (factors, side-car) each."""

    recorded: Recorded
    worked: list = field(default_factory=list)

    def __post_init__(self):
        self.app = make_client_app(self.recorded.config)

    def put_back(self) -> "Client":
        """Lets it keep what it kept before the last round."""
        self.recorded.put_back()
        self.worked.clear()
        return self

    def answer(self, kind, client, content) -> Message:
        """What a client answers."""
        return call_client(self.app, context_of(node_of(client), CLIENTS), alone(self.recorded, kind, client, content))

    @contextmanager
    def seen_working(self):
        """Inside the block, what the client's Site is given to work with is kept."""
        work, scores = Site.work, Site.scores

        def working(site, task, owned, start, reference, *rest):
            self.worked += [start, reference]
            return work(site, task, owned, start, reference, *rest)

        def scoring(site, number, adapter, *rest):
            self.worked += [adapter, None]
            return scores(site, number, adapter, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Site, "work", working)
            patch.setattr(Site, "scores", scoring)
            yield self
        close_sites()


def same(reply: Message, said) -> bool:
    """Whether a reply is what the client really said, but for the time it took."""
    if reply.has_error() or set(reply.content) != set(said):
        return False
    mine, theirs = scalars_of(reply.content["reply"]), scalars_of(said["reply"])
    timeless = [{k: v for k, v in one.items() if "seconds" not in k and k != "num_reference_tokens"} for one in (mine, theirs)]  # fmt: skip
    return timeless[0] == timeless[1] and ("adapter" not in said or blob_in(reply.content["adapter"]) == blob_in(said["adapter"]))  # fmt: skip


def available(recorded, client, content):
    """Name -> tensors of every part that the client has been sent, or kept, under the hash that it has."""
    blobs = {
        name.removeprefix("part-"): blob_in(record) for name, record in content.items() if name.startswith("part-")
    }
    kept = {path.stem.removeprefix("part-"): path.read_bytes() for path in (recorded.kept / str(client)).glob("part-*")}
    sent = {name: blob for name, blob in blobs.items() if blob is not None}
    return {name: tensors_in(blob) for name, blob in (*kept.items(), *sent.items()) if part_name(blob) == name}


def bytes_of(tensors):
    """Name -> bytes."""
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}


def check_loaded(client, number, content, request):
    """What it worked with are the parts of those names, and of no others."""
    has = available(client.recorded, number, content)
    wanted = [request.get(name, []) for name in NAMES]
    assert all(name in has for names in wanted for name in names), "it worked without a part that it was to have"
    for weights, names in zip(client.worked, (wanted[0], wanted[2]), strict=True):
        if weights is not None:
            assert bytes_of(weights.factors) == {k: raw for name in names for k, (_, _, raw) in has[name].items()}
    for weights, names in zip(client.worked, (wanted[1], wanted[3]), strict=True):
        if weights is not None and len(names) == 1:
            assert bytes_of(weights.sidecar) == {k: raw for k, (_, _, raw) in has[names[0]].items()}


def check(client, kind, number, content):
    """The properties, of one request. Gives what became of it."""
    recorded = client.put_back().recorded
    with watched() as seen, room_for(size_of(content)):
        reply = client.answer(kind, number, content)
    own = (recorded.store, recorded.cache / "charged", recorded.cache / "reference_sums")
    assert strayed(seen, *own) == []
    for path in recorded.store.rglob("*"):
        assert not path.is_file() or part_name(path.read_bytes()) == path.stem.removeprefix("part-"), path
    if reply.has_error():
        assert not any(word in reply.error.reason for word in NO_MEMORY), reply.error.reason
        return "error"
    said = scalars_of(reply.content["reply"])
    if kind == MessageType.QUERY:
        assert same(reply, recorded.said[kind, number])
        return "told"
    request = scalars_of(content["request"])
    assert said["client_id"] == request["client_id"] == number
    if said["missing"]:
        assert not client.worked
        assert set(said["missing"]) <= {name for names in NAMES for name in request.get(names, [])}
        return "missing"
    check_loaded(client, number, content, request)
    return "done"
