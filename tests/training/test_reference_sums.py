"""Reference sums: slow sums row by row, kept by what they depend on, and nothing of the model moved."""

import json
from dataclasses import replace

import pytest
import torch
from helpers_training import FORGET, RETAIN, forwards, made_model, rows

from fedunlearn.errors import UserError
from fedunlearn.models.adapter_tensors import read_tensors
from fedunlearn.models.lora import check_trainable
from fedunlearn.models.ranks import scaled_for
from fedunlearn.records.adapter import Weights
from fedunlearn.records.shape import ClientShape
from fedunlearn.training.charges import Charges
from fedunlearn.training.reference import BATCH_ROWS, ReferenceSums, as_reference


@pytest.fixture(scope="module")
def made():
    """Dropout would be seen: half of what goes into the adapter."""
    return made_model(dropout=0.5)


@pytest.fixture(scope="module")
def reference(made):
    """Another adapter than the one the model holds."""
    generator = torch.Generator().manual_seed(20)
    return Weights({n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in made.start.tensors.items()})


def sums_of(made, reference, chosen, cache, bf16=False):
    """The sums as a fresh process would have them: what is known comes from the cache."""
    sums = ReferenceSums(made, reference, cache, bf16, Charges(None, 1))
    sums.prepare(chosen)
    return sums.of(chosen)


def tokens_of(chosen):
    return sum(len(row.input_ids) for row in chosen)


def sidecar_of(made, seed=5):
    """Frozen factors of rank 3 beside each module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: 0.1 * torch.randn((3, t.shape[1]) if ".lora_A." in n else (t.shape[0], 3), generator=generator)
        for n, t in made.start.tensors.items()
    }


def models(cache):
    """A folder for each model that has sums."""
    return sorted((cache / "reference_sums").iterdir())


def files(cache):
    return sorted((cache / "reference_sums").glob("*/*.json"))


def known(cache):
    """All kept sums of all models, by model and row."""
    return {(path.parent.name, name): v for path in files(cache) for name, v in json.loads(path.read_text()).items()}


def slow_sums(reference, chosen):
    """Row by row without padding, in float64, with an adapter of the same values and no dropout."""
    plain = made_model()
    plain.put(plain.start.replace(reference.factors, reference.sidecar))
    found = []
    for row in chosen:
        with torch.no_grad():
            logits = plain.model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
        found.append(
            -sum(
                torch.log_softmax(logits[place - 1], -1)[row.input_ids[place]].item()
                for place in range(row.num_prompt, len(row.input_ids))
            )
        )
    return found


def test_they_are_the_slow_sums_in_the_rows_order_over_several_batches(made, reference, tmp_path):
    chosen = rows(2 * BATCH_ROWS + 3, 30)
    found = sums_of(made, reference, chosen, tmp_path)
    assert found.dtype == torch.float32
    assert found.shape == (len(chosen),)
    assert found.tolist() == pytest.approx(slow_sums(reference, chosen), rel=1e-5)


def test_the_order_of_rows_is_the_caller_s(made, reference, tmp_path):
    forth, back = (sums_of(made, reference, chosen, tmp_path) for chosen in (FORGET, FORGET[::-1]))
    assert torch.allclose(forth, back.flip(0), rtol=1e-6)


def test_they_are_read_again_from_the_cache(made, reference, tmp_path):
    """What stands in the file is what is given, whatever it is: there is no second forward."""
    first = sums_of(made, reference, FORGET, tmp_path)
    (path,) = files(tmp_path)
    saved = json.loads(path.read_text())
    assert sorted(saved.values()) == pytest.approx(sorted(first.tolist()), rel=1e-6)
    path.write_text(json.dumps({name: float(number) for number, name in enumerate(saved)}))
    assert sorted(sums_of(made, reference, FORGET, tmp_path).tolist()) == list(range(8))
    assert files(tmp_path) == [path]


def test_each_row_s_forward_is_run_once_and_its_tokens_counted(made, reference, tmp_path):
    """8 rows, then 3 of them with 5 new ones, then all 13 again: the tokens of 8, of 5, of none; a later run computes none and is charged for all."""
    sums = ReferenceSums(made, reference, tmp_path, False, Charges(None, 1))
    assert sums.tokens == 0
    sums.prepare(FORGET)
    assert sums.tokens == tokens_of(FORGET)
    sums.prepare((*FORGET[:3], *RETAIN))
    assert sums.tokens == tokens_of((*FORGET, *RETAIN))
    sums.prepare((*FORGET, *RETAIN))
    assert sums.tokens == tokens_of((*FORGET, *RETAIN))
    assert len(known(tmp_path)) == 13
    later = ReferenceSums(made, reference, tmp_path, False, Charges(None, 1))
    with forwards(made) as seen:
        later.prepare((*FORGET, *RETAIN))
    assert not seen
    assert later.tokens == tokens_of((*FORGET, *RETAIN))
    assert torch.equal(later.of((*RETAIN, *FORGET)), sums.of((*RETAIN, *FORGET)))


def test_a_row_that_occurs_twice_is_run_once(made, reference, tmp_path):
    sums = ReferenceSums(made, reference, tmp_path, False, Charges(None, 1))
    sums.prepare((FORGET[0], FORGET[1], FORGET[0]))
    assert sums.tokens == tokens_of(FORGET[:2])
    first, second, third = sums.of((FORGET[0], FORGET[1], FORGET[0])).tolist()
    assert first == third != second


def test_a_row_that_was_not_prepared_has_no_sum(made, reference, tmp_path):
    sums = ReferenceSums(made, reference, tmp_path, False, Charges(None, 1))
    sums.prepare(FORGET[:2])
    with pytest.raises(KeyError, match=r"[0-9a-f]{64}"):
        sums.of(FORGET[:3])


def test_the_rows_beside_a_row_do_not_change_its_sum(made, reference, tmp_path):
    """Padding beside a row of 13 ids or alone: the same to float32's rounding."""
    together = sums_of(made, reference, FORGET, tmp_path / "all")
    alone = torch.cat([sums_of(made, reference, [row], tmp_path / "one") for row in FORGET])
    assert torch.allclose(together, alone, rtol=1e-6)
    assert len(files(tmp_path / "one")) == 8


