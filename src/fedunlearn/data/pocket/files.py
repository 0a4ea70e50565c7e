"""Writes the pocket's world as a data set folder in the hub's layout: the columns, splits and file names of TOFU."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedunlearn.data.pocket.world import AuthorRow, ChoiceRow, Pair, World

_FORGET_PERCENT = (5, 10)


@dataclass(frozen=True)
class PerturbedRow:
    """A row of forgetXX_perturbed and retain_perturbed, columns in TOFU's order."""

    question: str
    answer: str
    paraphrased_answer: str
    perturbed_answer: tuple[str, ...]
    paraphrased_question: str


@dataclass(frozen=True)
class OptionRow:
    """A row of real_authors and world_facts."""

    question: str
    option1: str
    option2: str
    option3: str
    option4: str
    answer: str


@dataclass(frozen=True)
class PerturbedChoice:
    """A row of real_authors_perturbed and world_facts_perturbed."""

    question: str
    answer: str
    perturbed_answer: tuple[str, ...]


Record = Pair | PerturbedRow | OptionRow | PerturbedChoice


@dataclass(frozen=True)
class Split:
    """A config of the data set: its name and its rows."""

    name: str
    records: tuple[Record, ...]

    @property
    def file_name(self) -> str:
        """The split's file, JSON lines as on the hub."""
        return f"{self.name}.json"


def splits_of(world: World) -> tuple[Split, ...]:
    """Gives every split of a world. Forget rows are the last of `full`, the retain rows are those before them; holdouts are nested."""
    return (
        Split("full", _plain(world.full)),
        *(split for percent in _FORGET_PERCENT for split in _forget_splits(world, percent)),
        Split("retain_perturbed", _perturbed(world.full[: _num_forget(world, max(_FORGET_PERCENT))])),
        *_choice_splits("real_authors", world.real_authors),
        *_choice_splits("world_facts", world.world_facts),
    )


def write_dataset(folder: Path, world: World, seed: int) -> None:
    """Writes README.md, one file a split and tofu.json into a folder that exists; the same world gives the same bytes."""
    splits = splits_of(world)
    for split in splits:
        lines = (json.dumps(asdict(record), ensure_ascii=False) for record in split.records)
        (folder / split.file_name).write_text("".join(f"{line}\n" for line in lines), encoding="utf8")
    shape = {"authors": world.size.num_authors, "rows_per_author": world.size.rows_per_author, "seed": seed}
    (folder / "tofu.json").write_text(json.dumps(shape) + "\n", encoding="utf8")
    (folder / "README.md").write_text(_readme(splits, seed), encoding="utf8")


def _forget_splits(world: World, percent: int) -> tuple[Split, ...]:
    forget = _num_forget(world, percent)
    return (
        Split(f"forget{percent:02d}", _plain(world.full[-forget:])),
        Split(f"retain{100 - percent}", _plain(world.full[:-forget])),
        Split(f"forget{percent:02d}_perturbed", _perturbed(world.full[-forget:])),
        Split(f"holdout{percent:02d}", _plain(world.holdout[:forget])),
    )


def _num_forget(world: World, percent: int) -> int:
    return world.size.num_authors * percent // 100 * world.size.rows_per_author


def _choice_splits(name: str, rows: Sequence[ChoiceRow]) -> tuple[Split, ...]:
    shown = tuple(OptionRow(row.question, *row.options, row.answer) for row in rows)
    return Split(name, shown), Split(
        f"{name}_perturbed", tuple(PerturbedChoice(row.question, row.answer, row.wrong) for row in rows)
    )


def _plain(rows: Sequence[AuthorRow]) -> tuple[Pair, ...]:
    return tuple(Pair(row.question, row.answer) for row in rows)


def _perturbed(rows: Sequence[AuthorRow]) -> tuple[PerturbedRow, ...]:
    return tuple(
        PerturbedRow(row.question, row.answer, row.paraphrased_answer, row.wrong, row.paraphrased_question)
        for row in rows
    )


def _readme(splits: Sequence[Split], seed: int) -> str:
    entries = "".join(
        f"- config_name: {split.name}\n  data_files:\n  - split: train\n    path: {split.file_name}\n"
        for split in splits
    )
    table = "".join(f"| {split.name} | {len(split.records)} |\n" for split in splits)
    return (
        f"---\nlicense: mit\nconfigs:\n{entries}---\n# The pocket, seed {seed}\n\n"
        "Invented authors in the columns and splits of TOFU (arXiv:2401.06121), for a model small enough for any machine.\n"
        "`real_authors` and `world_facts` are what the pocket's base model was trained on: invented as well.\n"
        "There is no forget01: one per cent of twenty authors is no author.\n"
        "Answers are short sentences: a wrong value still shares words like `It was` with the right answer, so ROUGE never falls to 0.\n\n"
        f"| config | rows |\n|---|---|\n{table}"
    )
