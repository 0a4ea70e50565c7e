"""Laws of the server optimisers with moments, and what they refuse."""

import dataclasses
import inspect
import re

import pytest
import torch

from fedunlearn.aggregation.base import ServerOptimizer, ServerState
from fedunlearn.aggregation.fedadagrad import FedAdagrad
from fedunlearn.aggregation.fedadam import FedAdam
from fedunlearn.aggregation.fedavg import FedAvg
from fedunlearn.aggregation.fedavgm import FedAvgM
from fedunlearn.aggregation.fedprox import FedProx
from fedunlearn.aggregation.fedyogi import FedYogi
from fedunlearn.errors import UserError

KINDS = [FedAvgM, FedAdagrad, FedAdam, FedYogi]
MEMBERS = [kind(server_lr=0.5) for kind in KINDS]
ALL = [FedAvg(), FedProx(), *MEMBERS]
SHAPES = {"A": (2, 3), "B": (4,)}


def named(value):
    return type(value).__name__ if isinstance(value, ServerOptimizer) else None


def drawn(seed, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def mean(seed):
    return drawn(seed, torch.float64)


def after(strategy, rounds, adapter=None):
    state = ServerState(adapter=adapter or drawn(0))
    for number in range(1, rounds + 1):
        state = strategy.step(state, mean(number))
    return state


def only(names, tensors):
    return {name: tensors[name] for name in names}


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("strategy", ALL, ids=named)
def test_a_member_is_frozen_takes_keywords_and_says_which_moments_it_keeps(strategy):
    kept = {FedAvg: (), FedProx: (), FedAvgM: ("v",), FedAdagrad: ("v",), FedAdam: ("m", "v"), FedYogi: ("m", "v")}
    assert strategy.moment_names == kept[type(strategy)]
    assert tuple(sorted(after(strategy, 1).moments)) == strategy.moment_names
    parameters = inspect.signature(type(strategy)).parameters.values()
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)
    with pytest.raises(dataclasses.FrozenInstanceError, match="server_lr"):
        strategy.server_lr = 2.0


@pytest.mark.parametrize("strategy", ALL, ids=named)
def test_a_member_that_sends_the_mean_says_so_and_no_other(strategy):
    before = after(strategy, 1)
    stepped = strategy.step(before, mean(2))
    cast = {name: tensor.to(before.adapter[name].dtype) for name, tensor in mean(2).items()}
    assert strategy.sends_mean == same(stepped.adapter, cast)


def test_a_member_that_says_nothing_does_not_send_the_mean():
    class Plain(ServerOptimizer):
        moment_names = ()

        def step(self, state, mean):
            return state

    assert Plain().sends_mean is False


def test_a_member_must_say_which_moments_it_keeps():
    class Silent(ServerOptimizer):
        def step(self, state, mean):
            return state

    with pytest.raises(TypeError, match="moment_names"):
        Silent()


@pytest.mark.parametrize("strategy", ALL, ids=named)
@pytest.mark.parametrize("rounds", [0, 2])
def test_inputs_are_not_modified_and_what_is_given_is_not_shared(strategy, rounds):
    state, given = after(strategy, rounds), mean(9)
    again, kept = after(strategy, rounds), mean(9)
    result = strategy.step(state, given)
    for tensors in (result.adapter, *result.moments.values()):
        for tensor in tensors.values():
            tensor.fill_(1e9)
    assert same(state.adapter, again.adapter)
    assert same(given, kept)
    assert state.round == again.round == rounds
    assert set(state.moments) == set(again.moments)
    assert all(same(state.moments[moment], again.moments[moment]) for moment in state.moments)


@pytest.mark.parametrize("strategy", ALL, ids=named)
def test_a_step_is_a_function_of_state_and_mean(strategy):
    assert same(after(strategy, 4).adapter, after(strategy, 4).adapter)


@pytest.mark.parametrize("strategy", ALL, ids=named)
def test_from_a_state_without_moments_a_mean_equal_to_the_global_adapter_changes_nothing(strategy):
    start = drawn(0)
    result = strategy.step(ServerState(adapter=start), {name: tensor.double() for name, tensor in start.items()})
    assert same(result.adapter, start)
    assert result.round == 1


@pytest.mark.parametrize("strategy", MEMBERS, ids=named)
def test_the_mean_of_one_tensor_moves_no_other(strategy):
    both = after(strategy, 3)
    state = ServerState(adapter=only("A", drawn(0)))
    for number in (1, 2, 3):
        state = strategy.step(state, only("A", mean(number)))
    assert torch.equal(both.adapter["A"], state.adapter["A"])
    assert all(torch.equal(both.moments[moment]["A"], state.moments[moment]["A"]) for moment in strategy.moment_names)