def test_what_they_depend_on_makes_other_sums(made, reference, tmp_path):
    """Base, its dtype, reference, its side-car: another folder, with the same reference tensors otherwise."""
    cases = [
        (made, reference),
        (replace(made, fingerprint="another"), reference),
        (made_model(dropout=0.5, dtype=torch.bfloat16), reference),
        (made, Weights({n: 2 * t for n, t in reference.factors.items()})),
        (made, Weights(reference.factors, sidecar_of(made))),
    ]
    for number, case in enumerate(cases, start=1):
        sums_of(*case, FORGET, tmp_path)
        assert len(models(tmp_path)) == len(files(tmp_path)) == number
        assert len(known(tmp_path)) == 8 * number


def test_token_ids_and_prompt_length_make_another_row(made, reference, tmp_path):
    """The same ids with one more of them as a label are another sum: the missing row is run, the others are not."""
    shorter = replace(FORGET[1], num_prompt=FORGET[1].num_prompt - 1)
    other = replace(FORGET[1], input_ids=(*FORGET[1].input_ids[:-1], 3))
    sums = ReferenceSums(made, reference, tmp_path, False, Charges(None, 1))
    for number, row in enumerate((FORGET[1], shorter, other), start=1):
        sums.prepare([FORGET[0], row])
        assert len(known(tmp_path)) == 1 + number
    assert sums.of([shorter]) > sums.of([FORGET[1]])
    assert len(models(tmp_path)) == 1


def test_a_client_s_own_scale_acts_and_makes_another_folder(made, reference, tmp_path):
    """The model's is 4 / 2; at rank 2 and alpha 8 every B A counts twice, as B times 2 does under the model's own."""
    plain = sums_of(made, reference, FORGET, tmp_path)
    with scaled_for(made.model, ClientShape(rank=2, lora_alpha=8.0)):
        scaled = sums_of(made, reference, FORGET, tmp_path)
        assert len(models(tmp_path)) == 2
        assert torch.equal(sums_of(made, reference, FORGET, tmp_path), scaled)
    doubled = {n: 2 * t if ".lora_B." in n else t for n, t in reference.factors.items()}
    assert (scaled - plain).abs().max() > 0.1
    assert torch.equal(scaled, sums_of(made, Weights(doubled), FORGET, tmp_path))


