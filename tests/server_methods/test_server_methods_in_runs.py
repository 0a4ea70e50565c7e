"""What concerns several server-side methods at once, in whole runs: settings of a replay, whom they need, resuming, the result's file.

Two requests in sequence are in tests/requests.
"""

import pytest
from helpers_runs import adapter_bytes, unlearn
from helpers_server_methods import EXACT, KEEP, KEPT, REPLAY, apart, exported, hashes, whole
from safetensors.torch import load_file

from fedunlearn.errors import UserError
from fedunlearn.federation.checkpoint import latest_checkpoint


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


@pytest.mark.parametrize(("method", "undrawn"), [("pgd", 19), ("msa", 19)])
def test_owners_that_are_not_drawn_when_the_method_wants_them_are_refused(runs, method, undrawn):
    """One client of four is drawn: in round 1, when PGD and MSA need the owner of author 19, another."""
    with pytest.raises(UserError, match="owner"):
        runs.unlearned(
            f"undrawn_{method}",
            runs.tuned("always", *KEPT),
            f"method={method}",
            "trainer.federated.fraction_train=0.25",
            f"requests=[{{authors: [{undrawn}]}}]",
        )


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
    """What is measured on checkpoints in this folder's other files is what a user gets."""
    for name, rounds in (("fedosd", 4), ("fused", 2)):
        more = (f"method={name}", f"trainer.federated.num_rounds={rounds}")
        run = runs.unlearned(f"left_{name}", runs.tuned("always", *KEPT), *more)
        assert apart(exported(run), whole(run, latest_checkpoint(run))) < 1e-6
    assert load_file(runs.tuned("always", *KEPT) / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["rollback", "federaser", "negation", "msa", "pgd"])
def test_what_reads_the_past_wants_clients_of_one_rank(runs, method):
    tuned = runs.tuned("ranks", *KEPT, "aggregation=flora", "partition.ranks=[4, 2, 2, 2]")
    replay = REPLAY if method in ("rollback", "federaser") else ()
    (fault,) = runs.refused(tuned, *replay, "aggregation=flora", f"method={method}")
    assert "its clients had ranks or alphas of their own (partition.ranks, lora_alphas)" in fault
