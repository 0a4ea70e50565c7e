"""Composition: the commands of the documentation, word for word, and every fault of a command line at once."""

import shlex
from pathlib import Path

import pytest

from fedunlearn.aggregation.fedadam import FedAdam
from fedunlearn.aggregation.fedprox import FedProx
from fedunlearn.aggregation.robust.krum import Krum
from fedunlearn.config.launcher import LocalLauncher, RayLauncher
from fedunlearn.config.run import EvalRun, TrainRun
from fedunlearn.config.server import GateConfig
from fedunlearn.doors.command_line import read_command_line
from fedunlearn.doors.compose import ComposedConfig, checked_overrides, compose, model_from
from fedunlearn.doors.prepare import at_model
from fedunlearn.errors import UserError
from fedunlearn.methods.pdu import PDU
from fedunlearn.methods.simnpo import SimNPO
from fedunlearn.protocols.target_then_repair import TargetThenRepair

CONFIGS = Path(__file__).parents[2] / "configs"
UNLEARN = (
    "--config-name=unlearn-lora.yaml experiment=unlearn/tofu/default forget_split=forget10 retain_split=retain90 "
    "trainer=FederatedUnlearningTrainer task_name=fed_lora_unlearn model=Llama-3.2-3B-Instruct-lora "
    "model.model_args.pretrained_model_name_or_path=saves/finetune/SAMPLE_TRAIN"
)
STORIES = (
    "--config-name=unlearn-lora.yaml experiment=unlearn/tofu/default tofu_path=../data/tofu model=stories260K-lora "
    "model.model_args.pretrained_model_name_or_path=../models/stories260K task_name=x forget_split=forget01 "
    "retain_split=retain99 trainer.args.max_steps=2"
)
SCRIPT = "--config-name=unlearn-lora.yaml experiment=unlearn/tofu/default model=Llama-3.2-3B-Instruct-lora "


def run_of(words: str, default: str = "train-lora.yaml") -> TrainRun | EvalRun:
    return composed(words, default).run


def composed(words: str, default: str = "train-lora.yaml") -> ComposedConfig:
    line = read_command_line(shlex.split(words), CONFIGS, default)
    return compose(line.config_dir, line.config_name, line.overrides)


def faults(words: str) -> list[str]:
    with pytest.raises(UserError, match=r"\w") as caught:
        composed(words)
    return list(caught.value.faults)


def test_fine_tuning_as_documented():
    run = run_of(
        "--config-name=train-lora.yaml  experiment=finetune/tofu/default task_name=ft model=Llama-3.2-1B-Instruct-lora"
    )
    assert (run.mode, run.data.rows, run.tofu_path, run.method) == ("train", "full", "locuslab/TOFU", None)
    assert run.model.model_args.pretrained_model_name_or_path == "meta-llama/Llama-3.2-1B-Instruct"


def test_unlearning_as_documented():
    run = run_of(UNLEARN)
    assert (run.mode, run.task_name, run.trainer.name) == ("unlearn", "fed_lora_unlearn", "FederatedUnlearningTrainer")
    assert run.model.model_args.pretrained_model_name_or_path == "saves/finetune/SAMPLE_TRAIN"
    assert run.model.model_args.attn_implementation == "flash_attention_2"


def test_pdu_without_eps_is_refused_by_name():
    """The loss on retain rows that is allowed is a matter of the data: no value of ours would be right."""
    (fault,) = faults(f"{UNLEARN} method=pdu")
    assert fault == "method.eps is missing and has no default: give method.eps=VALUE on the command line or set it in a YAML of yours"  # fmt: skip
    assert run_of(f"{UNLEARN} method=pdu method.eps=0.3").method == PDU(eps=0.3)