def test_the_reference_s_side_car_acts_in_place_of_the_active_one_and_only_meanwhile(made, reference, tmp_path):
    """With and without side-cars on either side: the slow sums of the reference with its own, and the model as it was."""
    beside = Weights(reference.factors, sidecar_of(made))
    ids = torch.arange(8).unsqueeze(0)
    made.model.eval()
    for mine in ({}, sidecar_of(made, seed=6)):
        made.put(made.start.replace(made.start.tensors, mine))
        with torch.no_grad():
            before = made.model(input_ids=ids).logits
        for number, wanted in enumerate((beside, reference)):
            found = sums_of(made, wanted, FORGET, tmp_path / f"{bool(mine)}{number}")
            assert found.tolist() == pytest.approx(slow_sums(wanted, FORGET), rel=1e-5)
            with torch.no_grad():
                assert torch.equal(made.model(input_ids=ids).logits, before)
    made.put(made.start)


@pytest.mark.parametrize("training", [True, False])
def test_the_active_adapter_keeps_its_values_and_stays_trainable(made, reference, tmp_path, training):
    made.model.train(training)
    before, state = read_tensors(made.model), torch.get_rng_state()
    sums_of(made, reference, FORGET, tmp_path)
    after = read_tensors(made.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), state)
    check_trainable(made.model)


def test_they_carry_no_gradient(made, reference, tmp_path):
    assert not sums_of(made, reference, FORGET, tmp_path).requires_grad
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_under_bf16_they_are_those_of_the_training_forward_and_in_another_folder(made, reference, tmp_path):
    plain, cast = sums_of(made, reference, FORGET, tmp_path), sums_of(made, reference, FORGET, tmp_path, bf16=True)
    assert len(models(tmp_path)) == 2
    assert not torch.equal(plain, cast)
    assert torch.allclose(plain, cast, rtol=0.05)


DAMAGE = [b"", b"nothing of the kind", b"\xff\xfe", b"[1.0]", b"3", b'{"row": "far"}', b'{"row": null}']


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_computed_anew_and_told(made, reference, tmp_path, caplog, damage):
    good = sums_of(made, reference, FORGET, tmp_path)
    (file,) = files(tmp_path)
    saved = json.loads(file.read_text())
    file.write_bytes(damage)
    assert torch.equal(sums_of(made, reference, FORGET, tmp_path), good)
    assert f"{file} is damaged" in caplog.text
    assert json.loads(file.read_text()) == saved


def test_half_a_file_costs_its_own_rows_alone(made, reference, tmp_path, caplog):
    """Two files, one of them cut off: its rows are run again, those of the other are not."""
    sums = ReferenceSums(made, reference, tmp_path, False, Charges(None, 1))
    sums.prepare(FORGET)
    (first,) = files(tmp_path)
    sums.prepare(RETAIN)
    first.write_bytes(first.read_bytes()[:40])
    again = ReferenceSums(made, reference, tmp_path, False, Charges(None, 1))
    with forwards(made) as seen:
        again.prepare((*FORGET, *RETAIN))
    assert sum(f.num_rows for f in seen) == len(FORGET)
    assert torch.equal(again.of((*FORGET, *RETAIN)), sums.of((*FORGET, *RETAIN)))
    assert "is damaged" in caplog.text


def test_they_are_in_eval_mode_from_a_model_in_train_mode(made, reference, tmp_path):
    """Dropout of one half would be seen: the sums are those of a model without dropout, and the same at every call."""
    made.model.train()
    found = [sums_of(made, reference, FORGET, tmp_path / str(number)) for number in range(2)]
    made.model.eval()
    assert torch.equal(*found)
    assert found[0].tolist() == pytest.approx(slow_sums(reference, FORGET), rel=1e-5)


def test_a_reference_that_does_not_fit_leaves_the_adapter_as_it_was(made, reference):
    """Its factors fit and are written; its side-car then does not."""
    before = read_tensors(made.model)
    head = "base_model.model.nowhere.lora_"
    odd = Weights(reference.factors, {head + "A.weight": torch.zeros(1, 2), head + "B.weight": torch.zeros(2, 1)})
    with pytest.raises(UserError, match="has no LoRA layer"), as_reference(made, odd):
        pytest.fail("the block must not begin")
    after = read_tensors(made.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
