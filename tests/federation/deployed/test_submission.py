"""A submitted config on the server's machine: names become the server's own places, and nothing else is taken for one."""

import json
from pathlib import Path

import pytest
from helpers_architectures import CONFIGS
from helpers_deployed import MODEL, submitted, write_sites

from fedunlearn.config.lora import LoraArgs
from fedunlearn.config.parse import parse_config
from fedunlearn.config.reading import Reader
from fedunlearn.config.sites import ServerSite, read_site
from fedunlearn.doors.compose import ComposedConfig
from fedunlearn.doors.prepare import prepare
from fedunlearn.errors import UserError
from fedunlearn.federation.deployed.submission import at_server, brief_of, shaped
from fedunlearn.models.lora import attach_lora
from fedunlearn.models.lora_config import lora_config_of, plain_config
from fedunlearn.models.ranks import scales_in
from fedunlearn.models.resident import release
from fedunlearn.models.skeleton import skeleton


@pytest.fixture
def server(tmp_path, pocket):
    write_sites(tmp_path, pocket)
    (tmp_path / "served" / "finetune" / "ft").mkdir(parents=True)
    (tmp_path / "served" / "finetune" / "oracle").mkdir()
    (tmp_path / "served" / "finetune" / "oracle" / "TOFU_EVAL.json").write_text("{}")
    return read_site(tmp_path / "server.yaml", ServerSite)


def test_an_id_is_the_servers_folder_of_it(server, pocket):
    plain = at_server(server, submitted(pocket, "finetune", "x"))
    assert plain["model"]["model_args"]["pretrained_model_name_or_path"] == str(pocket.model)
    assert (plain["tofu_path"], plain["muse_path"]) == (str(pocket.data), None)
    assert plain["paths"]["saves_dir"] == server.saves_root
    assert Path(plain["paths"]["cache_dir"]).is_relative_to(server.work_dir)


def test_runs_are_looked_for_under_saves_root(server, pocket):
    named = (
        "model.model_args.pretrained_model_name_or_path=saves/finetune/ft", "partition.path=saves/finetune/ft",
        "retain_logs_path=saves/finetune/oracle/TOFU_EVAL.json",
    )  # fmt: skip
    plain, root = at_server(server, submitted(pocket, "unlearn", "x", *named)), Path(server.saves_root) / "finetune"
    assert plain["model"]["model_args"]["pretrained_model_name_or_path"] == str(root / "ft")
    assert plain["partition"]["path"] == str(root / "ft")
    assert plain["retain_logs_path"] == str(root / "oracle" / "TOFU_EVAL.json")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.model_args.pretrained_model_name_or_path=/etc", f"'/etc' names nothing on the server: give a run of its own as saves/finetune/NAME or saves/unlearn/NAME, or a model's id, one of {MODEL}"),
        ("model.model_args.pretrained_model_name_or_path=saves/../../etc", "'saves/../../etc' names nothing on the server"),
        ("model.model_args.pretrained_model_name_or_path=saves/finetune/gone", "'saves/finetune/gone': the server has no such run under its saves_root"),
        ("partition.path=/etc/passwd", "partition.path='/etc/passwd' names nothing on the server"),
        ("retain_logs_path=/etc/passwd", "retain_logs_path='/etc/passwd' names nothing on the server"),
        ("model.model_args.lora_model_path=/tmp", "lora_model_path='/tmp' names nothing on the server"),
        ("model.tokenizer_args.pretrained_model_name_or_path=/tmp", "is a file of one machine, which nodes do not have: leave it null"),
    ],
)  # fmt: skip
def test_any_other_path_is_refused_by_name(server, pocket, override, said):
    with pytest.raises(UserError) as caught:
        at_server(server, submitted(pocket, "finetune", "x", override))
    assert said in "\n".join(caught.value.faults)


def test_all_faults_are_told_at_once(server, pocket):
    overrides = ("partition.path=/a", "retain_logs_path=/b", "tofu_path=null", "muse_path=muse")
    plain = {**submitted(pocket, "finetune", "x", *overrides[:2]), "tofu_path": None, "muse_path": "muse"}
    with pytest.raises(UserError) as caught:
        at_server(server, plain)
    assert len(caught.value.faults) == 3
    assert "muse_path='muse': the server's site YAML names no data.muse_path" in caught.value.faults


