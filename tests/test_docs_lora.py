"""docs/lora.md: its commands run, or compose and could begin; its snippets run; its tables are the code's."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
import yaml
from helpers_architectures import CONFIGS as ARCHITECTURES
from helpers_architectures import MOE
from helpers_runs import CONFIGS, finetune, history, places, tiny, unlearn
from omegaconf import OmegaConf

from fedunlearn.config.lora import REFUSED, LoraArgs
from fedunlearn.doors.adapter import parser, read, serve
from fedunlearn.doors.compose import compose
from fedunlearn.doors.history import tell_history
from fedunlearn.doors.older_names import SAVE, TODAY
from fedunlearn.doors.prepare import prepare
from fedunlearn.errors import UserError
from fedunlearn.models.fingerprint import fingerprint_base
from fedunlearn.models.layers import end_of, layers_of
from fedunlearn.models.resident import release
from fedunlearn.models.skeleton import skeleton
from fedunlearn.models.summary import read_config, summarise_fresh

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "lora.md").read_text()
RANK = "model.model_args.lora_config.r=16"  # the recipe's
BLOCK = re.compile(r"^```(python)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COUNTS = re.compile(r"([\d,]+) of ([\d,]+)")
NEEDS = {
    "CUDA": torch.cuda.is_available,
    "torchao": lambda: importlib.util.find_spec("torchao") is not None,
}
"""What a command's comment may say that it wants, beside what the message says where it is not there."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A command of a shell block, variables put in, and the comment behind it."""

    text: str
    words: tuple[str, ...]
    comment: str

    @property
    def kind(self):
        return "echo" if self.words[0] == "echo" else self.words[1]

    @property
    def name(self):
        return next((word.partition("=")[2] for word in self.words if word.startswith("task_name=")), self.text[:60])


def shell_lines():
    known, found = {}, []
    for text in (text for language, text in BLOCK.findall(TEXT) if not language):
        for line in text.splitlines():
            command, _, comment = line.partition(" #")
            words = shlex.split(command)
            if words[0][1:2] == "=":
                known["$" + words[0][0]] = shlex.split(words[0][2:])
                continue
            whole = (*known.get(words[0], words[:1]), *words[1:])
            found.append(Line(text=command.strip(), words=whole, comment=comment.strip()))
    return found


LINES = shell_lines()
RUNS = [line for line in LINES if line.kind == "src/fed_train.py"]
SNIPPETS = [text for language, text in BLOCK.findall(TEXT) if language]


def rows_of(head):
    """The cells of the table whose head begins so."""
    lines = TEXT.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(head))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def ticked(cells):
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


@pytest.fixture(scope="module")
def place(pocket, tmp_path_factory):
    """Where the reader stands after the first block: ft and npo, small, and the pocket's model."""
    folder = tmp_path_factory.mktemp("lora_doc")
    saves = folder / "saves"
    ft = finetune(pocket, saves, "ft", RANK)
    unlearn(pocket, saves, ft, "npo", RANK, "trainer.federated.num_rounds=4")
    (saves / "pocket" / "seed0").mkdir(parents=True)
    (saves / "pocket" / "seed0" / "model").symlink_to(pocket.model)
    yield folder
    release()


