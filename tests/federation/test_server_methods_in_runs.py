"""Server-side methods in whole runs, measured as products outside the code that made them: rollback, FedEraser, negation, MSA, PGD, FUSED, FedOSD.

Two requests in sequence are in tests/requests.
"""

import json
import math
import re
import shutil

import pytest
import torch
from helpers_runs import adapter_bytes, adapter_tensors, finetune, history, tiny, unlearn
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedunlearn.aggregation.factors import modules_of, scales_of
from fedunlearn.data.ownership import FILE, owned_rows, read_partition
from fedunlearn.data.requests import write_request
from fedunlearn.doors.prepare import prepare
from fedunlearn.errors import UserError
from fedunlearn.federation.block_store import BlockStore
from fedunlearn.federation.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint
from fedunlearn.federation.launchers import launch
from fedunlearn.federation.ledger import Ledger
from fedunlearn.federation.start import load_start, save_start
from fedunlearn.records.requests import Request
from fedunlearn.training import loop

FOUR = ("trainer.federated.num_rounds=4", "trainer.federated.keep_rounds=all")
KEPT = (*FOUR, "ledger.enabled=true")
REPLAY = ("experiment=replay/tofu/pocket", *FOUR)
LATE = ("partition.joins={3: 3}",)
OWN = ("ledger.enabled=true", "ledger.purge=false")
ORACLE = ("data=retain",)
STRATEGIES = {
    "fedavg": (),
    "fedadam": ("strategy=fedadam",),
    "flora": ("aggregation=flora",),
    "rolora": ("aggregation=rolora",),
}


KEEP = "ledger.purge=false"


class Runs:
    """Runs of this module by name, each made once; no request purges the ledger that the next one reads."""

    def __init__(self, pocket, saves):
        self.pocket, self.saves = pocket, saves

    def tuned(self, name, *overrides):
        """A fine-tuning run, or an oracle."""
        made = self.saves / "finetune" / name
        return made if made.is_dir() else finetune(self.pocket, self.saves, name, *overrides)

    def unlearned(self, name, start, *overrides):
        """An unlearning run from another run."""
        made = self.saves / "unlearn" / name
        return made if made.is_dir() else unlearn(self.pocket, self.saves, start, name, KEEP, *overrides)

    def refused(self, start, *overrides, match=None):
        """The faults with which an unlearning run is refused; nothing of it is written."""
        folder = self.saves / "refused"
        shutil.rmtree(folder, ignore_errors=True)
        with pytest.raises(UserError, match=match) as caught:
            unlearn(self.pocket, folder, start, "x", KEEP, *overrides)
        assert not (folder / "unlearn").exists()
        return caught.value.faults


@pytest.fixture(scope="module")
def runs(pocket, tmp_path_factory):
    return Runs(pocket, tmp_path_factory.mktemp("runs"))


def hashes(run):
    """Round -> hash of the adapter after it."""
    return {line["round"]: line["adapter_hash"] for line in history(run)}


def roles(run, number):
    line = next(line for line in history(run) if line["round"] == number)
    return {client["client_id"]: client["role"] for client in line["clients"]}


def products(tensors, scales):
    """s B A by module path, float64."""
    return {m.name: scales[m.name] * tensors[m.b].double() @ tensors[m.a].double() for m in modules_of(tensors)}


def exported(run):
    """What a run's result adds to the base."""
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    tensors = adapter_tensors(run)
    return products(tensors, scales_of(config, tensors))


def run_scales(run):
    start = load_start(run).adapter
    return scales_of(start.peft_config, start.tensors)


def whole(run, checkpoint: Checkpoint):
    """What a checkpoint's factors and side-car add to the base."""
    scales = run_scales(run)
    blocks = BlockStore(run / "sidecar").read(checkpoint.blocks)
    beside = products(blocks, dict.fromkeys(scales, 1.0)) if blocks else dict.fromkeys(scales, 0.0)
    return {path: delta + beside[path] for path, delta in products(checkpoint.state.adapter, scales).items()}


def at_round(run, number):
    return whole(run, read_checkpoint(run / f"rounds/{number:04d}"))


def minus(one, other, share=1.0):
    return {path: one[path] - share * other[path] for path in one}


def norm(deltas):
    return math.sqrt(sum(float(delta.square().sum()) for delta in deltas.values()))


def inner(one, other):
    return sum(float((one[path] * other[path]).sum()) for path in one)


def apart(one, other):
    """The largest difference of any entry over the largest entry."""
    largest = max(float(delta.abs().max()) for delta in other.values())
    return max(float((one[path] - other[path]).abs().max()) for path in one) / largest


