"""Reference sums: slow sums row by row, kept by what they depend on, and nothing of the model moved."""

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from helpers_training import FORGET, made_model, rows
from safetensors.torch import load_file, save_file

from fedunlearn.models.lora import check_trainable, read_tensors
from fedunlearn.models.ranks import scaled_for
from fedunlearn.records.adapter import Weights
from fedunlearn.records.shape import ClientShape
from fedunlearn.training.reference import BATCH_ROWS, reference_sums


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
    return reference_sums(made, reference, chosen, cache, bf16)


def sidecar_of(made, seed=5):
    """Frozen factors of rank 3 beside each module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: 0.1 * torch.randn((3, t.shape[1]) if ".lora_A." in n else (t.shape[0], 3), generator=generator)
        for n, t in made.start.tensors.items()
    }


def kept(cache):
    return sorted((cache / "reference_sums").iterdir())


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
    first = sums_of(made, reference, FORGET, tmp_path)
    (path,) = kept(tmp_path)
    assert torch.equal(load_file(path)["sums"], first)
    save_file({"sums": torch.arange(8.0)}, path)
    assert sums_of(made, reference, FORGET, tmp_path).tolist() == list(range(8))
    assert kept(tmp_path) == [path]


def test_what_they_depend_on_makes_another_file(made, reference, tmp_path):
    """Base, its dtype, reference, its side-car, token ids, prompt length: each with the same reference tensors otherwise."""
    shorter = (replace(FORGET[0], num_prompt=FORGET[0].num_prompt - 1), *FORGET[1:])
    cases = [
        (made, reference, FORGET),
        (replace(made, fingerprint="another"), reference, FORGET),
        (made_model(dropout=0.5, dtype=torch.bfloat16), reference, FORGET),
        (made, Weights({n: 2 * t for n, t in reference.factors.items()}), FORGET),
        (made, Weights(reference.factors, sidecar_of(made)), FORGET),
        (made, reference, FORGET[:-1]),
        (made, reference, shorter),
    ]
    for number, case in enumerate(cases, start=1):
        sums_of(*case, tmp_path)
        assert len(kept(tmp_path)) == number


def test_a_client_s_own_scale_acts_and_makes_another_file(made, reference, tmp_path):
    """The model's is 4 / 2; at rank 2 and alpha 8 every B A counts twice, as B times 2 does under the model's own."""
    plain = sums_of(made, reference, FORGET, tmp_path)
    with scaled_for(made.model, ClientShape(rank=2, lora_alpha=8.0)):
        scaled = sums_of(made, reference, FORGET, tmp_path)
        assert len(kept(tmp_path)) == 2
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


def test_under_bf16_they_are_those_of_the_training_forward_and_another_file(made, reference, tmp_path):
    plain, cast = sums_of(made, reference, FORGET, tmp_path), sums_of(made, reference, FORGET, tmp_path, bf16=True)
    assert len(list((tmp_path / "reference_sums").iterdir())) == 2
    assert not torch.equal(plain, cast)
    assert torch.allclose(plain, cast, rtol=0.05)


@pytest.mark.parametrize("damage", [b"", b"nothing of the kind", safetensors.torch.save({"sums": torch.zeros(1)})])
def test_a_damaged_file_is_computed_anew_and_told(made, reference, tmp_path, caplog, damage):
    good = sums_of(made, reference, FORGET, tmp_path)
    file = next((tmp_path / "reference_sums").iterdir())
    file.write_bytes(damage)
    assert torch.equal(sums_of(made, reference, FORGET, tmp_path), good)
    assert "is damaged" in caplog.text
    assert torch.equal(safetensors.torch.load_file(file)["sums"], good)