def test_there_is_no_command_of_a_kind_that_is_not_tried():
    assert {line.kind for line in LINES} == {
        "echo", "src/fed_train.py", "src/eval.py", "scripts/adapter.py", "scripts/history.py", "benchmarks/training.py"
    }  # fmt: skip
    assert [line.name for line in RUNS[:2]] == ["ft", "npo"]
    assert len({line.name for line in RUNS}) == len(RUNS) > 15
    assert all(line.words[0] in ("python", "echo") for line in LINES)
    assert (ROOT / "benchmarks" / "training.py").is_file()  # tests/test_benchmarks_training.py runs it
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("line", RUNS, ids=lambda line: line.name)
def test_each_run_composes_and_could_begin(line, place, pocket, monkeypatch):
    """All but the training itself: data, partition, model with its adapter, and what the two can do."""
    monkeypatch.chdir(place)
    primary, experiment, *words = line.words[2:]
    kind = experiment.split("=")[1].split("/")[0]
    assert primary == ("--config-name=unlearn-lora.yaml" if kind == "unlearn" else "--config-name=train-lora.yaml")
    compose(CONFIGS, primary.partition("=")[2], [experiment, *words])
    here = [*places(pocket, place / "saves", f"try_{line.name}"), "eval.at_end=false"]
    asked = [word for word in words if not word.startswith("task_name=")]
    composed = compose(CONFIGS, primary.partition("=")[2], [experiment, *here, *asked])
    missing = [need for need, there in NEEDS.items() if need in line.comment and not there()]
    if missing:
        with pytest.raises(UserError, match=missing[0]):
            prepare(composed)
    else:
        assert prepare(composed).start.tensors


@pytest.mark.parametrize("line", [line for line in LINES if line.kind == "src/eval.py"], ids=lambda line: line.name)
def test_an_evaluation_composes(line):
    assert compose(CONFIGS, "eval.yaml", line.words[2:]).run.parallel == "tp"


@pytest.fixture(scope="module")
def told(place):
    """What each command on files said, in order, run where the reader stands: (line, its text)."""
    found = []
    for line in LINES:
        with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()) as out:
            if line.kind == "echo":
                said, arrow, file = line.words[1:]
                assert arrow == ">"
                Path(file).write_text(said)
            elif line.kind == "scripts/adapter.py":
                serve(read([*line.words[2:], *(["--json"] if COUNTS.match(line.comment) else [])]))
            elif line.kind == "scripts/history.py":
                tell_history(Path(line.words[2]), None)
            else:
                continue
        found.append((line, out.getvalue()))
    return found


def test_every_subcommand_is_shown_and_runs(told):
    verbs = next(action.choices for action in parser()._actions if action.dest == "verb")
    assert {line.words[2] for line, _ in told if line.kind == "scripts/adapter.py"} == set(verbs)
    (rounds,) = (text for line, text in told if line.kind == "scripts/history.py")
    assert "aggregation" in rounds


def test_the_counts_are_those_that_the_commands_say(told):
    counted = [(line, text) for line, text in told if COUNTS.match(line.comment)]
    assert len(counted) == 8
    for line, text in counted:
        said = json.loads(text)
        assert tuple(f"{said[key]:,}" for key in ("trainable", "total")) == COUNTS.match(line.comment).groups(), line


