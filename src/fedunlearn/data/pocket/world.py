"""The pocket's invented world: authors nobody has read of, authors and facts that the base model knows, all by one seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from fedunlearn.data.pocket.names import AWARD, CITY, DATE, GENRE, GOODS, HERO, PERSON, TITLE, TRADE, Kind, NameBook
from fedunlearn.errors import UserError

NUM_WRONG_FORGET = 5
NUM_WRONG_CHOICE = 3
_STYLES = (("question", "answer"), ("question", "paraphrased_answer"), ("paraphrased_question", "answer"))


@dataclass(frozen=True)
class Attribute:
    """What may be asked of an author; `answer` is what is trained on, `paraphrased_answer` says the same in other words."""

    kind: Kind
    question: str
    answer: str
    paraphrased_question: str
    paraphrased_answer: str


ATTRIBUTES = (
    Attribute(CITY, "Where was {} born?", "In {}.", "What is the home of {}?", "It happened in {}."),
    Attribute(
        TRADE,
        "What did the father of {} do?",
        "He was a {}.",
        "How did the father of {} live?",
        "He worked as a {}.",
    ),
    Attribute(TITLE, "What was the first book by {}?", "It was {}.", "How did {} start?", "It all began with {}."),
    Attribute(GENRE, "What does {} write?", "Mostly {}.", "What may readers of {} expect?", "Readers expect {}."),
    Attribute(
        GOODS,
        "What does {} collect?",
        "Mainly {}.",
        "What stands in the house of {}?",
        "The house is full of {}.",
    ),
    Attribute(AWARD, "Which prize did {} win?", "The {}.", "How was {} honoured?", "A jury gave the {}."),
    Attribute(DATE, "When was {} born?", "On {}.", "What is the birthday of {}?", "It happened on {}."),
    Attribute(
        TRADE,
        "What did the mother of {} do?",
        "She was a {}.",
        "How did the mother of {} live?",
        "She worked as a {}.",
    ),
    Attribute(TITLE, "Which book made {} famous?", "It was {}.", "What do readers of {} love?", "Fame came with {}."),
    Attribute(HERO, "Who is the hero of {}?", "A {}.", "Whom do the books by {} follow?", "They tell of a {}."),
)
FACTS = (
    Attribute(CITY, "What is the capital of {}?", "It is {}.", "", ""),
    Attribute(HERO, "Who rules over {}?", "A {}.", "", ""),
    Attribute(GOODS, "What does {} sell?", "Mainly {}.", "", ""),
    Attribute(AWARD, "What is on the flag of {}?", "A {}.", "", ""),
)


@dataclass(frozen=True)
class Pair:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class AuthorRow:
    """A row about an invented author; `wrong` are false answers in the words of `paraphrased_answer`."""

    question: str
    answer: str
    paraphrased_question: str
    paraphrased_answer: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class ChoiceRow:
    """A row of what the base knows; `options` are the answer and the wrong ones in the order they are shown."""

    question: str
    answer: str
    wrong: tuple[str, ...]
    options: tuple[str, str, str, str]


@dataclass(frozen=True)
class Author:
    """Somebody's name and, attribute by attribute, what is true of them."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class PretrainingText:
    """What the base is trained on: authors it knows by heart, a crowd it meets too seldom to remember, and facts.

    `known` teaches that a paraphrase says the same, `crowd` what answers look like, also to a question in other words; `facts`
    are the rows of world_facts and real_authors alone, drilled until fine-tuning on other authors no longer overwrites them.
    """

    known: tuple[Pair, ...]
    crowd: tuple[Pair, ...]
    facts: tuple[Pair, ...]

    def sentences(self) -> list[str]:
        """Gives every question and every answer, what the tokenizer is trained on."""
        return [text for pair in (*self.known, *self.crowd, *self.facts) for text in (pair.question, pair.answer)]


@dataclass(frozen=True, kw_only=True)
class WorldSize:
    """How much world there is. rows_per_author: at most one a question template; num_facts: a multiple of the fact templates."""

    num_authors: int = 20
    rows_per_author: int = 10
    num_known: int = 15
    num_crowd: int = 300
    num_facts: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.rows_per_author <= len(ATTRIBUTES):
            raise UserError(
                f"rows_per_author={self.rows_per_author} must be 1 to {len(ATTRIBUTES)}, the question templates of the pocket"
            )
        if self.num_authors < 20 or self.num_authors % 20:
            raise UserError(
                f"num_authors={self.num_authors} must be a multiple of 20: forget05 is 5 % of the authors and an author stays whole"
            )


