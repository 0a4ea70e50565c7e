"""AdaLoRA through a whole federation: the budget is met, the result is plain LoRA for everybody, and a stop in between changes no bit."""

import json

import pytest
import torch
from helpers_runs import adapter_bytes, adapter_tensors, central, finetune, history, tiny, unlearn
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedunlearn.aggregation.adalora import is_gone, triplets_of
from fedunlearn.doors.adapter import read, serve
from fedunlearn.doors.prepare import prepare
from fedunlearn.errors import NotApplicableError, UserError
from fedunlearn.federation import rounds
from fedunlearn.federation.checkpoint import read_checkpoint
from fedunlearn.models.adapter_files import read_folder
from fedunlearn.models.label_logits import label_logits
from fedunlearn.models.resident import release, resident
from fedunlearn.models.source import resolve_source
from fedunlearn.protocols.selection import select

LORA = "++model.model_args.lora_config."
MODULES = 14
ADA = (
    *(LORA + said for said in ("peft_type=ADALORA", "r=null", "init_r=4", "target_r=2", "tinit=1", "lora_alpha=8")),
    "trainer.federated.num_rounds=3",
    "trainer.args.learning_rate=0.01",
)
PLAIN = tuple(LORA + f"{key}=null" for key in ("r", "lora_alpha", "target_modules"))
IDS = torch.arange(24).reshape(2, 12) + 5


@pytest.fixture(scope="module")
def tuned(pocket, tmp_path_factory):
    """Its saves folder, and a run of three rounds with a momentum at the server, every round's checkpoint kept."""
    saves = tmp_path_factory.mktemp("adalora") / "saves"
    run = finetune(pocket, saves, "ft", *ADA, "strategy=fedavgm", "trainer.federated.keep_rounds=all")
    yield saves, run
    release()


def logits_of(model):
    with torch.no_grad():
        return label_logits(model, IDS, torch.ones_like(IDS), torch.ones_like(IDS, dtype=torch.bool))


def live_ranks(run, number):
    """By module: ranks whose E is not 0, and ranks that are gone for good."""
    adapter = read_folder(run / "rounds" / f"{number:04d}" / "adapter")[0].tensors
    modules = triplets_of(adapter)
    assert len(modules) == MODULES
    acting = {m.path: int((adapter[m.e] != 0).sum()) for m in modules}
    return acting, sum(int(is_gone(adapter[m.e], adapter[m.b]).sum()) for m in modules)


def test_the_budget_comes_down_and_is_met(tuned):
    """14 modules of rank 4 to 14 of 2: 56 after round 1 (tinit), int(28 (1/2)^3 + 28) = 31 after round 2, 28 after round 3, those gone for good."""
    _, run = tuned
    assert [line["metrics"]["ranks"] for line in history(run)] == [56, 31, 28]
    found = [live_ranks(run, number) for number in (1, 2, 3)]
    assert [sum(acting.values()) for acting, _ in found] == [56, 31, 28]
    assert [gone for _, gone in found] == [0, 0, 28]
    assert len(set(found[-1][0].values())) > 1  # ranks went where they are needed, not evenly
    assert all(0 < line["aggregation_error"] < 1 for line in history(run)[1:])
    assert all(client["reason"] == "" for line in history(run) for client in line["clients"])


def test_the_result_is_plain_lora_that_says_what_the_model_said(pocket, tuned):
    """PEFT alone on the folder, our own loading of it, and the AdaLoRA model with the last checkpoint in it."""
    saves, run = tuned
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not {"init_r", "target_r", "orth_reg_weight"} & config.keys()
    result = adapter_tensors(run)
    assert sum(t.shape[0] for name, t in result.items() if name.endswith(".lora_A.weight")) >= 28
    composed = tiny(pocket, saves, "finetune", "look", *ADA).run
    made = resident(
        composed.model, resolve_source(composed.model.model_args, saves), seed=0, max_length=256, pocket_dir=saves
    )
    base = logits_of(made.model)
    made.put(read_folder(run / "rounds" / "0003" / "adapter")[0])
    wanted = logits_of(made.model)
    plain = AutoModelForCausalLM.from_pretrained(pocket.model, dtype=torch.float32)
    theirs = logits_of(PeftModel.from_pretrained(plain, run / "adapter").eval())
    release()
    assert float((wanted - base).abs().max()) > 1e-2
    assert float((theirs - wanted).abs().max() / wanted.abs().max()) < 1e-6
    again = tiny(pocket, saves, "unlearn", "look", f"model.model_args.pretrained_model_name_or_path={run}", *PLAIN).run
    ours = resident(
        again.model, resolve_source(again.model.model_args, saves), seed=0, max_length=256, pocket_dir=saves
    )
    assert float((logits_of(ours.model) - wanted).abs().max() / wanted.abs().max()) < 1e-6


