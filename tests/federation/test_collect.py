"""Who is asked, how often, and who takes whose place; plans that cannot end well are refused before any training."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import RecordDict
from helpers_runs import central, tiny, unlearn
from helpers_turns import A, B, Federation, good, good_reply, norm_of, start, with_trainer

from fedunlearn.aggregation.robust.krum import Krum, MultiKrum
from fedunlearn.config.server import GateConfig
from fedunlearn.errors import UserError
from fedunlearn.federation import planning
from fedunlearn.federation.collect import collect
from fedunlearn.federation.link import rows_of
from fedunlearn.federation.planning import check_plans, plan_round
from fedunlearn.federation.wire import ADAPTER, REPLY, pack_adapter, pack_scalars
from fedunlearn.protocols.selection import select
from fedunlearn.protocols.target_then_repair import TargetThenRepair
from fedunlearn.records.rounds import Role

CLIENTS, ROUND = 8, 3


@pytest.fixture(scope="module")
def runs(pocket):
    """A run that fine-tunes and one that unlearns, as they are composed."""
    return {kind: tiny(pocket, Path("saves"), kind, "x").run for kind in ("finetune", "unlearn")}


@pytest.fixture
def federation(runs, tmp_path):
    """Gives a call that makes a federation of eight: answers by client, numbers of trainer.federated by name."""

    def make(answers=None, owners=(), kind="finetune", gate=None, robust=None, protocol=None, **federated):
        run = with_trainer(runs[kind], **{"num_clients": CLIENTS, **federated})
        given = {"gate": gate, "robust": robust, "protocol": protocol}
        run = replace(run, **{key: value for key, value in given.items() if value is not None})
        return Federation(run, tmp_path, CLIENTS, answers, owners)

    return make


def draw(count, left_out=(), seed=0, round=ROUND):
    """The cohort by the draw itself."""
    return select(set(range(CLIENTS)) - set(left_out), seed=seed, round=round, count=count)


def collected(federation, round=ROUND):
    with federation.spool() as spool:
        return collect(federation.call, round, {}, spool)


def counted(collected):
    return [update.client_id for update in collected.report.updates]


def reasons(collected):
    return {o.client_id: o.reason for o in collected.report.outcomes if o.reason}


def dies(request):
    raise RuntimeError("no memory left")


def dies_first(times):
    """An answer that comes only after so many failures."""
    left = [dies] * times

    def answer(request):
        return left.pop()(request) if left else good(request)

    return answer


# --- asked once more, then replaced


def test_a_client_that_failed_is_asked_once_more_and_nobody_else_is(federation):
    cohort = draw(3)
    made = federation({cohort[1]: dies_first(1)}, num_train_clients=3, min_clients=3)
    done = collected(made)
    assert made.asked == [*cohort, cohort[1]]
    assert counted(done) == list(cohort)
    assert (done.attempts, reasons(done)) == (2, {})


def test_a_client_that_failed_twice_is_replaced_by_the_next_of_the_draw_and_nobody_else_moves(federation):
    cohort = draw(3)
    lost = cohort[1]
    made = federation({lost: dies}, num_train_clients=3, min_clients=3, max_retries=2)
    done = collected(made)
    after = draw(3, left_out={lost})
    (substitute,) = set(after) - set(cohort)
    assert set(cohort) - {lost} < set(after)
    assert made.asked == [*cohort, lost, substitute]
    assert counted(done) == list(after)
    assert (done.attempts, reasons(done)) == (3, {lost: "crashed"})


def test_a_substitute_that_fails_is_asked_once_more_too_and_replaced_in_turn(federation):
    cohort = draw(2)
    lost = cohort[0]
    (second,) = set(draw(2, left_out={lost})) - set(cohort)
    (third,) = set(draw(2, left_out={lost, second})) - set(cohort)
    made = federation({lost: dies, second: dies}, num_train_clients=2, min_clients=2, max_retries=4)
    done = collected(made)
    assert made.asked == [*cohort, lost, second, second, third]
    assert counted(done) == sorted({cohort[1], third})
    assert reasons(done) == {lost: "crashed", second: "crashed"}


def test_no_more_than_max_retries_are_made(federation):
    cohort = draw(2)
    made = federation({cohort[0]: dies}, num_train_clients=2, min_clients=2, max_retries=1)
    with pytest.raises(
        UserError, match=r"round 3: 1 usable updates after 1 retries, .*min_clients .* wants 2 \(client"
    ):
        collected(made)
    assert made.asked == [*cohort, cohort[0]]


def test_where_nobody_is_left_to_ask_the_round_ends_at_once(federation):
    """All eight are in the cohort: there is no substitute, and retries that are left would find nobody."""
    made = federation({5: dies}, min_clients=CLIENTS, max_retries=50)
    said = r"round 3: 7 usable updates after 1 retries, .* wants 8 \(client 5: crashed \(RuntimeError: no"
    with pytest.raises(UserError, match=said):
        collected(made)
    assert made.asked == [*range(CLIENTS), 5]


def test_a_round_in_which_all_who_were_drawn_stand_idle_is_no_failure(federation):
    """Target-then-repair draws one client, and in this round it owns nothing to forget: nobody is asked, nothing is missing."""
    (drawn,) = draw(1)
    owner = (drawn + 1) % CLIENTS
    protocol = TargetThenRepair(unlearn_rounds=ROUND)
    made = federation(owners=(owner,), kind="unlearn", protocol=protocol, num_train_clients=1, num_rounds=ROUND + 1)
    done = collected(made)
    assert (made.asked, counted(done), done.attempts) == ([], [], 1)
    assert [(o.client_id, o.role) for o in done.report.outcomes] == [(drawn, Role.IDLE)]


def test_the_way_out_says_what_is_on_disk(federation):
    made = federation({5: dies}, min_clients=CLIENTS)
    with pytest.raises(UserError, match=r"go on with resume=true \(everything up to round 2 is on disk\)"):
        collected(made)
    with pytest.raises(UserError, match=r"go on with resume=true \(no round is done yet\)"):
        collected(made, round=1)


@pytest.mark.parametrize(("lost", "attempts"), [(5, 1), (6, 2)])
def test_a_round_goes_on_with_min_clients_and_is_repeated_below(federation, lost, attempts):
    """Of eight, three are wanted: five may fail, of six one must come on second thoughts."""
    answers = {client: dies_first(1) for client in range(lost)}
    done = collected(federation(answers, min_clients=3))
    assert done.attempts == attempts
    assert len(counted(done)) == (3 if attempts == 1 else CLIENTS)


def test_an_update_that_counted_is_kept_while_others_are_asked_again(federation):
    made = federation({2: dies_first(1)}, min_clients=CLIENTS)
    with made.spool() as spool:
        done = collect(made.call, ROUND, {}, spool)
        with spool.reader(counted(done)) as read:
            assert all(read(client, name).isfinite().all() for client in range(CLIENTS) for name in made.depot.adapter)
    assert made.asked.count(0) == 1


def test_bytes_of_both_times_are_counted_for_a_client_that_was_asked_twice(federation):
    done = collected(federation({2: dies_first(1)}, min_clients=CLIENTS))
    sent = {o.client_id: o.bytes_down for o in done.report.outcomes}
    assert sent[2] == 2 * sent[1] > 0


# --- robust weights want their own number


def test_robust_weights_are_waited_for_beyond_min_clients(federation):
    """Multi-Krum with one to distrust needs 2 + 3 = 5; min_clients=1 alone would have gone on with four."""
    cohort = draw(5)
    made = federation({cohort[0]: dies}, robust=MultiKrum(), num_train_clients=5, min_clients=1, max_retries=2)
    done = collected(made)
    assert counted(done) == list(draw(5, left_out={cohort[0]}))
    assert done.attempts == 3
    lone = federation({cohort[0]: dies}, num_train_clients=5, min_clients=1, max_retries=2)
    assert collected(lone).attempts == 1


def test_robust_weights_that_do_not_get_it_end_the_run(federation):
    made = federation({0: dies, 1: dies, 2: dies, 3: dies}, robust=Krum(), max_retries=3)
    with pytest.raises(UserError, match=r"4 usable updates .*min_clients \(or robust\) wants 5"):
        collected(made)


# --- norms


def far(by):
    return lambda request: good(request, by)


def test_an_update_that_goes_too_far_is_dropped_and_named(federation, caplog):
    with caplog.at_level(logging.WARNING):
        done = collected(federation({2: far(10.0)}))
    assert reasons(done) == {2: "norm"}
    assert 2 not in counted(done)
    (outcome,) = [o for o in done.report.outcomes if o.client_id == 2]
    assert outcome.detail == f"{norm_of(10.0):.3g} is above 10 x the others' median {norm_of(0.1):.3g}"
    assert "client 2 is dropped this round: norm" in caplog.text
    norms = {o.client_id: o.update_norm for o in done.report.outcomes}
    assert norms[2] == pytest.approx(norm_of(10.0), rel=1e-4)  # what it did is in the history all the same
    assert norms[1] == pytest.approx(norm_of(0.1), rel=1e-4)


@pytest.mark.parametrize(("ratio", "dropped"), [(3.0, {2: "norm"}), (5.0, {}), (None, {})])
def test_the_ratio_of_the_config_is_the_one_that_acts(federation, ratio, dropped):
    done = collected(federation({2: far(0.4)}, gate=GateConfig(max_norm_ratio=ratio)))
    assert reasons(done) == dropped
    assert done.notes == ()


def test_one_that_goes_too_far_is_asked_once_more_and_then_replaced(federation):
    cohort = draw(4)
    made = federation({cohort[0]: far(10.0)}, num_train_clients=4, min_clients=4, max_retries=2)
    done = collected(made)
    assert made.asked.count(cohort[0]) == 2
    assert counted(done) == list(draw(4, left_out={cohort[0]}))
    assert reasons(done) == {cohort[0]: "norm"}


def test_norms_are_judged_over_all_attempts_together(federation):
    """Two of three came at first, too few to judge; with the third it is seen that one of the two goes too far."""
    cohort = draw(3)
    answers = {cohort[0]: far(10.0), cohort[1]: dies_first(1)}
    made = federation(answers, num_train_clients=3, min_clients=3, max_retries=1)
    with pytest.raises(UserError, match=rf"2 usable updates .*client {cohort[0]}: norm"):
        collected(made)
    made = federation({cohort[0]: far(10.0)}, num_train_clients=3, min_clients=2)
    assert reasons(collected(made)) == {cohort[0]: "norm"}


def test_roles_are_measured_apart(federation):
    """Three owners that unlearn go ninety times as far as the five that fine-tune: each is usual in its own role."""
    answers = dict.fromkeys(range(3), far(9.0))
    made = federation(answers, owners=(0, 1, 2), kind="unlearn")
    done = collected(made)
    assert reasons(done) == {}
    roles = {o.client_id: o.role for o in done.report.outcomes}
    assert [k for k, role in roles.items() if role is Role.UNLEARN] == [0, 1, 2]
    unbound = GateConfig(max_update_ratio=None)
    answers = {**answers, 1: far(1e6), 4: far(9.0)}
    done = collected(federation(answers, owners=(0, 1, 2), kind="unlearn", gate=unbound))
    assert reasons(done) == {1: "norm", 4: "norm"}


def test_below_three_in_a_role_the_history_says_that_nobody_was_judged(federation):
    done = collected(federation({0: far(10.0)}, owners=(0, 1), kind="unlearn"))
    assert reasons(done) == {}
    assert done.notes == ("gate.max_norm_ratio is off for unlearn: 2 updates, 3 are wanted to tell who is odd",)
    off = federation({0: far(10.0)}, owners=(0, 1), kind="unlearn", gate=GateConfig(max_norm_ratio=None))
    assert collected(off).notes == ()
    assert collected(federation(owners=(0, 1, 2), kind="unlearn")).notes == ()


# --- how far one goes by itself


def regauged(times):
    """B A as it was, with A so many times larger and B smaller: as a product nothing has moved at all."""

    def answer(request):
        same = {A: start()[A] * times, B: start()[B] / times}
        return RecordDict({ADAPTER: pack_adapter(same), REPLY: pack_scalars(good_reply(request))})

    return answer


@pytest.mark.parametrize("act", [far(9e14), far(50.0), regauged(1e6), regauged(1e-6)])
@pytest.mark.parametrize("client", [0, 7])
def test_in_a_role_too_small_for_medians_what_takes_the_adapter_over_is_dropped_all_the_same(federation, act, client):
    """Two owners and two others: neither role has the three that a median wants."""
    made = federation(
        {client: act}, owners=(0, 1), kind="unlearn", num_train_clients=4, force_owners=True, max_retries=0
    )
    cohort = {task.client_id for task in made.call.plan(ROUND).tasks}
    client = client if client in cohort else max(cohort)
    made.answers = {client: act}
    done = collected(made)
    assert reasons(done) == {client: "norm"}
    (outcome,) = [o for o in done.report.outcomes if o.client_id == client]
    assert outcome.detail.startswith("it changed the factors by ")
    assert outcome.factor_norm > 10 * math.sqrt(9.5)  # sent: six entries of a half, eight ones
    assert outcome.update_norm is not None


def test_two_that_send_back_what_they_were_sent_do_not_shield_a_third(federation):
    """The others' median is 0, so beside them nobody can be odd; by itself the update still is."""
    cohort = draw(4)
    answers = {cohort[0]: far(0.0), cohort[1]: far(0.0), cohort[2]: far(0.0), cohort[3]: far(50.0)}
    assert reasons(collected(federation(answers, num_train_clients=4))) == {cohort[3]: "norm"}
    unbound = federation(answers, num_train_clients=4, gate=GateConfig(max_update_ratio=None))
    assert reasons(collected(unbound)) == {}