def contributions(run, clients):
    """sum over rounds of p_k U_k of these clients, from the ledger's tensors."""
    ledger, scales = Ledger(run), run_scales(run)
    total, old = dict.fromkeys(scales, 0.0), {}
    for entry in ledger.entries():
        if entry.kind == "global":
            old = ledger.read(entry)
        elif entry.kind == "update" and entry.client_id in clients:
            new = {**old, **ledger.read(entry)}
            moved = minus(products(new, scales), products(old, scales))
            total = {path: total[path] + entry.weight * moved[path] for path in total}
    return total


def logits(pocket, folder):
    """Logits of the base with a PEFT folder by plain PEFT: [3, 12, V]."""
    base = AutoModelForCausalLM.from_pretrained(pocket.model, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, folder).eval()(torch.arange(36).reshape(3, 12)).logits.double()


# --- rollback


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("target", ["stays", "gone"])
def test_rollback_of_a_late_client_is_a_federation_that_never_had_it(runs, name, target):
    """Client 3 joins in round 3 and is forgotten: rounds 1 and 2 are the run's own, 3 and 4 those of the oracle, bit by bit, moments and side-car too."""
    overrides = (*STRATEGIES[name], *LATE)
    tuned = runs.tuned(f"late_{name}", *KEPT, *overrides)
    without = runs.tuned(f"late_{name}_without", *FOUR, *overrides, *ORACLE, "requests=[{client: 3}]")
    back = runs.unlearned(
        f"back_{name}_{target}",
        tuned,
        *REPLAY,
        *overrides,
        "method=rollback",
        f"requests=[{{client: 3, target: {target}}}]",
    )
    assert list(hashes(back)) == [3, 4]
    assert hashes(back) == {number: hashes(without)[number] for number in (3, 4)}
    assert hashes(tuned)[2] == hashes(without)[2]
    assert hashes(tuned)[3] != hashes(without)[3]
    assert adapter_bytes(back) == adapter_bytes(without)
    assert roles(back, 3).get(3) == (None if target == "gone" else "idle")


def test_rollback_of_one_that_was_there_from_round_1_is_the_retrain_and_says_so(runs, caplog):
    tuned = runs.tuned("always", *KEPT)
    oracle = runs.tuned("always_without", *FOUR, *ORACLE, "requests=[{client: 3}]")
    caplog.clear()
    back = runs.unlearned("back_always", tuned, *REPLAY, "method=rollback", "requests=[{client: 3}]")
    assert "the targets were there from round 1: this rollback is the retrain" in caplog.text
    assert hashes(back) == hashes(oracle)
    assert adapter_bytes(back) == adapter_bytes(oracle)


def test_rollback_of_a_late_client_says_nothing_of_a_retrain(runs, caplog):
    tuned = runs.tuned("late_fedavg", *KEPT, *LATE)
    caplog.clear()
    runs.unlearned("back_quiet", tuned, *REPLAY, *LATE, "method=rollback", "requests=[{client: 3}]")
    assert "retrain" not in caplog.text


def test_rollback_of_some_of_a_client_s_rows_is_the_retrain_too(runs):
    """Owners come back with their retain rows: they weigh what they weigh in the oracle."""
    tuned = runs.tuned("always", *KEPT)
    oracle = runs.tuned("oracle", *FOUR, *ORACLE)
    back = runs.unlearned("back_rows", tuned, *REPLAY, "method=rollback")
    weights = [
        {c["client_id"]: c["weight"] for c in line["clients"]} for run in (oracle, back) for line in history(run)
    ]
    assert weights[:4] == weights[4:]
    assert hashes(back) == hashes(oracle)


def test_a_replay_without_the_joins_of_fine_tuning_is_refused(runs):
    """Client 2 joins in round 4: without its joins the replay would have it in round 3."""
    joins = "partition.joins={2: 4, 3: 3}"
    tuned = runs.tuned("two_late", *KEPT, joins)
    faults = runs.refused(tuned, *REPLAY, "method=rollback", "requests=[{client: 3}]")
    assert any("partition.joins" in fault for fault in faults)


def test_rollback_to_a_pruned_round_is_refused_with_the_way_out_and_nothing_is_written(runs):
    """keep_rounds=2 leaves rounds 3 and 4; round 2 is wanted."""
    few = ("trainer.federated.keep_rounds=2",)
    tuned = runs.tuned("pruned", *KEPT, *LATE, *few)
    (fault,) = runs.refused(tuned, *REPLAY, *LATE, *few, "method=rollback", "requests=[{client: 3}]")
    assert f"round 2 of '{tuned.resolve()}' is wanted and was pruned" in fault
    assert "trainer.federated.keep_rounds=all" in fault


# --- replays have fine-tuning's settings