@pytest.mark.parametrize(
    ("more", "where", "value"),
    [
        ("model.model_args.lora_model_path=path/to/adapter", "model.model_args.lora_model_path", "path/to/adapter"),
        ("strategy=fedprox", "strategy", FedProx(mu=0.01)),
        ("method=simnpo method.beta=2", "method", SimNPO(beta=2.0)),
        ("launcher=ray", "launcher", RayLauncher()),
        ("launcher.isolate=true", "launcher", LocalLauncher(isolate=True)),
        ("strategy=fedadam strategy.server_lr=1e-2", "strategy", FedAdam(server_lr=1e-2)),
        ("robust=krum aggregation=flora", "robust", Krum()),
        ("gate.max_client_share=null", "gate", GateConfig(max_client_share=None)),
        ("protocol=target_then_repair protocol.repair_epochs=null", "protocol", TargetThenRepair(repair_epochs=None)),
        ("experiment=unlearn/tofu/pocket protocol=target_then_repair", "protocol", TargetThenRepair(repair_epochs=1.0)),
        ("trainer.args.learning_rate=1e-5", "trainer.args.learning_rate", 1e-5),
    ],
)
def test_unlearning_with_more_as_documented(more, where, value):
    found = run_of(f"{UNLEARN} {more}")
    for name in where.split("."):
        found = getattr(found, name)
    assert found == value


def test_the_model_of_the_command_line_wins_over_the_experiments():
    run = run_of(STORIES)
    assert run.model.template_args.user_start_tag == "Question: "
    assert (run.model.model_args.lora_config.r, run.trainer.args.max_steps, run.forget_split) == (8, 2, "forget01")


def test_a_script_with_defaults_in_front_is_overridden_by_what_follows():
    run = run_of(f"{SCRIPT} {STORIES}")
    assert run.model.model_args.pretrained_model_name_or_path == "../models/stories260K"


def test_evaluation_as_documented():
    run = run_of("experiment=eval/tofu/default task_name=e", default="eval.yaml")
    assert isinstance(run, EvalRun)
    assert (run.max_length, run.eval.at_end) == (512, True)


def test_the_oracle_as_documented():
    assert run_of("--config-name=train-lora.yaml experiment=retrain/tofu/default task_name=o").data.rows == "retain"


def test_the_pockets_seed_reaches_data_and_base():
    run = run_of("--config-name=train-lora experiment=finetune/tofu/pocket pocket_seed=3 task_name=p")
    assert (run.tofu_path, run.model.model_args.pretrained_model_name_or_path) == ("pocket:3", "pocket:3")


def test_plain_and_text_say_the_same_and_are_resolved():
    config = composed("experiment=finetune/tofu/pocket task_name=p")
    assert config.plain["tofu_path"] == "pocket:0"
    assert "tofu_path: pocket:0\n" in config.text
    assert "hydra" not in config.plain