@pytest.mark.parametrize(("ratio", "dropped"), [(0.5, {2: "norm"}), (1.0, {}), (None, {})])
def test_the_ratio_to_what_was_sent_is_the_config_s(federation, ratio, dropped):
    """B moves by 1 in each of 8 entries: sqrt 8 over sqrt 9.5 is 0.92."""
    gate = GateConfig(max_norm_ratio=None, max_update_ratio=ratio)
    assert reasons(collected(federation({2: far(1.0)}, gate=gate))) == dropped


def test_what_was_sent_is_both_factors_where_one_alone_is_trained(federation):
    """Masked to B: its change of sqrt 8 is 1 x B, but 0.92 x A and B."""
    made = federation({2: only_b(1.0)}, gate=GateConfig(max_norm_ratio=None, max_update_ratio=0.95))
    chosen = replace(made.run, aggregation=replace(made.run.aggregation, mask="b"))
    made.run, made.answers = chosen, {k: only_b(1.0 if k == 2 else 0.1) for k in range(CLIENTS)}
    done = collected(made)
    assert reasons(done) == {}
    assert {o.client_id: o.factor_norm for o in done.report.outcomes}[2] == pytest.approx(math.sqrt(8))


def only_b(by):
    def answer(request):
        return RecordDict({ADAPTER: pack_adapter({B: start()[B] + by}), REPLY: pack_scalars(good_reply(request))})

    return answer


