"""Protocols in whole runs: the same epochs for an owner whatever the rounds, and what all_clients sends, seen on the wire."""

import json
import math

import pytest
from helpers_runs import adapter_bytes, finetune, history, tiny, unlearn

from fedunlearn.config.trainer import TrainArgs
from fedunlearn.data.tofu import load_tofu
from fedunlearn.errors import UserError
from fedunlearn.federation.local_grid import LocalGrid
from fedunlearn.federation.wire import PART, RELEASED, REQUEST
from fedunlearn.protocols.all_clients import AllClients
from fedunlearn.protocols.base import Stage
from fedunlearn.protocols.by_method import ByMethod
from fedunlearn.protocols.in_round import InRound
from fedunlearn.protocols.owners_only import OwnersOnly
from fedunlearn.protocols.target_then_repair import TargetThenRepair
from fedunlearn.records.rounds import ClientRows, Role
from fedunlearn.training.steps import count_steps

ROUNDS = (
    "trainer.federated.num_rounds=3",
    "trainer.args.num_train_epochs=2",
    "trainer.args.per_device_train_batch_size=2",
)
PROTOCOLS = {
    "in_round": ("protocol=in_round",),
    "repair": ("protocol=target_then_repair",),
    "repair2": ("protocol=target_then_repair", "protocol.unlearn_rounds=2"),
    "owners_only": ("protocol=owners_only",),
    "all_clients": ("protocol=all_clients", "protocol.released=true"),
    "by_method": ("protocol=by_method",),
}
OWNERS = (2, 3)


@pytest.fixture(scope="module")
def made(pocket, tmp_path_factory):
    """A fine-tuning run, and one unlearning run of each protocol from it."""
    saves = tmp_path_factory.mktemp("runs")
    tuned = finetune(pocket, saves)
    return {"tuned": tuned, **{name: unlearn(pocket, saves, tuned, name, *ROUNDS, *o) for name, o in PROTOCOLS.items()}}


def roles(run):
    return [[client["role"] for client in line["clients"]] for line in history(run)]


def test_who_works_when(made):
    both, alone, all_ = ["finetune"] * 2 + ["unlearn"] * 2, ["idle"] * 2 + ["unlearn"] * 2, ["finetune"] * 4
    assert roles(made["in_round"]) == roles(made["by_method"]) == [both] * 3
    assert roles(made["repair"]) == [alone, all_, all_]
    assert roles(made["repair2"]) == [alone, alone, all_]
    assert roles(made["owners_only"]) == [alone] * 3
    assert roles(made["all_clients"]) == [["unlearn"] * 4] * 3


def test_an_owner_s_steps_on_forget_rows_are_the_same_in_all(made):
    """Four rows at two a step, two epochs, three rounds: 12 steps, whatever the rounds they fall into."""
    for name in PROTOCOLS:
        for owner in OWNERS:
            clients = [c for line in history(made[name]) for c in line["clients"] if c["client_id"] == owner]
            assert sum(c["num_steps"] for c in clients if c["role"] == "unlearn") == 12