def test_unlearning_goes_on_from_it_as_plain_lora(pocket, tuned):
    saves, run = tuned
    done = unlearn(pocket, saves, run, "un", *PLAIN, "method=npo", "method.retain=kl", "trainer.federated.num_rounds=1")
    before, after = adapter_tensors(run), adapter_tensors(done)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(pocket, saves, monkeypatch):
    """Stopped before its last round: importance and momentum come from the checkpoint."""
    said = (*ADA, "strategy=fedavgm", "eval.every_n_rounds=3")
    whole = finetune(pocket, saves, "whole", *said)
    own = rounds._one_round

    def stops(server, before, number, curves):
        if number == 3:
            raise UserError("stopped here")
        return own(server, before, number, curves)

    with monkeypatch.context() as stopped:
        stopped.setattr(rounds, "_one_round", stops)
        with pytest.raises(UserError, match="stopped here"):
            finetune(pocket, saves, "cut", *said)
    left = saves / "finetune" / "cut"
    kept = read_checkpoint(left / "rounds" / "0002").importance
    assert len(kept.sensitivity) == len(kept.uncertainty) == 3 * MODULES
    assert any(t.any() for t in kept.uncertainty.values())
    finetune(pocket, saves, "cut", *said, "resume=true")
    assert adapter_bytes(left) == adapter_bytes(whole)
    assert history(left)[-1]["metrics"] == history(whole)[-1]["metrics"]
    assert history(left)[-1]["evaluation"]


def test_a_checkpoint_without_its_importance_is_damaged(pocket, tuned, tmp_path):
    import shutil

    place = tmp_path / "0002"
    shutil.copytree(tuned[1] / "rounds" / "0002", place)
    (place / "importance.safetensors").unlink()
    with pytest.raises(UserError, match=r"is damaged .*importance"):
        read_checkpoint(place)


def test_a_saved_module_travels_beside_it(pocket, saves):
    run = finetune(pocket, saves, "head", *ADA, LORA + "modules_to_save=[lm_head]")
    assert history(run)[-1]["metrics"]["ranks"] == 28
    (name,) = [name for name in adapter_tensors(run) if "lora_" not in name]
    began = read_folder(run / "start")[0].tensors
    assert not torch.equal(adapter_tensors(run)[name], began[name])
    plain = AutoModelForCausalLM.from_pretrained(pocket.model, dtype=torch.float32)
    ours = tiny(pocket, saves, "unlearn", "look", f"model.model_args.pretrained_model_name_or_path={run}", *PLAIN).run
    made = resident(ours.model, resolve_source(ours.model.model_args, saves), seed=0, max_length=256, pocket_dir=saves)
    found, theirs = logits_of(made.model), logits_of(PeftModel.from_pretrained(plain, run / "adapter").eval())
    assert float((found - theirs).abs().max() / theirs.abs().max()) < 1e-6
    release()


def test_nothing_is_masked_where_the_budget_is_the_beginning(pocket, saves):
    run = finetune(pocket, saves, "all", *ADA, LORA + "target_r=4", LORA + "orth_reg_weight=0")
    assert [line["metrics"]["ranks"] for line in history(run)] == [56, 56, 56]
    acting, gone = live_ranks(run, 3)
    assert (set(acting.values()), gone) == ({4}, 0)


def test_the_budget_is_met_though_nobody_works_in_the_last_round(pocket, saves):
    """One client a round, and only owners work: here one does before round 4, and none in it. deltaT has no mask fall due before."""
    drawn = {s: [select(range(4), seed=s, round=t, count=1) == (3,) for t in (1, 2, 3, 4)] for s in range(50)}
    seed = next(s for s, owners in drawn.items() if any(owners) and not owners[3])
    few = (
        "partition=by_author",
        "protocol=owners_only",
        "trainer.federated.fraction_train=0.25",
        "trainer.federated.force_owners=false",
    )
    said = (
        *ADA,
        LORA + "deltaT=5",
        "trainer.federated.num_rounds=4",
        f"trainer.args.seed={seed}",
        "trainer.federated.keep_rounds=all",
    )
    run = unlearn(pocket, saves, None, "un", *few, *said, "method=grad_diff")
    assert [bool(line["averaged"]) for line in history(run)] == drawn[seed]
    assert [line["metrics"]["ranks"] for line in history(run)] == [56, 56, 56, 28]
    acting, gone = live_ranks(run, 4)
    assert (gone, sum(acting.values()) <= 28) == (28, True)
    folded = adapter_tensors(run)
    assert sum(len(t) for name, t in folded.items() if name.endswith(".lora_A.weight")) <= 28 + MODULES


