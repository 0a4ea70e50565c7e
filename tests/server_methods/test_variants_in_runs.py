"""Server-side methods after fine-tuning with variants of LoRA: those that average go on with all tensors, those that count in products with PiSSA's side-car."""

import pytest
from helpers_runs import adapter_bytes, adapter_tensors
from helpers_server_methods import (
    EXACT,
    FOUR,
    KEPT,
    LATE,
    ONE,
    REPLAY,
    apart,
    contributions,
    exported,
    hashes,
    minus,
    norm,
    run_scales,
)

from fedunlearn.aggregation.factors import plain_of
from fedunlearn.federation.ledger import Ledger

LORA = "++model.model_args.lora_config."
PLAIN = (LORA + "modules_to_save=[lm_head]", LORA + "lora_bias=true")
PISSA = (LORA + "init_lora_weights=pissa",)


@pytest.mark.parametrize(("name", "variant", "again"), [("plain", PLAIN, PLAIN), ("pissa", PISSA, ())])
def test_rollback_is_a_federation_that_never_had_the_target(runs, name, variant, again):
    """Client 3 joins in round 3 and is forgotten: what follows is bit equal to rounds without it, saved head and side-car too."""
    tuned = runs.tuned(f"{name}_late", *KEPT, *LATE, *variant)
    without = runs.tuned(f"{name}_without", *FOUR, *LATE, *variant, "data=retain", "requests=[{client: 3}]")
    back = runs.unlearned(f"{name}_back", tuned, *REPLAY, *LATE, *again, "method=rollback", "requests=[{client: 3}]")
    assert hashes(back) == {number: hashes(without)[number] for number in (3, 4)}
    assert hashes(tuned)[3] != hashes(without)[3]
    assert adapter_bytes(back) == adapter_bytes(without)


def test_pgd_s_owners_begin_at_the_others_mean_of_every_tensor(runs, works):
    tuned = runs.tuned("plain_always", *KEPT, *PLAIN)
    works.clear()
    runs.unlearned("plain_pgd", tuned, *ONE, *PLAIN, "method=pgd", "method.radius=0.05")
    ledger = Ledger(tuned)
    last = {e.client_id: ledger.read(e) for e in ledger.entries() if e.kind == "update" and e.round == 4}
    names = plain_of(adapter_tensors(tuned))
    assert len(names) == 1 + 14
    for _, _, begun, _ in works:
        for name in names:
            assert begun[name].equal(((last[0][name].double() + last[1][name].double()) / 2).float())


def test_negation_after_pissa_takes_away_what_the_target_gave(runs):
    """The start's product and its side-car are nothing together, so that here too all that was given is the result."""
    tuned = runs.tuned("pissa_flora", *KEPT, *EXACT["flora"], *PISSA)
    given, every = contributions(tuned, {3}), contributions(tuned, {0, 1, 2, 3})
    assert apart(every, exported(tuned)) < 1e-4
    gone = runs.unlearned("pissa_gone", tuned, *EXACT["flora"], *ONE, "method=negation", "requests=[{client: 3}]")
    assert norm(given) > 0.05 * norm(exported(tuned))
    assert apart(minus(exported(gone), given, -1.0), exported(tuned)) < 1e-4
    assert set(run_scales(gone)) == set(given)


@pytest.mark.parametrize("method", ["negation", "msa", "fedosd", "federaser", "fused"])
def test_what_works_in_products_is_refused_beside_tensors_that_are_none(runs, method):
    tuned = runs.tuned("plain_always", *KEPT, *PLAIN)
    for said in (PLAIN, ()):  # the yaml's own words, and the loaded adapter's
        faults = runs.refused(tuned, f"method={method}", *said)
        assert any("lora_bias, modules_to_save beside method" in fault and "its steps add" in fault for fault in faults)