@pytest.mark.parametrize("strategy", MEMBERS, ids=named)
def test_a_tensor_without_a_moment_starts_beside_others_that_have_one(strategy):
    """Two rounds trained A alone; the third trains both: B moves as in a first round, A as if B were not there."""
    state = ServerState(adapter=only("A", drawn(0)))
    for number in (1, 2):
        state = strategy.step(state, only("A", mean(number)))
    third = strategy.step(dataclasses.replace(state, adapter={**state.adapter, "B": drawn(0)["B"]}), mean(3))
    alone = strategy.step(state, only("A", mean(3)))
    fresh = strategy.step(ServerState(adapter=only("B", drawn(0))), only("B", mean(3)))
    assert same(third.adapter, {**alone.adapter, **fresh.adapter})
    for moment in strategy.moment_names:
        assert same(third.moments[moment], {**alone.moments[moment], **fresh.moments[moment]})


@pytest.mark.parametrize("strategy", MEMBERS, ids=named)
def test_moments_of_tensors_that_are_not_active_are_handed_on(strategy):
    state = after(strategy, 2)
    result = strategy.step(dataclasses.replace(state, adapter=only("B", state.adapter)), only("B", mean(3)))
    assert set(result.adapter) == {"B"}
    for moment in strategy.moment_names:
        assert torch.equal(result.moments[moment]["A"], state.moments[moment]["A"])
        assert not torch.equal(result.moments[moment]["B"], state.moments[moment]["B"])


@pytest.mark.parametrize("strategy", MEMBERS, ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_keeps_its_type_and_moments_are_float32(strategy, dtype):
    state = after(strategy, 2, drawn(0, dtype))
    assert {tensor.dtype for tensor in state.adapter.values()} == {dtype}
    assert {tensor.dtype for moment in state.moments.values() for tensor in moment.values()} == {torch.float32}


@pytest.mark.parametrize("strategy", MEMBERS, ids=named)
def test_the_mean_update_is_taken_in_float64(strategy):
    """mean = 1 + 1e-9: in float32 D would be 0 and no moment would move; here D is 1e-9 to the 8 figures that 1 + 1e-9 leaves."""
    strategy = dataclasses.replace(strategy, **({} if type(strategy) is FedAvgM else {"v_init": 0.0}))
    state = strategy.step(
        ServerState(adapter={"w": torch.ones(1)}), {"w": torch.tensor([1 + 1e-9], dtype=torch.float64)}
    )
    first = {FedAvgM: 1e-9, FedAdagrad: 1e-18, FedAdam: 0.01 * 1e-18, FedYogi: 0.01 * 1e-18}[type(strategy)]
    assert state.moments["v"]["w"].item() == pytest.approx(first, rel=1e-6)


def test_x_moves_by_the_moments_as_computed_not_as_stored():
    """FedAvgM, x = 0, server_lr 3 2^18, D = 1 + 2^-24, which is no float32 number: v is stored as 1, but x becomes
    3 2^18 (1 + 2^-24) = 3 2^18 + 3/64, rounded to + 4/64 (float32's spacing there); the stored v would give 3 2^18.
    """
    strategy = FedAvgM(server_lr=3 * 2.0**18)
    state = strategy.step(
        ServerState(adapter={"w": torch.zeros(1)}), {"w": torch.tensor([1 + 2**-24], dtype=torch.float64)}
    )
    assert state.moments["v"]["w"].item() == 1.0
    assert state.adapter["w"].item() == 3 * 2**18 + 1 / 16


def test_mu_0_is_fedavg_bit_by_bit():
    assert same(after(FedProx(mu=0.0), 5).adapter, after(FedAvg(), 5).adapter)
    assert FedProx(mu=0.0).client_mu == FedAvg().client_mu == 0


def test_fedavgm_without_momentum_is_fedavg_to_one_rounding():
    got, want = after(FedAvgM(momentum=0.0), 5).adapter, after(FedAvg(), 5).adapter
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1.2e-7, atol=1e-15)


def test_momentum_rolls_on_where_clients_stand_still():
    """D = 1, then 0: v = 1, .9; x = 0, 1, 1.9."""
    first = FedAvgM().step(ServerState(adapter={"w": torch.zeros(1)}), {"w": torch.ones(1).double()})
    second = FedAvgM().step(first, {"w": first.adapter["w"].double()})
    assert second.adapter["w"].item() == pytest.approx(1.9, abs=2e-7)


@pytest.mark.parametrize(("one", "other"), [(a, b) for i, a in enumerate(ALL[1:]) for b in ALL[i + 2 :]], ids=named)
def test_no_two_members_are_the_same(one, other):
    """FedAdam's adapter is not FedAvg's, nor any member's another's."""
    got, want = after(one, 3).adapter, after(other, 3).adapter
    assert all((got[name] - want[name]).abs().max() > 1e-3 for name in SHAPES)


