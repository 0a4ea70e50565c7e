"""Every YAML of configs/ composes, every value of it arrives in the records, and so does every value that a user puts there instead."""

import typing
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType

import pytest
from omegaconf import OmegaConf

from fedunlearn.aggregation.robust.off import Off
from fedunlearn.config.lora import LoraArgs
from fedunlearn.config.server import AggregationConfig
from fedunlearn.doors.compose import compose
from fedunlearn.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
PRIMARY = ("train-lora.yaml", "unlearn-lora.yaml", "eval.yaml", "probe.yaml")
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
MEMBERS = [name for name in FILES if name not in PRIMARY and not name.startswith(("hydra/", "compare/"))]
GLOBAL = ("paths", "experiment")
INSIDE = {"lora": "model.model_args.lora_config"}
"""Groups whose values lie in another group's record."""

TEMPLATE = "model.template_args."
TAG_NAMES = ("system_prompt_with_special_tokens", "user_start_tag", "user_end_tag", "asst_start_tag", "asst_end_tag")
TAG_KEYS = [TEMPLATE + name for name in TAG_NAMES]
CHAT_KEYS = [TEMPLATE + "system_prompt", TEMPLATE + "date_string"]
TAGS = {
    "model.model_args.use_lora": False,
    TEMPLATE + "apply_chat_template": False,
    **{key: f"[{key}]" for key in TAG_KEYS},
    **dict.fromkeys(CHAT_KEYS),
}
CHAT = {TEMPLATE + "apply_chat_template": True, **dict.fromkeys(TAG_KEYS), **{key: f"[{key}]" for key in CHAT_KEYS}}

# Keys that cannot change together with all the others, and what has to change with each.
APART = {
    "resume": {},
    "model.model_args.quantization": {},
    "trainer.parallel": {},
    "trainer.args.warmup_epochs": {"trainer.args.warmup_steps": 0},
    "trainer.federated.num_train_clients": {"trainer.federated.fraction_train": 1.0},
    "muse_path": {"tofu_path": None, "eval.name": "muse"},
}
# Keys of which a small step is no other valid value.
STEPS = {
    "gate.max_reply_ratio": 2.5,
    "method.prompt": "{question} or {answer}",
    "partition.joins": {2: 3, 3: 2},
    "requests": "other rows",
    "eval.round_metrics": ("exact_memorization",),
    "model.model_args.lora_config.target_modules": ("k_proj", "o_proj"),
    "launcher.address": "127.0.0.1:6379",
    "trainer.parallel": "fsdp",
    "model.model_args.lora_config.adapts": ("lora_dropout",),
    "probe.unlearned": {"a": "y"},
    "probe.attacks": ("difference", "nf4", "rounds", "relearn_forget"),
}
# What members ask for that have no default, or want a word of consent.
ASKS = {
    "method/idk_dpo.yaml": ["data.idk_path=builtin"],
    "method/dpo.yaml": ["data.alternates_path=other.jsonl"],
    "method/pdu.yaml": ["method.eps=0.3"],
    "protocol/all_clients.yaml": ["protocol.released=true"],
    "eval/tofu_reference.yaml": ["eval.reference_model_path=other"],
    "eval/muse.yaml": ["tofu_path=null", "muse_path=given"],
    "launcher/superlink.yaml": ["launcher.address=127.0.0.1:8000", "launcher.insecure=true"],
    **{name: ["probe.unlearned={a: b}", "probe.oracle=other"] for name in FILES if "probe" in name},
}
# What a group's changed values ask of other groups.
PARTNERS = {
    "partition": ["aggregation=hetlora"],
    "robust": ["trainer.federated.num_clients=9"],
}
# Keys with one value that has a meaning: any other is refused by name.
FIXED = {
    "trainer.name",
    "trainer.args.dataloader_num_workers",
    "trainer.args.remove_unused_columns",
    "model.model_args.lora_config.task_type",
    "eval.name",
}
# And those that the mode of a run, or its benchmark, fixes.
ANSWERS = {"data.idk_path", "data.alternates_path"}
FIXED_IN = {
    "data/finetune.yaml": ANSWERS,
    "data/retain.yaml": ANSWERS,
    "data/unlearn.yaml": {"data.rows", *ANSWERS},
    "eval/tofu.yaml": {"eval.reference_model_path", "eval.holdout_split", "eval.gradnorm_of"},
    "eval/muse.yaml": {"eval.question_key", "eval.holdout_split", "eval.reference_model_path", "eval.gradnorm_of"},
    **{f"experiment/{kind}/muse/default.yaml": {"tofu_path"} for kind in ("eval", "finetune", "unlearn")},  # null there
    "paths/default.yaml": {"requests"},
    **{
        f"lora/{name}.yaml": {f"model.model_args.lora_config.{key}" for key in ("preset", "adapts")}
        for name in ("fast", "balanced", "high")
    },
    "protocol/all_clients.yaml": {"protocol.released"},
    "trainer/FederatedTrainer.yaml": {"trainer.federated.force_owners"},
}
# The choices of the aggregation hang together: whole settings. In the first two every key has a value that no preset has there.
AGGREGATION_KEYS = (
    "weights",
    "mask",
    "reducer",
    "residual",
    "gauge",
    "softness",
    "trim",
    "sidecar_rank",
    "export_rank",
)
AGGREGATIONS = [
    {f"aggregation.{key}": value for key, value in zip(AGGREGATION_KEYS, row, strict=True)}
    for row in (
        ("product_norm", "both", "factors", "sidecar", "procrustes", 0.25, None, 3, "r"),
        ("uniform", "b", "trimmed_mean", "dropped", "orthonormal", None, 0.25, None, "r"),
        ("trained", "alternate", "factors", "dropped", "balanced", None, None, None, "exact"),
        ("owned", "both", "product", "feedback", "balanced", None, None, None, "r"),
        ("trained", "both", "stack", "sidecar", "reset", None, None, 5, "exact"),
        ("uniform", "both", "padded_factors", "dropped", "as_is", None, None, None, "r"),
    )
]


