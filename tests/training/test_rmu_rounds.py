"""RMU in a client's round: the base stays as it is, layers above the block get no gradient, checkpointing and the last block work."""

import pytest
import torch
from helpers_training import FORGET, GRADIENT, RATE, RETAIN, equal, flat, made_model, train

from fedunlearn.config.data import CollatorConfig
from fedunlearn.config.trainer import GuardArgs
from fedunlearn.data.collator import collate
from fedunlearn.methods.rmu import RMU
from fedunlearn.methods.tokens import Need
from fedunlearn.models.adapter_tensors import write_tensors
from fedunlearn.models.hidden_states import block_output, num_blocks
from fedunlearn.models.lora import hold_reference
from fedunlearn.training.forward import token_losses

OFF = GuardArgs(max_loss=None, max_update_ratio=None)


@pytest.fixture(scope="module")
def made():
    model = made_model()
    hold_reference(model.model, model.start.weights)
    return model


def of_block(made, tensors, block):
    return {n: t - made.start.tensors[n] for n, t in tensors.items() if f".layers.{block}." in n}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_base_is_bit_equal_and_never_asks_for_a_gradient(made, layer, checkpointing):
    """The published code unfreezes blocks of the base; here nothing but the adapter's factors is ever trainable."""
    base = {n: p for n, p in made.model.named_parameters() if ".lora_" not in n}
    before = {n: p.clone() for n, p in base.items()}
    asked = []
    hook = (
        made.model.get_base_model()
        .model.layers[0]
        .register_forward_pre_hook(
            lambda *_: asked.append(any(p.requires_grad or p.grad is not None for p in base.values()))
        )
    )
    train(made, RMU(layer=layer), epochs=2, learning_rate=0.1, gradient_checkpointing=checkpointing)
    hook.remove()
    assert asked
    assert not any(asked)
    assert all(torch.equal(p, before[n]) for n, p in base.items())


@pytest.mark.parametrize("optimizer", [{"optim": "sgd"}, {"weight_decay": 0.5, "learning_rate": 0.1}])
def test_layers_above_the_block_get_no_gradient(made, optimizer):
    """Block 0: its own factors move, those of block 1 stay bit by bit, weight decay or not."""
    result = train(made, RMU(layer=0), epochs=2, **{"learning_rate": 0.5, **optimizer})
    assert all(not change.any() for change in of_block(made, result.tensors, 1).values())
    assert all(change.any() for change in of_block(made, result.tensors, 0).values())


def test_up_to_the_last_block_all_layers_move(made):
    result = train(made, RMU(layer=1), epochs=1, optim="sgd", learning_rate=0.5)
    for block in (0, 1):
        assert all(change.any() for change in of_block(made, result.tensors, block).values())


def test_null_is_half_the_blocks_of_so_small_a_model(made):
    assert num_blocks(made.model) == 2
    assert equal(train(made, RMU()), train(made, RMU(layer=1)))
    assert not equal(train(made, RMU()), train(made, RMU(layer=0)))


@pytest.mark.parametrize("layer", [0, 1])
def test_gradient_checkpointing_gives_the_same_gradient(made, layer):
    """A stopped forward ends inside the checkpoint of the next block: its backward must not be disturbed, nor the next step's."""
    method = RMU(layer=layer)
    plain, saving = (train(made, method, **GRADIENT, gradient_checkpointing=on) for on in (False, True))
    apart = (flat(plain.tensors) - flat(saving.tensors)).abs().max() / RATE
    size = (flat(plain.tensors) - flat(made.start.tensors)).abs().max() / RATE
    assert size > 1e-3
    assert apart < 1e-5 * size
    long, short = (train(made, method, epochs=3, optim="sgd", gradient_checkpointing=on) for on in (False, True))
    assert long.loss == pytest.approx(short.loss, rel=1e-5)
    assert equal(train(made, method, epochs=3, optim="sgd"), long)


@pytest.mark.parametrize("layer", [0, 1])
def test_it_brings_the_labels_states_to_the_target_and_keeps_retain_rows_in_place(made, layer):
    """Many steps: forget rows' mean distance to c falls well below where it was; the retain rows' to the reference stays below theirs."""
    method = RMU(layer=layer, steering=4.0)
    target = method.target(32, 0)

    def distances(tensors):
        write_tensors(made.model, tensors)
        needs = {Need.HIDDEN, Need.REFERENCE_HIDDEN}
        forget, retain = (
            token_losses(made.model, collate(rows, CollatorConfig(), 0, torch.device("cpu")), needs, layer=layer)
            for rows in (FORGET, RETAIN)
        )
        return (
            (forget.hidden - target).square().mean().item(),
            (forget.hidden - forget.reference_hidden).square().mean().item(),
            (retain.hidden - retain.reference_hidden).square().mean().item(),
        )

    before = distances(made.start.tensors)
    after = distances(train(made, method, epochs=60, learning_rate=2e-2, settings={"guard": OFF}).tensors)
    write_tensors(made.model, made.start.tensors)
    assert before[1:] == (0.0, 0.0)
    assert after[0] < 0.6 * before[0]
    assert after[2] < 0.5 * after[1]


class TestBlockOutput:
    def test_the_block_itself_is_not_run_again_and_those_after_it_never(self, made):
        ran, layers = [], made.model.get_base_model().model.layers
        hooks = [b.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, b in enumerate(layers)]
        batch = collate(FORGET, CollatorConfig(), 0, torch.device("cpu"))
        with block_output(made.model, 0, stop=True) as seen:
            made.model(input_ids=batch.input_ids)
            ran.append("not reached")
        for hook in hooks:
            hook.remove()
        assert ran == [0]
        assert seen[0].shape == (*batch.input_ids.shape, 32)

    def test_without_a_stop_the_forward_goes_to_its_end(self, made):
        batch = collate(FORGET, CollatorConfig(), 0, torch.device("cpu"))
        with torch.no_grad():
            plain = made.model(input_ids=batch.input_ids).logits
            with block_output(made.model, 0, stop=False) as seen:
                logits = made.model(input_ids=batch.input_ids).logits
        assert torch.equal(logits, plain)
        assert len(seen) == 1

    def test_another_error_inside_comes_out_and_the_hook_is_gone(self, made):
        with pytest.raises(RuntimeError, match="of another kind"), block_output(made.model, 1, stop=True):
            raise RuntimeError("of another kind")
        assert not any(m._forward_pre_hooks for m in made.model.modules())

    def test_a_model_whose_blocks_cannot_be_told_is_refused(self):
        bare = torch.nn.Linear(2, 2)
        bare.config = type("Config", (), {"num_hidden_layers": 3})()
        with pytest.raises(ValueError, match="no list of 3 decoder blocks with a norm beside it"):
            num_blocks(bare)