# --- owners


def test_where_no_owner_unlearns_the_others_do_not_go_on(federation):
    made = federation({0: dies, 1: dies}, owners=(0, 1), kind="unlearn", min_clients=1, max_retries=3)
    with pytest.raises(UserError, match=r"round 3: no client that unlearns gave a usable update \(client 0: crashed"):
        collected(made)
    one = federation({0: dies}, owners=(0, 1), kind="unlearn", min_clients=1)
    assert collected(one).attempts == 1


# --- selection


@pytest.mark.parametrize("count", [1, 3, CLIENTS])
def test_num_train_clients_is_how_many_are_drawn(federation, count):
    made = federation(num_train_clients=count)
    for number in range(1, 6):
        tasks = plan_round(made.run, rows_of(made.members), number).tasks
        assert tuple(task.client_id for task in tasks) == draw(count, round=number)
    drawn = {tuple(t.client_id for t in plan_round(made.run, rows_of(made.members), n).tasks) for n in range(1, 9)}
    assert (len(drawn) == 1) == (count == CLIENTS)


def test_forced_owners_are_in_every_cohort_and_take_places_of_those_drawn(federation):
    owners = (6, 7)
    made = federation(owners=owners, kind="unlearn", num_train_clients=3, force_owners=True)
    plain = federation(owners=owners, kind="unlearn", num_train_clients=3)
    lucky = 0
    for number in range(1, 21):
        cohort = {task.client_id for task in plan_round(made.run, rows_of(made.members), number).tasks}
        assert set(owners) < cohort
        assert len(cohort) == 3
        lucky += set(owners) <= {task.client_id for task in plan_round(plain.run, rows_of(plain.members), number).tasks}
    assert lucky < 20  # else the test shows nothing


