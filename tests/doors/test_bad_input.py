"""Bad input: one clear message with code 2 and no traceback, and under saves/ everything as it was."""

import copy
import errno
import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers_runs import CONFIGS, adapter_bytes, finetune, tiny
from safetensors.torch import load_file, save_file

from fedunlearn.config.parse import parse_config
from fedunlearn.doors.compose import ComposedConfig, compose
from fedunlearn.doors.evaluation import run_evaluation
from fedunlearn.doors.main import guarded, hydra_door
from fedunlearn.doors.stages import run_federated
from fedunlearn.errors import UserError
from fedunlearn.files import append_line
from fedunlearn.training.client_update import client_update
from fedunlearn.training.local import LocalData, LocalSettings

BASE = "model.model_args.pretrained_model_name_or_path"
LORA = "model.model_args.lora_model_path"
TARGETS = "model.model_args.lora_config.target_modules"
WEIGHTS = "adapter_model.safetensors"
ONE = "trainer.federated.num_rounds=1"


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below: path -> size and time of change (0, 0 for a folder)."""
    found = sorted(folder.rglob("*"))
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) if p.is_file() else (0, 0) for p in found
    }


@pytest.fixture(scope="module")
def tuned(pocket, tmp_path_factory):
    """A finished fine-tuning run: 4 clients, round robin, r = 4."""
    return finetune(pocket, tmp_path_factory.mktemp("tuned"))


@pytest.fixture
def told(saves, capsys):
    """Gives a call that does the work, which must be refused with nothing changed under saves, and gives its messages."""
    saves.mkdir()

    def call(work) -> list[str]:
        before = tree(saves)
        code = guarded(work)
        said = capsys.readouterr().err
        assert code == 2, said
        assert "Traceback" not in said
        assert tree(saves) == before
        return [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]

    return call


@pytest.fixture(scope="module")
def composed(pocket):
    """Both kinds of runs as Hydra composes them, in 0.3 s each: the tests change values in these."""
    return {kind: tiny(pocket, Path("saves"), kind, "x") for kind in ("finetune", "unlearn")}


def changed_by(config: ComposedConfig, overrides: tuple[str, ...]) -> ComposedConfig:
    plain = copy.deepcopy(dict(config.plain))
    for override in overrides:
        key, _, value = override.partition("=")
        *path, last = key.split(".")
        functools.reduce(lambda tree, name: tree[name], path, plain)[last] = yaml.safe_load(value)
    return replace(config, plain=plain, run=parse_config(plain))


@pytest.fixture
def refused(told, composed, pocket, saves):
    """Gives a call that composes and runs, and gives the one message it is refused with."""

    def run(kind: str, overrides: tuple[str, ...]) -> object:
        if kind == "eval":
            return run_evaluation(evaluation(pocket, saves, *overrides))
        if any(override.startswith("partition=") for override in overrides):
            return run_federated(tiny(pocket, saves, kind, "x", *overrides))
        places = [
            f"paths.{name}_dir={saves / sub}" for name, sub in (("saves", ""), ("cache", "cache"), ("pocket", "pocket"))
        ]
        return run_federated(changed_by(composed[kind], (*places, *overrides)))

    def call(kind: str, *overrides: str) -> str:
        lines = told(lambda: run(kind, overrides))
        assert len(lines) == 1, lines
        return lines[0]

    return call


def evaluation(pocket, saves, *overrides) -> ComposedConfig:
    own = (
        "experiment=eval/tofu/pocket", "task_name=x", f"tofu_path={pocket.data}", f"{BASE}={pocket.model}", f"paths.saves_dir={saves}",
        "model.model_args.lora_config.r=4", "eval.max_rows=1", "eval.max_new_tokens=2",
    )  # fmt: skip
    return compose(CONFIGS, "eval.yaml", [*own, *overrides])


@pytest.mark.parametrize(
    ("kind", "overrides", "said"),
    [
        ("finetune", "trainer.args.learning_rat=1", "did you mean 'learning_rate'?"),
        ("finetune", "model.model_args.use_lora=false", "use_lora=false in a federated run: only adapters travel; set use_lora=true"),
        ("finetune", "task_name=a/b", "task_name='a/b' must be a plain folder name"),
        ("finetune", "task_name=..", "task_name='..' must be a plain folder name"),
        ("finetune", f"task_name={'a' * 300}", "at most 200 bytes"),
        ("finetune", "trainer.federated.num_clients=-1", "num_clients=-1 must be above 0"),
        ("finetune", "trainer.federated.min_clients=5", "min_clients=5 must lie between 1 and the clients drawn each round, 4 of num_clients=4: lower it, or raise fraction_train or num_train_clients"),
        ("finetune", "trainer.federated.num_train_clients=2 trainer.federated.min_clients=3", "min_clients=3 must lie between 1 and the clients drawn each round, 2 of num_clients=4"),
        ("finetune", "trainer.federated.num_train_clients=5", "num_train_clients=5 must lie between 1 and num_clients=4, or be null (by fraction_train)"),
        ("finetune", "trainer.federated.num_train_clients=2 trainer.federated.fraction_train=0.5", "num_train_clients=2 beside fraction_train=0.5: give one of the two"),
        ("finetune", "trainer.federated.force_owners=true", "force_owners=true: nobody owns forget rows where nothing is unlearned; leave it false"),
        ("finetune", "trainer.federated.wire_dtype=float16", "wire_dtype='float16' does not fit; did you mean 'bfloat16'? allowed: float32, bfloat16"),
        ("finetune", "gate.max_norm_ratio=1", "gate.max_norm_ratio=1.0 must be above 1 (the median itself), at most 1e6, or null for no bound"),
        ("finetune", "gate.max_client_share=0", "gate.max_client_share=0.0 must lie in (0, 1], or null for no cap"),
        ("finetune", "gate.max_reply_ratio=0.5", "gate.max_reply_ratio=0.5 must be at least 1"),
        ("finetune", "gate.max_ratio=3", "gate.max_ratio=3 is an unknown key; did you mean 'max_norm_ratio'? Known: max_client_share, max_norm_ratio, max_reply_ratio, max_update_ratio. Correct it or leave it out"),
        ("finetune", "aggregation.mask=a", "aggregation.mask='a' does not fit; allowed: both, b, alternate"),
        ("finetune", "aggregation.reducer=mean", "aggregation.reducer='mean' does not fit; allowed: factors, padded_factors, trimmed_mean, product, stack"),
        ("finetune", "aggregation.softness=0.5", "aggregation.softness=0.5 beside aggregation.gauge=as_is: it is the softness of procrustes, wanted there (0.5 in FedRot) and null elsewhere"),
        ("finetune", "aggregation.sidecar_rank=4", "aggregation.sidecar_rank=4 beside aggregation.residual=dropped: there is no side-car; set residual=sidecar or leave it null"),
        ("finetune", "trainer.args.loraplus_lr_ratio=0", "loraplus_lr_ratio=0.0 must lie between 1e-6 and 1e6; null or 1: B learns at A's rate"),
        ("finetune", "model.model_args.device=cpu trainer.args.optim=paged_adamw_8bit", "optim=paged_adamw_8bit needs a CUDA device, and the base is on the cpu: set adamw_torch"),
        ("finetune", "model.model_args.device=cpu model.model_args.quantization=nf4", "quantization=nf4 needs CUDA, and model.model_args.device=cpu: set device=auto, or choose torchao_int8"),
        ("finetune", "trainer.args.dataloader_num_workers=2", "dataloader_num_workers=2 is refused: rows are tokenised once and kept in memory"),
        ("finetune", "trainer.args.learning_rate=-1", "learning_rate=-1.0 must not be negative"),
        ("finetune", "trainer.federated.num_clients=21", "num_clients=21 exceeds the 20 authors"),
        ("finetune", "forget_split=forget01 retain_split=retain99", "has no split 'forget01': 1 % of its 20 authors is no whole number"),
        ("finetune", "forget_split=forget05", "forget_split='forget05' and retain_split='retain90' are no pair"),
        ("unlearn", "partition=by_author trainer.federated.num_clients=10", "client 9 of 10 owns forget rows only (8 of the request), but method NPO"),
        ("finetune", f"{BASE}=/nowhere/model", "'/nowhere/model' does not exist: give a folder that does, a hub id"),
        ("finetune", f"{LORA}=/nowhere/adapter", "'/nowhere/adapter' does not exist: give a model folder, a PEFT adapter"),
        ("finetune", f"{TARGETS}=[q_prj]", "target_modules: 'q_prj' matches no module of this base; linear ones are down_proj"),
        ("finetune", f"{BASE}=nobody/nothing", "'nobody/nothing' is no folder here, and the model hub did not give it"),
        ("finetune", "tofu_path=nobody/nothing", "tofu_path='nobody/nothing': split 'full' is not in the cache and the hub cannot be reached"),
        ("finetune", "tofu_path=pocket:x", "tofu_path='pocket:x' is no folder"),
        ("finetune", "resume=true", "resume=true, but "),
        ("finetune", "paths.saves_dir=/dev/null", "cannot be made, for '/dev/null' is a file"),
        ("finetune", "paths.saves_dir=/proc/nowhere", "cannot be written (No such file or directory)"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_key_and_way_out(refused, kind, overrides, said):
    assert said in refused(kind, *overrides.split())


def test_misspelt_members_of_groups_are_told_with_the_nearest(told):
    words = [
        "task_name=x",
        "strategy=fedavgg",
        "aggregation=flra",
        "robust=krumm",
        "method=npoo",
        "partition=by_auther",
    ]
    lines = told(lambda: compose(CONFIGS, "unlearn-lora.yaml", words))
    assert [line.split(" Known:")[0] for line in lines] == [
        "strategy='fedavgg' is unknown; did you mean 'fedavg'?",
        "aggregation='flra' is unknown; did you mean 'flora'?",
        "robust='krumm' is unknown; did you mean 'krum'?",
        "method='npoo' is unknown; did you mean 'npo'?",
        "partition='by_auther' is unknown; did you mean 'by_author'?",
    ]


def test_faults_of_folder_data_and_model_are_told_at_once(told, pocket, saves, tuned):
    shutil.copytree(tuned, saves / "finetune" / "x")
    faults = ("trainer.args.seed=9", "retain_logs_path=/nowhere/log", f"{BASE}=/nowhere/model")
    lines = told(lambda: run_federated(tiny(pocket, saves, "finetune", "x", *faults)))
    wanted = ("was made with another config", "retain_logs_path='/nowhere/log'", "'/nowhere/model' does not exist")
    assert [word in line for word, line in zip(wanted, lines, strict=True)] == [True] * 3


# --- the server: strategies, aggregation, robust weights, ranks


@pytest.fixture
def door(saves, pocket, capsys):
    """Gives a call of the door as the command line has it, which must be refused: code 2, one line, nothing changed under saves."""
    saves.mkdir(exist_ok=True)

    def call(*overrides: str) -> str:
        before = tree(saves)
        assert hydra_door(CONFIGS, "train-lora.yaml", run_federated, words(pocket, saves, "x", ONE, *overrides)) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert tree(saves) == before
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        return line.removeprefix("error: ")

    return call


OURS = "a frozen dataclass that subclasses fedunlearn.aggregation.base.ServerOptimizer"
FLOWERS = "a Flower strategy (flwr.serverapp.strategy.*)"
RANKS_DIFFER = "partition.ranks or lora_alphas give clients a rank or scale of their own, but aggregation.reducer=factors needs factors of one: choose aggregation=flora, flexlora or hetlora, or leave them null"
MOMENTS = "its moments belong to entries of the factors, and this gauge changes what an entry means in each round; choose fedavg or fedprox"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("strategy=fedadamm", "strategy='fedadamm' is unknown; did you mean 'fedadam'? Known: fedadagrad, fedadam, fedavg, fedavgm, fedprox, fedyogi (configs/strategy/)"),
        ("strategy=fedavg strategy.tau=1", "strategy.tau=1 is an unknown key. FedAvg has no parameters. Correct it or leave it out"),
        ("strategy=fedprox strategy.tau=1", "strategy.tau=1 is an unknown key. Known: mu. Correct it or leave it out"),
        ("strategy=fedadam strategy.epsilon=1", "strategy.epsilon=1 is an unknown key. Known: beta_1, beta_2, bias_correction, server_lr, tau, v_init. Correct it"),
        ("strategy=fedadam strategy.tau=0", "strategy.tau=0.0 is refused: FedAdam wants a number above 0, at most 1e6; correct it, or leave it out for 0.001"),
        ("strategy=fedadam strategy.beta_1=1", "strategy.beta_1=1.0 is refused: FedAdam wants a number in [0, 1); correct it, or leave it out for 0.9"),
        ("strategy=fedyogi strategy.beta_2=-0.1", "strategy.beta_2=-0.1 is refused: FedYogi wants a number in [0, 1); correct it, or leave it out for 0.99"),
        ("strategy=fedadam strategy.beta_2=nan", "strategy.beta_2=nan does not fit; allowed: a finite number"),
        ("strategy=fedavgm strategy.momentum=1", "strategy.momentum=1.0 is refused: FedAvgM wants a number in [0, 1)"),
        ("strategy=fedprox strategy.mu=-1", "strategy.mu=-1.0 is refused: FedProx wants a number from 0 to 1e6; correct it, or leave it out for 0.01"),
        ("strategy=fedadagrad strategy.server_lr=-1", "strategy.server_lr=-1.0 is refused: FedAdagrad wants a number above 0, at most 1e6; correct it, or leave it out for 0.001"),
        ("strategy=fedavgm strategy.server_lr=0", "strategy.server_lr=0.0 is refused: FedAvgM wants a number above 0, at most 1e6"),
        ("aggregation=fedit partition.ranks=[4,2,2,1]", RANKS_DIFFER),
        ("aggregation=fedit partition.lora_alphas=[8,8,8,4]", RANKS_DIFFER),
        ("aggregation=flora partition.ranks=[8,4,4,4]", "partition.ranks=[8, 4, 4, 4]: 8 is above the adapter's r=4, which is the largest there can be: lower it, or raise model.model_args.lora_config.r"),
        ("aggregation=flora partition.ranks=[4,4,4]", "partition.ranks has 3 entries, trainer.federated.num_clients=4: give one a client, or null"),
        ("aggregation=flora partition.ranks=[4,4,4,0]", "partition.ranks=[4, 4, 4, 0] must be whole numbers from 1, one a client"),
        ("aggregation=flora partition.lora_alphas=[4,4,4,-1]", "partition.lora_alphas=[4.0, 4.0, 4.0, -1.0] must be numbers from 1e-6 to 1e6, one a client"),
        ("strategy=fedadam aggregation=flexlora", f"strategy FedAdam beside aggregation.gauge=balanced: {MOMENTS}"),
        ("strategy=fedyogi aggregation=fedex", "strategy FedYogi beside aggregation.residual=sidecar: what is left over belongs to the mean itself, which this strategy does not send; choose fedavg or fedprox"),
        ("aggregation=flora aggregation.residual=dropped", "aggregation.reducer=stack beside aggregation.residual=dropped: all that was learnt would be thrown away; choose residual=sidecar"),
        ("robust=krum", "robust Krum needs 5 updates a round, trainer.federated draws 4 clients: draw more, lower robust.num_malicious, or choose robust=off"),
        ("robust=krum robust.num_malicious=-1", "robust.num_malicious=-1 must not be negative"),
        ("robust=norm_clipping robust.max_norm=0", "robust.max_norm=0.0 must be above 0, at most 1e6, or null for the round's median norm"),
        ("strategy._target_=nowhere.Strategy", f"strategy._target_='nowhere.Strategy' cannot be imported (No module named 'nowhere'): give the import path of {OURS} or of {FLOWERS}"),
        ("strategy._target_=flwr.serverapp.strategy.FedAdm", "strategy._target_='flwr.serverapp.strategy.FedAdm': flwr.serverapp.strategy has no 'FedAdm'; did you mean 'FedAdam'? give"),
        ("strategy._target_=flwr.serverapp.Grid", f"strategy._target_='flwr.serverapp.Grid' is not a ServerOptimizer or {FLOWERS}: give the import path of {OURS}"),
        ("strategy._target_=helpers_strategies.NoStrategy", "strategy._target_='helpers_strategies.NoStrategy' is no Flower strategy: make it a subclass of flwr.serverapp.strategy.Strategy"),
        ("strategy._target_=helpers_strategies.Refusing +strategy.share=2", "strategy._target_='helpers_strategies.Refusing' cannot be built (ValueError: share is at most 1): correct strategy.* or choose another strategy"),
        ("strategy._target_=flwr.server.strategy.FedAvg", "strategy._target_='flwr.server.strategy.FedAvg' is a strategy of Flower's legacy interface (configure_fit): name its like in flwr.serverapp.strategy"),
        ("strategy._target_=flwr.serverapp.strategy.FedAvg +strategy.fraction_train=0.5", "strategy.fraction_train=0.5 is refused: trainer.federated.fraction_train draws the clients; leave it out"),
        ("strategy._target_=flwr.serverapp.strategy.FedAvg aggregation=flora", "strategy flwr.serverapp.strategy.FedAvg is Flower's and does its own averaging, per factor: it goes with aggregation.reducer=factors"),
    ],
)  # fmt: skip
def test_what_the_server_cannot_do_is_refused_by_key_and_way_out(door, overrides, said):
    assert door(*overrides.split()).startswith(said)


def test_the_real_door_ends_with_code_2_one_line_and_no_traceback(pocket, saves):
    door = [sys.executable, str(CONFIGS.parent / "src" / "fed_train.py")]
    done = subprocess.run([*door, *words(pocket, saves, "x", "strategy=fedadam", "strategy.tau=0")], capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: strategy.tau=0.0 is refused: FedAdam wants a number above 0, at most 1e6; correct it, or leave it out for 0.001\n"  # fmt: skip
    assert not saves.exists()


def test_a_run_is_not_resumed_with_another_strategy_or_aggregation(door, pocket, saves):
    run_federated(compose(CONFIGS, "train-lora.yaml", words(pocket, saves, "x", ONE)))
    for change, keys in (
        ("strategy=fedprox", "strategy._target_, strategy.mu"),
        ("aggregation=fedex", "aggregation.residual, aggregation.weights"),
        ("robust=norm_clipping", "robust._target_"),
        ("gate.max_norm_ratio=5", "gate.max_norm_ratio"),
    ):
        line = door(change, "resume=true")
        assert f"was made with another config (differs in {keys}): choose another task_name, or overwrite=true" in line


def test_a_checkpoint_of_another_strategy_is_not_gone_on_with(door, pocket, saves):
    """Where the config is the same, the class behind it may have changed: the state says whose it is."""
    run_federated(compose(CONFIGS, "train-lora.yaml", words(pocket, saves, "x", ONE)))
    (path,) = (saves / "finetune" / "x" / "rounds").glob("*1/checkpoint.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "strategy": "mine.Other"}))
    (saves / "finetune" / "x" / "done.json").unlink()  # a finished run is left as it is
    line = door("resume=true")
    assert (
        "round 1 on disk holds the state of strategy mine.Other, this run has fedunlearn.aggregation.fedavg.FedAvg"
        in line
    )
    assert line.endswith("go on with the strategy it was begun with, or start anew with overwrite=true")


# --- adapters and bases


def without_weights(folder):
    (folder / WEIGHTS).unlink()


def truncated(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:999])


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def changed(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1] + b"\x77")


def endless(folder):
    """A foreign adapter whose training diverged."""
    (folder / "fedunlearn.json").unlink()
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, min(tensors): tensors[min(tensors)] * float("nan")}, folder / WEIGHTS)


def rescaled(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))


def rankless(folder):
    (folder / "fedunlearn.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": "16"}))


def writes(name, data):
    return lambda folder: (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_weights, f"lacks {WEIGHTS}: name a complete PEFT folder"),
        (truncated, "is corrupt or truncated"),
        (writes(WEIGHTS, b""), "is corrupt or truncated"),
        (changed, "does not match the hash in fedunlearn.json"),
        (endless, "holds NaN or infinity (1 of 28 tensors)"),
        (rescaled, "adapter_config.json does not match the hash in fedunlearn.json"),
        (rankless, "adapter_config.json has r='16', which is no rank: a whole number from 1"),
        (emptied, "holds neither config.json (a model) nor adapter_config.json (an adapter)"),
        (writes("adapter_config.json", b"{"), "adapter_config.json"),
        (writes("adapter_config.json", b"[]"), "adapter_config.json is no JSON object"),
        (writes("adapter_config.json", b"\xff"), "adapter_config.json"),
        (writes("fedunlearn.json", b"[]"), "fedunlearn.json is no JSON object"),
        (writes("fedunlearn.json", b"{}"), "fedunlearn.json lacks 'tensor_hash'"),
        (writes("fedunlearn.json", b'{"tensor_hash": "", "base_fingerprint": null, "probe": {}}'), "is none of ours"),
    ],
)
def test_a_damaged_adapter_is_refused(refused, tuned, tmp_path, damage, said):
    folder = shutil.copytree(tuned / "adapter", tmp_path / "adapter")
    damage(folder)
    assert said in refused("unlearn", f"{LORA}={folder}")


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b'{"base_model_name_or_path": 5}'])
def test_an_adapter_whose_base_cannot_be_read_is_refused(refused, tuned, tmp_path, text):
    folder = shutil.copytree(tuned / "adapter", tmp_path / "adapter")
    (folder / "adapter_config.json").write_bytes(text)
    assert f"{folder / 'adapter_config.json'} " in refused("unlearn", f"{BASE}={folder}")


def test_an_adapter_of_another_base_is_refused(refused, pocket, tuned, tmp_path):
    other = shutil.copytree(pocket.model, tmp_path / "base")
    tensors = load_file(other / "model.safetensors")
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    line = refused("unlearn", f"{BASE}={other}", f"{LORA}={tuned}")
    assert "belongs to another base: its fingerprint is " in line
    assert line.endswith("name the base it was trained on")


def test_an_adapter_of_another_rank_and_an_adapter_named_twice_are_refused(refused, tuned):
    line = refused("unlearn", f"{BASE}={tuned}", "model.model_args.lora_config.r=8")
    assert line == "model.model_args.lora_config.r=8 differs from the loaded adapter's 4: set that value or null"
    assert "two adapters are named" in refused("unlearn", f"{BASE}={tuned}", f"{LORA}={tuned}/adapter")


def test_a_run_without_a_result_is_neither_model_nor_adapter(refused, tuned, tmp_path):
    unfinished = shutil.copytree(tuned, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "adapter")
    said = "is a run without a result (no adapter/): finish it with resume=true, or name rounds/<n>/adapter in it"
    assert said in refused("eval", f"{BASE}={unfinished}")
    assert said in refused("unlearn", f"{BASE}={unfinished}")
    assert said in refused("unlearn", f"{LORA}={unfinished}")
    (unfinished / "config.json").write_text('{"mode": "eval", "task_name": "e"}')
    assert "is an evaluation, which holds no model" in refused("unlearn", f"{BASE}={unfinished}")


def test_a_model_whose_config_is_damaged_or_which_has_no_chat_template_is_refused(refused, pocket, tmp_path):
    model = shutil.copytree(pocket.model, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    assert "has no chat template: set it to false and give the tags" in refused("finetune", f"{BASE}={model}")
    tags = ("model.template_args.apply_chat_template=false", "model.template_args.user_start_tag=Q")
    assert "needs user_start_tag, user_end_tag, asst_start_tag" in refused("finetune", f"{BASE}={model}", *tags)
    for text in ("[]", "{"):
        (model / "config.json").write_text(text)
        assert "its config.json is" in refused("finetune", f"{BASE}={model}")


# --- partitions


def edit(change, *, keeps_hash=False):
    def apply(saved):
        if not keeps_hash:
            saved["hash"] = None
        change(saved["clients"])
        return saved

    return apply


@pytest.mark.parametrize(
    ("apply", "said"),
    [
        (edit(lambda c: c[3].pop(), keeps_hash=True), "does not match the hash in it: it was changed after it was written"),
        (edit(lambda c: [rows.__setitem__(slice(None), [r for r in rows if r < 72]) for rows in c]), "8 of its rows (first: row 72 of full) belong to no client"),
        (edit(lambda c: c[0].append(c[1].pop())), "splits the author of rows "),
        (edit(lambda c: c[0].append(80)), "gives client 0 row 80, full has rows 0 to 79"),
        (edit(lambda c: c[0].append(-1)), "gives client 0 row -1, full has rows 0 to 79"),
        (edit(lambda c: c[0].append(c[1][0])), "gives a row to two clients"),
        (edit(lambda c: c[0].append(0.5)), "0.5 is no whole number"),
        (edit(lambda c: c.append([])), "num_clients=4, but the partition has 5 clients: set trainer.federated.num_clients=5"),
        (lambda saved: {**saved, "rows_per_author": 2, "hash": None}, "rows_per_author=2, tofu_path="),
        (lambda saved: {**saved, "data_hash": "x", "hash": None}, "was made over other data than tofu_path="),
        (lambda saved: {**saved, "scheme": "x"}, "is no partition file"),
        (lambda saved: [], "is no partition file"),
    ],
)  # fmt: skip
def test_a_partition_made_by_hand_is_checked(refused, tuned, tmp_path, apply, said):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(apply(json.loads((tuned / "partition.json").read_text()))))
    assert said in refused("unlearn", f"partition.path={path}")


def test_a_run_and_a_partition_of_others_are_refused_together(refused, tuned, tmp_path):
    saved = json.loads((tuned / "partition.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**saved, "clients": saved["clients"][::-1], "hash": None}))
    line = refused("unlearn", f"{BASE}={tuned}", f"partition.path={tmp_path / 'mine.json'}")
    assert "gives rows to other clients than" in line
    assert line.endswith("leave partition.path out")


def test_a_partition_that_is_not_there_or_not_json_is_refused(refused, tuned, tmp_path):
    assert "does not exist: name a partition.json" in refused("unlearn", "partition.path=/nowhere.json")
    (tmp_path / "p.json").write_text("{")
    assert "is no partition file" in refused("unlearn", f"partition.path={tmp_path / 'p.json'}")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.federated.num_clients=5", "num_clients=5, but the partition has 4 clients: set trainer.federated.num_clients=4"),
        ("partition=by_author", "{'name': 'ByAuthor'} is asked for, but the fine-tuning run has {'name': 'RoundRobin'}"),
    ],
)  # fmt: skip
def test_unlearning_keeps_the_partition_of_the_fine_tuning_run(refused, tuned, override, said):
    assert said in refused("unlearn", f"{BASE}={tuned}", override)


# --- data and logs


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))


def without_column(folder):
    rows = rows_of(folder / "full.json")
    del rows[3]["answer"]
    write_rows(folder / "full.json", rows)


def one_row_more(folder):
    for name in ("full.json", "retain90.json"):
        write_rows(folder / name, [{"question": "q", "answer": "a"}, *rows_of(folder / name)])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "retain90.json").unlink(), "has no split 'retain90'; it has: forget05, "),
        (lambda f: (f / "world_facts_perturbed.json").unlink(), "has no split 'world_facts_perturbed'"),
        (without_column, "full row 3 needs a text in column 'answer'"),
        (lambda f: (f / "full.json").write_text("{"), "is neither JSON lines nor a JSON list"),
        (lambda f: shutil.copy(f / "forget05.json", f / "forget10.json"), "are not the end and the beginning of its full"),
        (one_row_more, "full has 81 rows, no whole number of authors at 4 rows each"),
    ],
)  # fmt: skip
def test_a_tofu_folder_that_is_not_whole_is_refused_before_the_run(refused, pocket, tmp_path, damage, said):
    folder = shutil.copytree(pocket.data, tmp_path / "tofu")
    damage(folder)
    assert said in refused("finetune", f"tofu_path={folder}", "eval.at_end=true")


def test_a_retain_log_of_something_else_is_refused(refused, pocket, saves, tmp_path):
    (tmp_path / "no.json").write_text("no")
    assert "is no TOFU_EVAL.json" in refused("unlearn", f"retain_logs_path={tmp_path / 'no.json'}")
    run_evaluation(evaluation(pocket, saves, "task_name=trial"))
    log = f"retain_logs_path={saves / 'eval' / 'trial'}"
    assert "made with eval.max_rows=1, this evaluation has None" in refused("unlearn", log)
    other = ("forget_split=forget05", "retain_split=retain95", "eval.max_rows=1")
    assert "the log is of forget_split='forget10', this evaluation of 'forget05'" in refused("unlearn", log, *other)


def test_a_client_without_forget_rows_is_not_asked_to_unlearn_and_says_so_if_it_is(pocket, saves):
    from fedunlearn.doors.stages import central_task

    composed = tiny(pocket, saves, "unlearn", "x")
    task = central_task(composed.run)
    settings = LocalSettings(args=composed.run.trainer.args, collator=composed.run.collator, method=composed.run.method)
    with pytest.raises(ValueError, match="client 7 has nothing to do as unlearn"):
        client_update(None, {}, LocalData(forget=(), retain=()), replace(task, client_id=7), settings)


# --- folders


def test_a_folder_that_is_taken_stays_as_it_is(refused, pocket, saves):
    folder = finetune(pocket, saves, "x")
    differs = "differs in trainer.args.seed): choose another task_name, or overwrite=true"
    for more in ((), ("resume=true",)):
        assert differs in refused("finetune", "trainer.args.seed=3", *more)
    (folder / "config.json").write_text("{")
    assert "config.json' is damaged" in refused("finetune", "resume=true")
    (folder / "config.json").unlink()
    assert "exists and is no run of ours" in refused("finetune")
    shutil.rmtree(folder)
    folder.mkdir()
    assert "is empty: leave resume out" in refused("finetune", "resume=true")
    folder.rmdir()
    folder.write_text("a file")
    for more in ((), ("overwrite=true",)):
        assert "is a file: choose another task_name or paths.saves_dir" in refused("finetune", *more)


def test_an_unfinished_run_is_named_with_both_ways_on(refused, pocket, saves):
    folder = finetune(pocket, saves, "x")
    (folder / "done.json").unlink()
    assert "holds an unfinished run of this config: resume=true goes on, overwrite=true starts anew" in refused(
        "finetune"
    )
    shutil.rmtree(folder / "start")
    assert "lacks start/: put it back, or overwrite=true starts anew in its place" in refused("finetune", "resume=true")


# --- a full disk


@pytest.fixture
def full_disk(monkeypatch):
    """Gives a call after which writing the n-th file whose path holds `part` fails, once."""

    def arm(part: str, nth: int = 1) -> None:
        real, seen = Path.open, []

        def refuse(self, mode="r", *args, **more):
            if part in str(self) and any(letter in mode for letter in "wax"):
                seen.append(self)
                if len(seen) == nth:
                    raise OSError(errno.ENOSPC, "No space left on device", str(self))
            return real(self, mode, *args, **more)

        monkeypatch.setattr(Path, "open", refuse)

    return arm


@pytest.mark.parametrize("part", ["config.json", "provenance.json", WEIGHTS])
def test_a_full_disk_before_the_first_round_leaves_the_old_run_or_nothing(refused, saves, tuned, full_disk, part):
    full_disk(part)
    assert "disk full while saving" in refused("finetune")
    shutil.copytree(tuned, saves / "finetune" / "x")
    full_disk(part)
    line = refused("finetune", "trainer.args.seed=3", "overwrite=true")
    assert ".tmp" not in line
    assert "nothing half-written was left; free some space and give the same command again" in line


@pytest.mark.parametrize(
    ("part", "nth"),
    [("history.jsonl", 2), ("checkpoint.json", 2), ("x/.adapter", 1), ("done.json", 1)],
)  # fmt: skip
def test_after_a_full_disk_the_run_resumes_to_the_same_adapter(pocket, saves, tuned, full_disk, part, nth):
    full_disk(part, nth)
    with pytest.raises(UserError, match=r"disk full while saving .*with resume=true"):
        finetune(pocket, saves, "x")
    assert [path for path in saves.rglob("*") if ".tmp" in path.name] == []
    assert adapter_bytes(finetune(pocket, saves, "x", "resume=true")) == adapter_bytes(tuned)


def test_a_line_that_does_not_fit_leaves_the_lines_before_it_whole(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    append_line(path, '{"round": 1}')

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="disk full while saving"):
        append_line(path, '{"round": 2}')
    assert path.read_text() == '{"round": 1}\n'


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_what_the_machine_refuses_anywhere_is_told_without_a_traceback(told, number):
    def work():
        raise OSError(number, "refused", "/some/place")

    assert "/some/place" in told(work)[0]


# --- the real command line


def words(pocket, saves, task, *more):
    return [
        "experiment=finetune/tofu/pocket", f"tofu_path={pocket.data}", f"{BASE}={pocket.model}", f"paths.saves_dir={saves}",
        f"task_name={task}", "trainer.federated.num_clients=4", "trainer.federated.num_rounds=6", "trainer.args.num_train_epochs=2",
        "model.model_args.lora_config.r=4", "eval.at_end=false", *more,
    ]  # fmt: skip


def _heed_interrupts():
    """A shell lets what it starts in the background ignore SIGINT, and children inherit that: the suite may run so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_in_mid_round_ends_with_130_and_the_run_resumes_bit_equal(pocket, saves):
    door = [sys.executable, str(CONFIGS.parent / "src" / "fed_train.py")]
    running = subprocess.Popen(
        [*door, *words(pocket, saves, "stopped")], stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts
    )
    first, end = saves / "finetune" / "stopped" / "rounds" / "0001", time.monotonic() + 60
    while not first.is_dir() and running.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130, said
    assert said.splitlines()[-1].startswith("interrupted: the same command with resume=true goes on")
    assert "Traceback" not in said
    run_federated(compose(CONFIGS, "train-lora.yaml", words(pocket, saves, "stopped", "resume=true")))
    run_federated(compose(CONFIGS, "train-lora.yaml", words(pocket, saves, "whole")))
    assert adapter_bytes(saves / "finetune" / "stopped") == adapter_bytes(saves / "finetune" / "whole")


