"""Who does what: roles by hand for each protocol, and the laws of the interface."""

import pytest

from fedunlearn.errors import UserError
from fedunlearn.protocols.base import Stage
from fedunlearn.protocols.finetune import Finetune
from fedunlearn.protocols.in_round import InRound
from fedunlearn.protocols.target_then_repair import TargetThenRepair
from fedunlearn.records.rounds import ClientRows, Role


def rows(client, forget, retain):
    return ClientRows(client_id=client, num_owned=forget + retain, num_forget=forget, num_retain=retain)


OWNER, OTHER, FORGET_ONLY, EMPTY = rows(9, 4, 16), rows(2, 0, 20), rows(5, 4, 0), rows(7, 0, 0)
COHORT = (OTHER, FORGET_ONLY, EMPTY, OWNER)
UNLEARN, FINETUNE, IDLE = Role.UNLEARN, Role.FINETUNE, Role.IDLE
PROTOCOLS = [
    Finetune(),
    InRound(finetune_epochs=None),
    InRound(finetune_epochs=0.5),
    TargetThenRepair(repair_epochs=None),
    TargetThenRepair(unlearn_rounds=2, repair_epochs=3),
]


def roles(protocol, round, cohort=COHORT, epochs=2.0, num_rounds=2):
    return [
        (a.client_id, a.role, a.epochs)
        for a in protocol.assign(Stage(round=round, num_rounds=num_rounds), cohort, epochs)
    ]


def test_finetune_trains_whoever_has_rows():
    """Fine-tuning counts retain rows alone: a client whose rows are all to be forgotten is idle in the oracle."""
    assert roles(Finetune(), 1) == [(2, FINETUNE, 2.0), (5, IDLE, 0.0), (7, IDLE, 0.0), (9, FINETUNE, 2.0)]


def test_in_round_lets_owners_unlearn_and_the_others_train():
    """The others for one epoch, or with null as long as the owners."""
    protocol = InRound(finetune_epochs=None)
    assert roles(protocol, 1) == [(2, FINETUNE, 2.0), (5, UNLEARN, 2.0), (7, IDLE, 0.0), (9, UNLEARN, 2.0)]
    assert roles(InRound(), 1) == [(2, FINETUNE, 1.0), (5, UNLEARN, 2.0), (7, IDLE, 0.0), (9, UNLEARN, 2.0)]


def test_in_round_finetune_epochs_belong_to_the_others_alone():
    assert roles(InRound(finetune_epochs=0.5), 3) == [
        (2, FINETUNE, 0.5),
        (5, UNLEARN, 2.0),
        (7, IDLE, 0.0),
        (9, UNLEARN, 2.0),
    ]


def test_in_round_is_the_same_in_every_round():
    assert roles(InRound(), 1) == roles(InRound(), 50)


def test_target_then_repair_by_rounds():
    """unlearn_rounds 2: owners alone in rounds 1 and 2; from round 3 everyone with retain rows repairs, owners too."""
    protocol = TargetThenRepair(unlearn_rounds=2, repair_epochs=3)
    alone = [(2, IDLE, 0.0), (5, UNLEARN, 2.0), (7, IDLE, 0.0), (9, UNLEARN, 2.0)]
    assert roles(protocol, 1) == roles(protocol, 2) == alone
    assert roles(protocol, 3) == [(2, FINETUNE, 3), (5, IDLE, 0.0), (7, IDLE, 0.0), (9, FINETUNE, 3)]


def test_target_then_repair_defaults_to_one_round_and_one_epoch_of_repair_and_null_is_the_trainer_s():
    assert roles(TargetThenRepair(), 1, num_rounds=1)[3] == (9, UNLEARN, 2.0)
    assert roles(TargetThenRepair(), 2) == [(2, FINETUNE, 1.0), (5, IDLE, 0.0), (7, IDLE, 0.0), (9, FINETUNE, 1.0)]
    null = TargetThenRepair(repair_epochs=None)
    assert roles(null, 2) == [(2, FINETUNE, 2.0), (5, IDLE, 0.0), (7, IDLE, 0.0), (9, FINETUNE, 2.0)]


def test_a_round_without_owners_is_idle_for_all_in_the_unlearning_part():
    assert [role for _, role, _ in roles(TargetThenRepair(), 1, (OTHER, EMPTY))] == [IDLE, IDLE]


def test_only_fine_tuning_serves_no_request():
    assert [protocol.unlearns for protocol in PROTOCOLS] == [False, True, True, True, True]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("round", [1, 2, 3])
class TestLaws:
    def test_one_assignment_a_client_in_the_cohort_s_order(self, protocol, round):
        for cohort in (COHORT, COHORT[::-1], (OWNER,), ()):
            assert [client for client, _, _ in roles(protocol, round, cohort)] == [r.client_id for r in cohort]

    def test_nobody_works_on_rows_it_lacks(self, protocol, round):
        for client, (_, role, epochs) in zip(COHORT, roles(protocol, round), strict=True):
            assert role is not UNLEARN or client.num_forget
            assert role is not FINETUNE or client.num_retain
            assert (epochs == 0) == (role is IDLE)

    def test_a_role_does_not_depend_on_who_else_is_there(self, protocol, round):
        together = roles(protocol, round)
        assert [roles(protocol, round, (client,))[0] for client in COHORT] == together

    def test_no_state_is_kept(self, protocol, round):
        first = roles(protocol, round)
        roles(protocol, round + 5)
        assert roles(protocol, round) == first


@pytest.mark.parametrize("epochs", [0, -1.0])
def test_epochs_must_be_above_0(epochs):
    with pytest.raises(UserError, match=rf"protocol\.finetune_epochs={epochs} must be above 0"):
        InRound(finetune_epochs=epochs)
    with pytest.raises(UserError, match=rf"protocol\.repair_epochs={epochs} must be above 0"):
        TargetThenRepair(repair_epochs=epochs)


@pytest.mark.parametrize("rounds", [0, -2])
def test_there_is_at_least_one_round_of_unlearning(rounds):
    with pytest.raises(UserError, match=rf"protocol\.unlearn_rounds={rounds} must be at least 1"):
        TargetThenRepair(unlearn_rounds=rounds)


def test_rounds_that_are_not_there_are_told():
    """Two rounds: three cannot unlearn; where both do, no round is left to repair in."""
    assert TargetThenRepair(unlearn_rounds=1, repair_epochs=1.0).faults(2) == ()
    assert TargetThenRepair(unlearn_rounds=2, repair_epochs=None).faults(2) == ()
    at = "protocol.unlearn_rounds={} beside trainer.federated.num_rounds=2: "
    (fault,) = TargetThenRepair(unlearn_rounds=3).faults(2)
    assert fault == at.format(3) + "there are not so many rounds; lower it, or raise num_rounds"
    (fault,) = TargetThenRepair(unlearn_rounds=2, repair_epochs=1.5).faults(2)
    assert fault.startswith(at.format(2) + "no round is left for protocol.repair_epochs=1.5 to act in; leave that null")
    assert InRound().faults(1) == ()


@pytest.mark.parametrize("epochs", [0.0, -1.0, 1.1e6, 1e308])
def test_epochs_that_are_none_or_overflow_are_refused(epochs):
    with pytest.raises(UserError, match=r"protocol\.repair_epochs=.* must be above 0, at most 1e6, or null"):
        TargetThenRepair(repair_epochs=epochs)
    with pytest.raises(UserError, match=r"protocol\.finetune_epochs=.* must be above 0, at most 1e6, or null"):
        InRound(finetune_epochs=epochs)