def test_a_parameter_that_no_yaml_names_needs_no_plus():
    assert run_of("task_name=t data.max_length=99 ++eval.max_rows=3").eval.max_rows == 3
    assert run_of("task_name=t max_length=99", default="eval.yaml").max_length == 99


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("strategy=fedprx", "strategy='fedprx' is unknown; did you mean 'fedprox'? Known: fedadagrad, fedadam, fedavg, fedavgm, fedprox, fedyogi (configs/strategy/)"),
        ("aggregation=flra", "aggregation='flra' is unknown; did you mean 'flora'? Known: fedex, fedit, fedrot, fedsvd, ffa, flexlora, flora, hetlora, rolora (configs/aggregation/)"),
        ("robust=kram", "robust='kram' is unknown; did you mean 'krum'? Known: geometric_median, krum, multi_krum, norm_clipping, off (configs/robust/)"),
        ("partition=by_autor", "partition='by_autor' is unknown; did you mean 'by_author'? Known: by_author, dirichlet, iid, inherit, quantity_skew, round_robin (configs/partition/)"),
        ("--config-name=unlearn-lora.yaml method=nppo", "method='nppo' is unknown; did you mean 'npo'?"),
        ("experiment=finetune/tofu/pockt", "did you mean 'finetune/tofu/pocket'? Known: eval/muse/default, "),
        ("model=null", "model='null' is unknown. Known: Llama-2-7b-hf-lora, "),
        ("method=npo", "method='npo': train-lora.yaml uses no group 'method'; leave it out, or choose another --config-name"),
        ("strategi=fedavg", "strategi='fedavg' is an unknown key; did you mean 'strategy'?"),
        ("trainer.args.lr=1", "trainer.args.lr=1 is an unknown key"),
        ("trainer.args.deepspeed=x", "trainer.args.deepspeed='x' is refused: "),
        ("model.model_args.use_lora=false", "model.model_args.use_lora=false in a federated run"),
        ("trainer.args.seed=[", "'trainer.args.seed=[' is no override"),
        ("trainer.args.seed=1,2", "'trainer.args.seed=1,2' is a sweep: add --multirun"),
        ("hydra.run.dir=elsewhere", "hydra.run.dir='elsewhere' has no effect here"),
        ("'tofu_path=${nowhere}'", "'tofu_path=${nowhere}': Interpolation key 'nowhere' not found"),
        ("~trainer.args.nothing", "'~trainer.args.nothing': Could not delete from config."),
        ("model=stories260K-lora", "model.model_args.pretrained_model_name_or_path is missing and has no default: give model.model_args.pretrained"),
        ("trainer=FederatedUnlearningTrainer", "trainer.name='FederatedUnlearningTrainer' does not fit mode='train': choose trainer=FederatedTrainer"),
        ("--config-name=unlearn-lora.yaml experiment=finetune/tofu/default", "protocol Finetune does not fit mode='unlearn'"),
        ("--config-name=unlern.yaml", "--config-name='unlern.yaml' is unknown; did you mean 'unlearn-lora.yaml'?"),
        ("--config-path=nowhere", "--config-path='nowhere' is no folder"),
    ],
)  # fmt: skip
def test_a_fault_of_the_command_line_is_told_by_key_and_way_out(words, said):
    assert any(said in fault for fault in faults(f"task_name=t {words}"))


def test_faults_of_the_line_the_groups_and_the_records_are_told_at_once():
    told = faults(
        "experiment=finetune/tofu/defualt strategy=fedprx trainer.args.fp16=true trainer.args.seed=x a=[b model.lora=1"
    )
    for said in (
        "experiment=",
        "strategy=",
        "trainer.args.fp16=",
        "trainer.args.seed=",
        "'a=[b'",
        "model.lora=",
        "task_name is missing",
    ):
        assert len([fault for fault in told if fault.startswith(said)]) == 1
    assert len(told) == 7


def test_only_composition_is_checked_where_a_config_is_shown():
    assert checked_overrides(CONFIGS, "train-lora.yaml", ["trainer.args.lr=1"]) == ("++trainer.args.lr=1",)
    with pytest.raises(UserError, match="is unknown; did you mean 'fedprox'"):
        checked_overrides(CONFIGS, "train-lora.yaml", ["strategy=fedprx"])


def test_a_member_of_the_users_own_is_found_by_config_dir(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method/mine.yaml").write_text("_target_: fedunlearn.methods.npo.NPO\nbeta: 0.7\n", encoding="utf8")
    words = f"--config-dir={tmp_path} --config-name=unlearn-lora.yaml task_name=t method=mine"
    assert run_of(words).method.beta == 0.7
    assert faults(f"{words} trainer.args.lr=1")[0].startswith("trainer.args.lr=1 is an unknown key")


def test_an_initialisation_stays_behind_where_an_adapter_takes_the_model_s_place(tmp_path):
    """The second of two requests begins with what the first left; pissa was for the fresh adapter of the first."""
    composed = compose(
        CONFIGS, "train-lora.yaml", ["task_name=t", "++model.model_args.lora_config.init_lora_weights=pissa"]
    )
    model = model_from(composed.plain, str(tmp_path))["model_args"]
    assert model["lora_config"]["init_lora_weights"] is None
    assert model["lora_config"]["r"] == composed.plain["model"]["model_args"]["lora_config"]["r"]
    args = at_model(composed.run, str(tmp_path)).model.model_args
    assert (args.lora_config.init_lora_weights, args.pretrained_model_name_or_path) == (None, str(tmp_path))
    assert composed.run.model.model_args.lora_config.init_lora_weights == "pissa"
