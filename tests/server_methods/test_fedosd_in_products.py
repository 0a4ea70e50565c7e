"""FedOSD's algebra on random factors: the step, what of it is stored, and repair, all against dense float64 matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedunlearn.aggregation.factors import Module
from fedunlearn.aggregation.product import LowRank
from fedunlearn.errors import UserError
from fedunlearn.protocols.base import Stage
from fedunlearn.records.rounds import ClientRows, Role
from fedunlearn.server_methods.base import Contribution, Scene, ServerStep
from fedunlearn.server_methods.fedosd import FedOSD, orthogonal_coefficients
from fedunlearn.server_methods.linear import difference, gram

MODULES = tuple(Module(name, f"{name}.lora_A.weight", f"{name}.lora_B.weight") for name in ("one", "two"))
SHAPES = {"one": (12, 9), "two": (7, 10)}


def random_product(generator, rank, size=1.0):
    """B A of a module at that rank; float32 factors in float64, as clients send them."""
    made = {
        name: LowRank(
            (size * torch.randn(d_out, rank, generator=generator)).double(),
            torch.randn(rank, d_in, generator=generator).double(),
        )
        for name, (d_out, d_in) in SHAPES.items()
    }
    return lambda module: made[module.name]


def plus(old, moved):
    return difference(old, lambda module: LowRank(-moved(module).left, moved(module).right))


def dense(product):
    """All modules as one vector."""
    return torch.cat([product(module).dense().flatten() for module in MODULES])


def stored(block):
    return torch.cat([(block[m.b].double() @ block[m.a].double()).flatten() for m in MODULES])


def cos(one, other):
    return abs(float(one @ other / one.norm() / other.norm()))


def scene(seed, num_retain, num_forget, rank=2, size=1.0, round=2, held=True):
    """A second round of FedOSD: as many held retain updates, as many owners' updates at unequal weights."""
    generator = torch.Generator().manual_seed(seed)
    old = random_product(generator, rank)

    def sent(client, weight):
        new = plus(old, random_product(generator, rank, size))
        return Contribution(client_id=client, weight=weight, new=new, old=old)

    retain = tuple(sent(k, 0.0) for k in range(num_retain))
    shares = [k + 1.0 for k in range(num_forget)]
    forget = tuple(sent(10 + k, share / sum(shares)) for k, share in enumerate(shares))
    stage = Stage(round=round, num_rounds=4)
    return Scene(stage=stage, modules=MODULES, now=old, start=old, updates=forget, held=retain if held else ())


def updates_of(contributions):
    return [dense(difference(u.new, u.old)) for u in contributions]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1e-3, 1.0, 1e2])
)
def test_the_step_is_orthogonal_to_every_retain_update_and_as_long_as_g(seed, num_retain, num_forget, rank, size):
    """In float64 to 1e-6 and better by far; what is stored in float32 to 1e-4 of it, and the history says how much."""
    made = scene(seed, num_retain, num_forget, rank, size)
    retain, forget = updates_of(made.held), updates_of(made.updates)
    g = sum(u.weight * update for u, update in zip(made.updates, forget, strict=True))
    inner = gram([difference(u.new, u.old) for u in (*made.held, *made.updates)], MODULES)
    weights = orthogonal_coefficients(inner, torch.tensor([u.weight for u in made.updates], dtype=torch.float64))
    step = sum(float(w) * update for w, update in zip(weights, [*retain, *forget], strict=True))
    assert max(cos(step, row) for row in retain) < 1e-6
    assert float(step.norm()) == pytest.approx(float(g.norm()), rel=1e-6)
    basis = torch.linalg.qr(torch.stack(retain, 1))[0]
    direct = g - basis @ (basis.T @ g)
    assert torch.allclose(step, direct * g.norm() / direct.norm(), atol=1e-6 * float(g.norm()))

    change = FedOSD().change(made)
    kept = stored(change.block)
    assert float((kept - step).norm() / step.norm()) < 1e-5
    said = change.figures["fedosd/largest_cos"]
    assert said == pytest.approx(max(cos(kept, row) for row in retain), abs=1e-9)
    assert said < 1e-4


def test_the_same_update_twice_is_no_fault():
    """G G^T is singular: the pseudo-inverse takes its span."""
    made = scene(3, 2, 1)
    twice = Scene(
        **{
            **{f: getattr(made, f) for f in ("stage", "modules", "now", "start", "updates")},
            "held": (made.held[0],) * 2,
        }
    )
    once = Scene(
        **{**{f: getattr(made, f) for f in ("stage", "modules", "now", "start", "updates")}, "held": made.held[:1]}
    )
    one, other = (stored(FedOSD().change(s).block) for s in (twice, once))
    assert torch.allclose(one, other, atol=1e-5 * float(other.norm()))


