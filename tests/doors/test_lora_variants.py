"""Every variant through a whole federation: fine-tuned, unlearned from that run, gone on with after a stop, and loaded by PEFT alone."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from helpers_runs import adapter_bytes, adapter_tensors, finetune, history, tiny, unlearn
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from fedunlearn.doors.prepare import prepare
from fedunlearn.errors import UserError
from fedunlearn.federation import client_app, rounds
from fedunlearn.federation.block_store import BlockStore
from fedunlearn.federation.site import Site
from fedunlearn.federation.wire import RollCallReply
from fedunlearn.models.adapter_files import load_adapter, save_adapter
from fedunlearn.models.label_logits import label_logits
from fedunlearn.models.resident import release, resident
from fedunlearn.models.source import BEGAN, START, resolve_source

LORA = "++model.model_args.lora_config."
BASE = "model.model_args.pretrained_model_name_or_path="
KL = ("method=npo", "method.retain=kl", "trainer.federated.num_rounds=1")
VARIANTS = {
    "dora": (LORA + "use_dora=true",),
    "biases": (LORA + "bias=all", LORA + "lora_bias=true"),
    "saved": (LORA + "modules_to_save=[lm_head]",),
    "pissa": (LORA + "init_lora_weights=pissa",),
}
IDS = torch.arange(24).reshape(2, 12) + 5


@pytest.fixture(scope="module")
def gpt2(pocket, tmp_path_factory):
    """A GPT-2 of two narrow layers with biases that are not zero, and the pocket's tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(pocket.model)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def overrides_of(name, gpt2):
    on_gpt2 = (f"{BASE}{gpt2}", LORA + "target_modules=[c_attn,c_fc]") if name == "biases" else ()
    return (*VARIANTS[name], *on_gpt2)


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def tuned(request, pocket, gpt2, tmp_path_factory):
    """Its name, its base, its saves folder, and a run of two rounds of that variant."""
    saves = tmp_path_factory.mktemp(request.param) / "saves"
    run = finetune(pocket, saves, "ft", *overrides_of(request.param, gpt2))
    yield request.param, (gpt2 if request.param == "biases" else pocket.model), saves, run
    release()