def test_more_owners_than_places_are_all_asked(federation):
    made = federation(owners=(1, 4, 6), kind="unlearn", num_train_clients=2, force_owners=True)
    assert {t.client_id for t in plan_round(made.run, rows_of(made.members), 1).tasks} == {1, 4, 6}


def test_a_forced_owner_that_failed_twice_is_left_out_like_any_other(federation):
    made = federation({6: dies}, owners=(6, 7), kind="unlearn", num_train_clients=3, force_owners=True, min_clients=3, max_retries=2)  # fmt: skip
    done = collected(made)
    assert {7} < set(counted(done))
    assert len(counted(done)) == 3
    assert made.asked.count(6) == 2


def test_a_planner_draws_each_round_once_and_anew_without_those_who_failed_it(federation, monkeypatch):
    made = federation(num_train_clients=3)
    planner = check_plans(made.run, rows_of(made.members))
    monkeypatch.setattr(planning, "select", lambda *args, **kwargs: pytest.fail("it is drawn again"))
    plans = [planner.plan(number) for number in range(1, made.run.total_rounds + 1)]
    monkeypatch.undo()
    assert plans == [plan_round(made.run, rows_of(made.members), plan.round) for plan in plans]
    failed = plans[0].tasks[0].client_id
    anew = [task.client_id for task in planner.plan(1, {failed}).tasks]
    assert tuple(anew) == draw(3, left_out=(failed,), round=1)
    assert planner.plan(1) == plans[0]


