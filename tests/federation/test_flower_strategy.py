"""Flower strategies behind our round loop: parity with ours, what each is shown, what it may answer, and resume bit by bit."""

import json
import logging
import random

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.clientapp import ClientApp
from helpers_adapters import mean_of_clients
from helpers_strategies import Recording
from safetensors.torch import load_file, save_file

from fedunlearn.aggregation.flower import FlowerStrategy
from fedunlearn.errors import UserError
from fedunlearn.federation import flower_strategy
from fedunlearn.federation.flower_strategy import OfferedNodes, StrategyState, WrappedStrategy
from fedunlearn.federation.local_grid import LocalGrid

STOCK, OURS = "flwr.serverapp.strategy.", "helpers_strategies."
NODES = {0: 31, 1: 12, 2: 23, 3: 44}
WEIGHTS = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}
GLOBAL = {"b": torch.tensor([1.0, -1.0]), "a": torch.tensor([[0.5, 0.25, 2.0]])}


@pytest.fixture(autouse=True)
def _inside_a_run():
    LocalGrid(ClientApp(), 1)


def wrapped(target, seed=0, **parameters):
    return WrappedStrategy.build(FlowerStrategy(target=target, parameters=parameters), seed)


def update(round, client, adapter):
    draw = torch.Generator().manual_seed(100 * round + client)
    return {n: 0.9 * adapter[n] + 0.1 * torch.randn(adapter[n].shape, generator=draw) for n in sorted(adapter)}


def reader(updates):
    return lambda client, name: updates[client][name]


def one_round(strategy, round, adapter, nodes=NODES, weights=WEIGHTS, losses=None):
    """The global adapter after one round, cast to float32 as our loop does."""
    wanted = strategy.configure(round, adapter, nodes)
    updates = {client: update(round, client, adapter) for client in wanted}
    taken = {client: weights[client] for client in wanted}
    result = strategy.aggregate(round, taken, nodes, reader(updates), adapter, losses)
    return {name: tensor.float() for name, tensor in result.items()}


def rounds(strategy, numbers, adapter):
    for number in numbers:
        adapter = one_round(strategy, number, adapter)
    return adapter


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- parity


def test_wrapped_fedavg_is_our_mean_within_float32():
    """Flower sums in float32, ours in float64: 4 clients leave at most some 4 ulp of float32 at entries below 4."""
    updates = {client: update(1, client, GLOBAL) for client in NODES}
    strategy = wrapped(STOCK + "FedAvg")
    assert strategy.configure(1, GLOBAL, NODES) == dict.fromkeys(NODES, 0.0)
    theirs = strategy.aggregate(1, WEIGHTS, NODES, reader(updates), GLOBAL)
    ours = mean_of_clients(sorted(GLOBAL), WEIGHTS, reader(updates))
    assert list(theirs) == ["a", "b"]
    assert {tensor.dtype for tensor in theirs.values()} == {torch.float64}
    for name, mean in ours.items():
        torch.testing.assert_close(theirs[name], mean, rtol=0, atol=1e-6)
        assert not torch.allclose(mean, GLOBAL[name].double(), atol=1e-2)


def test_krum_takes_the_client_in_the_thick_of_the_others():
    """n = 5, f = 1: two nearest. At 0, 1, 1.125, 1.5, 9 the sums of squares are 2.27, .27, .16, .39, 118: client 2 wins; FedAvg would give 2.5."""
    places = dict(enumerate([0.0, 1.0, 1.125, 1.5, 9.0]))
    updates = {client: {"w": torch.tensor([place, place])} for client, place in places.items()}
    nodes, adapter = {client: 50 - client for client in places}, {"w": torch.zeros(2)}
    strategy = wrapped(STOCK + "Krum", num_malicious_nodes=1)
    strategy.configure(1, adapter, nodes)
    result = strategy.aggregate(1, dict.fromkeys(places, 0.2), nodes, reader(updates), adapter)
    assert result["w"].tolist() == [1.125, 1.125]