@pytest.mark.parametrize("method", ["rollback", "federaser"])
def test_a_replay_with_other_settings_is_refused_naming_each_key(runs, method):
    tuned = runs.tuned("always", *KEPT)
    other = {
        "trainer.args.learning_rate": "0.001",
        "trainer.args.seed": "7",
        "trainer.args.num_train_epochs": "2.0",
        "trainer.federated.num_rounds": "3",
        "trainer.federated.final_lr_ratio": "0.5",
        "data.max_length": "300",
    }
    with pytest.raises(UserError) as caught:
        runs.unlearned(
            "x",
            tuned,
            *REPLAY,
            f"method={method}",
            *(f"{k}={v}" for k, v in other.items()),
            "strategy=fedadam",
            "aggregation=ffa",
        )
    for key in (*other, "strategy._target_", "aggregation.mask"):
        assert sum(f"must have its settings: {key}=" in fault for fault in caught.value.faults) == 1
    assert all("experiment=replay/..." in fault for fault in caught.value.faults)
    assert not (runs.saves / "unlearn" / "x").exists()


def test_what_does_not_act_on_the_result_may_differ(runs):
    tuned = runs.tuned("always", *KEPT)
    free = ("trainer.federated.keep_rounds=1", "trainer.federated.max_retries=3", "trainer.args.logging_steps=3")
    one = runs.unlearned("free", tuned, *REPLAY, *free, "method=rollback", "requests=[{client: 3}]")
    same = runs.unlearned("back_always", tuned, *REPLAY, "method=rollback", "requests=[{client: 3}]")
    assert adapter_bytes(one) == adapter_bytes(same)


def test_a_method_that_reads_the_past_is_refused_where_there_is_none(runs):
    with pytest.raises(
        UserError,
        match=r"method Rollback works on what the server remembers of fine-tuning, but the adapter comes from no run",
    ):
        runs.unlearned("x", None, *REPLAY, "method=rollback")


# --- FedEraser


def replay_for_nobody(runs, name, tuned, *overrides):
    """FedEraser's run with its request taken out of the folder before the rounds begin: all clients keep all rows, there is no target."""
    named = f"model.model_args.pretrained_model_name_or_path={tuned}"
    composed = tiny(runs.pocket, runs.saves, "unlearn", name, *REPLAY, named, "method=federaser", *overrides)
    prepared = prepare(composed)
    write_request(prepared.folder, Request())
    nobody = owned_rows("forget_and_retain", read_partition(prepared.folder / FILE), Request())
    save_start(prepared.folder, prepared.start, nobody)
    launch(prepared.run.launcher, composed.plain)
    return prepared.folder


@pytest.mark.parametrize("joins", [(), LATE], ids=["always", "late"])
def test_federaser_of_nobody_at_ratio_1_and_interval_1_is_the_run_itself(runs, joins):
    """Where the reducer is exact: new directions are the old ones, so are the lengths, round after round."""
    name = f"flex{len(joins)}"
    tuned = runs.tuned(name, *KEPT, "aggregation=flexlora", *joins)
    again = replay_for_nobody(
        runs, f"again_{name}", tuned, "aggregation=flexlora", "method.ratio=1", "method.interval=1", *joins
    )
    for number in range(1, 5):
        assert apart(at_round(again, number), at_round(tuned, number)) < 1e-6
    assert apart(at_round(again, 4), at_round(tuned, 3)) > 1e-2


def test_federaser_of_nobody_at_another_ratio_or_after_fedit_is_not(runs):
    """The test above can fail: half of two epochs is another update, and FedIT's mean of factors is no best rank r."""
    two = ("aggregation=flexlora", "trainer.args.num_train_epochs=2")
    flex = runs.tuned("flex_two", *KEPT, *two)
    half = replay_for_nobody(runs, "half", flex, *two, "method.ratio=0.5", "method.interval=1")
    assert apart(at_round(half, 1), at_round(flex, 1)) < 1e-6  # as they were
    assert apart(at_round(half, 2), at_round(flex, 2)) > 1e-3
    fedit = replay_for_nobody(runs, "fedit", runs.tuned("always", *KEPT), "method.ratio=1", "method.interval=1")
    assert apart(at_round(fedit, 1), at_round(runs.tuned("always"), 1)) > 1e-4