def test_nodes_are_told_what_the_adapter_is_made_of(server, pocket):
    """A node attaches the adapter from the brief alone: every key that gives it a tensor, or takes one, is the start's own."""
    lora = "++model.model_args.lora_config."
    wanted = {
        "use_dora": True,
        "modules_to_save": ["lm_head"],
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
    }
    asked = (f"{lora}use_dora=true", f"{lora}modules_to_save=[lm_head]", f"{lora}target_modules=[q_proj]", f"{lora}layers_to_transform=[1]")  # fmt: skip
    plain = at_server(server, submitted(pocket, "finetune", "x", *asked))
    prepared = prepare(ComposedConfig(plain=plain, text="", run=parse_config(plain)))
    args = plain["model"]["model_args"]
    forgotten = {**plain, "model": {**plain["model"], "model_args": {**args, "lora_config": {**args["lora_config"], **dict.fromkeys(wanted)}}}}  # fmt: skip
    told = brief_of(server, prepared.run, forgotten, prepared.folder).config["model"]["model_args"]["lora_config"]
    assert {key: told[key] for key in wanted} == wanted
    release()


YAML = {"r": None, "lora_alpha": None, "target_modules": None, "lora_dropout": 0.0, "use_rslora": False, "bias": "none"}


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("phi", {}),
        ("phi", {"target_modules": "all-linear", "layers_to_transform": (1,), "layers_pattern": "layers"}),
        ("phi", {"target_modules": r".*\.(q|k)_proj", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 1.0}}),
        ("phi", {"exclude_modules": ("v_proj",), "use_rslora": True}),
        ("phi", {"use_dora": True, "modules_to_save": ("lm_head",)}),
        ("phi", {"lora_bias": True, "bias": "lora_only"}),
        ("gpt2", {"target_modules": "attention"}),
        ("mixtral", {"target_modules": "all-linear"}),
        ("mixtral", {"target_modules": "mlp", "exclude_modules": ("mlp.experts.down_proj",)}),
    ],
)
def test_nodes_build_the_adapter_that_the_server_has(kind, changed):
    """From the brief alone, whatever the submitted yaml left to a loaded adapter."""
    base = skeleton(CONFIGS[kind])
    config = lora_config_of(
        LoraArgs(**{"r": 4, "lora_alpha": 8.0, "target_modules": ("q_proj", "v_proj"), **changed}), None, "base", base
    )
    reader = Reader()
    args = reader.record(LoraArgs, json.loads(json.dumps(shaped(YAML, plain_config(config)))), "lora_config")
    assert reader.faults == []
    theirs = lora_config_of(args, None, "base", base)
    assert plain_config(theirs) == plain_config(config)
    assert tensors_of(kind, theirs) == tensors_of(kind, config)


def test_nodes_build_adalora_as_the_server_does():
    """Its ranks are the yaml's init_r; PEFT's r, which acts nowhere, is not told."""
    base, own = skeleton(CONFIGS["phi"]), {"peft_type": "ADALORA", "init_r": 6, "target_r": 2, "tinit": 1}
    said = {"r": None, "lora_alpha": 8.0, "target_modules": ("q_proj", "v_proj"), **own}
    config = lora_config_of(LoraArgs(**said), None, "base", base)
    reader = Reader()
    args = reader.record(LoraArgs, json.loads(json.dumps(shaped({**YAML, **own}, plain_config(config)))), "lora_config")
    assert reader.faults == []
    theirs = lora_config_of(args, None, "base", base)
    assert plain_config(theirs) == plain_config(config)
    assert tensors_of("phi", theirs) == tensors_of("phi", config)


def tensors_of(kind, config):
    """Name -> shape of what is trained, and the scale of each layer."""
    model = attach_lora(skeleton(CONFIGS[kind]), config)
    return {n: p.shape for n, p in model.named_parameters() if p.requires_grad}, scales_in(model)