@pytest.mark.parametrize(
    ("name", "parameters", "want"),
    [("FedMedian", {}, 2.0), ("FedTrimmedAvg", {"beta": 0.34}, 2.0), ("MultiKrum", {"num_nodes_to_select": 2}, 1.5)],
)
def test_robust_ones_leave_the_outlier_out(name, parameters, want):
    """Of 1, 2, 90: the median and the mean of the middle are 2; the two nearest to each other mean 1.5."""
    updates = {client: {"w": torch.tensor([place])} for client, place in enumerate([1.0, 2.0, 90.0])}
    nodes, adapter = {0: 5, 1: 6, 2: 7}, {"w": torch.zeros(1)}
    strategy = wrapped(STOCK + name, **parameters)
    strategy.configure(1, adapter, nodes)
    result = strategy.aggregate(1, dict.fromkeys(nodes, 1 / 3), nodes, reader(updates), adapter)
    assert result["w"].item() == pytest.approx(want, abs=1e-6)


def test_fedprox_s_mu_reaches_every_client_and_others_have_none():
    assert wrapped(STOCK + "FedProx", proximal_mu=0.25).configure(1, GLOBAL, NODES) == dict.fromkeys(NODES, 0.25)
    assert wrapped(STOCK + "FedAdam").configure(1, GLOBAL, NODES) == dict.fromkeys(NODES, 0.0)


def test_qfedavg_gets_its_losses():
    """q = 0: every client's pull counts the same and L cancels, so the result is the plain mean; without losses it says what it lacks."""
    strategy = wrapped(STOCK + "QFedAvg", client_learning_rate=0.5, q=0.0)
    result = one_round(strategy, 1, GLOBAL, losses=dict.fromkeys(NODES, 2.0))
    mean = mean_of_clients(sorted(GLOBAL), dict.fromkeys(NODES, 0.25), reader({k: update(1, k, GLOBAL) for k in NODES}))
    torch.testing.assert_close(result, {name: tensor.float() for name, tensor in mean.items()}, rtol=0, atol=1e-6)
    with pytest.raises(
        UserError, match=r"round 2: aggregate_train raised AggregationError: Missing or invalid training"
    ):
        one_round(strategy, 2, GLOBAL)


# --- what it is shown


def test_it_sees_the_round_plain_arrays_in_name_order_and_the_selected_nodes_alone():
    adapter = {name: tensor.bfloat16() for name, tensor in GLOBAL.items()}
    strategy = wrapped(OURS + "Recording")
    strategy.configure(7, adapter, {2: 23, 0: 31})
    assert list(Recording.seen["offered"]) == ["a", "b"]
    assert {array.numpy().dtype for array in Recording.seen["offered"].values()} == {np.dtype("float32")}
    assert Recording.seen["offered"]["a"].numpy().tolist() == GLOBAL["a"].tolist()
    assert Recording.seen["nodes"] == [31, 23]
    assert Recording.seen["config"] == {}


def test_replies_come_in_client_order_from_their_nodes_with_their_weights():
    adapter = {name: tensor.bfloat16() for name, tensor in GLOBAL.items()}
    strategy = wrapped(OURS + "Recording")
    strategy.configure(3, adapter, NODES)
    updates = {client: {n: t.bfloat16() for n, t in update(3, client, GLOBAL).items()} for client in NODES}
    strategy.aggregate(3, {3: 0.75, 1: 0.25}, NODES, reader(updates), adapter)
    replies = Recording.seen["replies"]
    assert Recording.seen["round"] == 3
    assert [reply.metadata.src_node_id for reply in replies] == [12, 44]
    assert [dict(reply.content["metrics"]) for reply in replies] == [{"num-examples": 0.25}, {"num-examples": 0.75}]
    assert [list(reply.content["arrays"]) for reply in replies] == [["a", "b"]] * 2
    assert replies[1].content["arrays"]["b"].numpy().tolist() == updates[3]["b"].float().tolist()


def test_one_client_neither_blocks_nor_is_sampled_away():
    result = one_round(wrapped(STOCK + "FedMedian"), 1, GLOBAL, nodes={5: 9}, weights={5: 1.0})
    assert equal(result, update(1, 5, GLOBAL))


