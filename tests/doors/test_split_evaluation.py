"""An evaluation over two processes, each with half of every layer: the metrics of one process."""

import json
import weakref

import pytest
import torch
from helpers_eval import tiny_chat
from helpers_families import adapter_of, base_of
from helpers_runs import CONFIGS, finetune
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from fedunlearn.doors import evaluation as evaluation_door
from fedunlearn.doors.compose import compose
from fedunlearn.doors.evaluation import run_evaluation
from fedunlearn.doors.split_evaluation import MODEL, _write_merged
from fedunlearn.errors import UserError
from fedunlearn.models.adapter_tensors import write_tensors
from fedunlearn.models.lora import attach_lora
from fedunlearn.models.resident import Resident
from fedunlearn.training.parallel.group import Group


@pytest.fixture
def evaluation(pocket, saves):
    """Composes an evaluation of a model."""

    def composed(task, start, *overrides):
        places = (
            f"tofu_path={pocket.data}", f"paths.saves_dir={saves}", f"paths.cache_dir={saves}/cache", f"paths.pocket_dir={saves}/pocket",
            "eval.max_new_tokens=4", "model.model_args.lora_config.r=4", "eval.max_rows=6", f"task_name={task}",
            f"model.model_args.pretrained_model_name_or_path={start}",
        )  # fmt: skip
        return compose(CONFIGS, "eval.yaml", ["experiment=eval/tofu/pocket", *places, *overrides])

    return composed


def figures(saves, task):
    log = json.loads((saves / "eval" / task / "TOFU_EVAL.json").read_text())
    return {name: metric["agg_value"] for name, metric in log.items() if name != "provenance"}


def test_two_processes_find_what_one_does(pocket, saves, evaluation, monkeypatch):
    models, alive = [], []
    load, start_group = evaluation_door.load_model, Group.start

    def loaded(*said):
        made = load(*said)
        models.append(weakref.ref(made.model))
        return made

    def started(group, *said):
        alive.append(models[-1]() is not None)
        return start_group(group, *said)

    monkeypatch.setattr(evaluation_door, "load_model", loaded)
    monkeypatch.setattr(Group, "start", started)
    start = finetune(pocket, saves, "ft", "trainer.args.learning_rate=0.05", "trainer.args.num_train_epochs=5")
    run_evaluation(evaluation("whole", start))
    run_evaluation(evaluation("base", pocket.model))
    run_evaluation(evaluation("split", start, "parallel={kind:tp,processes:2}"))
    assert (len(models), alive) == (3, [False])  # what two processes hold is not held a third time
    told = [
        json.loads((saves / "eval" / task / "provenance.json").read_text())["hashes"] for task in ("whole", "split")
    ]
    assert told[0] == told[1]
    whole, split = figures(saves, "whole"), figures(saves, "split")
    assert split.keys() == whole.keys()
    for name, value in whole.items():
        assert split[name] == pytest.approx(value, abs=1e-4), name
    base = figures(saves, "base")  # the adapter is in it: without one the figures are others
    assert max(abs(base[name] - value) for name, value in whole.items() if value is not None) > 1e-3
    assert list((saves / "cache" / "teams").iterdir()) == []


def resident_of(kind, **lora):
    """A family's tiny base with an adapter that acts."""
    adapter = adapter_of(kind, **lora)
    model = attach_lora(base_of(kind), LoraConfig(**adapter.peft_config))
    write_tensors(model, adapter.tensors)
    return Resident(model.eval(), tiny_chat(), "print", "a tiny base", torch.device("cpu"), adapter)


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("llama", {"use_dora": True}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("gpt2", {"use_dora": True, "fan_in_fan_out": True}),
        ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]}),
        ("qwen3_moe", {}),
    ],
)
def test_what_the_processes_read_is_the_model_with_its_adapter(tmp_path, kind, lora):
    made = resident_of(kind, **lora)
    ids = torch.arange(12).view(2, 6) + 5
    with torch.no_grad(), made.model.disable_adapter():
        plain = made.model(ids).logits
    with torch.no_grad():
        wanted = made.model(ids).logits
        _write_merged(made, tmp_path)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / MODEL)(ids).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (plain - wanted).abs().max() > 0.05


def test_an_adapter_that_cannot_be_merged_is_refused_with_the_way_out(tmp_path):
    made = resident_of("llama", lora_bias=True)
    with pytest.raises(
        UserError, match=r"Linear has no bias to merge it into[\s\S]*set parallel=none, which evaluates it beside"
    ):
        _write_merged(made, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_number_of_processes_that_does_not_fit_is_refused(pocket, saves, evaluation):
    with pytest.raises(
        UserError, match=r"parallel\.processes=3 does not divide LlamaForCausalLM's num_attention_heads=4"
    ):
        run_evaluation(evaluation("three", pocket.model, "parallel={kind:tp,processes:3}"))
    assert not (saves / "eval" / "three").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel=fsdp"], r"parallel=fsdp: an evaluation is carried out by one process, or .*: none or tp"),
        (["parallel=tp", "eval=tofu_attacks"], r"parallel=tp beside mia_gradnorm: gradients are not taken through split layers"),
        (["parallel={kind:tp,processes:1}"], r"parallel\.processes=1 must lie between 2 and 1024"),
    ],
)  # fmt: skip
def test_what_has_no_sense_is_refused(pocket, evaluation, overrides, said):
    with pytest.raises(UserError, match=said):
        evaluation("e", pocket.model, *overrides)
