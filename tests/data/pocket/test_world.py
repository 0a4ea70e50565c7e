"""The invented world: one seed, one world; nothing of the authors to be learned stands in what the base reads."""

import random
import re

import pytest

from fedunlearn.data.pocket.names import AWARD, CITY, DATE, GENRE, PERSON, TITLE, TRADE, NameBook
from fedunlearn.data.pocket.world import ATTRIBUTES, NUM_WRONG_FORGET, WorldSize, make_world
from fedunlearn.errors import UserError

KINDS = (PERSON, CITY, DATE, TITLE, TRADE, GENRE, AWARD)
SIZE = WorldSize()
WORLDS = {seed: make_world(seed, SIZE) for seed in range(4)}


def own_words(world):
    """Names (from the first question of each author) and values (from the answers, cut by the attribute's form)."""
    words = set()
    for i, row in enumerate((*world.full, *world.holdout)):
        attribute = ATTRIBUTES[i % SIZE.rows_per_author]
        before, after = attribute.question.split("{}")
        words.add(row.question.removeprefix(before).removesuffix(after))
        before, after = attribute.answer.split("{}")
        words.add(row.answer.removeprefix(before).removesuffix(after))
    return words


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_kind_has_hundreds_of_values(kind):
    generator = random.Random(0)
    assert len({kind.draw(generator) for _ in range(2000)}) > 500


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_pools_hold_no_word_twice(kind):
    assert all(len(set(pool)) == len(pool) for pool in kind.pools)


def test_a_reserved_value_never_comes_again():
    book = NameBook(random.Random(3))
    reserved = {book.reserve(AWARD) for _ in range(200)}
    drawn = {book.draw(AWARD) for _ in range(5000)}
    assert len(reserved) == 200
    assert not reserved & drawn


def test_the_surname_of_a_reserved_person_never_comes_again():
    book = NameBook(random.Random(3))
    surnames = {book.reserve(PERSON).split()[-1] for _ in range(300)}
    assert len(surnames) == 300
    assert surnames.isdisjoint(book.draw(PERSON).split()[-1] for _ in range(3000))


@pytest.mark.parametrize("seed", WORLDS)
def test_no_name_or_value_of_an_author_stands_in_the_pretraining_text(seed):
    world = WORLDS[seed]
    text = "\n".join(world.pretraining.sentences())
    words = own_words(world)
    assert len(words) == 22 * (1 + SIZE.rows_per_author)
    assert [word for word in words if word in text and re.search(rf"\b{re.escape(word)}\b", text)] == []


@pytest.mark.parametrize("seed", WORLDS)
def test_no_surname_of_an_author_stands_in_the_pretraining_text(seed):
    world = WORLDS[seed]
    surnames = {
        re.search(r"(\w+) born\?$", row.question)[1]
        for row in (*world.full, *world.holdout)
        if row.question.startswith("Where was")
    }
    read = set(re.findall(r"\w+", "\n".join(world.pretraining.sentences())))
    assert len(surnames) == 22
    assert surnames.isdisjoint(read)


def test_what_the_base_is_tested_on_stands_in_the_pretraining_text():
    world = WORLDS[0]
    known = {(pair.question, pair.answer) for pair in (*world.pretraining.known, *world.pretraining.facts)}
    assert {(row.question, row.answer) for row in (*world.real_authors, *world.world_facts)} <= known


def test_the_same_seed_gives_the_same_world():
    assert make_world(1, SIZE) == WORLDS[1]


def test_another_seed_gives_other_names_and_facts():
    names = [own_words(world) for world in WORLDS.values()]
    facts = [{row.answer for row in world.world_facts} for world in WORLDS.values()]
    shared = [len(a & b) for i, a in enumerate(names) for b in names[:i]]
    assert max(shared) < 22  # chance meetings of common values only, of 242
    assert all(not a & b for i, a in enumerate(facts) for b in facts[:i])


def test_wrong_answers_differ_from_the_right_one_and_from_each_other():
    for row in (*WORLDS[0].full, *WORLDS[0].holdout):
        assert len({*row.wrong, row.paraphrased_answer}) == NUM_WRONG_FORGET + 1
    for choice in (*WORLDS[0].real_authors, *WORLDS[0].world_facts):
        assert sorted(choice.options) == sorted([choice.answer, *choice.wrong])
        assert len(set(choice.options)) == 4


def test_the_right_option_does_not_always_stand_first():
    places = {row.options.index(row.answer) for row in (*WORLDS[0].real_authors, *WORLDS[0].world_facts)}
    assert len(places) > 1


def test_rows_stand_author_by_author():
    rows = make_world(0, WorldSize(rows_per_author=3)).full
    assert len(rows) == 60
    assert [row.question.split("?")[0].split()[0] for row in rows[:6]] == [
        a.question.split()[0] for a in ATTRIBUTES[:3]
    ] * 2


def test_the_wrong_answers_have_the_form_of_the_paraphrase():
    for i, row in enumerate(WORLDS[2].full):
        before = ATTRIBUTES[i % 10].paraphrased_answer.split("{}")[0]
        assert all(text.startswith(before) for text in (*row.wrong, row.paraphrased_answer))
        assert row.paraphrased_question != row.question


@pytest.mark.parametrize("rows", [0, 11])
def test_a_row_count_without_templates_is_refused(rows):
    with pytest.raises(UserError, match=f"rows_per_author={rows} must be 1 to 10"):
        WorldSize(rows_per_author=rows)


def test_a_number_of_authors_that_five_per_cent_would_cut_is_refused():
    with pytest.raises(UserError, match="num_authors=30 must be a multiple of 20"):
        WorldSize(num_authors=30)
