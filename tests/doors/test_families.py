"""Each family of models through the whole story: fine-tuned and unlearned in a federation, merged, taken apart again, loaded by PEFT alone."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers_adapters import apart
from helpers_families import CONFIGS, base_tensors
from helpers_runs import adapter_tensors, finetune, history, unlearn
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedunlearn import lora
from fedunlearn.doors.adapter import read, serve
from fedunlearn.models.fingerprint import fingerprint_base
from fedunlearn.models.resident import release

KINDS = ("gpt2", "llama", "qwen3", "qwen3_moe")
LORA = "model.model_args.lora_config."
FEW = (
    "trainer.federated.num_clients=3",
    "trainer.federated.num_rounds=1",
    f"{LORA}target_modules=all-linear",
    f"{LORA}lora_dropout=0",
)
IDS = torch.arange(24).reshape(2, 12) + 5


@dataclass(frozen=True)
class Story:
    """Where everything of one family lies. tuned, unlearned: run folders."""

    base: Path
    saves: Path
    tuned: Path
    unlearned: Path


def save_base(kind: str, pocket, folder: Path) -> Path:
    """A base of random weights that reads what the pocket's tokenizer writes."""
    tokenizer = AutoTokenizer.from_pretrained(pocket.model)
    longest = {"n_positions": 512} if kind == "gpt2" else {}
    config = type(CONFIGS[kind])(**{**CONFIGS[kind].to_dict(), "vocab_size": len(tokenizer), **longest})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def story_of(kind: str, pocket, place: Path, *overrides: str) -> Story:
    base, saves = save_base(kind, pocket, place / "base"), place / "saves"
    named = (f"model.model_args.pretrained_model_name_or_path={base}",)
    tuned = finetune(pocket, saves, "ft", *named, *FEW, *overrides)
    null = [f"{LORA}{key}=null" for key in ("r", "lora_alpha", "target_modules")]
    unlearned = unlearn(
        pocket, saves, tuned, "un", *FEW[:2], *null, f"{LORA}lora_dropout=0", "method=npo", "method.retain=nll"
    )
    return Story(base, saves, tuned, unlearned)


@pytest.fixture(scope="module", params=KINDS)
def story(request, pocket, tmp_path_factory):
    yield story_of(request.param, pocket, tmp_path_factory.mktemp(request.param))
    release()


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def by_peft(base, run):
    return logits(PeftModel.from_pretrained(loaded(base), run / "adapter").eval())


def test_both_stages_move_the_adapter_and_every_client_counts(story):
    for run in (story.tuned, story.unlearned):
        assert all(client["reason"] == "" for line in history(run) for client in line["clients"])
    before, after = adapter_tensors(story.tuned), adapter_tensors(story.unlearned)
    assert before.keys() == after.keys()
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(tensor.any() for tensor in before.values())


def test_merged_it_says_what_it_says_unmerged_and_the_base_comes_back_bit_by_bit(story):
    model = lora.apply(loaded(story.base), story.unlearned)
    before, wanted = base_tensors(model), logits(model)
    assert torch.equal(wanted, by_peft(story.base, story.unlearned))
    assert apart(wanted, logits(loaded(story.base))) > 1e-4
    lora.merge(model)
    assert apart(logits(model), wanted) < 1e-5
    lora.unmerge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model).items())
    assert torch.equal(logits(model), wanted)


def test_so_do_the_files_of_the_command_line(story, tmp_path):
    serve(read(["merge", str(story.unlearned), "--to", str(tmp_path / "merged"), "--keep"]))
    assert apart(logits(loaded(tmp_path / "merged")), by_peft(story.base, story.unlearned)) < 1e-5
    serve(read(["unmerge", str(tmp_path / "merged"), "--to", str(tmp_path / "back")]))
    assert fingerprint_base(tmp_path / "back") == fingerprint_base(story.base)
    assert torch.equal(logits(loaded(tmp_path / "back")), logits(loaded(story.base)))
    serve(read(["verify", str(story.unlearned)]))


@pytest.mark.parametrize("initial", ["pissa", "olora"])
def test_what_began_with_the_base_s_own_weights_is_the_difference_to_it_at_twice_the_rank(initial, pocket, tmp_path):
    found = story_of("llama", pocket, tmp_path, f"++{LORA}init_lora_weights={initial}")
    ranks = {
        run: {min(tensor.shape) for tensor in adapter_tensors(run).values()} for run in (found.tuned, found.unlearned)
    }
    assert ranks == {found.tuned: {2 * 4}, found.unlearned: {2 * 4 + 4}}  # unlearning has factors of its own above
    model = lora.apply(loaded(found.base), found.unlearned)
    before, wanted = base_tensors(model), logits(model)
    assert torch.equal(wanted, by_peft(found.base, found.unlearned))
    lora.merge(model)
    assert apart(logits(model), wanted) < 1e-5
    lora.unmerge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model).items())
    release()
