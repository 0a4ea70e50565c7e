"""Server steps that go wrong in a whole run: told with strategy, round and tensor, and nothing of that round is left."""

import pytest
from helpers_components import HERE
from helpers_runs import adapter_bytes, finetune, history
from helpers_strategies import HERE as STRATEGIES

from fedunlearn.errors import UserError
from fedunlearn.federation import server_step

THREE = "trainer.federated.num_rounds=3"


def odd(how, begin=2):
    return f"strategy._target_={HERE}.OddStep", f"strategy.how={how}", f"strategy.begin={begin}"


def left(run):
    """Rounds on disk, lines of the history, side-car blocks."""
    blocks = list((run / "sidecar").glob("*"))
    return sorted(path.name for path in (run / "rounds").iterdir()), len(history(run)), len(blocks)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("overflow", "its adapter has entries in tensor '.*lora_A.*' that are not finite as torch.float32"),
        ("lacks", "its adapter lacks tensor"),
        ("skips", "its step counts round=3 after 1; allowed: 2"),
        ("moment_none", r"its moments are \[\]; allowed: \['m'\]"),
        ("raises", "its step raised RuntimeError: out of ideas"),
    ],
)
def test_a_step_of_the_users_own_that_goes_wrong_leaves_the_rounds_before_it(pocket, saves, how, said):
    with pytest.raises(
        UserError, match=rf"^strategy helpers_components\.OddStep, round 2: {said}.*up to round 1 is on disk"
    ):
        finetune(pocket, saves, "ft", *odd(how), THREE)
    assert left(saves / "finetune" / "ft") == (["0001"], 1, 0)


def test_one_that_gives_float64_is_stored_as_float32_and_goes_on(pocket, saves):
    one, other = (finetune(pocket, saves, f"ft{len(how)}", *odd(how)) for how in ("''", "double"))
    assert adapter_bytes(one) == adapter_bytes(other)


def test_a_flower_strategy_s_result_that_overflows_float32_is_told_too(pocket, saves):
    """Finite in the float64 it comes in."""
    target = f"{STRATEGIES}.Huge"
    with pytest.raises(
        UserError, match=rf"^strategy {target}, round 1: its adapter has entries .* \(no round yet is on disk\)"
    ):
        finetune(pocket, saves, "ft", f"strategy._target_={target}")
    assert left(saves / "finetune" / "ft") == ([], 0, 0)


def test_a_step_of_ours_that_overflows_is_told(pocket, saves, monkeypatch):
    real = server_step.reduce_round

    def huge(choices, cohort):
        reduced = real(choices, cohort)
        return reduced.__class__(**{**vars(reduced), "mean": {name: t + 1e39 for name, t in reduced.mean.items()}})

    monkeypatch.setattr(server_step, "reduce_round", huge)
    with pytest.raises(
        UserError, match=r"^strategy fedunlearn\.aggregation\.fedavg\.FedAvg, round 1: its adapter has entries"
    ):
        finetune(pocket, saves, "ft")


@pytest.mark.parametrize(
    ("key", "preset"), [("block", "aggregation=fedex"), ("carried", "aggregation.residual=feedback")]
)
def test_what_goes_beside_the_factors_is_finite_or_the_round_is_not_kept(pocket, saves, monkeypatch, key, preset):
    real = server_step.reduce_round

    def spoilt(choices, cohort):
        reduced = real(choices, cohort)
        return reduced.__class__(
            **{**vars(reduced), key: {name: t * float("nan") for name, t in getattr(reduced, key).items()}}
        )

    monkeypatch.setattr(server_step, "reduce_round", spoilt)
    more = ("aggregation=flexlora",) if key == "carried" else ()
    with pytest.raises(
        UserError, match=r"^aggregation, round 1: .* that are not finite; nothing of this round is kept"
    ):
        finetune(pocket, saves, "ft", *more, preset)
    assert left(saves / "finetune" / "ft") == ([], 0, 0)


def test_an_error_that_is_no_number_is_not_told(pocket, saves, monkeypatch):
    real = server_step.reduce_round

    def spoilt(choices, cohort):
        reduced = real(choices, cohort)
        return reduced.__class__(**{**vars(reduced), "error": float("nan"), "norm": float("inf")})

    monkeypatch.setattr(server_step, "reduce_round", spoilt)
    run = finetune(pocket, saves, "ft")
    assert [line["aggregation_error"] for line in history(run)] == [None, None]
    assert not any("product_norm" in line["metrics"] for line in history(run))
