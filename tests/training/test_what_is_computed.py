"""Forwards counted: what a method declares is computed, once, as deep as it must go, and nothing else is."""

from dataclasses import replace

import pytest
import torch
from helpers_training import (
    DATA,
    FORGET,
    GRADIENT,
    OTHERS,
    Forward,
    forwards,
    made_model,
    train,
    with_alternates,
)

from fedunlearn.methods.ceu import CEU
from fedunlearn.methods.dpo import DPO
from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.methods.ihl import IHL
from fedunlearn.methods.npo import NPO
from fedunlearn.methods.pdu import PDU
from fedunlearn.methods.rmu import RMU
from fedunlearn.methods.satimp import SatImp
from fedunlearn.methods.simnpo import SimNPO
from fedunlearn.methods.uce import UCE
from fedunlearn.methods.undial import UNDIAL
from fedunlearn.methods.wga import WGA
from fedunlearn.models.lora import hold_reference
from fedunlearn.records.adapter import Weights
from fedunlearn.training.charges import Charges
from fedunlearn.training.reference import ReferenceSums

OWN = Forward(True, "default", True, 8, (0, 1), True)
REFERENCE = Forward(False, "reference", False, 8, (0, 1), True)
OWN_0, REFERENCE_0 = (replace(which, blocks=(0,), head=False) for which in (OWN, REFERENCE))
OWN_1, REFERENCE_1 = (replace(which, head=False) for which in (OWN, REFERENCE))
STEP = {**GRADIENT, "per_device_train_batch_size": 8}
EXPECTED = [
    (None, [replace(OWN, num_rows=5)]),
    (GradAscent(), [OWN]),
    (CEU(), [OWN]),
    (UNDIAL(), [REFERENCE, OWN]),
    (UNDIAL(alpha=1.0, retain="nll"), [REFERENCE, OWN, OWN]),
    *((method, [OWN, OWN]) for method in (GradDiff(), NPO(), SimNPO(), WGA(), SatImp(), PDU(eps=0.3), IHL(), UCE())),
    (NPO(alpha=0.0, retain="none"), [OWN]),
    (GradDiff(retain="kl"), [OWN, REFERENCE, OWN]),
    (DPO(), [OWN, OWN, OWN]),
    (RMU(layer=0), [OWN_0, REFERENCE_0, OWN_0]),
    (RMU(layer=1), [OWN_1, REFERENCE_1, OWN_1]),
    (RMU(), [OWN_1, REFERENCE_1, OWN_1]),
    (RMU(layer=0, alpha=0.0, retain="none"), [OWN_0]),
    (RMU(layer=0, retain="nll"), [OWN_0, OWN]),
    (RMU(layer=0, retain="kl"), [OWN_0, REFERENCE, OWN]),
]


@pytest.fixture(scope="module")
def made():
    model = made_model()
    hold_reference(model.model, model.start.weights)
    return model


@pytest.fixture
def other(made):
    """Another adapter than the start, as the reference of sums."""
    return Weights({n: 0.5 * t for n, t in made.start.tensors.items()})


@pytest.mark.parametrize(("method", "expected"), EXPECTED)
def test_the_forwards_of_one_step_by_hand(made, method, expected):
    """8 forget rows in one micro-batch, 8 retain rows beside them; the reference comes first, in eval mode and without gradient.

    Blocks below the layer of hidden states run, those above it and the head do not. Fine-tuning: one batch of its 5 rows.
    """
    with forwards(made) as seen:
        train(made, method, with_alternates(), **STEP)
    assert seen == expected


@pytest.mark.parametrize("layer", [0, 1])
def test_a_stopped_forward_leaves_no_hook_behind_and_the_next_one_goes_to_the_end(made, layer):
    train(made, RMU(layer=layer), DATA)
    with forwards(made) as seen:
        train(made, GradAscent(), DATA, **STEP)
    assert seen == [OWN]
    assert not any(m._forward_pre_hooks for m in made.model.modules())


