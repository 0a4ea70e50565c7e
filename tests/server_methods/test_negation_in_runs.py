"""Negation in whole runs: what it takes away, measured as products, and where it is refused."""

import re

import pytest
from helpers_server_methods import EXACT, KEPT, ONE, apart, contributions, exported, minus, norm


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
