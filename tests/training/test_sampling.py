"""Alternates sampled from the reference: by (seed, row), in eval mode, none of them the answer, kept by what they depend on."""

import json
import re
from dataclasses import replace

import pytest
import torch
from helpers_training import equal, forwards, made_model, train

from fedunlearn.data.tofu import QaRow
from fedunlearn.errors import UserError
from fedunlearn.evals.generation import Draw
from fedunlearn.methods.alternates import Sampled
from fedunlearn.models.adapter_tensors import read_tensors
from fedunlearn.models.lora import check_trainable
from fedunlearn.records.adapter import Weights
from fedunlearn.training import sampling
from fedunlearn.training.charges import Charges
from fedunlearn.training.sampling import sampled_alternates

ROWS = {3: QaRow("Who?", "Ann."), 9: QaRow("Where?", "In Rome.")}
HOW = Sampled(count=3, tries=2, prompt=None, max_new_tokens=6)


@pytest.fixture(scope="module")
def made():
    """Dropout would be seen: half of what goes into the adapter."""
    return made_model(dropout=0.5)


@pytest.fixture(scope="module")
def reference(made):
    """Another adapter than the one the model holds, which it cannot but change what is drawn."""
    generator = torch.Generator().manual_seed(20)
    return Weights({n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in made.start.tensors.items()})


def drawn(made, reference, cache, rows=ROWS, how=HOW, seed=0):
    charges = Charges(cache / "charged.json", 1)
    return sampled_alternates(made, reference, rows, how, seed=seed, cache=cache, charges=charges)


def files(cache):
    return sorted((cache / "alternates").glob("*.json"))


def test_each_row_has_its_number_of_texts_none_empty_or_its_answer(made, reference, tmp_path):
    found = drawn(made, reference, tmp_path)
    assert set(found.texts) == {3, 9}
    for number, texts in found.texts.items():
        assert len(texts) == 3
        assert all(text and text == text.strip() and text != ROWS[number].answer for text in texts)
    assert found.tokens > 0


def test_they_come_from_seed_and_row_and_from_nothing_else(made, reference, tmp_path):
    """Not from global random state, the other rows beside it, their order, or what the model holds; another seed, other texts."""
    torch.manual_seed(1)
    first = drawn(made, reference, tmp_path / "a").texts
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert drawn(made, reference, tmp_path / "b", dict(reversed(ROWS.items()))).texts == first
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn(made, reference, tmp_path / "c", {9: ROWS[9]}).texts == {9: first[9]}
    assert drawn(made, reference, tmp_path / "d", seed=1).texts != first
    assert drawn(made, reference, tmp_path / "e", {4: ROWS[3]}).texts[4] != first[3]


def test_they_are_the_reference_s_and_not_the_active_adapter_s(made, reference, tmp_path):
    own = drawn(made, made.start.weights, tmp_path / "a").texts
    theirs = drawn(made, reference, tmp_path / "b").texts
    assert own != theirs
    held = made_model(dropout=0.5)
    held.put(held.start.replace(reference.factors, {}))
    assert drawn(held, held.start.replace(reference.factors, {}).weights, tmp_path / "c").texts == theirs


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_no_gradient_is_kept(made, reference, tmp_path, training):
    """The same texts as from a model without dropout, whichever mode it was in; the adapter keeps its values."""
    made.model.train(training)
    before = read_tensors(made.model)
    with forwards(made) as seen:
        found = drawn(made, reference, tmp_path / "a").texts
    made.model.eval()
    assert {(f.gradient, f.training) for f in seen} == {(False, False)}
    assert found == drawn(replace(made_model(), fingerprint="other"), reference, tmp_path / "b").texts
    assert all(torch.equal(t, before[n]) for n, t in read_tensors(made.model).items())
    check_trainable(made.model)


def test_they_are_drawn_once_and_read_again(made, reference, tmp_path):
    first = drawn(made, reference, tmp_path)
    assert len(files(tmp_path)) == 2
    saved = json.loads(files(tmp_path)[0].read_text())
    files(tmp_path)[0].write_text(json.dumps({**saved, "texts": ["x", "y", "z"]}))
    with forwards(made) as seen:
        again = drawn(made, reference, tmp_path)
    assert not seen
    assert again.tokens == first.tokens  # a new run pays for what an older one left
    assert ("x", "y", "z") in again.texts.values()
    assert len(set(again.texts.values()) & set(first.texts.values())) == 1


