"""Through a tiny Llama: padding, its side, the pad id, prompt tokens and the order of rows change no term of any method."""

from dataclasses import replace

import pytest
import torch
from helpers_tiny import CPU, EVERY, OTHERS, RIGHT, ROWS, made_tiny, name_of, term_of

from fedunlearn.config.data import CollatorConfig
from fedunlearn.data.collator import collate
from fedunlearn.methods.tokens import Need
from fedunlearn.training.forward import token_losses

LEFT = CollatorConfig(padding_side="left")
VARIANTS = [
    pytest.param(LEFT, 0, id="left"),
    pytest.param(CollatorConfig(pad_to_multiple_of=8), 77, id="right to 16"),
    pytest.param(CollatorConfig(padding_side="left", pad_to_multiple_of=32), 0, id="left to 32"),
    pytest.param(RIGHT, 265, id="the pad id is the closing token"),
    pytest.param(LEFT, 10, id="the pad id is a word of the prompt"),
]
METHODS = [pytest.param(method, id=name_of(method)) for method in EVERY]
TERMS = [
    pytest.param(method, term, id=f"{name_of(method)}-{term}")
    for method in EVERY
    for term in ("forget", "retain_loss")
    if term == "forget" or method.retain != "none"
]


@pytest.fixture(scope="module")
def model():
    return made_tiny()


@pytest.fixture(scope="module")
def blind():
    """Attention's output is nought: each position sees itself alone, so a prompt reaches the labels by its last token only."""
    made = made_tiny(target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])
    with torch.no_grad():
        for layer in made.get_base_model().model.layers:
            layer.self_attn.o_proj.weight.zero_()
    return made


def alike(first, second):
    """Values and gradients to 1e-5, the gradients over the largest entry."""
    assert first[1].abs().max() > 1e-4
    apart = (first[1] - second[1]).abs().max() / first[1].abs().max()
    return abs(first[0] - second[0]) < 1e-5 * max(1.0, abs(first[0])) and apart < 1e-5


@pytest.mark.parametrize(("method", "term"), TERMS)
def test_padding_its_side_and_the_pad_id_change_nothing(model, method, term):
    plain = term_of(model, method, term)
    for variant in VARIANTS:
        config, pad = variant.values
        assert alike(plain, term_of(model, method, term, config=config, pad=pad)), variant.id


@pytest.mark.parametrize(("method", "term"), TERMS)
def test_prompt_tokens_change_nothing_where_no_position_sees_another(blind, method, term):
    """All of a prompt but its last token is replaced, in both answers' rows: were any prompt position in the mean, it would be seen."""

    def changed(rows):
        return tuple(
            replace(row, input_ids=(*range(100, 99 + row.num_prompt), *row.input_ids[row.num_prompt - 1 :]))
            for row in rows
        )

    assert changed(ROWS)[2].input_ids == (100, 101, 102, 103, 104, 34, 50, 51, 52, 265)
    plain = term_of(blind, method, term)
    assert alike(plain, term_of(blind, method, term, changed(ROWS), changed(OTHERS)))


@pytest.mark.parametrize("method", METHODS)
def test_a_label_more_changes_something_where_no_position_sees_another(blind, method):
    """The control of the test above: row 1's prompt gives its last token to the labels."""
    rows = (replace(ROWS[0], num_prompt=3), *ROWS[1:])
    plain, moved = term_of(blind, method), term_of(blind, method, rows=rows)
    assert (plain[1] - moved[1]).abs().max() > 1e-3 * plain[1].abs().max()


@pytest.mark.parametrize("config", [RIGHT, LEFT, CollatorConfig(padding_side="left", pad_to_multiple_of=32)])
@pytest.mark.parametrize("layer", [0, 1])
def test_hidden_states_are_those_of_each_row_alone_at_the_labels_own_positions(model, config, layer):
    """Not one place before them, where logits are read; the last block's before the final norm."""
    needs = {Need.HIDDEN, Need.REFERENCE_HIDDEN}
    batch = token_losses(model, collate(ROWS, config, 3, CPU), needs, layer=layer)
    wanted, block = [], model.get_base_model().model.layers[layer]
    handle = block.register_forward_hook(lambda _, inputs, output: wanted.append(output[0]))
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row.input_ids]))
            wanted[-1] = wanted[-1].reshape(len(row.input_ids), -1)[row.num_prompt :]
    handle.remove()
    assert batch.hidden.shape == (8, 32)
    assert batch.hidden.dtype == torch.float32
    assert (batch.hidden - torch.cat(wanted)).abs().max() < 1e-5 * batch.hidden.abs().max()
    assert (batch.reference_hidden - batch.hidden).abs().max() > 1e-2
    assert batch.hidden.requires_grad
    assert not batch.reference_hidden.requires_grad
