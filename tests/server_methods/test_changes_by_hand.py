"""FedEraser, negation, MSA and PGD without a federation: what they make of a scene, by hand, and what they refuse."""

import math

import pytest
import torch

from fedunlearn.aggregation.factors import Module
from fedunlearn.aggregation.product import LowRank
from fedunlearn.errors import UserError
from fedunlearn.protocols.base import Stage
from fedunlearn.records.rounds import ClientRows, Role
from fedunlearn.server_methods.base import Contribution, Origin, Scene, ServerStep
from fedunlearn.server_methods.federaser import FedEraser
from fedunlearn.server_methods.fused import FUSED
from fedunlearn.server_methods.linear import Term, block_of, difference, norms_by_module, summed
from fedunlearn.server_methods.msa import MSA
from fedunlearn.server_methods.negation import Negation
from fedunlearn.server_methods.pgd import PGD
from fedunlearn.server_methods.rollback import Rollback

MODULE = Module("m", "m.lora_A.weight", "m.lora_B.weight")
COHORT = [
    ClientRows(client_id=k, num_owned=4, num_forget=f, num_retain=r) for k, f, r in ((0, 0, 4), (1, 2, 2), (2, 4, 0))
]


def rank_one(*entries):
    """The product (entries)^T (1, 0)."""
    left = torch.tensor([[float(e)] for e in entries], dtype=torch.float64)
    return lambda module: LowRank(left, torch.tensor([[1.0, 0.0]], dtype=torch.float64))


ZERO = rank_one(0, 0)


def sent(client, weight, *entries, old=ZERO):
    return Contribution(client_id=client, weight=weight, new=rank_one(*entries), old=old)


def scene(number=1, **given):
    return Scene(
        stage=Stage(round=number, num_rounds=4), modules=(MODULE,), now=ZERO, start=ZERO, **{"updates": (), **given}
    )


def dense(block):
    """The product's entries, row by row."""
    return (block[MODULE.b].double() @ block[MODULE.a].double()).flatten().tolist()


def test_federaser_s_weight_of_a_client_is_p_times_old_length_over_new():
    """U_0 = (3, 4), new length 5, old 10: 0.25 x 2 = 0.5. U_1 = (0, 2), old 1: 0.75 / 2 = 0.375."""
    updates = (sent(0, 0.25, 3, 4), sent(1, 0.75, 0, 2))
    change = FedEraser().change(scene(2, updates=updates, old_norms={0: {"m": 10.0}, 1: {"m": 1.0}}))
    assert change.weights["m"] == pytest.approx({0: 0.5, 1: 0.375}, rel=1e-12)


def test_a_new_update_of_0_adds_nothing():
    updates = (sent(0, 0.5, 0, 0), sent(1, 0.5, 1, 0))
    change = FedEraser().change(scene(2, updates=updates, old_norms={0: {"m": 3.0}, 1: {"m": 1.0}}))
    assert change.weights["m"] == pytest.approx({0: 0.0, 1: 0.5})


def test_federaser_s_length_is_of_what_was_changed():
    """Sent (1, 0), sent back (1, 3): the update is 3 long."""
    updates = (sent(0, 1.0, 1, 3, old=rank_one(1, 0)),)
    assert FedEraser().change(scene(2, updates=updates, old_norms={0: {"m": 6.0}})).weights["m"][0] == pytest.approx(
        2.0
    )


@pytest.mark.parametrize(
    ("interval", "num_rounds", "replayed"),
    [(1, 4, [1, 2, 3, 4]), (2, 4, [1, 3]), (2, 5, [1, 3, 5]), (3, 4, [1, 4]), (9, 4, [1])],
)
def test_federaser_s_rounds(interval, num_rounds, replayed):
    method = FedEraser(interval=interval)
    assert [method.origin_round(n) for n in range(1, method.rounds(num_rounds) + 1)] == replayed


@pytest.mark.parametrize(
    ("ratio", "epochs", "trained"),
    [(0.5, 1.0, 1), (0.5, 2.0, 1), (0.5, 3.0, 2), (0.1, 10.0, 1), (1.0, 3.0, 3), (0.3, 10.0, 3)],
)
def test_federaser_s_epochs_round_up(ratio, epochs, trained):
    roles = FedEraser(ratio=ratio).assign(Stage(round=2, num_rounds=4), COHORT, epochs)
    assert [(a.role, a.epochs) for a in roles] == [(Role.FINETUNE, trained), (Role.FINETUNE, trained), (Role.IDLE, 0)]


def test_negation_by_hand():
    """Two rounds of one client: 0.5 (1, 0) and 0.25 ((0, 4) - (0, 2)): the sum is (0.5, 0.5), twice that is taken away."""
    change = Negation(scale=2.0).change(
        scene(contributions=(sent(3, 0.5, 1, 0), sent(3, 0.25, 0, 4, old=rank_one(0, 2))))
    )
    assert dense(change.block) == pytest.approx([-1.0, 0.0, -1.0, 0.0], abs=1e-6)
    assert not change.from_start


