"""Federated MSA in whole runs: what it subtracts, measured as products and by the owners' own tensors."""

from helpers_server_methods import KEPT, ONE, apart, at_round, exported, minus, norm, products, run_scales


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