def test_an_interrupt_says_the_way_on_that_fits(capsys, monkeypatch, tmp_path):
    from fedunlearn.doors.main import hydra_door

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    assert hydra_door(CONFIGS, "eval.yaml", stop, ["task_name=e"]) == 130
    assert capsys.readouterr().err == "interrupted: nothing was written; the same command starts it again\n"
    assert hydra_door(CONFIGS, "train-lora.yaml", stop, ["task_name=t", "overwrite=true"]) == 130
    assert capsys.readouterr().err.endswith("(and without overwrite=true)\n")


# --- what the first attack found


def test_a_base_that_lacks_a_tensor_is_refused(pocket, saves, tmp_path):
    """transformers would fill the gap at random and go on."""
    broken = tmp_path / "broken"
    shutil.copytree(pocket.model, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its tensors \(first: 'model.layers.1.self_attn.q_proj.weight'\)"):
        finetune(pocket, saves, "ft", f"{BASE}={broken}")
    assert not (saves / "finetune").exists()


def test_a_row_that_does_not_fit_is_told_once_and_leaves_no_folder(pocket, saves):
    with pytest.raises(UserError, match=r"full row \d+ has \d+ tokens .*more than data.max_length=12") as caught:
        finetune(pocket, saves, "ft", "data.max_length=12")
    assert len(caught.value.faults) == 1
    assert not (saves / "finetune").exists()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            "[input_layernorm]",
            "'input_layernorm' matches LlamaRMSNorm, which is no linear layer; linear ones are down_proj",
        ),
        (
            "[embed_tokens]",
            "'embed_tokens' matches model.embed_tokens, an embedding: its rows are looked up, not multiplied",
        ),
        ("[q_proj, c_attn]", "'c_attn' matches no module of this base"),
        ("'q_proj['", r"target_modules='q_proj\[' is no regular expression"),
    ],
)
def test_a_target_that_cannot_carry_lora_is_refused(pocket, saves, targets, message):
    with pytest.raises(UserError, match=message):
        finetune(pocket, saves, "ft", f"model.model_args.lora_config.target_modules={targets}")


@pytest.mark.parametrize("value", ["adam_beta1=1", "adam_beta2=-0.1", "adam_epsilon=-1", "warmup_epochs=-1"])
def test_an_optimiser_s_number_out_of_range_is_refused(pocket, saves, value):
    with pytest.raises(UserError, match=rf"trainer.args.*{value.split('=')[0]}"):
        finetune(pocket, saves, "ft", f"trainer.args.{value}")
