"""Compiled decoder blocks: the gradients of uncompiled ones, and hooks that go on acting."""

import pytest
import torch
from helpers_training import GRADIENT, RMU, flat, made_model, train, with_alternates

from fedunlearn.methods.npo import NPO
from fedunlearn.models.hidden_states import decoder_blocks
from fedunlearn.models.lora import hold_reference
from fedunlearn.models.sidecar import put_sidecar
from fedunlearn.training.compiled import compiled_blocks

DATA = with_alternates()


@pytest.fixture(scope="module")
def made():
    model = made_model()
    hold_reference(model.model, model.start.weights)
    return model


def ids_of(length):
    return torch.arange(2 * length).reshape(2, length) + 40


def raises_inside(model, look):
    with compiled_blocks(model):
        look()
        raise RuntimeError("in between")


def test_every_block_is_compiled_inside_and_none_afterwards(made):
    blocks, compiled = list(decoder_blocks(made.model)), []
    before = [block.forward for block in blocks]
    with pytest.raises(RuntimeError, match="in between"):
        raises_inside(
            made.model, lambda: compiled.extend(hasattr(b.forward, "_torchdynamo_orig_callable") for b in blocks)
        )
    assert compiled == [True] * len(blocks)
    assert [block.forward for block in blocks] == before
    assert not any("forward" in vars(block) for block in blocks)


def test_where_one_block_cannot_be_compiled_none_stays_compiled(made, monkeypatch):
    left = [torch.compile]

    def once(forward, **said):
        if not left:
            raise RuntimeError("no compiler")
        return left.pop()(forward, **said)

    monkeypatch.setattr(torch, "compile", once)
    with pytest.raises(RuntimeError, match="no compiler"), compiled_blocks(made.model):
        pytest.fail("the block must not begin")
    assert not left
    assert not any("forward" in vars(block) for block in decoder_blocks(made.model))


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, NPO(retain="kl"), RMU(layer=0)])
@pytest.mark.parametrize("saving", [False, True])
def test_it_trains_as_uncompiled_blocks_do(made, method, saving):
    """Hidden states are read by a hook on a block, logits narrowed by one on the head, the reference by another adapter."""
    args = {**GRADIENT, "gradient_checkpointing": saving}
    plain, compiled = (train(made, method, DATA, torch_compile=on, **args) for on in (False, True))
    moved = (flat(plain.tensors) - flat(made.start.tensors)).abs().max()
    assert moved > 1
    assert (flat(plain.tensors) - flat(compiled.tensors)).abs().max() < 1e-5 * moved
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-5)


@pytest.mark.slow
def test_a_side_car_that_comes_after_compiling_acts():
    """torch itself would not look whether hooks inside a compiled forward came or went."""
    made = made_model()
    with compiled_blocks(made.model), torch.no_grad():
        bare = made.model(input_ids=ids_of(5)).logits
        for scale in (1.0, 3.0):
            put_sidecar(made.model, {name: scale * tensor for name, tensor in made.start.tensors.items()}, "default")
            found = made.model(input_ids=ids_of(5)).logits
            assert (found - bare).abs().max() > 0.1
            bare = found
    wanted = made.model(input_ids=ids_of(5)).logits
    assert (wanted - found).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.gpu
def test_it_trains_on_cuda_as_uncompiled_blocks_do():
    made = made_model(device="cuda")
    plain, compiled = (train(made, None, torch_compile=on, **GRADIENT) for on in (False, True))
    moved = (flat(plain.tensors) - flat(made.start.tensors)).abs().max()
    assert (flat(plain.tensors) - flat(compiled.tensors)).abs().max() < 1e-4 * moved