def test_federaser_s_first_round_is_the_others_old_updates_and_later_ones_are_as_long_as_the_old(runs):
    """interval 2 of 4 rounds: rounds 1 and 3 again. Round 1: the mean of clients 0, 1, 2's old products, cut to rank 4, nobody works. The other
    has ||U_old|| of round 3: what it moves by is no longer than the mean of these lengths."""
    tuned = runs.tuned("always", *KEPT)
    again = runs.unlearned("eraser", tuned, *REPLAY, "method=federaser", "requests=[{client: 3}]")
    assert list(hashes(again)) == [1, 2]
    assert set(roles(again, 1).values()) == {"idle"}
    assert [c["weight"] for c in history(again)[0]["clients"]] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert {k for k, role in roles(again, 2).items() if role == "finetune"} == {0, 1, 2}
    ledger, scales = Ledger(tuned), run_scales(tuned)
    first = [e for e in ledger.entries() if e.kind == "update" and e.round == 1 and e.client_id != 3]
    mean = dict.fromkeys(scales, 0.0)
    for entry in first:
        mean = {path: mean[path] + delta / 3 for path, delta in products(ledger.read(entry), scales).items()}
    for path, got in at_round(again, 1).items():
        u, s, vt = torch.linalg.svd(mean[path])
        best = u[:, :4] * s[:4] @ vt[:4]
        assert float((got - best).norm() / best.norm()) < 1e-6
    third = [e for e in ledger.entries() if e.kind == "update" and e.round == 3 and e.client_id != 3]
    step, exact = minus(at_round(again, 2), at_round(again, 1)), history(again)[1]["aggregation_error"]
    for path, moved in step.items():
        assert float(moved.norm()) < sum(e.norms[path] / 3 for e in third) + exact * norm(at_round(again, 2))


def test_federaser_s_own_ledger_keeps_what_was_trained_in_the_round_that_is_replayed(runs):
    """RoLoRA trains B in odd rounds: the replay's second round is round 3 again, and trains B as that did."""
    tuned = runs.tuned("rolora", *KEPT, "aggregation=rolora")
    again = runs.unlearned(
        "eraser_rolora", tuned, *REPLAY, "aggregation=rolora", "ledger.enabled=true", "method=federaser"
    )
    ledger, names = Ledger(again), {}
    for entry in (e for e in ledger.entries() if e.kind == "update" and e.weight > 0):
        names.setdefault(entry.round, set()).update(ledger.read(entry))
    assert names[2] == {m.b for m in modules_of(adapter_tensors(again))}


def test_federaser_replays_an_owner_with_its_retain_rows_at_its_old_length(runs):
    tuned = runs.tuned("always", *KEPT)
    again = runs.unlearned("eraser_rows", tuned, *REPLAY, "method=federaser", "requests=[{authors: [19]}]")
    assert {k: c["weight"] > 0 for c in history(again)[0]["clients"] for k in [c["client_id"]]} == {
        0: True,
        1: True,
        2: True,
        3: False,
    }
    second = {c["client_id"]: c for c in history(again)[1]["clients"]}
    assert second[3]["role"] == "finetune"
    assert second[3]["num_trained"] == 16
    assert second[0]["num_trained"] == 20


def test_federaser_s_ratio_rounds_up_to_whole_epochs(runs):
    """Half of one epoch is one; half of three is two: 20 rows at 8 a step are 3 steps an epoch."""
    for epochs, steps in ((1, 3), (3, 6)):
        args = (f"trainer.args.num_train_epochs={epochs}",)
        tuned = runs.tuned(f"epochs{epochs}", *KEPT, *args)
        again = runs.unlearned(f"eraser{epochs}", tuned, *REPLAY, *args, "method=federaser", "requests=[{client: 3}]")
        assert {c["num_steps"] for c in history(again)[1]["clients"] if c["role"] == "finetune"} == {steps}


def test_federaser_keeps_a_ledger_of_its_own(runs):
    tuned = runs.tuned("always", *KEPT)
    again = runs.unlearned("eraser_kept", tuned, *REPLAY, *OWN, "method=federaser", "requests=[{client: 3}]")
    assert [e.kind for e in Ledger(again).entries()][:2] == ["parent", "global"]


# --- negation


EXACT = {
    "flora": ("aggregation=flora",),
    "fedex": ("aggregation=fedex",),
    "fedsvd": ("aggregation=fedsvd",),
    "ffa": ("aggregation=ffa",),
    "rolora": ("aggregation=rolora",),
    "prox": ("aggregation=flora", "strategy=fedprox"),
}
ONE = ("trainer.federated.num_rounds=1",)


@pytest.mark.parametrize("name", EXACT)
def test_what_negation_took_away_added_again_is_the_adapter_as_it_was(runs, name):
    tuned = runs.tuned(f"exact_{name}", *KEPT, *EXACT[name])
    gone = runs.unlearned(f"negated_{name}", tuned, *EXACT[name], *ONE, "method=negation", "requests=[{client: 3}]")
    given = contributions(tuned, {3})
    assert norm(given) > 0.05 * norm(exported(tuned))
    assert apart(minus(exported(gone), given, -1.0), exported(tuned)) < 1e-5
    assert apart(exported(gone), exported(tuned)) > 1e-2