def test_nothing_is_left_of_a_forget_update_in_the_others_span():
    """g_u is a retain update itself: there is no direction, and no step is blown up out of rounding."""
    made = scene(4, 2, 1)
    same = Scene(
        stage=made.stage,
        modules=MODULES,
        now=made.now,
        start=made.start,
        held=made.held,
        updates=(Contribution(client_id=9, weight=1.0, new=made.held[0].new, old=made.held[0].old),),
    )
    change = FedOSD().change(same)
    assert change.block == {}
    assert change.figures["fedosd/largest_cos"] == 0.0


def test_without_a_retain_update_the_step_is_g():
    made = scene(5, 1, 2, held=False)
    g = sum(u.weight * update for u, update in zip(made.updates, updates_of(made.updates), strict=True))
    assert torch.allclose(stored(FedOSD().change(made).block), g, atol=1e-5 * float(g.norm()))


def test_coefficients_by_hand():
    """One retain update r = (1, 0), one forget update u = (3, 4), g = u: g - 3 r = (0, 4), scaled by 5 / 4: -3.75 r + 1.25 u = (0, 5)."""
    inner = torch.tensor([[1.0, 3.0], [3.0, 25.0]], dtype=torch.float64)
    weights = orthogonal_coefficients(inner, torch.ones(1, dtype=torch.float64))
    assert weights.tolist() == pytest.approx([-3.75, 1.25], abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_repair_takes_each_update_s_part_along_the_way_unlearned(seed, clients):
    made = scene(seed, 1, clients, round=3)
    generator = torch.Generator().manual_seed(seed + 1)
    way = random_product(generator, 2)
    repair = Scene(stage=made.stage, modules=MODULES, now=plus(made.start, way), start=made.start, updates=made.updates)
    a, wanted = dense(way), 0.0
    for u, g in zip(made.updates, updates_of(made.updates), strict=True):
        left = g - (g @ a) / (a @ a) * a
        used = left * g.norm() / left.norm()
        assert cos(used, a) < 1e-10
        wanted = wanted + u.weight * used
    step = stored(FedOSD().change(repair).block)
    assert torch.allclose(step, wanted, atol=1e-5 * float(wanted.norm()))
    assert abs(float(step @ a)) < 1e-5 * float(a.norm() * max(g.norm() for g in updates_of(made.updates)))


def test_repair_where_nothing_was_unlearned_is_the_mean():
    made = scene(8, 1, 3, round=3)
    mean = sum(u.weight * g for u, g in zip(made.updates, updates_of(made.updates), strict=True))
    assert torch.allclose(stored(FedOSD().change(made).block), mean, atol=1e-5 * float(mean.norm()))


def test_the_first_of_two_rounds_is_held():
    made = scene(1, 2, 1, round=1)
    assert FedOSD().change(made).hold
    assert not FedOSD().change(made).block


def test_roles_of_two_steps_and_repair():
    """steps 2: rounds 1 and 3 everyone's retain rows, 2 and 4 owners alone, from 5 on repair; a client without retain rows makes no row of G."""
    cohort = [
        ClientRows(client_id=k, num_owned=4, num_forget=f, num_retain=r)
        for k, f, r in ((0, 0, 4), (1, 2, 2), (2, 4, 0))
    ]
    method = FedOSD(steps=2, retain_epochs=0.5)
    found = [
        [(a.role, a.epochs) for a in method.assign(Stage(round=number, num_rounds=6), cohort, 3.0)]
        for number in range(1, 7)
    ]
    retain = [(Role.FINETUNE, 0.5), (Role.FINETUNE, 0.5), (Role.IDLE, 0.0)]
    owners = [(Role.IDLE, 0.0), (Role.UNLEARN, 3.0), (Role.UNLEARN, 3.0)]
    assert found == [retain, owners, retain, owners, retain, retain]
    assert {method.step(Stage(round=number, num_rounds=6)) for number in range(1, 7)} == {ServerStep.OWN}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 0}, "method.steps=0"),
        ({"retain_epochs": 0}, "method.retain_epochs=0"),
        ({"retain_epochs": float("nan")}, "method.retain_epochs=nan"),
    ],
)
def test_what_is_no_number_of_steps_or_epochs_is_refused(values, said):
    with pytest.raises(UserError, match=said):
        FedOSD(**values)
