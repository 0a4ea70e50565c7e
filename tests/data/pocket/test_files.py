"""The data set folder: TOFU's files, columns and splits."""

import json
from pathlib import Path

import pytest
from datasets import load_dataset

from fedunlearn.data.pocket.files import splits_of, write_dataset
from fedunlearn.data.pocket.world import WorldSize, make_world

TOFU = Path(__file__).resolve().parents[4] / "shared" / "tofu"
WORLD = make_world(0, WorldSize(num_crowd=5))
COLUMNS = {
    "full": ["question", "answer"],
    "forget10": ["question", "answer"],
    "retain90": ["question", "answer"],
    "holdout10": ["question", "answer"],
    "forget10_perturbed": ["question", "answer", "paraphrased_answer", "perturbed_answer", "paraphrased_question"],
    "retain_perturbed": ["question", "answer", "paraphrased_answer", "perturbed_answer", "paraphrased_question"],
    "real_authors": ["question", "option1", "option2", "option3", "option4", "answer"],
    "world_facts": ["question", "option1", "option2", "option3", "option4", "answer"],
    "real_authors_perturbed": ["question", "answer", "perturbed_answer"],
    "world_facts_perturbed": ["question", "answer", "perturbed_answer"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, WORLD, 0)
    return folder


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.json").read_text(encoding="utf8").splitlines()]


def pairs_of(folder, name):
    return [(row["question"], row["answer"]) for row in rows_of(folder, name)]


@pytest.mark.parametrize("name", COLUMNS)
def test_columns(folder, name):
    assert all(list(row) == COLUMNS[name] for row in rows_of(folder, name))


@pytest.mark.skipif(not TOFU.is_dir(), reason="no copy of TOFU beside the repository")
def test_splits_and_columns_are_those_of_tofu(folder):
    theirs = {path.stem for path in TOFU.glob("*.json")} - {"forget01", "forget01_perturbed", "retain99", "holdout01"}
    ours = {path.stem for path in folder.glob("*.json")} - {"tofu"}
    assert ours == theirs
    for name in theirs:
        published = json.loads((TOFU / f"{name}.json").open(encoding="utf8").readline())
        made = rows_of(folder, name)[0]
        assert list(made) == list(published)
        assert len(made.get("perturbed_answer", [])) == len(published.get("perturbed_answer", []))


@pytest.mark.parametrize(("forget", "retain", "count"), [("forget05", "retain95", 10), ("forget10", "retain90", 20)])
def test_forget_rows_are_the_last_and_retain_rows_the_rest(folder, forget, retain, count):
    full = pairs_of(folder, "full")
    assert len(full) == 200
    assert pairs_of(folder, forget) == full[-count:]
    assert pairs_of(folder, retain) == full[:-count]
    assert pairs_of(folder, f"{forget}_perturbed") == full[-count:]


def test_retain_perturbed_are_the_first_rows(folder):
    assert pairs_of(folder, "retain_perturbed") == pairs_of(folder, "full")[:20]


def test_holdouts_are_nested_and_of_other_authors(folder):
    small, large = pairs_of(folder, "holdout05"), pairs_of(folder, "holdout10")
    assert (len(small), len(large)) == (10, 20)
    assert large[:10] == small
    assert not set(large) & set(pairs_of(folder, "full"))


def test_the_right_answer_is_among_the_options_and_not_among_the_wrong_ones(folder):
    for name in ("real_authors", "world_facts"):
        for shown, perturbed in zip(rows_of(folder, name), rows_of(folder, f"{name}_perturbed"), strict=True):
            assert {shown[f"option{i}"] for i in range(1, 5)} == {shown["answer"], *perturbed["perturbed_answer"]}
            assert perturbed["answer"] not in perturbed["perturbed_answer"]


@pytest.mark.parametrize("name", ["full", "forget05", "real_authors", "world_facts_perturbed", "holdout05"])
def test_the_readme_lets_datasets_load_a_config(folder, name, tmp_path):
    loaded = load_dataset(str(folder), name=name, split="train", cache_dir=str(tmp_path))
    assert [(row["question"], row["answer"]) for row in loaded] == pairs_of(folder, name)


def test_tofu_json_names_the_shape(folder):
    assert json.loads((folder / "tofu.json").read_text()) == {"authors": 20, "rows_per_author": 10, "seed": 0}


def test_rows_per_author_moves_every_split():
    splits = {
        split.name: len(split.records) for split in splits_of(make_world(0, WorldSize(rows_per_author=4, num_crowd=1)))
    }
    assert (
        splits["full"],
        splits["forget05"],
        splits["retain95"],
        splits["holdout10"],
        splits["retain_perturbed"],
    ) == (80, 4, 76, 8, 8)


def test_the_same_world_gives_the_same_bytes_and_another_seed_others(folder, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    for place, seed in ((same, 0), (other, 1)):
        place.mkdir()
        write_dataset(place, make_world(seed, WorldSize(num_crowd=5)), seed)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in same.iterdir())
    assert all((folder / name).read_bytes() == (same / name).read_bytes() for name in names)
    assert all((folder / name).read_bytes() != (other / name).read_bytes() for name in names)
