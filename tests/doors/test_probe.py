"""Probes on the tiny pocket: what is attacked, by what, what stands in the files, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers_families import base_of
from helpers_runs import CONFIGS, SMALL, finetune, unlearn
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fedunlearn.config.probe import ProbeConfig
from fedunlearn.doors.compose import compose
from fedunlearn.doors.probe import run_probe
from fedunlearn.errors import UserError

CASTS = "probe.attacks=[bfloat16,int8,nf4]"


@pytest.fixture
def probe(pocket, saves):
    def composed(unlearned, oracle, *overrides):
        places = (
            f"tofu_path={pocket.data}", f"model.model_args.pretrained_model_name_or_path={pocket.model}", f"paths.saves_dir={saves}",
            f"paths.cache_dir={saves}/cache", f"paths.pocket_dir={saves}/pocket", "task_name=p", "eval.max_new_tokens=2",
        )  # fmt: skip
        names = ",".join(f"{name}:{path}" for name, path in unlearned.items())
        named = (f"probe.unlearned={{{names}}}", f"probe.oracle={oracle}")
        return compose(CONFIGS, "probe.yaml", ["experiment=probe/tofu/pocket", *places, *SMALL, *named, *overrides])

    return composed


@pytest.fixture
def models(pocket, saves):
    """tuned, oracle, unlearned."""
    tuned = finetune(pocket, saves, "ft")
    oracle = finetune(pocket, saves, "oracle", "data=retain")
    return tuned, oracle, unlearn(pocket, saves, tuned, "un", "method=grad_diff")


def weights_of(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_a_probe_by_several_processes_is_refused_whatever_it_attacks_with(probe, kind):
    """The difference of two adapters too: it trains nothing, and a base in shards would not be measured."""
    with pytest.raises(UserError, match=rf"trainer\.parallel={kind} beside mode='probe': .*leave it at none"):
        probe(
            {"diff": "run"}, "oracle", "probe.attacks=[difference]", "probe.finetuned=run", f"trainer.parallel={kind}"
        )


def test_every_attack_on_every_model_and_the_models_stay_as_they_were(pocket, saves, probe, models):
    tuned, oracle, un = models
    before = [weights_of(run) for run in models]
    attacks = "probe.attacks=[relearn_forget,relearn_unrelated,rounds,bfloat16,int8,nf4,difference]"
    more = (
        attacks,
        "probe.rounds=2",
        f"probe.finetuned={tuned}",
        f"probe.control={tuned}",
        "trainer.args.learning_rate=1e-2",
    )
    found = run_probe(probe({"diff": un}, oracle, *more))
    assert [subject.name for subject in found.subjects] == ["oracle", "diff", "base"]
    for subject in found.subjects:
        assert set(subject.after) == {"relearn_forget", "relearn_unrelated", "rounds", "bfloat16", "int8", "nf4"}
        assert len({figures["forget_Q_A_Prob"] for figures in (subject.before, *subject.after.values())}) == 7
        assert all(value is not None for figures in subject.after.values() for value in figures.values())
    for run, old in zip(models, before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in weights_of(run).items())
    folder = saves / "probe" / "p"
    said = json.loads((folder / "PROBE.json").read_text())
    assert set(said["subjects"]) == {"oracle", "diff", "base"}
    assert said["subjects"]["oracle"]["scores"]["relearn_forget"]["forget_Q_A_Prob"] == 1.0
    assert set(said["difference"]) == {"diff", "control"}
    assert all(
        (folder / name).stat().st_size
        for name in ("table.txt", "table.md", "table.csv", "done.json", "provenance.json")
    )
    assert (folder / "table.txt").read_text().count("diff") >= 5


def test_the_same_model_under_two_names_has_the_same_figures_and_r_1_where_it_is_the_oracle(saves, probe, models):
    """The oracle probed as if it had been unlearned: it gains what the oracle gains."""
    _, oracle, un = models
    found = run_probe(
        probe({"same": oracle, "one": un, "two": un}, oracle, "probe.attacks=[relearn_forget,nf4]", "probe.base=false")
    )
    by_name = {subject.name: subject for subject in found.subjects}
    assert by_name["one"].after == by_name["two"].after
    assert by_name["same"].after == by_name["oracle"].after
    said = json.loads((saves / "probe" / "p" / "PROBE.json").read_text())["subjects"]["same"]
    assert set(said["scores"]["relearn_forget"].values()) == {1.0}


def test_the_difference_of_an_adapter_to_itself_is_nothing_and_signs_are_told_apart(probe, models):
    tuned, oracle, un = models
    more = (f"probe.finetuned={tuned}", "probe.attacks=[difference]", f"probe.control={tuned}", "probe.base=false")
    found = run_probe(probe({"un": un}, oracle, *more))
    leaks = {leak.name: leak for leak in found.leaks}
    for metric in ("forget_Q_A_Prob", "retain_Q_A_Prob"):
        assert leaks["control"].of(metric) == pytest.approx(0.0, abs=1e-6)
        assert leaks["un"].minus[metric] != leaks["un"].plus[metric] != leaks["un"].base[metric]


REFUSED = {
    "a name of ours": (("probe.unlearned={oracle: x}",), "probe.unlearned.oracle is a name of ours"),
    "no attack": (("probe.attacks=[]",), "leaves nothing to do"),
    "one twice": (("probe.attacks=[nf4,nf4]",), "names one twice"),
    "an unknown one": (("probe.attacks=[int2]",), "int2"),
    "difference alone": (("probe.attacks=[difference]",), "difference needs probe.finetuned"),
    "finetuned alone": (("probe.finetuned=x",), "difference needs probe.finetuned"),
    "control alone": (("probe.control=x",), "probe.control='x' is read by difference alone"),
    "no epochs": (("probe.relearn_epochs=0",), "probe.relearn_epochs=0.0 must be above 0"),
    "no rounds": (("probe.rounds=0",), "probe.rounds=0 must be at least 1"),
    "an unread backend": (
        ("probe.attacks=[rounds]", "probe.backend=bitsandbytes"),
        "probe.backend=bitsandbytes is read by bfloat16, int8, nf4 alone",
    ),
    "unread epochs": (
        ("probe.attacks=[nf4]", "probe.relearn_epochs=2"),
        "probe.relearn_epochs=2.0 is read by relearn_forget",
    ),
    "unread rounds": (("probe.attacks=[nf4]", "probe.rounds=3"), "probe.rounds=3 is read by rounds alone"),
    "casts of a quantised base": (
        ("probe.attacks=[rounds,nf4]", "model.model_args.quantization=torchao_int8"),
        r"probe.attacks=\['nf4'\] beside model.model_args.quantization=torchao_int8: .* nothing is merged into a quantised base",
    ),
    "no oracle": (("probe.oracle=???",), "probe.oracle"),
    "a metric out": (("~eval.metrics.extraction_strength",), "eval.metrics lacks extraction_strength"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_probe_is_refused(probe, name):
    overrides, said = REFUSED[name]
    with pytest.raises(UserError, match=said):
        probe({"a": "b"}, "c", *overrides)


def test_a_probe_of_nothing_is_refused():
    with pytest.raises(UserError, match="names nothing to probe"):
        ProbeConfig(unlearned={}, oracle="x")


def test_paths_that_are_no_models_and_a_missing_backend_are_told_at_once(saves, probe, models):
    overrides = (CASTS, "probe.backend=bitsandbytes") if not torch.cuda.is_available() else (CASTS,)
    with pytest.raises(UserError) as caught:
        run_probe(probe({"a": "nowhere/a", "b": models[2]}, "nowhere/oracle", *overrides))
    said = "\n".join(caught.value.faults)
    assert "nowhere/a" in said
    assert "nowhere/oracle" in said
    assert torch.cuda.is_available() or "probe.backend=bitsandbytes" in said
    assert not (saves / "probe").exists()


def test_fused_experts_are_not_cast_in_part(pocket, probe, tmp_path):
    base = tmp_path / "moe"
    base_of("qwen3_moe").save_pretrained(base)
    AutoTokenizer.from_pretrained(pocket.model).save_pretrained(base)
    with pytest.raises(
        UserError, match=r"probe.attacks=\['bfloat16', 'int8', 'nf4'\] beside '.*/moe', whose base has fused experts"
    ):
        run_probe(probe({"a": base}, base, CASTS))


def test_a_damaged_adapter_is_told_before_any_is_attacked(saves, probe, models, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(Path(models[2]) / "adapter", cut)
    (cut / "adapter_model.safetensors").write_bytes((cut / "adapter_model.safetensors").read_bytes()[:200])
    with pytest.raises(UserError, match=f"{cut}.* is corrupt or truncated"):
        run_probe(probe({"a": cut}, models[1], CASTS))
    assert not (saves / "cache" / "evaluations").exists()