def leaves(tree, key=""):
    """Dotted key -> value; lists are values, `_target_` and the defaults list are none."""
    if not isinstance(tree, dict):
        return {key: tree}
    found = {}
    for name, value in tree.items():
        if name not in ("_target_", "defaults"):
            found |= leaves(value, f"{key}.{name}" if key else name)
    return found


def member(name):
    """The YAML's own leaves, with the keys they have in a run."""
    group = name.split("/")[0]
    raw = OmegaConf.to_container(OmegaConf.load(CONFIGS / name))
    return leaves(raw or {}, "" if group in GLOBAL else INSIDE.get(group, group))


def host(name):
    """A primary file that can use the member, and the override that chooses it."""
    group, _, choice = name.removesuffix(".yaml").partition("/")
    unlearns = group == "method" or choice.startswith(
        ("unlearn", "in_round", "target", "owners", "all_clients", "by_method", "replay", "FederatedUnlearning")
    )
    primary = "eval.yaml" if group in ("model", "lm_eval") or choice.startswith("eval") else PRIMARY[unlearns]
    primary = "probe.yaml" if group == "probe" or choice.startswith("probe") else primary
    chosen = [f"{group}={choice}", "task_name=t", *ASKS.get(name, [])]
    return primary, chosen + ["++model.model_args.pretrained_model_name_or_path=given"] * ("stories260K" in choice)


def at(run, key):
    for name in key.split("."):
        run = run[name] if isinstance(run, dict) else getattr(run, name)
    return run


def hint_of(run, key):
    parent, _, name = key.rpartition(".")
    return typing.get_type_hints(type(at(run, parent) if parent else run))[name]