def by_peft(base, run):
    """Logits of the result, loaded by PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, run / "adapter").eval()(input_ids=IDS).logits


def by_us(pocket, saves, run):
    """Logits of the result, loaded and proven by us."""
    null = [LORA + f"{key}=null" for key in ("r", "lora_alpha", "target_modules", "bias")]
    config = tiny(pocket, saves, "unlearn", "look", f"{BASE}{run}", *null).run
    source = resolve_source(config.model.model_args, saves)
    made = resident(config.model, source, seed=0, max_length=256, pocket_dir=saves)
    everywhere = torch.ones_like(IDS, dtype=torch.bool)
    with torch.no_grad():
        return label_logits(made.model, IDS, torch.ones_like(IDS), everywhere).reshape(*IDS.shape, -1)


def same_logits(pocket, saves, base, run):
    theirs, ours = by_peft(base, run), by_us(pocket, saves, run)
    return float((theirs - ours).abs().max() / theirs.abs().max())


def plain_names(run):
    return {name for name in adapter_tensors(run) if not name.endswith((".lora_A.weight", ".lora_B.weight"))}


def test_it_moves_all_that_it_trains_and_plain_peft_says_the_same(pocket, tuned):
    name, base, saves, run = tuned
    start, result = load_file(run / "start" / "adapter_model.safetensors"), adapter_tensors(run)
    if name != "pissa":  # whose result is a stack
        assert start.keys() == result.keys()
        assert all(not torch.equal(start[key], tensor) for key, tensor in result.items())
    assert len(plain_names(run)) == {"dora": 14, "biases": 13 + 4, "saved": 1, "pissa": 0}[name]
    assert all(client["reason"] == "" for line in history(run) for client in line["clients"])
    assert same_logits(pocket, saves, base, run) < 1e-5


def test_unlearning_goes_on_from_it_and_moves_it(pocket, tuned, caplog):
    """NPO sums rows under the reference, KL runs it beside the trained adapter: both must find it whole."""
    name, base, saves, run = tuned
    null = [LORA + "init_lora_weights=null"] if name == "pissa" else []
    again = [value for value in VARIANTS[name] if "init" not in value]
    targets = [LORA + "target_modules=null"]
    with caplog.at_level(logging.WARNING):
        done = unlearn(pocket, saves, run, "un", *again, *null, *targets, *KL)
    assert "does not give the logits" not in caplog.text
    before, after = adapter_tensors(run), adapter_tensors(done)
    changed = {key for key in after if key not in before or not torch.equal(before[key], after[key])}
    assert changed >= plain_names(done)
    assert len(changed) == len(after) if name != "pissa" else changed
    assert same_logits(pocket, saves, base, done) < 1e-5


def test_a_stopped_run_goes_on_bit_equal(pocket, tuned, gpt2, tmp_path, monkeypatch):
    name, _, _, run = tuned
    real = rounds.save_checkpoint

    def stop(folder, checkpoint, *rest):
        real(folder, checkpoint, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(pocket, tmp_path, "ft", *overrides_of(name, gpt2))
    monkeypatch.setattr(rounds, "save_checkpoint", real)
    release()
    resumed = finetune(pocket, tmp_path, "ft", *overrides_of(name, gpt2), "resume=true")
    assert adapter_bytes(resumed) == adapter_bytes(run)


def test_pissa_s_result_is_the_difference_at_twice_the_rank(pocket, saves):
    run = finetune(pocket, saves, "ft", *VARIANTS["pissa"], "trainer.federated.num_rounds=1")
    adapter, _ = load_adapter(run / "adapter")
    assert adapter.peft_config["init_lora_weights"] is True
    assert {t.shape[0] for name, t in adapter.tensors.items() if "lora_A" in name} == {8}


def test_what_a_loaded_adapter_is_is_looked_at_where_the_yaml_leaves_it_null(pocket, tuned):
    name, _, saves, run = tuned
    refused = {"dora": "use_dora=true beside aggregation", "biases": "lora_bias, bias beside method Negation", "saved": "modules_to_save beside method Negation"}  # fmt: skip
    if name not in refused:
        pytest.skip("a side-car goes with every method")
    asked = ["aggregation=flexlora"] if name == "dora" else ["method=negation"]
    null = [LORA + f"{key}=null" for key in ("target_modules", "bias")]
    with pytest.raises(UserError, match=refused[name]):
        prepare(tiny(pocket, saves, "unlearn", "no", f"{BASE}{run}", *asked, *null))
    assert not (saves / "unlearn" / "no").exists()


def test_an_initialisation_beside_a_loaded_adapter_is_refused(pocket, saves):
    run = finetune(pocket, saves, "ft", "trainer.federated.num_rounds=1")
    with pytest.raises(
        UserError,
        match=r"init_lora_weights='pissa' beside the adapter .*, which brings its values along: set it to null",
    ):
        prepare(tiny(pocket, saves, "unlearn", "no", f"{BASE}{run}", *VARIANTS["pissa"]))


SLOWLY = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("fedit", "ffa", "rolora", "flexlora", "fedrot", "hetlora")
]


@pytest.mark.parametrize("preset", ["flora", "fedex", "fedsvd", *SLOWLY])
def test_pissa_under_every_aggregation_exports_what_the_federation_ended_with(pocket, saves, preset):
    """The side-car takes out what the factors began with; whatever became of them, the result moves a little, and PEFT alone says the same."""
    run = finetune(pocket, saves, "ft", *VARIANTS["pissa"], f"aggregation={preset}", "trainer.federated.num_rounds=1")
    assert same_logits(pocket, saves, pocket.model, run) < 1e-5
    assert all(client["reason"] == "" for line in history(run) for client in line["clients"])
    base = AutoModelForCausalLM.from_pretrained(pocket.model, dtype=torch.float32).eval()
    with torch.no_grad():
        away = (by_peft(pocket.model, run) - base(input_ids=IDS).logits).abs().max()
    assert 1e-3 < float(away) < 20
    release()


def test_the_best_rank_r_of_a_pissa_result_is_plain_lora(pocket, saves):
    last = ("trainer.federated.num_rounds=1", "aggregation.export_rank=r")
    run = finetune(pocket, saves, "ft", *VARIANTS["pissa"], *last)
    adapter, _ = load_adapter(run / "adapter")
    assert {t.shape[0] for name, t in adapter.tensors.items() if "lora_A" in name} == {4}
    assert same_logits(pocket, saves, pocket.model, run) < 1e-5


def test_clients_of_another_process_begin_with_what_they_are_sent(pocket, saves, tuned):
    """They compute no SVD of their own, and give the same bits."""
    name, _, _, run = tuned
    if name != "pissa":
        pytest.skip("nothing of the others is computed from the base's weights but norms")
    apart = finetune(
        pocket, saves, "ft", *VARIANTS[name], "launcher.isolate=true", "trainer.federated.round_timeout=300"
    )
    assert adapter_bytes(apart) == adapter_bytes(run)


class TestGoingOnElsewhere:
    """A run that began with another SVD's factors of the same base: signs of its singular vectors may differ."""

    def begun(self, pocket, saves):
        """A run that stopped before its first round, and what it began with."""
        prepared = prepare(tiny(pocket, saves, "finetune", "ft", *VARIANTS["pissa"]))
        return prepared.folder, prepared.start

    def put(self, folder, adapter):
        """Makes it what the run began with."""
        began = json.loads((folder / BEGAN).read_text())
        save_adapter(folder / START, adapter.replace(adapter.tensors, {}))
        began["sidecar"] = [BlockStore(folder / "sidecar").keep(adapter.sidecar)]
        (folder / BEGAN).write_text(json.dumps(began))

    def test_it_goes_on_with_its_own(self, pocket, saves):
        folder, start = self.begun(pocket, saves)
        turned = {name: -tensor for name, tensor in start.tensors.items()}
        other = start.replace(turned, {name: -tensor for name, tensor in start.sidecar.items()})
        self.put(folder, other)
        again = prepare(tiny(pocket, saves, "finetune", "ft", *VARIANTS["pissa"], "resume=true"))
        assert again.start == other != start

    def test_factors_that_their_side_car_does_not_take_out_are_refused(self, pocket, saves):
        folder, start = self.begun(pocket, saves)
        self.put(folder, start.replace({name: 1.01 * tensor for name, tensor in start.tensors.items()}))
        with pytest.raises(UserError, match="is not the adapter that the model now names"):
            prepare(tiny(pocket, saves, "finetune", "ft", *VARIANTS["pissa"], "resume=true"))