# --- plans that cannot end well


def test_a_plan_that_never_draws_an_owner_is_refused(federation):
    few = {"num_train_clients": 1, "num_rounds": 1}
    lone = next(k for k in range(CLIENTS) if draw(1, round=1) != (k,))
    made = federation(owners=(lone,), kind="unlearn", **few)
    with pytest.raises(UserError, match=r"nobody unlearned: no owner .* is drawn in any round.*force_owners=true"):
        check_plans(made.run, rows_of(made.members))
    check_plans(with_trainer(made.run, force_owners=True), rows_of(made.members))
    many = with_trainer(made.run, num_rounds=100)  # one of them draws it
    check_plans(many, rows_of(made.members))


def test_a_round_with_fewer_working_clients_than_the_robust_weights_need_is_refused_before_training(federation):
    """Target-then-repair: while owners unlearn the others stand idle, so Krum's five are not there."""
    protocol = TargetThenRepair(repair_epochs=None)
    made = federation(owners=(0, 1), kind="unlearn", robust=Krum(), protocol=protocol, num_rounds=4)
    with pytest.raises(UserError, match=r"robust Krum needs 5 updates, but round 1 has 2 working clients \(protocol TargetThenRepair\)"):  # fmt: skip
        check_plans(made.run, rows_of(made.members))
    check_plans(federation(owners=(0, 1), kind="unlearn", robust=Krum(), num_rounds=4).run, rows_of(made.members))
    five = federation(owners=range(5), kind="unlearn", robust=Krum(), protocol=protocol, num_rounds=1)
    check_plans(five.run, rows_of(five.members))


KRUM_ALONE = ("robust=krum", "protocol=target_then_repair", "trainer.federated.num_clients=5", "partition=round_robin")


def test_a_refused_plan_leaves_nothing_behind(pocket, saves):
    """Through the door: two working clients in the first round of a run of five with Krum."""
    with pytest.raises(UserError, match=r"robust Krum needs 5 updates, but round 1 has 2 working clients"):
        unlearn(pocket, saves, None, "un", *KRUM_ALONE)
    assert not (saves / "unlearn").exists()


def test_a_refused_plan_leaves_the_run_that_it_was_to_overwrite(pocket, saves):
    run = unlearn(pocket, saves, None, "un", "partition=round_robin")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"robust Krum needs 5 updates"):
        unlearn(pocket, saves, None, "un", *KRUM_ALONE, "overwrite=true")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_central_baseline_has_no_plan(pocket, saves):
    """One client a round, and none of them an owner: of no matter where nobody is drawn."""
    few = ("partition=by_author", "trainer.federated.fraction_train=0.25", "trainer.federated.num_rounds=1")
    seed = next(s for s in range(50) if select(range(4), seed=s, round=1, count=1) != (3,))
    run = central(pocket, saves, "unlearn", "un", *few, f"trainer.args.seed={seed}")
    assert (run / "done.json").is_file()