@pytest.mark.parametrize("kind", [FedAdam, FedYogi, FedAdagrad])
def test_the_first_step_of_an_entry_is_no_longer_than_its_bound(kind):
    """v >= (1 - beta_2) D^2 gives |step| < server_lr (1 - beta_1) / sqrt(1 - beta_2) = server_lr, and server_lr for FedAdagrad."""
    adapter = {"w": torch.zeros(5)}
    huge = {"w": torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6]).double()}
    step = kind(server_lr=0.1).step(ServerState(adapter=adapter), huge).adapter["w"]
    assert (step > 0).all()
    assert (step.diff() > 0).all()
    assert step[-1].item() == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("kind", [FedAdam, FedYogi])
def test_v_never_turns_negative_and_no_adapter_is_nan(kind):
    """In FedYogi beta_2 = 0 takes the whole of D^2 off a v that exceeds it; 60 rounds of ever smaller updates, a float32 v every round."""
    strategy = kind(beta_2=0.0, v_init=0.0)
    state = ServerState(adapter=drawn(0))
    for number in range(60):
        update = {name: tensor * 0.7**number for name, tensor in mean(number).items()}
        state = strategy.step(state, {name: state.adapter[name].double() + update[name] for name in update})
        assert all((v >= 0).all() for v in state.moments["v"].values())
    assert all(torch.isfinite(tensor).all() for tensor in state.adapter.values())


def test_bias_correction_fades():
    """In round 2000 beta_2^2001 = 2e-9: the correction is 1 - 1e-9, and nothing of it is left in float32."""
    late = dataclasses.replace(after(FedAdam(), 2), round=1999)
    plain, corrected = (FedAdam(bias_correction=on).step(late, mean(3)) for on in (False, True))
    early = FedAdam(bias_correction=True).step(after(FedAdam(), 2), mean(3))
    for name in SHAPES:
        torch.testing.assert_close(plain.adapter[name], corrected.adapter[name], rtol=1.2e-7, atol=0)
        assert not torch.equal(plain.adapter[name], early.adapter[name])


@pytest.mark.parametrize("strategy", MEMBERS, ids=named)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"A": torch.zeros(2, 3)}, "mean and global adapter differ in tensor 'B'"),
        ({**mean(0), "C": torch.zeros(1)}, "differ in tensor 'C'"),
        ({**mean(0), "B": torch.zeros(1, 4)}, r"mean of 'B' has shape \(1, 4\), the global adapter \(4,\)"),
    ],
)
def test_a_mean_of_other_names_or_shapes_is_refused(strategy, given, said):
    with pytest.raises(ValueError, match=said):
        strategy.step(ServerState(adapter=drawn(0)), given)


@pytest.mark.parametrize(
    ("strategy", "moments", "said"),
    [
        (FedAvg(), ["v"], "moment 'v' is not kept by FedAvg: this is the state of another strategy"),
        (FedProx(), ["m", "v"], "moment 'm' is not kept by FedProx: this is the state of another strategy"),
        (FedAvgM(), ["m", "v"], "moment 'm' is not kept by FedAvgM: this is the state of another strategy"),
        (FedAdagrad(), ["m", "v"], "moment 'm' is not kept by FedAdagrad: this is the state of another strategy"),
        (FedAdam(), ["v"], "moment 'm' is missing for FedAdam: this is the state of another strategy"),
        (FedYogi(), ["v"], "moment 'm' is missing for FedYogi: this is the state of another strategy"),
        (FedAdam(), ["m", "u", "v"], "moment 'u' is not kept by FedAdam: this is the state of another strategy"),
    ],
    ids=named,
)
def test_the_state_of_another_strategy_is_refused(strategy, moments, said):
    state = ServerState(adapter=drawn(0), moments={moment: drawn(1) for moment in moments})
    with pytest.raises(ValueError, match=f"^{said}$"):
        strategy.step(state, mean(1))


@pytest.mark.parametrize(
    ("before", "now"),
    [(a, b) for a in ALL for b in ALL if a.moment_names and a.moment_names != b.moment_names],
    ids=named,
)
def test_a_strategy_changed_between_rounds_is_refused(before, now):
    with pytest.raises(ValueError, match="state of another strategy"):
        now.step(after(before, 2), mean(3))


def test_fedadagrad_refuses_fedavgm_s_v_which_bears_the_same_name():
    with pytest.raises(
        ValueError, match="moment 'v' of 'A' is negative, no sum of squares: this is the state of another"
    ):
        FedAdagrad().step(after(FedAvgM(), 2), mean(3))