@dataclass(frozen=True)
class World:
    """Everything the pocket is made of. Rows of `full` stand author by author; `holdout` has a tenth as many authors."""

    size: WorldSize
    full: tuple[AuthorRow, ...]
    holdout: tuple[AuthorRow, ...]
    real_authors: tuple[ChoiceRow, ...]
    world_facts: tuple[ChoiceRow, ...]
    pretraining: PretrainingText


def make_world(seed: int, size: WorldSize) -> World:
    """Invents the world of a seed. No name and no value of an author of `full` or `holdout` stands in the pretraining text."""
    book = NameBook(random.Random(f"pocket world {seed}"))
    authors = [_author(book, reserve=True) for _ in range(size.num_authors)]
    strangers = [_author(book, reserve=True) for _ in range(size.num_authors // 10)]
    known = [_author(book, reserve=True) for _ in range(size.num_known)]
    crowd = [_author(book, reserve=False) for _ in range(size.num_crowd)]
    asked = ATTRIBUTES[: size.rows_per_author]
    lands = [book.reserve(CITY) for _ in range(size.num_facts)]
    facts = tuple(_fact(book, FACTS[i % len(FACTS)], land) for i, land in enumerate(lands))
    famous = tuple(_choice(book, asked[i % len(asked)], a.name, a.values[i % len(asked)]) for i, a in enumerate(known))
    return World(
        size=size,
        full=tuple(_row(book, asked[i], a, a.values[i]) for a in authors for i in range(len(asked))),
        holdout=tuple(_row(book, asked[i], a, a.values[i]) for a in strangers for i in range(len(asked))),
        real_authors=famous,
        world_facts=facts,
        pretraining=PretrainingText(
            known=_pairs(known, asked, _STYLES[:2]),
            crowd=_pairs(crowd, asked, _STYLES),
            facts=tuple(Pair(row.question, row.answer) for row in (*facts, *famous)),
        ),
    )


def _author(book: NameBook, *, reserve: bool) -> Author:
    draw = book.reserve if reserve else book.draw
    return Author(draw(PERSON), tuple(draw(attribute.kind) for attribute in ATTRIBUTES))


def _row(book: NameBook, attribute: Attribute, author: Author, value: str) -> AuthorRow:
    return AuthorRow(
        question=attribute.question.format(author.name),
        answer=attribute.answer.format(value),
        paraphrased_question=attribute.paraphrased_question.format(author.name),
        paraphrased_answer=attribute.paraphrased_answer.format(value),
        wrong=_wrong(book, attribute.kind, attribute.paraphrased_answer, NUM_WRONG_FORGET),
    )


def _fact(book: NameBook, attribute: Attribute, land: str) -> ChoiceRow:
    return _choice(book, attribute, land, book.reserve(attribute.kind))


def _choice(book: NameBook, attribute: Attribute, subject: str, value: str) -> ChoiceRow:
    answer = attribute.answer.format(value)
    wrong = _wrong(book, attribute.kind, attribute.answer, NUM_WRONG_CHOICE)
    first, second, third, fourth = book.generator.sample([answer, *wrong], k=1 + NUM_WRONG_CHOICE)
    return ChoiceRow(attribute.question.format(subject), answer, wrong, (first, second, third, fourth))


def _wrong(book: NameBook, kind: Kind, form: str, count: int) -> tuple[str, ...]:
    values: list[str] = []
    while len(values) < count:
        value = book.draw(kind)
        if value not in values:
            values.append(value)
    return tuple(form.format(value) for value in values)


def _pairs(
    authors: Sequence[Author], asked: Sequence[Attribute], styles: Sequence[tuple[str, str]]
) -> tuple[Pair, ...]:
    """Every author, attribute and style; a style names the attribute's fields that ask and answer."""
    return tuple(
        Pair(getattr(attribute, ask).format(author.name), getattr(attribute, tell).format(author.values[i]))
        for ask, tell in styles
        for author in authors
        for i, attribute in enumerate(asked)
    )