def another(hint, value):
    """Another valid value of the field; the record's own rules are kept by small steps."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    for option in (option for option in options if option is not NoneType):
        if typing.get_origin(option) is typing.Literal:
            return next(word for word in (*typing.get_args(option), "nonsense") if word != value)
        if option is bool:
            return not value
        if option is int:
            return 3 if value in (None, -1) else value + 1
        if option is float:
            return value * 0.5 if value else 0.25
        if typing.get_origin(option) is tuple:
            of_each = {str: ("q_proj", "v_proj"), int: (3, 1, 2, 5, 4), float: (1.5, 8.0, 4.0, 0.5, 2.0)}
            return of_each[typing.get_args(option)[0]]
        return f"another_{len(str(value))}"
    raise AssertionError(f"no rule for {hint}")


def changed_value(run, key):
    return STEPS[key] if key in STEPS else another(hint_of(run, key), at(run, key))


def fixed_in(name):
    return FIXED | FIXED_IN.get(name, set())


def as_override(key, value):
    if isinstance(value, dict):
        return f"{key}={{{','.join(f'{name}:{item}' for name, item in value.items())}}}"
    if isinstance(value, tuple):
        return f"{key}=[{','.join(map(str, value))}]"
    return f"{key}={'null' if value is None else repr(value) if isinstance(value, str) else str(value)}"


@cache
def unchanged(name):
    return composed(name, {})


def composed(name, changes):
    primary, chosen = host(name)
    partners = PARTNERS.get(name.split("/")[0], []) if changes else []
    return compose(
        CONFIGS, primary, [*chosen, *partners, *(as_override(key, value) for key, value in changes.items())]
    ).run


@pytest.mark.parametrize("name", MEMBERS)
def test_each_value_of_the_file_arrives(name):
    run = unchanged(name)
    given = {text.split("=")[0]: text.split("=")[1] for text in ASKS.get(name, [])}
    for key, value in member(name).items():
        want = "given" if value == "???" else value
        if key in given:
            assert str(at(run, key)).lower().replace("'", "") == given[key]
            continue
        if isinstance(want, str):
            want = want.replace("${pocket_seed}", "0")
        arrived = at(run, key)
        assert (list(arrived) if isinstance(arrived, tuple) else arrived) == want, key


@pytest.mark.parametrize("name", [name for name in MEMBERS if member(name)])
def test_each_changed_value_arrives(name):
    """All at once where they may stand together; the others one by one, each with its partners."""
    run = unchanged(name)
    chosen_by_group = {"partition.scheme"} & set(member(name))  # an object: the group's other members change it
    changes = {key: changed_value(run, key) for key in member(name) if key not in chosen_by_group}
    fixed = fixed_in(name)
    together = {
        key: value for key, value in changes.items() if key not in APART and key not in fixed and key not in TAGS
    }
    changed = [together, *(APART[key] | {key: value} for key, value in changes.items() if key in APART)]
    if name.startswith("model/"):
        changed = [together | CHAT, TAGS, *changed[1:]]
    if name.startswith("aggregation/"):
        changed = AGGREGATIONS if name == "aggregation/fedit.yaml" else AGGREGATIONS[:2]
    assert all(any(choice.get(key, at(run, key)) != at(run, key) for choice in changed) for key in set(changes) - fixed)
    for choice in changed:
        seen = composed(name, choice)
        assert {key: at(seen, key) for key in choice} == choice


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (name, key)
        for name in MEMBERS
        for key in member(name)
        if (key in FIXED and name.startswith(("trainer/FederatedT", "model/pocket", "eval")))
        or key in FIXED_IN.get(name, ())
    ],
)
def test_a_value_without_meaning_is_refused_by_name(name, key):
    run = unchanged(name)
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        composed(name, {key: changed_value(run, key)})


@pytest.mark.parametrize(
    "name", [name for name in MEMBERS if not name.startswith(("experiment", "paths", "lora", "eval/tofu_"))]
)
def test_each_file_names_every_parameter(name):
    """No value falls back to a default that the reader of the YAML does not see."""
    record = at(unchanged(name), name.split("/")[0])
    named = {"eval.metrics" if key.startswith("eval.metrics.") else key for key in member(name)}
    assert named == {f"{name.split('/')[0]}.{key}" for key in parameters(record)}


def parameters(record):
    """But for LoRA's keys that are null: PEFT's own, or the loaded adapter's."""
    found = []
    for field in (field for field in fields(record) if field.init):
        value = getattr(record, field.name)
        if isinstance(record, LoraArgs) and value in (None, ()):
            continue
        found += [f"{field.name}.{key}" for key in parameters(value)] if is_dataclass(value) else [field.name]
    return found


def test_paths_default_and_the_primary_file_name_every_plain_parameter():
    run = compose(CONFIGS, "train-lora.yaml", ["task_name=t"]).run
    plain = {field.name for field in fields(run) if not is_dataclass(getattr(run, field.name))}
    assert plain - {"method"} == {key for key in member("paths/default.yaml") if "." not in key} | {"task_name", "mode"}


def test_no_experiment_sets_a_value_of_a_method():
    assert not [
        key
        for name in FILES
        if name.startswith("experiment/")
        for key in member(name)
        if key.split(".")[0] in ("method", "strategy", "protocol")
    ]


@pytest.mark.parametrize("recipe", ["tofu/default", "tofu/pocket", "muse/default"])
def test_the_oracle_differs_from_fine_tuning_by_its_rows_only(recipe):
    finetune = compose(CONFIGS, "train-lora.yaml", [f"experiment=finetune/{recipe}", "task_name=t"]).plain
    retrain = compose(CONFIGS, "train-lora.yaml", [f"experiment=retrain/{recipe}", "task_name=t"]).plain
    assert {key for key in finetune if finetune[key] != retrain[key]} == {"data"}
    assert retrain["data"] == {**finetune["data"], "rows": "retain"}


def test_the_settings_of_the_aggregation_hold_every_word_of_every_choice():
    """So that each word arrives from the command line, as the test above shows over fedit."""
    hints = typing.get_type_hints(AggregationConfig)
    words = {f"aggregation.{key}": set(typing.get_args(hint)) for key, hint in hints.items()}
    choices = {key: allowed for key, allowed in words.items() if typing.get_origin(hints[key[12:]]) is typing.Literal}
    assert set(choices) == {
        f"aggregation.{key}" for key in ("weights", "mask", "reducer", "residual", "gauge", "export_rank")
    }
    assert {key: {setting[key] for setting in AGGREGATIONS} for key in choices} == choices


@pytest.mark.parametrize(
    "said", [[], ["robust=off"], ["robust='off'"], ['robust="off"'], ["robust=krum", "robust=off"]]
)
@pytest.mark.parametrize("primary", PRIMARY[:2])
def test_off_is_a_word_and_no_truth_value(primary, said):
    """YAML reads a bare off as false: the primary files quote it, and Hydra's command line knows no such word."""
    assert compose(CONFIGS, primary, ["task_name=t", *said]).run.robust == Off()


def test_hydra_makes_no_folder():
    hydra = OmegaConf.load(CONFIGS / "hydra/default.yaml")
    assert (hydra.run.dir, hydra.output_subdir, hydra.job.chdir) == (".", None, False)