@pytest.mark.parametrize("strategy", MEMBERS, ids=named)
def test_a_moment_of_another_shape_is_refused(strategy):
    """(1, 3) would broadcast into (2, 3) without a word."""
    state = after(strategy, 1)
    wrong = {**state.moments, "v": {**state.moments["v"], "A": torch.ones(1, 3)}}
    with pytest.raises(ValueError, match=r"moment 'v' of 'A' has shape \(1, 3\), the global adapter \(2, 3\)"):
        strategy.step(dataclasses.replace(state, moments=wrong), mean(2))


NAN, INF = float("nan"), float("inf")
ABOVE_0, FROM_0, BELOW_1 = "a number above 0, at most 1e6", "a number from 0 to 1e6", r"a number in \[0, 1\)"
BAD = [
    *[(kind, "server_lr", bad, ABOVE_0, 1e-3) for kind in KINDS[1:] for bad in (0.0, -1e-3, 1.1e6, 1e308, NAN, INF)],
    *[(FedAvgM, "server_lr", bad, ABOVE_0, 1.0) for bad in (0.0, -1.0, NAN, INF)],
    *[(FedAvgM, "momentum", bad, BELOW_1, 0.9) for bad in (-0.1, 1.0, 1.5, NAN)],
    *[(kind, "tau", bad, ABOVE_0, 1e-3) for kind in KINDS[1:] for bad in (0.0, -1e-3, 1.1e6, 1e200, NAN, INF)],
    *[(kind, "beta_1", bad, BELOW_1, 0.9) for kind in (FedAdam, FedYogi) for bad in (-0.1, 1.0, NAN)],
    *[(kind, "beta_2", bad, BELOW_1, 0.99) for kind in (FedAdam, FedYogi) for bad in (-0.1, 1.0, NAN)],
    *[(kind, "v_init", bad, FROM_0, "null") for kind in KINDS[1:] for bad in (-1e-6, 1e300, NAN, INF)],
    *[(FedProx, "mu", bad, FROM_0, 0.01) for bad in (-0.1, 1.1e6, NAN, INF)],
]


def test_the_largest_that_are_allowed_step_and_stay_finite():
    """tau and v_init squared, and the mean update times server_lr: no number of it overflows."""
    state = ServerState(adapter={"A": torch.ones(2, 3)})
    most = {"server_lr": 1e6, "tau": 1e6, "v_init": 1e6}
    for strategy in (FedAvgM(server_lr=1e6), FedAdam(**most), FedYogi(**most), FedAdagrad(**most)):
        stepped = strategy.step(state, {"A": torch.full((2, 3), 1e15, dtype=torch.float64)})
        assert all(t.isfinite().all() for t in (*stepped.adapter.values(), *(m["A"] for m in stepped.moments.values())))
    assert FedProx(mu=1e6).client_mu == 1e6


@pytest.mark.parametrize(("kind", "name", "value", "allowed", "default"), BAD)
def test_a_bad_hyperparameter_is_refused_by_key_value_range_and_way_out(kind, name, value, allowed, default):
    said = rf"^strategy\.{name}={re.escape(str(value))} is refused: {kind.__name__} wants {allowed}; correct it, or leave it out for {default}$"
    with pytest.raises(UserError, match=said):
        kind(**{name: value})


def test_all_bad_hyperparameters_are_told_at_once():
    with pytest.raises(UserError, match=r"strategy\.server_lr=0 is refused") as caught:
        FedAdam(server_lr=0, beta_1=1, beta_2=-1, tau=0, v_init=-1)
    assert [fault.split("=")[0] for fault in caught.value.faults] == [
        f"strategy.{name}" for name in ("server_lr", "beta_1", "beta_2", "tau", "v_init")
    ]


@pytest.mark.parametrize(
    ("kind", "edge"),
    [
        (FedAvgM, {"momentum": 0.0, "server_lr": 1e-30}),
        (FedAdam, {"beta_1": 0.0, "beta_2": 0.0, "v_init": 0.0, "tau": 1e-12}),
        (FedYogi, {"beta_1": 0.0, "beta_2": 0.0, "v_init": 0.0, "tau": 1e-12}),
        (FedAdagrad, {"v_init": 0.0, "tau": 1e-12}),
        (FedProx, {"mu": 0.0}),
    ],
)
def test_the_edge_of_what_is_allowed_is_allowed(kind, edge):
    assert all(torch.isfinite(tensor).all() for tensor in after(kind(**edge), 2).adapter.values())


def test_fedadagrad_has_no_betas():
    with pytest.raises(TypeError, match="beta_1"):
        FedAdagrad(beta_1=0.9)