def test_negation_s_scale_is_how_much_of_it(runs):
    tuned = runs.tuned("exact_flora", *KEPT, *EXACT["flora"])
    half = runs.unlearned(
        "negated_half", tuned, *EXACT["flora"], *ONE, "method=negation", "method.scale=0.5", "requests=[{client: 3}]"
    )
    assert apart(minus(exported(half), contributions(tuned, {3}), -0.5), exported(tuned)) < 1e-5


def test_all_contributions_of_a_stack_are_the_whole_adapter(runs):
    """The sum that negation builds on: the start (B = 0) plus every p_k U_k is the result."""
    tuned = runs.tuned("exact_flora", *KEPT, *EXACT["flora"])
    assert apart(contributions(tuned, {0, 1, 2, 3}), exported(tuned)) < 1e-5


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("fedit", (), r"aggregation.reducer=factors with residual=dropped and sidecar_rank=None lost something of each round's product"),
        ("adam", ("strategy=fedadam",), r"its strategy FedAdam moved the adapter by other steps than the mean: fine-tune with strategy=fedavg or fedprox"),
        ("ffa_adam", ("strategy=fedadam", "aggregation=ffa"), r"its strategy FedAdam moved the adapter by other steps"),
        ("momentum", ("strategy=fedavgm",), r"its strategy FedAvgM moved"),
    ],
)  # fmt: skip
def test_negation_is_refused_where_the_adapter_is_no_sum_of_contributions(runs, name, overrides, said):
    tuned = runs.tuned(f"refused_{name}", *KEPT, *overrides)
    (fault,) = runs.refused(tuned, "method=negation")
    assert re.search(rf"method Negation is not defined after '.*refused_{name}': {said}", fault)


def test_negation_of_a_client_that_was_taken_away_before_is_refused(runs):
    """Both requests name rows of client 3, and its contribution holds for all of them; client 0's is still there."""
    exact = (*EXACT["flora"], *ONE, "method=negation")
    tuned = runs.tuned("exact_flora", *KEPT, *EXACT["flora"])
    first = runs.unlearned("negated_author", tuned, *exact, "requests=[{authors: [19]}]")
    (fault,) = runs.refused(first, *exact, "requests=[{client: 3}]")
    assert "negated_author' took the contributions of clients [3] away already, all of them" in fault
    other = runs.unlearned("negated_another", first, *exact, "requests=[{client: 0}]")
    assert apart(minus(exported(other), contributions(tuned, {0, 3}), -1.0), exported(tuned)) < 1e-5


def test_negation_goes_with_fedex_as_its_own_message_says(runs):
    tuned = runs.tuned("exact_fedex", *KEPT, "aggregation=fedex")
    gone = runs.unlearned(
        "negated_fedex", tuned, "aggregation=fedex", *ONE, "method=negation", "requests=[{client: 3}]"
    )
    assert apart(minus(exported(gone), contributions(tuned, {3}), -1.0), exported(tuned)) < 1e-5


# --- MSA


def test_msa_subtracts_what_tuning_the_earlier_adapter_on_forget_rows_adds(runs):
    """result = present - s (tuned - rewound), tuned from the side-car block outside: the mean of the owners' updates as its own clients sent them."""
    tuned, sent = runs.tuned("always", *KEPT), {}
    made = {}
    for rewind in (1, 2, 9):
        gone = runs.unlearned(f"msa{rewind}", tuned, *ONE, "method=msa", f"method.rewind={rewind}", "method.scale=0.7")
        made[rewind] = exported(gone)
        sent[rewind] = minus(exported(tuned), made[rewind])
    assert len({round(norm(vector), 9) for vector in sent.values()}) == 3
    double = runs.unlearned("msa_double", tuned, *ONE, "method=msa", "method.rewind=2", "method.scale=1.4")
    assert apart(minus(exported(tuned), sent[2], 2.0), exported(double)) < 1e-5


@pytest.fixture
def works(monkeypatch):
    """(client, role, start, what came back) of every client's work, in order."""
    from fedunlearn.federation.site import Site

    seen, real = [], Site.work

    def work(self, task, owned, start, reference, released=()):
        done = real(self, task, owned, start, reference, released)
        seen.append(
            (task.client_id, task.role.value, dict(start.factors), {n: t.clone() for n, t in done.tensors.items()})
        )
        return done

    monkeypatch.setattr(Site, "work", work)
    return seen