def test_micro_batches_multiply_the_forwards_and_not_their_rows(made):
    """4 micro-batches of 2 rows and 3 retain rows each: reference and own forward of 6 retain rows, after the forget rows' forward of 2."""
    with forwards(made) as seen:
        train(
            made,
            GradDiff(retain="kl"),
            settings={"retain_per_forget": 3},
            **{**GRADIENT, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        )
    part = [replace(OWN, num_rows=2), replace(REFERENCE, num_rows=6), replace(OWN, num_rows=6)]
    assert seen == part * 4


class TestReferenceSums:
    def test_npo_runs_one_reference_forward_a_forget_row_and_run_and_none_in_later_rounds(self, made, other, tmp_path):
        """8 rows in one batch without gradient before round 1, whose 3 epochs see each three times; round 2 runs none, in a new process too."""
        tokens = sum(len(row.input_ids) for row in FORGET)
        sums, later = (
            ReferenceSums(made, other, tmp_path, False, Charges(tmp_path / "charged.json", r)) for r in (1, 2)
        )
        for reference, expected in ((sums, tokens), (sums, 0), (later, 0)):
            with forwards(made) as seen:
                result = train(made, NPO(), replace(DATA, reference=reference), epochs=3)
            silent = [f for f in seen if not f.gradient]
            assert sum(f.num_rows for f in silent) == (8 if expected else 0)
            assert not any(f.training for f in silent)
            assert result.num_reference_tokens == expected
            assert sums.tokens == tokens

    def test_only_rows_that_the_round_s_steps_meet_are_run(self, made, other, tmp_path):
        """One step of 4 rows in round 1, another 4 at most in round 2: 4 sums, then those that are new."""
        sums = ReferenceSums(made, other, tmp_path, False, Charges(None, 1))
        first, second = (
            train(made, NPO(), replace(DATA, reference=sums), max_steps=1, seed=seed).num_reference_tokens
            for seed in (1, 2)
        )
        assert 0 < first < sum(len(row.input_ids) for row in FORGET)
        assert first + second == sums.tokens

    def test_what_the_loss_reads_is_the_reference_s_sum(self, made, other, tmp_path):
        """At the reference itself NPO is (2/beta) ln 2 = 20 ln 2; with another adapter's sums it is another number."""
        own = ReferenceSums(made, made.start.weights, tmp_path, False, Charges(None, 1))
        changed = ReferenceSums(made, other, tmp_path, False, Charges(None, 1))
        at, off = (
            train(made, NPO(alpha=0.0, retain="none"), replace(DATA, reference=sums), **STEP).loss
            for sums in (own, changed)
        )
        assert at == pytest.approx(20 * torch.log(torch.tensor(2.0)).item(), abs=1e-4)
        assert abs(off - at) > 0.1

    def test_dpo_s_alternates_are_run_as_they_are_met(self, made, other, tmp_path):
        """8 forget rows and the 8 alternates that one epoch draws for them; not all 24, and no row twice."""
        met = []

        def encode(place, choice):
            met.append((place, choice))
            return OTHERS[place][choice]

        sums = ReferenceSums(made, other, tmp_path, False, Charges(None, 1))
        data = replace(with_alternates(encode), reference=sums)
        with forwards(made) as seen:
            result = train(made, DPO(), data)
        rows = [*FORGET, *(OTHERS[place][choice] for place, choice in set(met))]
        assert len(set(met)) == 8
        assert sum(f.num_rows for f in seen if not f.gradient) == 16
        assert result.num_reference_tokens == sums.tokens == sum(len(row.input_ids) for row in rows)


class TestAccountOfTokens:
    """num_tokens: with gradient; num_reference_tokens: without."""

    def tokens(self, rows):
        return sum(len(row.input_ids) for row in rows)

    @pytest.mark.parametrize(
        ("method", "own", "reference"),
        [
            (GradAscent(), 1, 0),
            (UNDIAL(), 1, 1),
            (GradDiff(), 2, 0),
            (GradDiff(retain="kl"), 2, 1),
            (RMU(), 2, 1),
            (RMU(alpha=0.0, retain="none"), 1, 0),
        ],
    )
    def test_by_hand(self, made, method, own, reference):
        """Forget and retain rows are one and the same here, so that all counts are multiples of their tokens."""
        row = FORGET[:1]
        result = train(made, method, replace(DATA, forget=row * 4, retain=row), epochs=1)
        assert result.num_tokens == own * 4 * self.tokens(row)
        assert result.num_reference_tokens == reference * 4 * self.tokens(row)

    def test_what_making_the_alternates_cost_is_in_it(self, made):
        data = with_alternates()
        plain, dear = (train(made, DPO(), replace(data, tokens=tokens)) for tokens in (0, 1234))
        assert dear.num_reference_tokens == plain.num_reference_tokens + 1234
        assert dear.num_tokens == plain.num_tokens > self.tokens(FORGET)