def test_what_they_depend_on_makes_another_file(made, reference, tmp_path):
    cases = [
        {},
        {"seed": 1},
        {"how": replace(HOW, count=2)},
        {"how": replace(HOW, max_new_tokens=5)},
        {"how": replace(HOW, prompt="{question} not {answer}")},
        {"rows": {3: QaRow("Who else?", "Ann.")}},
        {"rows": {3: QaRow("Who?", "Bob.")}},
        {"rows": {4: ROWS[3]}},
        {"reference": made.start.weights},
        {"made": replace(made, fingerprint="another")},
    ]
    for number, case in enumerate(cases, start=1):
        drawn(**{"made": made, "reference": reference, "cache": tmp_path, "rows": {3: ROWS[3]}, **case})
        assert len(files(tmp_path)) == number


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"no json",
        b"\xff",
        b'["one"]',
        b'{"a": 1}',
        b'{"texts": ["one"], "tokens": 1}',
        b'{"texts": [1, 2, 3], "tokens": 1}',
        b'{"texts": ["a", "b", "c"]}',
    ],
)
def test_a_damaged_file_is_drawn_anew_and_told(made, reference, tmp_path, caplog, damage):
    rows = {3: ROWS[3]}
    first = drawn(made, reference, tmp_path, rows)
    (path,) = files(tmp_path)
    path.write_bytes(damage)
    again = drawn(made, reference, tmp_path, rows)
    assert again == first
    assert f"{path} is damaged" in caplog.text
    assert tuple(json.loads(path.read_text())["texts"]) == first.texts[3]


class Scripted:
    """Draws by a script, a list a call, in sample_texts' place; remembers what it was asked for."""

    def __init__(self, *calls):
        self.calls, self.asked = list(calls), []

    def __call__(self, model, chat, prompt, *, count, max_new_tokens, seed):
        self.asked.append((count, seed))
        return tuple(Draw(text, len(text)) for text in self.calls.pop(0))


def test_a_draw_that_equals_the_answer_or_is_empty_is_made_again_in_its_place(made, reference, tmp_path, monkeypatch):
    """Three wanted: one of the first draws is good, then one of two, then the last. Each try has a seed of its own."""
    fake = Scripted(["Ann.", "", "Bob."], ["Ann.", "Cid."], ["Dan."])
    monkeypatch.setattr(sampling, "sample_texts", fake)
    found = drawn(made, reference, tmp_path, {3: ROWS[3]})
    prompt = len(made.chat.prompt("Who?"))
    assert found.texts == {3: ("Bob.", "Cid.", "Dan.")}
    assert [count for count, _ in fake.asked] == [3, 2, 1]
    assert len({seed for _, seed in fake.asked}) == 3
    assert found.tokens == 6 * prompt + 4 + 0 + 4 + 4 + 4 + 4


def test_the_answer_is_compared_stripped(made, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "sample_texts", Scripted(["Ann."] * 3, ["a", "b", "c"]))
    found = drawn(made, reference, tmp_path, {3: QaRow("Who?", " Ann. ")})
    assert found.texts == {3: ("a", "b", "c")}


def test_after_so_many_tries_the_run_ends_and_names_the_row(made, reference, tmp_path, monkeypatch):
    """tries 2: the first draws and two more; one of three was good."""
    fake = Scripted(["Ann.", "Ann.", "Bob."], ["Ann.", "Ann."], ["", "Ann."])
    monkeypatch.setattr(sampling, "sample_texts", fake)
    message = "full row 3: 2 of 3 alternates equal its answer (or are empty) after 2 more draws"
    with pytest.raises(UserError, match=re.escape(message)):
        drawn(made, reference, tmp_path, {3: ROWS[3]})
    assert fake.calls == []
    assert not files(tmp_path)
    assert equal(train(made), train(made)), "the model is as usable as before"


def test_the_prompt_asks_with_question_and_answer(made, reference, tmp_path, monkeypatch):
    asked = []

    def fake(model, chat, prompt, *, count, **_):
        asked.append(chat.tokenizer.decode(list(prompt)))
        return tuple(Draw(f"text {n}", 1) for n in range(count))

    monkeypatch.setattr(sampling, "sample_texts", fake)
    drawn(made, reference, tmp_path, {3: ROWS[3]}, replace(HOW, prompt="Not {answer} to {question} again"))
    drawn(made, reference, tmp_path, {3: ROWS[3]})
    assert "Not Ann. to Who? again" in asked[0]
    assert "Who?" in asked[1]
    assert "Ann." not in asked[1]