@pytest.mark.parametrize("name", [STOCK + "FedAvg", OURS + "Demanding"])
def test_clients_come_in_order_however_the_strategy_draws_them(name):
    assert all(list(wrapped(name, seed).configure(1, GLOBAL, NODES)) == [0, 1, 2, 3] for seed in range(4))


def test_a_subset_of_its_own_will_is_allowed_and_said(caplog):
    strategy = wrapped(OURS + "Drawing")
    with caplog.at_level(logging.INFO, logger="fedunlearn"):
        wanted = strategy.configure(1, GLOBAL, NODES)
    assert len(wanted) == 2
    assert list(wanted) == sorted(wanted)
    assert f"strategy._target_='helpers_strategies.Drawing' wants clients {list(wanted)} of [0, 1, 2, 3]" in caplog.text


def test_its_draws_are_a_function_of_the_seed_and_no_other_draw_moves():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first, again, other = (rounds(wrapped(OURS + "Drawing", seed), [1, 2], GLOBAL) for seed in (4, 4, 5))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert equal(first, again)
    assert not equal(first, other)
    drawn = [wrapped(OURS + "Drawing", seed)._strategy.drawn for seed in (4, 4, 5)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_flower_s_own_log_lines_stay_out(caplog):
    logging.getLogger("flwr").setLevel(logging.DEBUG)
    with caplog.at_level(logging.DEBUG):
        one_round(wrapped(STOCK + "FedAvg"), 1, GLOBAL)
    assert not [record for record in caplog.records if record.name.startswith("flwr")]
    logging.getLogger("flwr").setLevel(logging.ERROR)
    wrapped(STOCK + "FedAvg")
    assert logging.getLogger("flwr").level == logging.ERROR


def test_the_grid_it_gets_can_only_name_nodes():
    grid = OfferedNodes([3, 4])
    assert [info.node_id for info in grid.get_nodes()] == [3, 4]
    assert grid.create_message(RecordDict({"c": ConfigRecord()}), "train", 4, "1").metadata.dst_node_id == 4
    for use in (
        lambda: grid.push_messages([]),
        lambda: grid.pull_messages([]),
        lambda: grid.send_and_receive([]),
        lambda: grid.set_run(None),
        lambda: grid.run,
    ):
        with pytest.raises(UserError, match=r"grid\.\w+ is not a strategy's to use here: give messages back"):
            use()


# --- what it may not answer


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("invents", r"it asks node 99, which is none of the 4 selected"),
        ("repeats", r"it asks client 0 twice"),
        ("nobody", r"it wants none of the 4 selected clients trained"),
        ("evaluates", r"it sends a message of type 'evaluate'; allowed: 'train'"),
        ("queries", r"it sends a message of type 'train.twice'"),
        ("configures", r"it sends the config key 'lr'; our clients know 'server-round' and 'proximal-mu' only"),
        ("mu_negative", r"it sends proximal-mu=-1.0; allowed: a finite number, 0 or above"),
        ("mu_nan", r"it sends proximal-mu=nan"),
        ("mu_text", r"it sends proximal-mu='much'"),
        ("rewrites", r"it sends another 'b' than the global adapter's"),
        ("drops", r"it sends another 'b' than the global adapter's"),
        ("measures", r"it sends a MetricRecord 'metrics'; our clients read none"),
        ("sends", r"configure_train raised UserError: grid.send_and_receive is not a strategy's"),
        ("returns_text", r"configure_train gives a str where messages are wanted"),
    ],
)
def test_a_message_we_would_not_send_ends_the_round(how, said):
    strategy = wrapped(OURS + "Faulty", how=how)
    with pytest.raises(UserError, match=r"^strategy\._target_='helpers_strategies\.Faulty', round 2: " + said):
        strategy.configure(2, GLOBAL, NODES)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", r"aggregate_train raised RuntimeError: out of ideas"),
        ("nothing", r"aggregate_train gives no arrays"),
        ("dict", r"aggregate_train gives dict arrays"),
        ("nan", r"its tensor 'b' has entries that are not finite"),
        ("shape", r"its tensor 'b' has shape \(1, 2\) instead of \(2,\)"),
        ("text_array", r"its tensor 'b' has dtype <U1; allowed: real numbers"),
        ("unreadable", r"its tensor 'b' cannot be read \(Unsupported serialization type"),
        ("lacks", r"its result lacks tensor 'b'"),
        ("extra", r"its result has an unknown tensor 'c'"),
    ],
)
def test_a_result_that_is_no_adapter_ends_the_round(how, said):
    strategy = wrapped(OURS + "Faulty", how=how)
    with pytest.raises(
        UserError, match=r"^strategy\._target_='helpers_strategies\.Faulty', round 1: " + said
    ) as caught:
        one_round(strategy, 1, GLOBAL)
    assert isinstance(caught.value.__cause__, RuntimeError | TypeError | None)
    assert (caught.value.__cause__ is not None) == (how in ("raises", "unreadable"))


