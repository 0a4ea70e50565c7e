"""Ten thousand hostile requests: a client answers with an error or does what it was asked, of parts with the right hash, and stays as it was."""

import json
from dataclasses import dataclass, field

import pytest
from conftest import examples, room_for
from flwr.app import Message, MessageType
from hypothesis import assume, given
from hypothesis import strategies as st
from mutations import mutated
from oracle import blob_in, part_name, scalars_of, tensors_in
from recorded import CLIENTS, Recorded, alone, node_of
from test_replies import NO_MEMORY, _size
from watch import strayed, watched

from fedunlearn.federation.client_app import close_sites, make_client_app
from fedunlearn.federation.local_grid import call_client, make_contexts
from fedunlearn.federation.site import Site

FEW, LIMIT = 50, 1_000_000
NAMES = ("adapter", "sidecar", "reference", "reference_sidecar")


@dataclass(eq=False)
class Client:
    """The real ClientApp of a recorded run. worked: the weights that the last message was worked on with: (factors, side-car) each."""

    recorded: Recorded
    worked: list = field(default_factory=list)

    def __post_init__(self):
        self.app, self.contexts = make_client_app(self.recorded.config), make_contexts(CLIENTS)

    def put_back(self) -> "Client":
        """Lets it keep what it kept before the last round."""
        self.recorded.put_back()
        self.worked.clear()
        return self

    def answer(self, kind, client, content) -> Message:
        """What a client answers."""
        return call_client(self.app, self.contexts, alone(self.recorded, kind, client, content))


@pytest.fixture(scope="module", params=["tuned", "unlearned", "remembered"])
def client(recorded_runs, request):
    client = Client(recorded_runs[request.param])
    with pytest.MonkeyPatch.context() as patch:
        work, scores = Site.work, Site.scores

        def working(site, task, owned, start, reference, *rest):
            client.worked += [start, reference]
            return work(site, task, owned, start, reference, *rest)

        def scoring(site, number, adapter, *rest):
            client.worked += [adapter, None]
            return scores(site, number, adapter, *rest)

        patch.setattr(Site, "work", working)
        patch.setattr(Site, "scores", scoring)
        yield client
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
    blobs = {name.removeprefix("part-"): blob_in(record) for name, record in content.items() if name.startswith("part-")}
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
    with watched() as seen, room_for(_size(content)):
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
        assert not set(said["missing"]) & set(available(recorded, number, content))
        return "missing"
    check_loaded(client, number, content, request)
    return "done"


def is_long(content) -> bool:
    """Whether a request asks for so many epochs that a client would honestly work on it for minutes."""
    data = scalars_of(content.get("request")) or {}
    asked = [data.get(key) for key in ("epochs", "rounds", "parts")]
    if not all(type(value) in (int, float) for value in asked) or not asked[2] or not 0 < asked[0] <= 1e6:
        return False
    return FEW < asked[0] * abs(asked[1]) / abs(asked[2]) <= LIMIT


@pytest.mark.parametrize("kind", [MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE])
def test_a_request_as_it_was_gives_the_reply_as_it_was(client, kind):
    for number in range(CLIENTS):
        reply = client.put_back().answer(kind, number, client.recorded.asked[kind, number])
        assert same(reply, client.recorded.said[kind, number])


@pytest.mark.parametrize(("kind", "share"), [("train", 0.3), ("evaluate", 0.15), ("query", 0.05)])
def test_a_hostile_request_gives_an_error_or_what_was_asked_for(client, kind, share):
    recorded, found = client.recorded, {}
    others = [*recorded.asked.values(), *recorded.said.values()]

    @examples(share)
    @given(st.data())
    def holds(data):
        number = data.draw(st.integers(0, CLIENTS - 1))
        content = data.draw(mutated(recorded.asked[kind, number], others))
        assume(content is not None and not is_long(content))
        became = check(client, kind, number, content)
        found[became] = found.get(became, 0) + 1
        if kind != MessageType.QUERY and became != "error":
            after = client.put_back().answer(kind, number, recorded.asked[kind, number])
            assert same(after, recorded.said[kind, number]), "the next sound request was answered otherwise"

    holds()
    print(kind, found)
    for number in range(CLIENTS):
        assert same(client.put_back().answer(kind, number, recorded.asked[kind, number]), recorded.said[kind, number])


def test_every_error_leaves_the_client_as_it_was(client):
    """The next sound request, after each field in turn was spoilt."""
    recorded = client.recorded
    for kind in (MessageType.TRAIN, MessageType.EVALUATE):
        request = scalars_of(recorded.asked[kind, 0]["request"])
        for key in request:
            for value in (None, -1, "x", ["x"], float("nan"), 10**400):
                spoilt = type(recorded.asked[kind, 0])({**recorded.asked[kind, 0], "request": type(recorded.asked[kind, 0]["request"])({"json": json.dumps({**request, key: value})})})  # fmt: skip
                check(client, kind, 0, spoilt)
        assert same(client.put_back().answer(kind, 0, recorded.asked[kind, 0]), recorded.said[kind, 0])


def test_nodes_are_those_of_the_grid():
    assert list(make_contexts(CLIENTS)) == [node_of(k) for k in range(CLIENTS)]