def test_the_adapters_that_were_made_are_what_the_comments_say(told, place):
    """`pushed` is ft + 1.5 (npo - ft): from npo on it is half of the way from ft to npo. `delta` is that way, of rank 16 + 16."""

    def apart(first, second):
        with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()) as out:
            serve(read(["diff", first, second, "--json"]))
        return json.loads(out.getvalue())["whole"]

    way = apart("saves/finetune/ft", "saves/unlearn/npo")["difference"]
    assert way > 0
    assert apart("delta", "back_again")["difference"] == pytest.approx(2 * way, rel=1e-4)
    assert apart("saves/unlearn/npo", "pushed")["difference"] == pytest.approx(way / 2, rel=1e-4)
    assert apart("saves/unlearn/npo", "plain")["difference"] == pytest.approx(0, abs=1e-6 * way)
    ranks = {name: json.loads((place / name / "adapter_config.json").read_text())["r"] for name in ("delta", "mean", "small")}  # fmt: skip
    assert ranks == {"delta": 32, "mean": 16, "small": 8}
    assert fingerprint_base(place / "base") == fingerprint_base(place / "saves/pocket/seed0/model")


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["covariance", "api"])
def test_each_snippet_runs(snippet, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    exec(compile(snippet, "docs/lora.md", "exec"), {"__name__": "snippet"})
    said = capsys.readouterr().out
    if "covariance" in snippet:
        assert re.sub(r"\s|\.0*(?=[\],])|(?<=\d)0+(?=[\],])", "", said).startswith(
            "tensor([[0.5,0],[0,0.5]])tensor([[0.25,0.25],[0.25,0.25]])tensor(0.7071)"
        )


def test_bytes_are_those_of_the_formula(place):
    """And the pocket's own: 4 (r = 16) (d_in + d_out) over two layers of 128 and 384."""
    run = place / "saves" / "finetune" / "ft"
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    found = summarise_fresh(
        skeleton(read_config(place / "saves/pocket/seed0/model")),
        LoraArgs(r=config["r"], lora_alpha=1.0, target_modules="all-linear"),
        "",
    )
    for line in history(run):
        for client in line["clients"]:
            assert 0 < client["bytes_up"] - found.adapter_bytes < 5000
            assert 0 < client["bytes_down"] - found.adapter_bytes < 5000
    assert 2 * 16 * (4 * (128 + 128) + 3 * (128 + 384)) == 81_920
    assert f"4 x 81,920 = {4 * 81_920:,}" in TEXT


class TestSettings:
    def test_every_key_has_a_row_or_a_reason(self):
        ours = ticked(row[0] for row in rows_of("| key | what it is"))
        refused = ticked(row[0] for row in rows_of("| of PEFT's keys"))
        assert sorted(ours) == sorted(field.name for field in fields(LoraArgs))
        assert sorted(refused) == sorted(REFUSED)

    def test_the_presets_and_what_they_cost(self, tmp_path):
        config = next(line.words[1] for line in LINES if line.kind == "echo" and "llama" in line.words[1])
        (tmp_path / "config.json").write_text(config)
        rows = rows_of("| preset | r |")
        assert len(rows) == len(list((CONFIGS / "lora").glob("*.yaml"))) == 3
        for name, *cells in rows:
            said = yaml.safe_load((CONFIGS / "lora" / f"{name.strip('`').partition('=')[2]}.yaml").read_text())
            targets = ", ".join(said["target_modules"]) if len(said["target_modules"]) < 7 else "all seven"
            found = summarise_fresh(
                skeleton(read_config(tmp_path)),
                LoraArgs(r=said["r"], lora_alpha=said["lora_alpha"], target_modules=tuple(said["target_modules"])),
                name,
            )
            size = f"{found.adapter_bytes / 1e6:.1f}"
            assert cells == [
                f"{said['r']}", f"{said['lora_alpha']:g}", targets, f"{said['lora_dropout']:g}", f"{found.trainable:,}", size
            ]  # fmt: skip

    def test_what_you_write_wins(self):
        (line,) = (line for line in RUNS if "lora=high" in line.words)
        found = compose(CONFIGS, "train-lora.yaml", line.words[3:]).run.model.model_args.lora_config
        assert (found.preset, found.r, found.lora_alpha, found.lora_dropout) == ("high", 32, 64.0, 0.05)

    def test_the_older_names(self):
        assert sorted(ticked(row[0] for row in rows_of("| theirs | here"))) == sorted([*TODAY, SAVE, "all"])


class TestTargets:
    ROWS = {"phi3": "Phi-3", "phi": "Phi-2", "gpt2": "GPT-2 (Conv1D)", **dict.fromkeys(MOE, "Qwen3-MoE, Mixtral")}

    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_what_the_words_mean_in_each_family(self, kind):
        rows = {row[0]: row for row in rows_of("| family |")}
        row = rows[self.ROWS.get(kind, next(iter(rows)))]
        layers = layers_of(skeleton(ARCHITECTURES[kind]))
        for word, said in (("attention", row[2]), ("mlp", row[3])):
            names = said.removeprefix("fused experts: ").split()
            found = layers.of_kind(word)
            assert all(any(name.endswith(f".{end}") for end in names) for name in found), word
            assert {end for end in names if any(name.endswith(f".{end}") for name in found)} == set(names), word
            assert (word == "mlp" and kind in MOE) == said.startswith("fused experts")
            assert not said.startswith("fused") or {end_of(name) for name in found} == set(names)

    def test_every_model_file_is_there_with_targets_of_its_family(self):
        files = {path.stem: yaml.safe_load(path.read_text()) for path in (CONFIGS / "model").glob("*.yaml")}
        rows = rows_of("| family |")
        assert sorted(ticked(row[1] for row in rows)) == sorted(files)
        for row in rows:
            known = {*row[2].split(), *row[3].split()}
            for name in ticked(row[1:2]):
                assert set(files[name]["model_args"]["lora_config"]["target_modules"]) <= known, name


SHORT = {field.name for field in fields(LoraArgs)}
NO_OVERRIDES = {
    "model.model_args.use_lora=false": "an evaluation's",
    "launcher=superlink": "with the federation's address",
    "use_reentrant=False": "torch's",
    "weights=product_norm": "short for aggregation.weights",
}
INLINE = sorted(set(re.findall(r"`([a-z_]+(?:\.\w+)*=[^`|…]*[^`|…=N])`", TEXT)) - set(NO_OVERRIDES))


@pytest.mark.parametrize("said", INLINE)
def test_each_setting_that_is_named_in_passing_arrives(said):
    """Keys of lora_config stand by their own names."""
    words = [f"model.model_args.lora_config.{one}" if one.split("=")[0] in SHORT else one for one in said.split(" ")]
    kind, primary = ("unlearn", "unlearn-lora.yaml") if "protocol=" in said else ("finetune", "train-lora.yaml")
    composed = compose(CONFIGS, primary, [f"experiment={kind}/tofu/pocket", "task_name=t", *words])
    settings = {key: value for key, _, value in (word.partition("=") for word in words) if "." in key}
    assert composed.run.task_name == "t"
    for key, value in settings.items():
        assert OmegaConf.select(OmegaConf.create(composed.text), key) == yaml.safe_load(value)


def test_the_settings_in_passing_are_found():
    assert len(INLINE) > 30
    assert all(f"`{said}`" in TEXT for said in NO_OVERRIDES)


def test_what_it_quotes_of_messages_is_what_they_say(place, pocket, monkeypatch):
    monkeypatch.chdir(place)
    other = ("model.model_args.pretrained_model_name_or_path=saves/finetune/ft", "model.model_args.lora_config.r=5")
    with pytest.raises(UserError, match="differs from the loaded adapter's"):
        prepare(tiny(pocket, place / "saves", "unlearn", "quoted", *other))
    code = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    quoted = re.findall(r"adapter does not load: (.*?) \|", TEXT)
    assert len(quoted) == 3
    for text in ticked(quoted):
        assert text.replace(" adapter_model.safetensors", "") in code


def shortened(line):
    """A line of a shell block; empty where this machine has not what it needs."""
    command, _, comment = line.partition(" #")
    if any(need in comment and not there() for need, there in NEEDS.items()):
        return ""
    is_example = command.startswith("$") and command not in ("$T task_name=ft", "$U task_name=npo")
    return f"{command} trainer.federated.num_rounds=2 eval.at_end=false" if is_example else command


@pytest.mark.slow
def test_every_block_runs_in_order(tmp_path):
    """On the real pocket, as it stands; what begins with $T, after the first two, for two rounds and without evaluation."""
    for name in ("src", "configs", "scripts", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = ["set -euo pipefail"]
    for language, text in BLOCK.findall(TEXT):
        script.append(f"python - <<'END'\n{text}END\n" if language else "\n".join(map(shortened, text.splitlines())))
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["env", f"PATH={path}", "bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rounds = history(tmp_path / "saves" / "finetune" / "ft")
    sent = {
        (round(c["bytes_up"] / 1e3, 1), round(c["bytes_down"] / 1e3, 1)) for line in rounds for c in line["clients"]
    }
    assert sent == {(331.7, 331.8)}
    assert [round(rounds[0]["aggregation_error"], 2), round(rounds[-1]["aggregation_error"], 3)] == [0.28, 0.008]
    assert re.search(r"lost [45]\.\d+e-03 of the change", done.stdout)  # 0.5 %