def test_a_reference_stands_beside_it_when_unlearning_begins_afresh(pocket, saves):
    """KL asks a second adapter, AdaLoRA too and frozen, which says what the base says."""
    run = unlearn(pocket, saves, None, "un", *ADA, "method=npo", "method.retain=kl", "partition=by_author")
    assert history(run)[-1]["metrics"]["ranks"] == 28
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_it_is_evaluated_by_clients_and_at_the_end_beside_another_model(pocket, tuned, saves):
    """The other is an AdaLoRA run's result, which is plain LoRA."""
    other = ("eval=tofu_reference", f"eval.reference_model_path={tuned[1]}")
    run = finetune(pocket, saves, "ft", *ADA, *other, "eval.at_end=true", "eval.clients_every_n_rounds=3")
    assert history(run)[-1]["by_clients"]
    assert (run / "TOFU_SUMMARY.json").is_file()


class TestRefused:
    def test_a_loaded_adapter_beneath_it(self, pocket, tuned):
        saves, run = tuned
        named = f"model.model_args.pretrained_model_name_or_path={run}"
        with pytest.raises(
            UserError, match=r"peft_type=ADALORA beside an adapter that is loaded: .*set peft_type=LORA"
        ):
            prepare(tiny(pocket, saves, "unlearn", "no", *ADA, named))
        assert not (saves / "unlearn" / "no").exists()

    @pytest.mark.parametrize("verb", ["export", "diff", "summary", "add", "scale", "merge", "card", "verify"])
    def test_a_checkpoint_at_the_command(self, verb, tuned, tmp_path):
        place = tuned[1] / "rounds" / "0003"
        more = {"diff": [place], "scale": ["--by", 2], "card": ["--to", tmp_path / "c.md"]}.get(verb, [])
        to = ["--to", tmp_path / "out"] if verb in ("export", "add", "scale", "merge") else []
        with pytest.raises(UserError, match=r"a checkpoint of AdaLoRA .*holds all ranks.* name the run's own folder"):
            serve(read([verb, *map(str, [place, *more, *to])]))
        assert not list(tmp_path.iterdir())

    def test_a_checkpoint_as_an_adapter(self, pocket, tuned):
        saves, run = tuned
        named = f"model.model_args.pretrained_model_name_or_path={run / 'rounds' / '0003' / 'adapter'}"
        with pytest.raises(UserError, match=r"peft_type='ADALORA': .*name the run's own folder"):
            prepare(tiny(pocket, saves, "unlearn", "no", *PLAIN, named))

    def test_a_server_side_method_on_its_past(self, pocket, tuned):
        saves, run = tuned
        said = (*PLAIN, "method=rollback", "data.replay=true")
        with pytest.raises((NotApplicableError, UserError), match="by AdaLoRA, and its rounds hold triplets"):
            unlearn(pocket, saves, run, "no", *said[:-1])

    def test_the_central_baseline(self, pocket, saves):
        with pytest.raises(UserError, match="peft_type=ADALORA: ranks are given out by a server"):
            central(pocket, saves, "finetune", "no", *ADA)

    @pytest.mark.parametrize(
        ("said", "match"),
        [
            ((LORA + "tinit=2", LORA + "tfinal=1"), "tinit=2 and tfinal=1 of trainer.federated.num_rounds=3: .*lower them to 2 together, or raise num_rounds to 4"),
            (("trainer.parallel=fsdp",), "trainer.parallel=fsdp beside peft_type=ADALORA"),
            (("trainer.args.loraplus_lr_ratio=4",), "loraplus_lr_ratio=4.0 beside peft_type=ADALORA"),
            (("ledger.enabled=true",), "ledger.enabled=true beside peft_type=ADALORA"),
            (("model.model_args.quantization=torchao_int8",), "quantization=torchao_int8 beside lora_config.peft_type=ADALORA"),
            (("aggregation=flexlora",), "peft_type=ADALORA beside aggregation.reducer=product: .*choose aggregation=fedit"),
            ((LORA + "total_step=3",), "total_step=3 is refused: AdaLoRA's schedule counts rounds"),
        ],
    )  # fmt: skip
    def test_what_it_does_not_go_with(self, pocket, saves, said, match):
        with pytest.raises(UserError, match=match):
            tiny(pocket, saves, "finetune", "no", *ADA, *said)

    def test_several_requests(self, pocket, saves):
        two = "requests=[{authors: [18]}, {authors: [19]}]"
        with pytest.raises(UserError, match="requests has 2 entries beside peft_type=ADALORA"):
            tiny(pocket, saves, "unlearn", "no", *ADA, two)