def test_msa_is_that_by_the_owners_own_tensors(runs, works):
    """Both owners weigh a half (10 rows each... 20 owned): mean of tuned - rewound; rewound is round 3 of 4."""
    tuned = runs.tuned("always", *KEPT)
    works.clear()
    gone = runs.unlearned("msa_seen", tuned, *ONE, "method=msa", "method.rewind=1", "method.scale=0.7")
    assert [(client, role) for client, role, _, _ in works] == [(2, "memorise"), (3, "memorise")]
    scales, vector = run_scales(tuned), dict.fromkeys(run_scales(tuned), 0.0)
    for _, _, begun, came in works:
        assert apart(products(begun, scales), at_round(tuned, 3)) < 1e-7
        moved = minus(products(came, scales), products(begun, scales))
        vector = {path: vector[path] + 0.5 * moved[path] for path in vector}
    assert norm(vector) > 1e-3
    assert apart(exported(gone), minus(exported(tuned), vector, 0.7)) < 1e-5


# --- PGD


def test_pgd_begins_at_the_others_mean_and_no_step_leaves_the_ball(runs, works, monkeypatch):
    """Each owner's start is (sum p_k x_k - p_u x_u) / (1 - p_u) of round 4, factor by factor; after each of its steps the product is within the radius, and was pulled
    there at least once."""
    radius, lengths, real = 0.05, [], loop.pull_inside
    tuned = runs.tuned("always", *KEPT)
    works.clear()
    own = run_scales(tuned)

    def measured(live, start, scales, bound):
        pulled = {name: tensor.clone() for name, tensor in live.items()}
        real(live, start, scales, bound)
        before, now, then = ({n: t.detach() for n, t in tensors.items()} for tensors in (start, live, pulled))
        lengths.append([norm(minus(products(x, own), products(before, own))) for x in (then, now)])
        assert bound == radius

    monkeypatch.setattr(loop, "pull_inside", measured)
    runs.unlearned(
        "pgd", tuned, *ONE, "method=pgd", f"method.radius={radius}", "trainer.args.per_device_train_batch_size=2"
    )
    ledger = Ledger(tuned)
    last = {e.client_id: ledger.read(e) for e in ledger.entries() if e.kind == "update" and e.round == 4}
    assert [(client, role) for client, role, _, _ in works] == [(2, "unlearn"), (3, "unlearn")]
    for _, _, begun, _ in works:
        for name, tensor in begun.items():
            mean = (last[0][name].double() + last[1][name].double()) / 2
            assert torch.equal(tensor, mean.float())
    assert len(lengths) >= 4
    assert all(now <= radius * (1 + 1e-6) for _, now in lengths)
    assert any(then > 1.01 * radius for then, _ in lengths)
    assert max(now for _, now in lengths) > 0.99 * radius


def test_pgd_has_no_ball_in_repair(runs, works):
    tuned = runs.tuned("always", *KEPT)
    works.clear()
    run = runs.unlearned("pgd_repair", tuned, "method=pgd", "method.radius=1e-6")
    assert list(roles(run, 2).values()) == ["finetune"] * 4
    scales = run_scales(tuned)
    moved = [norm(minus(products(came, scales), products(begun, scales))) for _, _, begun, came in works]
    assert max(moved[:2]) <= 1e-6 * (1 + 1e-6)
    assert min(moved[2:]) > 1e-3


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_pgd_after_a_side_car_begins_at_the_others_mean_too(runs, name):
    """Round 4's clients stand upon the side-car of round 3, which the run's last one is not any more."""
    tuned = runs.tuned(f"exact_{name}", *KEPT, f"aggregation={name}")
    ledger, scales = Ledger(tuned), run_scales(tuned)
    begun = read_checkpoint(tuned / "rounds" / "0003")
    mean = minus(whole(tuned, begun), products(begun.state.adapter, scales))
    for entry in (e for e in ledger.entries() if e.kind == "update" and e.round == 4 and e.client_id in (0, 1)):
        mean = minus(mean, products(ledger.read(entry), scales), -0.5)
    run = runs.unlearned(f"pgd_{name}", tuned, f"aggregation={name}", *ONE, "method=pgd", "method.radius=1e-7")
    assert apart(exported(run), mean) < 1e-4


def test_pgd_after_flexlora_begins_at_the_best_rank_of_the_others_product(runs):
    tuned = runs.tuned("flex", *KEPT, "aggregation=flexlora")
    ledger, scales = Ledger(tuned), run_scales(tuned)
    last = [e for e in ledger.entries() if e.kind == "update" and e.round == 4 and e.client_id in (0, 1)]
    first, second = (products(ledger.read(entry), scales) for entry in last)
    run = runs.unlearned("pgd_flex", tuned, "aggregation=flexlora", *ONE, "method=pgd", "method.radius=1e-7")
    for path, got in exported(run).items():
        u, s, vt = torch.linalg.svd((first[path] + second[path]) / 2)
        best = u[:, :4] * s[:4] @ vt[:4]
        assert float((got - best).norm() / best.norm()) < 1e-4