def test_a_client_whose_adapter_lacks_a_saved_module_is_left_out_by_name(pocket, saves, monkeypatch):
    head, real = "base_model.model.lm_head.weight", Site.work

    def work(self, task, *rest):
        done = real(self, task, *rest)
        kept = {name: tensor for name, tensor in done.tensors.items() if task.client_id != 2 or name != head}
        return replace(done, tensors=kept)

    monkeypatch.setattr(Site, "work", work)
    few = ("trainer.federated.num_rounds=1", "trainer.federated.min_clients=3", "trainer.federated.max_retries=0")
    run = finetune(pocket, saves, "ft", *VARIANTS["saved"], *few)
    told = {client["client_id"]: (client["reason"], client["detail"]) for client in history(run)[0]["clients"]}
    assert told[2] == ("missing_key", head)
    assert [told[client][0] for client in (0, 1, 3)] == ["", "", ""]


def test_a_client_that_makes_another_adapter_is_left_out_at_the_roll_call(pocket, saves, monkeypatch):
    """It would answer every round, and be dropped in every one."""

    def another(**said):
        return RollCallReply(**(said if said["client_id"] != 2 else {**said, "layout": "x"}))

    monkeypatch.setattr(client_app, "RollCallReply", another)
    run = finetune(pocket, saves, "ft", "trainer.federated.num_rounds=1")
    told = json.loads((run / "roll_call.json").read_text())["refused"][0]
    assert told.startswith("roll call: client 2 makes an adapter of other tensors or shapes")
    assert [client["client_id"] for client in history(run)[0]["clients"]] == [0, 1, 3]


def test_a_module_that_the_base_lacks_is_refused_before_anything_is_written(pocket, saves):
    with pytest.raises(UserError, match=r"modules_to_save: 'score' matches no module of this base"):
        prepare(tiny(pocket, saves, "finetune", "no", LORA + "modules_to_save=[score]"))
    assert not saves.exists()