def test_a_strategy_without_a_fault_passes_all_of_that():
    assert not equal(one_round(wrapped(OURS + "Faulty", how="sound"), 1, GLOBAL), GLOBAL)


def test_bulyan_with_too_few_clients_is_told():
    with pytest.raises(UserError, match=r"Bulyan', round 1: aggregate_train gives no arrays"):
        one_round(wrapped(STOCK + "Bulyan", num_malicious_nodes=1), 1, GLOBAL)


def test_waiting_for_nodes_that_will_not_come_ends(monkeypatch):
    monkeypatch.setattr(flower_strategy, "PATIENCE", 0.5)
    with pytest.raises(
        UserError, match=r"it waits for more nodes than the 4 selected: raise trainer\.federated\.min_clients"
    ):
        wrapped(OURS + "Patient").configure(1, GLOBAL, NODES)


@pytest.mark.parametrize(
    ("target", "parameters", "said"),
    [
        (
            OURS + "Refusing",
            {"share": 2},
            r"Refusing' cannot be built \(ValueError: share is at most 1\): correct strategy",
        ),
        (STOCK + "FedTrimmedAvg", {"beta": 0.7}, r"cannot be built \(ValueError: `beta` must be in the range"),
        (OURS + "Greedy", {}, r"cannot be built \(TypeError: .*multiple values for keyword argument 'fraction_train'"),
        (OURS + "NoStrategy", {}, r"is no Flower strategy: make it a subclass of flwr\.serverapp\.strategy\.Strategy"),
        (OURS + "Nobody", {}, r"cannot be built \(AttributeError: "),
    ],
)
def test_what_cannot_be_built_is_told_by_its_key(target, parameters, said):
    with pytest.raises(UserError, match=r"^strategy\._target_=.*" + said):
        wrapped(target, **parameters)


# --- state

KEEPING = [
    (STOCK + "FedAdam", {}),
    (STOCK + "FedYogi", {}),
    (STOCK + "FedAdagrad", {}),
    (STOCK + "FedAvgM", {"server_momentum": 0.9, "server_learning_rate": 0.5}),
    (OURS + "Velocity", {"decay": 0.9, "rates": [0.5, 0.1]}),
]


def through_files(state, folder):
    """As a checkpoint would keep it, keys sorted."""
    save_file(dict(state.arrays), folder / "strategy.safetensors")
    (folder / "strategy.json").write_text(json.dumps(state.kinds, sort_keys=True))
    kinds = json.loads((folder / "strategy.json").read_text())
    return StrategyState(arrays=load_file(folder / "strategy.safetensors"), kinds=kinds, unsaved=state.unsaved)


@pytest.mark.parametrize(("target", "parameters"), KEEPING)
def test_four_rounds_are_two_and_two_bit_by_bit(target, parameters, tmp_path):
    whole = rounds(wrapped(target, **parameters), [1, 2, 3, 4], GLOBAL)
    first = wrapped(target, **parameters)
    half = rounds(first, [1, 2], GLOBAL)
    state = first.state()
    assert state.unsaved == ()
    second = wrapped(target, **parameters)
    second.restore(through_files(state, tmp_path))
    assert equal(rounds(second, [3, 4], half), whole)
    assert not equal(rounds(wrapped(target, **parameters), [3, 4], half), whole)  # so the state does count