@pytest.mark.parametrize("num_rounds", [1, 2, 3, 7])
@pytest.mark.parametrize("epochs", [0.2, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_law_of_equal_steps(num_rounds, epochs, size):
    """The same whole number of steps in all, rounded up once a round and not once a protocol."""
    args = TrainArgs(learning_rate=1e-3, per_device_train_batch_size=size)
    owner, other = (ClientRows(client_id=k, num_owned=8, num_forget=f, num_retain=8 - f) for k, f in ((0, 4), (1, 0)))
    later = [TargetThenRepair(unlearn_rounds=n) for n in range(1, num_rounds + 1)]
    for protocol in (
        InRound(),
        ByMethod(),
        InRound(finetune_epochs=9.0),
        OwnersOnly(),
        AllClients(released=True),
        *later,
    ):
        total = 0
        for number in range(1, num_rounds + 1):
            mine, _ = protocol.assign(Stage(round=number, num_rounds=num_rounds), [owner, other], epochs)
            total += count_steps(4, mine.epochs, args, mine.share) if mine.role is Role.UNLEARN else 0
        assert total == num_rounds * math.ceil(epochs * math.ceil(4 / size))


def test_by_method_is_in_round_for_a_local_method(made):
    assert adapter_bytes(made["by_method"]) == adapter_bytes(made["in_round"])
    assert len({adapter_bytes(made[name]) for name in PROTOCOLS}) == len(PROTOCOLS) - 1


@pytest.mark.parametrize("method", ["fedosd", "fused", "pgd", "rollback"])
@pytest.mark.parametrize("protocol", ["in_round", "owners_only", "target_then_repair", "all_clients"])
def test_a_server_side_method_goes_with_no_other_protocol(pocket, saves, method, protocol):
    released = ("protocol.released=true",) if protocol == "all_clients" else ()
    said = r"protocol \w+ beside method \w+, a server-side method that says itself who works: leave protocol out \(by_method\)"
    with pytest.raises(UserError, match=said):
        tiny(pocket, saves, "unlearn", "x", f"method={method}", f"protocol={protocol}", *released)


class TestReleasedRows:
    @pytest.fixture
    def sent(self, monkeypatch):
        """Every train message's records, by client: (names, text of all that is no tensor)."""
        seen, real = [], LocalGrid.push_messages

        def push(self, messages):
            messages = list(messages)
            for message in messages:
                if message.metadata.message_type == "train":
                    light = {key: dict(record) for key, record in message.content.items() if not key.startswith(PART)}
                    seen.append((json.loads(light[REQUEST]["json"])["client_id"], set(message.content), light))
            return real(self, messages)

        monkeypatch.setattr(LocalGrid, "push_messages", push)
        return seen

    def test_non_owners_are_sent_the_rows_text_and_nothing_else(self, pocket, made, saves, sent):
        run = unlearn(pocket, saves, made["tuned"], "un", *ROUNDS, *PROTOCOLS["all_clients"])
        full = load_tofu(str(pocket.data)).rows("full")
        rows = [[number, full[number].question, full[number].answer] for number in range(72, 80)]
        assert len(sent) == 12
        for client, names, light in sent:
            beside = {name for name in names if not name.startswith(PART)}
            assert beside == ({REQUEST} if client in OWNERS else {REQUEST, RELEASED})
            if client not in OWNERS:
                assert light[RELEASED].keys() == {"json"}
                assert json.loads(light[RELEASED]["json"]) == rows
        assert {c["client_id"]: c["num_trained"] for c in history(run)[0]["clients"]} == {0: 8, 1: 8, 2: 4, 3: 4}

    @pytest.mark.parametrize("name", ["in_round", "repair", "owners_only"])
    def test_no_other_protocol_lets_a_row_s_text_leave_its_owner(self, pocket, made, saves, sent, name):
        run = unlearn(pocket, saves, made["tuned"], "un", *ROUNDS, *PROTOCOLS[name])
        full = load_tofu(str(pocket.data)).rows("full")
        assert sent
        for _, names, light in sent:
            assert RELEASED not in names
            assert not any(row.answer in json.dumps(light) for row in full)
        assert not (run / "released.json").exists()

    def test_it_is_refused_where_nobody_said_that_they_are_released(self, pocket, made, saves):
        with pytest.raises(
            UserError, match=r"protocol.released=false: with all_clients the server sends the request's rows, as text"
        ):
            unlearn(pocket, saves, made["tuned"], "un", "protocol=all_clients")
        assert not (saves / "unlearn").exists()

    def test_only_what_is_asked_for_is_released(self, pocket, made, saves, sent):
        unlearn(pocket, saves, made["tuned"], "un", *PROTOCOLS["all_clients"], "requests=[{rows: [77]}]")
        told = [json.loads(light[RELEASED]["json"]) for client, _, light in sent if client != 3]
        assert len(told) == 6
        assert all([number for number, _, _ in rows] == [77] for rows in told)