def test_negation_and_adding_again_is_nothing():
    terms = [Term(-0.3, rank_one(1, 2)), Term(0.3, rank_one(1, 2))]
    assert float(summed(terms, MODULE).dense().abs().max()) == 0.0


@pytest.mark.parametrize(
    ("strategy", "reducer", "residual", "masked", "sidecar_rank", "defined"),
    [("FedAvg", "factors", "dropped", True, None, True), ("FedProx", "stack", "sidecar", False, None, True), ("FedAvg", "factors", "sidecar", False, None, True),
     ("FedAvg", "product", "sidecar", False, None, True), ("FedAvg", "factors", "dropped", False, None, False), ("FedAvg", "product", "dropped", False, None, False),
     ("FedAvg", "product", "feedback", False, None, False), ("FedAvg", "factors", "sidecar", False, 4, False), ("FedAvg", "trimmed_mean", "dropped", True, None, False),
     ("FedAdam", "factors", "dropped", True, None, False), ("FedAvgM", "stack", "sidecar", False, None, False), ("FedAvg", "padded_factors", "dropped", False, None, False)],
)  # fmt: skip
def test_where_negation_is_defined(strategy, reducer, residual, masked, sidecar_rank, defined):
    origin = Origin(strategy=strategy, reducer=reducer, residual=residual, masked=masked, sidecar_rank=sidecar_rank)
    assert (Negation().check_origin(origin) == "") == defined


def test_msa_by_hand():
    """0.5 (((2, 0) - (1, 0)) + ((1, 4) - (1, 0))) = (0.5, 2); three times that is subtracted from what unlearning began with."""
    old = rank_one(1, 0)
    change = MSA(scale=3.0).change(scene(updates=(sent(0, 0.5, 2, 0, old=old), sent(1, 0.5, 1, 4, old=old))))
    assert dense(change.block) == pytest.approx([-1.5, 0.0, -6.0, 0.0], abs=1e-6)
    assert change.from_start


def test_roles_of_the_first_round_and_of_repair():
    """MSA, PGD and negation act in round 1 alone; then everyone with retain rows repairs, repair_epochs long. FUSED and rollback train as fine-tuning did."""
    first = {
        MSA(repair_epochs=0.5): ([Role.IDLE, Role.MEMORISE, Role.MEMORISE], 0.5),
        PGD(repair_epochs=0.5): ([Role.IDLE, Role.UNLEARN, Role.UNLEARN], 0.5),
        Negation(repair_epochs=0.5): ([Role.IDLE] * 3, 0.5),
        FUSED(): ([Role.FINETUNE, Role.FINETUNE, Role.IDLE], 2.0),
        Rollback(): ([Role.FINETUNE, Role.FINETUNE, Role.IDLE], 2.0),
    }
    for method, (roles, epochs) in first.items():
        begun = method.assign(Stage(round=1, num_rounds=3), COHORT, 2.0)
        assert [a.role for a in begun] == roles
        assert all(a.epochs == (0.0 if a.role is Role.IDLE else 2.0) for a in begun)
        repair = method.assign(Stage(round=2, num_rounds=3), COHORT, 2.0)
        assert [(a.role, a.epochs) for a in repair] == [
            (Role.FINETUNE, epochs),
            (Role.FINETUNE, epochs),
            (Role.IDLE, 0.0),
        ]
        assert method.step(Stage(round=2, num_rounds=3)) is ServerStep.AVERAGE


def test_pgd_s_ball_is_the_first_round_s():
    assert [PGD(radius=0.3).bound(Stage(round=n, num_rounds=3)) for n in (1, 2)] == [0.3, 0.0]
    assert FUSED().bound(Stage(round=1, num_rounds=3)) == 0.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FedEraser(interval=0), "method.interval=0"), (lambda: FedEraser(ratio=0), "method.ratio=0"), (lambda: FedEraser(ratio=1.1), "method.ratio=1.1"),
        (lambda: FedEraser(ratio=math.nan), "method.ratio=nan"), (lambda: Negation(scale=0), "method.scale=0"), (lambda: Negation(scale=math.inf), "method.scale=inf"),
        (lambda: MSA(rewind=0), "method.rewind=0"), (lambda: MSA(scale=-1), "method.scale=-1"), (lambda: PGD(radius=0), "method.radius=0"), (lambda: PGD(radius=math.nan), "method.radius=nan"),
    ],
)  # fmt: skip
def test_a_parameter_out_of_its_range_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_a_block_is_the_sum_of_its_terms_and_none_where_no_term_has_a_weight():
    terms = [Term(2.0, rank_one(1, 0)), Term(-1.0, rank_one(0, 3)), Term(0.0, rank_one(9, 9))]
    assert dense(block_of(terms, (MODULE,))) == pytest.approx([2.0, 0.0, -3.0, 0.0], abs=1e-6)
    assert block_of([Term(0.0, rank_one(1, 1))], (MODULE,)) == {}
    with pytest.raises(ValueError, match="no term of m has a weight"):
        summed([Term(0.0, rank_one(1, 1))], MODULE)


def test_norms_by_module():
    assert norms_by_module(difference(rank_one(4, 4), rank_one(1, 0)), (MODULE,)) == pytest.approx({"m": 5.0})