def test_pgd_after_another_request_is_refused(runs):
    """It begins at fine-tuning's last round, in which what the first request took is still there."""
    tuned = runs.tuned("always", *KEPT)
    first = runs.unlearned("npo_first", tuned, *ONE, "method=npo", "requests=[{authors: [18]}]")
    (fault,) = runs.refused(first, "method=pgd", "requests=[{authors: [19]}]")
    assert "npo_first', from which the adapter comes, has forgotten something since: choose another method" in fault


@pytest.mark.parametrize("method", ["rollback", "federaser", "negation", "msa", "pgd"])
def test_what_reads_the_past_wants_clients_of_one_rank(runs, method):
    tuned = runs.tuned("ranks", *KEPT, "aggregation=flora", "partition.ranks=[4, 2, 2, 2]")
    replay = REPLAY if method in ("rollback", "federaser") else ()
    (fault,) = runs.refused(tuned, *replay, "aggregation=flora", f"method={method}")
    assert "its clients had ranks or alphas of their own (partition.ranks, lora_alphas)" in fault


# --- FUSED


@pytest.mark.parametrize("name", ["always", "exact_flora"])
def test_fused_without_its_new_factors_is_the_adapter_as_it_was(runs, pocket, name, tmp_path):
    overrides = () if name == "always" else EXACT["flora"]
    tuned = runs.tuned(name, *KEPT, *overrides)
    run = runs.unlearned(f"fused_{name}", tuned, "method=fused")
    last = latest_checkpoint(run)
    old = logits(pocket, tuned / "adapter")
    assert float((logits(pocket, run / "adapter") - old).abs().max() / old.abs().max()) > 1e-3
    beside = BlockStore(run / "sidecar").read(last.blocks)
    ranks = {m.name: beside[m.a].shape[0] for m in modules_of(beside)}
    config = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    config |= {"r": max(ranks.values()), "lora_alpha": max(ranks.values()), "rank_pattern": {}, "alpha_pattern": {}}
    assert len(set(ranks.values())) == 1
    (tmp_path / "dropped").mkdir()
    (tmp_path / "dropped" / "adapter_config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    save_file(beside, tmp_path / "dropped" / "adapter_model.safetensors", metadata={"format": "pt"})
    assert float((logits(pocket, tmp_path / "dropped") - old).abs().max() / old.abs().max()) < 1e-5


def test_fused_keeps_the_old_adapter_s_tensors_in_the_side_car(runs):
    """A as it was bit by bit, B times s (a power of two here: bit by bit too), in every round."""
    tuned = runs.tuned("always", *KEPT)
    run = runs.unlearned("fused_kept", tuned, "method=fused", "trainer.federated.keep_rounds=all")
    old, scales = adapter_tensors(tuned), run_scales(tuned)
    for number in (1, 2):
        beside = BlockStore(run / "sidecar").read(read_checkpoint(run / f"rounds/{number:04d}").blocks)
        assert beside.keys() == old.keys()
        for module in modules_of(old):
            assert torch.equal(beside[module.a], old[module.a])
            assert torch.equal(beside[module.b], scales[module.name] * old[module.b])
            assert math.log2(scales[module.name]).is_integer()


def test_fused_trains_everyone_s_retain_rows_and_no_forget_row(runs):
    run = runs.unlearned("fused_always", runs.tuned("always", *KEPT), "method=fused")
    assert {c["client_id"]: (c["role"], c["num_trained"]) for c in history(run)[0]["clients"]} == {
        0: ("finetune", 20), 1: ("finetune", 20), 2: ("finetune", 16), 3: ("finetune", 16),
    }  # fmt: skip


# --- FedOSD


OSD = ("method=fedosd", "trainer.federated.num_rounds=4", "trainer.federated.keep_rounds=all")


def test_fedosd_s_step_is_orthogonal_to_every_retain_update_and_as_long_as_the_forget_one(runs, works):
    """Measured on the tensors that clients sent, as dense float64 products: 4 retain updates in round 1, 2 forget updates in round 2, the step in between."""
    tuned = runs.tuned("always", *KEPT)
    works.clear()
    run = runs.unlearned("osd", tuned, *OSD)
    scales = run_scales(tuned)
    moved = [minus(products(came, scales), products(begun, scales)) for _, _, begun, came in works]
    retain, forget = moved[:4], moved[4:6]
    assert [role for _, role, _, _ in works[:6]] == ["finetune"] * 4 + ["unlearn"] * 2
    assert apart(at_round(run, 1), exported(tuned)) == 0  # held, nothing moved
    step = minus(at_round(run, 2), at_round(run, 1))
    g = {path: (forget[0][path] + forget[1][path]) / 2 for path in scales}
    assert norm(step) == pytest.approx(norm(g), rel=1e-5)
    cosines = [abs(inner(step, row)) / norm(step) / norm(row) for row in retain]
    assert max(cosines) < 1e-6
    assert max(abs(inner(g, row)) / norm(g) / norm(row) for row in retain) > 1e-3  # g itself is not
    assert inner(step, g) > 0
    said = history(run)[1]["metrics"]["fedosd/largest_cos"]
    assert said == pytest.approx(max(cosines), abs=1e-9)
    assert ["fedosd/largest_cos" in line["metrics"] for line in history(run)] == [False, True, False, False]


def test_fedosd_s_repair_uses_updates_without_their_part_along_the_way_unlearned(runs, works):
    """Round 3: each client's g loses its part along a = adapter now - adapter when unlearning began, is scaled back to ||g||, and their mean is the step."""
    tuned = runs.tuned("always", *KEPT)
    works.clear()
    run = runs.unlearned("osd_repair", tuned, *OSD)
    scales = run_scales(tuned)
    away = minus(at_round(run, 2), exported(tuned))
    wanted = dict.fromkeys(scales, 0.0)
    for _, _, begun, came in works[6:10]:
        g = minus(products(came, scales), products(begun, scales))
        left = minus(g, away, inner(g, away) / inner(away, away))
        used = {path: delta * norm(g) / norm(left) for path, delta in left.items()}
        assert abs(inner(used, away)) / norm(used) / norm(away) < 1e-10
        wanted = {path: wanted[path] + used[path] / 4 for path in scales}
    step = minus(at_round(run, 3), at_round(run, 2))
    assert apart(step, wanted) < 1e-5
    assert abs(inner(step, away)) / norm(step) / norm(away) < 1e-6


def test_fedosd_without_a_round_to_unlearn_in_is_refused(runs):
    (fault,) = runs.refused(runs.tuned("always", *KEPT), "method=fedosd", *ONE)
    assert (
        "FedOSD needs an owner of forget rows at work in round 2, and trainer.federated.num_rounds=1 ends before"
        in fault
    )


@pytest.mark.parametrize(("method", "undrawn"), [("fedosd", 18), ("pgd", 19), ("msa", 19)])
def test_owners_that_are_not_drawn_when_the_method_wants_them_are_refused(runs, method, undrawn):
    """One client of four is drawn: in round 1, when PGD and MSA need the owner of author 19, another; in round 2 not that of author 18."""
    with pytest.raises(UserError, match="owner"):
        runs.unlearned(
            f"undrawn_{method}",
            runs.tuned("always", *KEPT),
            f"method={method}",
            "trainer.federated.fraction_train=0.25",
            f"requests=[{{authors: [{undrawn}]}}]",
        )


# --- stopped and resumed


@pytest.mark.parametrize("name", ["fedosd", "msa", "pgd", "fused", "negation", "rollback", "federaser"])
def test_a_stopped_run_resumes_bit_equal(runs, pocket, saves, monkeypatch, name):
    from fedunlearn.federation import rounds

    base = EXACT["flora"] if name == "negation" else ()
    tuned = runs.tuned("exact_flora" if base else "always", *KEPT, *base)
    replay = REPLAY if name in ("rollback", "federaser") else ()
    overrides = (*base, *replay, f"method={name}", "requests=[{authors: [18, 19]}]")
    whole_run = runs.unlearned(f"whole_{name}", tuned, *overrides)
    real = rounds.save_checkpoint

    def save_and_stop(folder, checkpoint, *rest):
        real(folder, checkpoint, *rest)
        raise KeyboardInterrupt("stopped by the test")

    monkeypatch.setattr(rounds, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        unlearn(pocket, saves, tuned, "x", KEEP, *overrides)
    monkeypatch.setattr(rounds, "save_checkpoint", real)
    resumed = unlearn(pocket, saves, tuned, "x", KEEP, *overrides, "resume=true")
    assert hashes(resumed) == hashes(whole_run)
    assert adapter_bytes(resumed) == adapter_bytes(whole_run)


def test_the_adapter_file_is_what_the_last_round_left(runs):
    """What is measured above on checkpoints is what a user gets."""
    for name in ("osd", "fused_always"):
        run = runs.saves / "unlearn" / name
        if run.is_dir():
            assert apart(exported(run), whole(run, latest_checkpoint(run))) < 1e-6
    assert load_file(runs.tuned("always", *KEPT) / "adapter" / "adapter_model.safetensors")