@pytest.mark.parametrize(("target", "parameters"), KEEPING)
def test_a_restored_state_is_the_saved_one(target, parameters, tmp_path):
    first, second = wrapped(target, **parameters), wrapped(target, **parameters)
    rounds(first, [1, 2], GLOBAL)
    state = first.state()
    second.restore(through_files(state, tmp_path))
    again = second.state()
    assert again.kinds == state.kinds
    assert equal(again.arrays, state.arrays)
    assert {n: t.dtype for n, t in again.arrays.items()} == {n: t.dtype for n, t in state.arrays.items()}


def test_kinds_orders_and_dtypes_come_back(tmp_path):
    first, second = (wrapped(OURS + "Velocity", decay=0.5) for _ in range(2))
    rounds(first, [1, 2], GLOBAL)
    second.restore(through_files(first.state(), tmp_path))
    kept = vars(second._strategy)
    assert (type(kept["before"]), list(kept["before"])) == (ArrayRecord, ["a", "b"])
    assert (list(kept["velocity"]), kept["velocity"]["a"].dtype) == (["b", "a"], np.float64)
    assert (type(kept["norms"]), len(kept["norms"])) == (list, 2)
    assert (kept["rounds"].shape, kept["rounds"].dtype, int(kept["rounds"])) == ((), np.int64, 2)


def test_a_state_does_not_change_under_the_caller():
    strategy = wrapped(STOCK + "FedAvgM", server_momentum=0.9)
    rounds(strategy, [1], GLOBAL)
    state = strategy.state()
    before = {name: tensor.clone() for name, tensor in state.arrays.items()}
    for array in strategy._strategy.momentum_vector:
        array += 1
    assert before
    assert equal(state.arrays, before)


def test_before_the_first_round_there_is_nothing_to_keep_but_none():
    state = wrapped(STOCK + "FedAdam").state()
    assert (state.arrays, state.unsaved) == ({}, ())
    assert state.kinds == {"current_arrays": ["none"], "m_t": ["none"], "v_t": ["none"]}


def test_what_changed_and_is_no_array_is_named(tmp_path):
    """A number, an object, a list, and a generator made on the way; a lambda, an idle generator and nan at rest are not."""
    strategy = wrapped(OURS + "Counting")
    assert strategy.state().unsaved == ()
    rounds(strategy, [1], GLOBAL)
    state = strategy.state()
    assert state.unsaved == ("calls", "meter", "names", "used_generator")
    with pytest.raises(
        UserError, match=r"Counting' cannot be resumed: it changes calls, meter, names, used_generator, of which"
    ):
        wrapped(OURS + "Counting").restore(state)


def test_an_idle_generator_that_was_drawn_from_is_named():
    strategy = wrapped(OURS + "Counting")
    strategy._strategy.idle_generator.normal()
    assert strategy.state().unsaved == ("idle_generator",)


def test_an_array_that_checkpoints_do_not_find_is_named_once_it_changes():
    """Tuples are not among what is kept."""
    strategy = wrapped(OURS + "Counting")
    strategy._strategy.table[1][0] = 2.0
    assert strategy.state().unsaved == ("table",)


def test_what_cannot_be_compared_is_named():
    assert wrapped(OURS + "Locked").state().unsaved == ("lock",)


def test_an_attribute_that_is_gone_is_named():
    strategy = wrapped(OURS + "Counting")
    del strategy._strategy.calls
    assert strategy.state().unsaved == ("calls",)


@pytest.mark.parametrize(
    "state",
    [
        StrategyState(kinds={"m_t": ["ndarray", "m_t"]}),
        StrategyState(kinds={"m_t": ["tensor", "m_t"]}),
        StrategyState(kinds={"m_t": []}),
        StrategyState(kinds={"m_t": 3}),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state):
    with pytest.raises(
        UserError, match=r"FedAdam': its saved state does not fit \(\w+: .*start anew with overwrite=true"
    ):
        wrapped(STOCK + "FedAdam").restore(state)
