"""scripts/adapter.py, verb by verb: what it writes, what it says, and that bad input leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers_adapters import apart
from helpers_eval import byte_tokenizer
from helpers_families import FAMILIES, adapter_of, base_of
from helpers_runs import finetune
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedunlearn.doors.adapter import read, serve
from fedunlearn.doors.adapter_named import few_logits
from fedunlearn.errors import UserError
from fedunlearn.models.adapter_files import load_adapter, save_adapter
from fedunlearn.models.fingerprint import fingerprint_base
from fedunlearn.models.merged_files import KEPT, RECORD
from fedunlearn.records.adapter import Adapter

ROOT = Path(__file__).resolve().parents[2]


def call(*words):
    serve(read([str(word) for word in words]))


@pytest.fixture
def told(capsys):
    """Calls with --json and gives what was said."""

    def ask(*words):
        capsys.readouterr()
        call(*words, "--json")
        return json.loads(capsys.readouterr().out)

    return ask


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folders = {}
    for kind in (*FAMILIES, "bf16"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        base = base_of("llama", torch.bfloat16) if kind == "bf16" else base_of(kind)
        base.save_pretrained(folders[kind])
        byte_tokenizer().save_pretrained(folders[kind])
    return folders


def own(kind, base, seed=1, fingerprint=True, **lora):
    found = adapter_of("llama" if kind == "bf16" else kind, seed, **lora)
    config = {**found.peft_config, "base_model_name_or_path": str(base)}
    return Adapter(found.tensors, config, fingerprint_base(base) if fingerprint else None)


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory):
    """Two of each base."""
    place = tmp_path_factory.mktemp("adapters")
    for kind, base in bases.items():
        for seed in (1, 2):
            save_adapter(place / f"{kind}{seed}", own(kind, base, seed, r=2 + seed))
    return {kind: (place / f"{kind}1", place / f"{kind}2") for kind in bases}


def in_peft(base, folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return few_logits((PeftModel.from_pretrained(model, folder) if folder else model).eval())


def listing(place):
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


class TestMerge:
    @pytest.mark.parametrize("kind", FAMILIES)
    def test_merged_logits_are_plain_peft_s_and_the_base_comes_back(self, kind, bases, adapters, tmp_path, told):
        said = told("merge", adapters[kind][0], "--to", tmp_path / "merged", "--keep")
        assert said["logits"] < 1e-5
        assert (said["dtype"], said["kept"]) == ("float32", True)
        wanted = in_peft(bases[kind], adapters[kind][0])
        assert apart(in_peft(bases[kind], None), wanted) > 0.05
        assert apart(in_peft(tmp_path / "merged", None), wanted) < 1e-5
        assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("x") == AutoTokenizer.from_pretrained(
            bases[kind]
        ).encode("x")
        said = told("unmerge", tmp_path / "merged", "--adapter", adapters[kind][0], "--to", tmp_path / "back")
        assert said["fingerprint"] == fingerprint_base(bases[kind]) == fingerprint_base(tmp_path / "back")
        assert torch.equal(in_peft(tmp_path / "back", None), in_peft(bases[kind], None))
        assert not (tmp_path / "back" / KEPT).exists()
        assert not (tmp_path / "back" / RECORD).exists()

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("kind", ["llama", "bf16"])
    def test_dtypes_and_what_the_cast_lost(self, kind, dtype, bases, adapters, tmp_path, told):
        said = told("merge", adapters[kind][0], "--to", tmp_path / "merged", "--dtype", dtype)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
        assert {p.dtype for p in model.parameters()} == {torch.float32 if dtype == "fp32" else torch.bfloat16}
        assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == said["dtype"]
        assert (1e-4 < said["loss"]["error"] < 0.1) if dtype == "bf16" else said["loss"]["error"] < 1e-5

    def test_keeping_a_bfloat16_base(self, bases, adapters, tmp_path, told):
        told("merge", adapters["bf16"][0], "--to", tmp_path / "merged", "--keep")
        kept = safetensors.torch.load_file(tmp_path / "merged" / KEPT)
        assert len(kept) == 14
        assert all("proj" in name and tensor.dtype == torch.bfloat16 for name, tensor in kept.items())
        assert told("unmerge", tmp_path / "merged", "--to", tmp_path / "back")["fingerprint"] == fingerprint_base(
            bases["bf16"]
        )

    def test_a_base_in_several_files(self, bases, tmp_path, told):
        base = tmp_path / "sharded"
        base_of("llama").save_pretrained(base, max_shard_size="40KB")
        assert len(list(base.glob("*.safetensors"))) > 1
        save_adapter(tmp_path / "adapter", own("llama", base))
        told("merge", tmp_path / "adapter", "--to", tmp_path / "merged", "--keep")
        assert told("unmerge", tmp_path / "merged", "--to", tmp_path / "back")["fingerprint"] == fingerprint_base(base)

    @pytest.mark.parametrize(
        "lora",
        [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True, "alpha_pattern": {"q_proj": 3}}],
    )
    @pytest.mark.parametrize("kind", ["llama", "qwen2"])
    def test_variants(self, kind, lora, bases, tmp_path, told):
        """Qwen2's head is tied to its embedding, and a saved head is not."""
        save_adapter(tmp_path / "adapter", own(kind, bases[kind], **lora))
        told("merge", tmp_path / "adapter", "--to", tmp_path / "merged", "--keep")
        assert apart(in_peft(tmp_path / "merged", None), in_peft(bases[kind], tmp_path / "adapter")) < 1e-5
        assert told("unmerge", tmp_path / "merged", "--to", tmp_path / "back")["fingerprint"] == fingerprint_base(
            bases[kind]
        )

    def test_without_keep_the_base_is_named_in_place_of_a_guess(self, bases, adapters, tmp_path):
        call("merge", adapters["llama"][0], "--to", tmp_path / "merged")
        with pytest.raises(UserError, match=rf"merged without --keep.*take the base itself, '{bases['llama']}'"):
            call("unmerge", tmp_path / "merged", "--to", tmp_path / "back")
        assert listing(tmp_path) == [path for path in listing(tmp_path) if path.startswith("merged")]

    def test_a_merged_folder_that_was_changed_gives_no_base(self, adapters, tmp_path):
        call("merge", adapters["llama"][0], "--to", tmp_path / "merged", "--keep")
        file = tmp_path / "merged" / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        tensors["model.norm.weight"] += 1
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"is not its base \(fingerprint .*changed after it was merged"):
            call("unmerge", tmp_path / "merged", "--to", tmp_path / "back")
        assert not (tmp_path / "back").exists()

    def test_another_adapter_than_was_merged(self, adapters, tmp_path):
        call("merge", adapters["llama"][0], "--to", tmp_path / "merged", "--keep")
        with pytest.raises(UserError, match="is not what was merged"):
            call("unmerge", tmp_path / "merged", "--adapter", adapters["llama"][1], "--to", tmp_path / "back")


class TestMergeRefused:
    def refused(self, tmp_path, *words):
        """The one sentence it is told by; nothing is written."""
        before = listing(tmp_path)
        with pytest.raises(UserError) as caught:
            call("merge", *words, "--to", tmp_path / "merged")
        assert listing(tmp_path) == before
        (said,) = caught.value.faults
        return said

    def test_a_quantised_base(self, tmp_path):
        base = tmp_path / "base"
        base_of("llama").save_pretrained(base)
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
        save_adapter(tmp_path / "adapter", own("llama", base))
        said = self.refused(tmp_path, tmp_path / "adapter")
        assert "is quantised (gptq): an adapter is not merged into it; name the model it was quantised from" in said

    def test_another_base_by_fingerprint_and_by_name(self, bases, adapters, tmp_path):
        said = self.refused(tmp_path, adapters["llama"][0], "--base", bases["bf16"])
        assert "belongs to another base" in said
        save_adapter(tmp_path / "foreign", own("llama", bases["llama"], fingerprint=False))
        said = self.refused(tmp_path, tmp_path / "foreign", "--base", bases["bf16"])
        assert "names another base" in said
        assert "--trust-base" in said
        call("merge", tmp_path / "foreign", "--base", bases["bf16"], "--trust-base", "--to", tmp_path / "merged")

    def test_shapes_that_do_not_fit(self, bases, tmp_path):
        odd = own("gpt2", bases["llama"])
        config = {**odd.peft_config, "target_modules": ["q_proj"]}
        save_adapter(tmp_path / "adapter", Adapter(odd.tensors, config, odd.base_fingerprint))
        assert "does not fit this base" in self.refused(tmp_path, tmp_path / "adapter")
        wide = own("llama", bases["llama"])
        save_adapter(tmp_path / "wide", Adapter(wide.tensors, {**wide.peft_config, "r": 8}, wide.base_fingerprint))
        assert "has rank 4 (14 pairs do not fit), and adapter_config.json has r=8" in self.refused(
            tmp_path, tmp_path / "wide"
        )

    def test_a_folder_that_exists_or_is_no_adapter(self, bases, adapters, tmp_path):
        assert "is a full model, no adapter" in self.refused(tmp_path, bases["llama"])
        assert "does not exist" in self.refused(tmp_path, tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        assert "holds neither config.json" in self.refused(tmp_path, tmp_path / "empty")
        (tmp_path / "merged").mkdir()
        assert "is there already: name a folder" in self.refused(tmp_path, adapters["llama"][0])

    def test_keeping_what_is_all_overwritten(self, adapters, tmp_path):
        said = self.refused(tmp_path, adapters["llama"][0], "--keep", "--dtype", "bf16")
        assert "--keep with --dtype bf16: the base is float32" in said

    def test_numbers_that_are_not_finite(self, bases, tmp_path):
        one = own("llama", bases["llama"])
        save_adapter(tmp_path / "odd", one.replace({n: t * float("inf") for n, t in one.tensors.items()}))
        assert "holds NaN or infinity (28 of 28 tensors)" in self.refused(tmp_path, tmp_path / "odd")

    @pytest.mark.parametrize(("name", "text"), [(RECORD, "{"), (RECORD, "[]"), (RECORD, "{}")])
    def test_a_damaged_record(self, adapters, tmp_path, name, text):
        call("merge", adapters["llama"][0], "--to", tmp_path / "merged", "--keep")
        (tmp_path / "merged" / name).write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            call("unmerge", tmp_path / "merged", "--to", tmp_path / "back")

    def test_a_model_that_nobody_merged(self, bases, tmp_path):
        with pytest.raises(UserError, match=f"holds no {RECORD}"):
            call("unmerge", bases["llama"], "--to", tmp_path / "back")


class TestArithmetic:
    @pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3_moe"])
    def test_a_sum_in_plain_peft_is_the_sum_in_the_base(self, kind, bases, adapters, tmp_path, told):
        """Merged one after the other, the second on what the first left."""
        said = told("add", *adapters[kind], "--weights", "1", "-0.5", "--to", tmp_path / "sum")
        assert (said["rank"], said["error"]) == (3 + 4, None)
        told("scale", adapters[kind][1], "--by", "-0.5", "--to", tmp_path / "half")
        call("merge", adapters[kind][0], "--to", tmp_path / "first")
        call("merge", tmp_path / "half", "--base", tmp_path / "first", "--trust-base", "--to", tmp_path / "both")
        assert apart(in_peft(bases[kind], tmp_path / "sum"), in_peft(tmp_path / "both", None)) < 1e-5
        call("verify", tmp_path / "sum")

    def test_a_truncated_sum_tells_its_error(self, adapters, tmp_path, told):
        whole = told("add", *adapters["llama"], "--to", tmp_path / "sum")
        small = told("add", *adapters["llama"], "--rank", "2", "--to", tmp_path / "small")
        assert (small["rank"], whole["rank"]) == (2, 7)
        assert 0.1 < small["error"] < 1
        compared = told("diff", tmp_path / "sum", tmp_path / "small")
        assert compared["whole"]["relative"] == pytest.approx(small["error"], rel=1e-4)
        assert "r" in compared["config"]

    def test_negating_takes_it_out(self, bases, adapters, tmp_path, told):
        call("negate", adapters["llama"][0], "--to", tmp_path / "minus")
        call("add", adapters["llama"][0], tmp_path / "minus", "--to", tmp_path / "nothing")
        assert apart(in_peft(bases["llama"], tmp_path / "nothing"), in_peft(bases["llama"], None)) < 1e-6
        found = told("diff", adapters["llama"][0], tmp_path / "minus")
        assert found["whole"]["cosine"] == pytest.approx(-1)
        assert found["same_base"] is True
        assert found["config"] == {}

    def test_diff_shows_tables(self, adapters, capsys):
        call("diff", *adapters["llama"])
        said = capsys.readouterr().out
        assert "the same base" in said
        assert "mlp.down_proj" in "".join(character for character in said if character.isalnum() or character in "._")
        assert "adapter_config.json" in said

    def test_refusals_write_nothing(self, bases, adapters, tmp_path):
        save_adapter(tmp_path / "dora", own("llama", bases["llama"], use_dora=True))
        before = listing(tmp_path)
        for words, said in (
            (("add", tmp_path / "dora", adapters["llama"][0]), "magnitude of DoRA"),
            (("add", *adapters["llama"], "--weights", "1"), "2 adapters, but 1 weights"),
            (("add", *adapters["llama"], "--rank", "0"), "--rank 0 is no rank"),
            (("add", adapters["llama"][0], adapters["bf16"][0]), "belong to different bases"),
            (("negate", tmp_path / "dora"), "magnitude of DoRA"),
            (("scale", adapters["llama"][0], "--by", "nan"), "weight nan"),
            (("export", adapters["llama"][0], "--rank", "-1"), "--rank -1 is no rank"),
            (
                ("export", adapters["llama"][0], "--rank", "999"),
                "--rank 999 is no rank of it: a whole number from 1 to",
            ),
            (("add", *adapters["llama"], "--rank", "999"), "--rank 999 is no rank of it: a whole number from 1 to"),
            (("export", adapters["llama"][0], "--as", "model", "--rank", "1"), "--rank beside --as model"),
            (("export", adapters["llama"][0], "--dtype", "bf16"), "--dtype beside --as peft"),
            (("export", adapters["llama"][0], "--device", "auto"), "--device auto beside --as peft"),
        ):
            with pytest.raises(UserError, match=said):
                call(*words, "--to", tmp_path / "out")
            assert listing(tmp_path) == before


class TestExport:
    def test_a_foreign_folder_gets_its_base_s_fingerprint(self, bases, tmp_path, told):
        save_adapter(tmp_path / "foreign", own("llama", bases["llama"], fingerprint=False))
        told("export", tmp_path / "foreign", "--to", tmp_path / "ours")
        assert load_adapter(tmp_path / "ours")[0].base_fingerprint == fingerprint_base(bases["llama"])
        assert torch.equal(in_peft(bases["llama"], tmp_path / "ours"), in_peft(bases["llama"], tmp_path / "foreign"))

    def test_a_lower_rank_and_a_full_model(self, bases, adapters, tmp_path, told):
        said = told("export", adapters["gpt2"][0], "--rank", "3", "--to", tmp_path / "same")
        assert said["error"] < 1e-6
        assert apart(in_peft(bases["gpt2"], tmp_path / "same"), in_peft(bases["gpt2"], adapters["gpt2"][0])) < 1e-4
        assert told("export", adapters["gpt2"][0], "--rank", "1", "--to", tmp_path / "less")["error"] > 0.1
        call("export", adapters["gpt2"][0], "--as", "model", "--to", tmp_path / "model")
        assert apart(in_peft(tmp_path / "model", None), in_peft(bases["gpt2"], adapters["gpt2"][0])) < 1e-5


class TestVerify:
    @pytest.mark.parametrize("kind", [*FAMILIES, "bf16"])
    def test_what_holds(self, kind, adapters, told):
        said = told("verify", adapters[kind][0])
        assert {check["name"]: check["holds"] for check in said["checks"]} == {
            "hash": True,
            "config": True,
            "base fingerprint": True,
            "form": True,
            "finite": True,
            "acts": True,
            "loads in plain PEFT": True,
            "logits in plain PEFT": True,
        }

    def test_a_foreign_adapter_that_does_nothing(self, bases, tmp_path, told):
        one = own("llama", bases["llama"], fingerprint=False)
        zero = one.replace({n: torch.zeros_like(t) for n, t in one.tensors.items()})
        save_adapter(tmp_path / "zero", zero)
        (tmp_path / "zero" / "fedunlearn.json").unlink()
        said = {check["name"]: check["holds"] for check in told("verify", tmp_path / "zero")["checks"]}
        assert (said["hash"], said["config"], said["base fingerprint"], said["acts"]) == (None, None, None, None)
        assert said["logits in plain PEFT"] is True

    def test_a_tensor_that_is_not_finite(self, bases, tmp_path, capsys):
        one = own("llama", bases["llama"])
        save_adapter(
            tmp_path / "odd", one.replace({n: t * float("nan") if "lora_B" in n else t for n, t in one.tensors.items()})
        )
        with pytest.raises(UserError, match=r"finite: .*lora_B.* holds NaN or infinity \(14 of 28 tensors\)"):
            call("verify", tmp_path / "odd")
        assert "NO" in capsys.readouterr().out

    def test_a_changed_tensor(self, adapters, tmp_path):
        save_adapter(tmp_path / "adapter", load_adapter(adapters["llama"][0])[0])
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(file)
        safetensors.torch.save_file({n: t + 1 for n, t in tensors.items()}, file)
        with pytest.raises(UserError, match="is not what was saved"):
            call("verify", tmp_path / "adapter")


class TestSummary:
    def test_a_bare_config(self, tmp_path, told, capsys):
        config = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
        (tmp_path / "config.json").write_text(json.dumps(config))
        for targets, wanted in (
            (["c_attn"], 294_912),
            (["c_attn", "attn.c_proj"], 442_368),
            (["c_attn", "c_proj"], 811_008),
        ):
            said = told("summary", tmp_path / "config.json", "--r", 8, "--targets", *targets)
            assert (said["trainable"], said["total"], said["file_bytes"]) == (wanted, 124_439_808, None)
        call("summary", tmp_path, "--r", 8, "--alpha", 4, "--targets", "c_attn")
        shown = capsys.readouterr().out
        assert "124,439,808 parameters, 294,912 trainable" in " ".join(shown.split())
        assert "0.5" in shown

    @pytest.mark.parametrize("kind", FAMILIES)
    def test_an_adapter_and_its_base(self, kind, bases, adapters, told):
        said = told("summary", adapters[kind][0])
        assert said["trainable"] == sum(t.numel() for t in load_adapter(adapters[kind][0])[0].tensors.values())
        assert said["total"] == sum(p.numel() for p in base_of(kind).parameters())
        assert said["file_bytes"] == (adapters[kind][0] / "adapter_model.safetensors").stat().st_size
        assert told("summary", bases[kind])["total"] == said["total"]
        assert told("summary", adapters[kind][0], "--base", bases[kind] / "config.json") == {
            **said,
            "base": str(bases[kind] / "config.json"),
        }

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--r", "4"), "needs --r and --targets"),
            (("--rslora",), "needs --r and --targets"),
            (("--base", "other"), r"--base 'other' beside .*, which is a model itself: leave it out"),
            (("--r", "0", "--targets", "q_proj"), "r=0 is no rank"),
            (("--r", "4", "--targets", "nonesuch"), "'nonesuch' matches no module"),
        ],
    )
    def test_bad_arguments(self, bases, words, said):
        with pytest.raises(UserError, match=said):
            call("summary", bases["llama"], *words)

    def test_what_an_adapter_is_needs_no_arguments(self, adapters, tmp_path):
        with pytest.raises(UserError, match="is an adapter, which has its own r"):
            call("summary", adapters["llama"][0], "--r", "4", "--targets", "q_proj")
        with pytest.raises(UserError, match="does not exist"):
            call("summary", tmp_path / "nowhere")

    @pytest.mark.parametrize("option", [("--trust-base",), ("--device", "cpu")])
    def test_what_a_summary_has_no_use_for_is_refused(self, option, adapters, capsys):
        with pytest.raises(SystemExit, match="2"):
            call("summary", adapters["llama"][0], *option)
        assert "unrecognized arguments" in capsys.readouterr().err

    def test_a_base_of_another_size(self, adapters, tmp_path):
        config = base_of("llama").config.to_dict() | {"hidden_size": 64}
        (tmp_path / "config.json").write_text(json.dumps(config))
        said = r"module 'model.layers.0.mlp.down_proj' maps 48 to 32, and that of .* 48 to 64: name the base"
        with pytest.raises(UserError, match=said):
            call("summary", adapters["llama"][0], "--base", tmp_path / "config.json")

    def test_a_base_that_cannot_be_found(self, bases, tmp_path):
        odd = own("llama", bases["llama"])
        save_adapter(
            tmp_path / "lost", Adapter(odd.tensors, {**odd.peft_config, "base_model_name_or_path": "/gone"}, None)
        )
        with pytest.raises(UserError, match=r"the config of the base '/gone' cannot be read .*with --base"):
            call("summary", tmp_path / "lost")


class TestCard:
    def test_a_run_s_result(self, pocket, saves, told):
        run = finetune(pocket, saves, "ft", "eval.at_end=true", "eval.max_rows=4", "eval.max_new_tokens=4")
        said = told("card", run)
        text = (run / "adapter" / "README.md").read_text()
        adapter = load_adapter(run / "adapter")[0]
        assert said["metrics"] > 5
        assert f"| model_utility | {json.loads((run / 'TOFU_SUMMARY.json').read_text())['model_utility']:.4g} |" in text
        for line in (
            "library_name: peft",
            "| rounds | 2 |",
            "| clients | 4 |",
            "| strategy | FedAvg |",
            f"{adapter.tensor_hash}",
            f"{adapter.base_fingerprint}",
            "| torch |",
        ):
            assert line in text, line
        with pytest.raises(
            UserError, match=r"README\.md' is there already: name another file with --to, or give --overwrite"
        ):
            call("card", run)
        call("card", run, "--overwrite")
        call("card", run / "rounds" / "0002" / "adapter", "--to", saves / "round.md")
        assert "has not been evaluated in its run" in (saves / "round.md").read_text()

    def test_a_foreign_adapter(self, adapters, tmp_path, capsys):
        call("card", adapters["llama"][0], "--to", tmp_path / "card.md")
        assert "Its run is not known" in (tmp_path / "card.md").read_text()
        assert "no run is known" in capsys.readouterr().out
        with pytest.raises(UserError, match="is a folder: name a file"):
            call("card", adapters["llama"][0], "--to", tmp_path)


class TestRounds:
    def test_a_round_with_a_side_car_is_exported_as_one_folder(self, pocket, saves, tmp_path, told):
        """The last round is the run's result, whose own folder is the stack of the same."""
        run = finetune(
            pocket, saves, "ft", "aggregation.reducer=stack", "aggregation.residual=sidecar", "aggregation.gauge=reset"
        )
        last = run / "rounds" / "0002"
        assert (last / "factors").is_dir()
        told("export", last, "--to", tmp_path / "stack")
        assert told("diff", run, tmp_path / "stack")["whole"]["relative"] < 1e-6
        assert told("summary", last)["trainable"] == told("summary", tmp_path / "stack")["trainable"]
        with pytest.raises(UserError, match="no PEFT folder yet"):
            call("verify", last)
        call("merge", last, "--to", tmp_path / "merged")
        assert apart(in_peft(tmp_path / "merged", None), in_peft(pocket.model, run / "adapter")) < 1e-4


def test_the_command_itself(adapters, tmp_path):
    """In processes of their own: an answer as JSON, and a fault as one line and code 2."""

    def run(*words):
        command = [sys.executable, "scripts/adapter.py", *map(str, words)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)

    fault = run("negate", tmp_path / "nowhere", "--to", tmp_path / "out")
    assert fault.returncode == 2
    assert fault.stderr.startswith("error: adapter=")
    assert fault.stderr.count("\n") == 1
    good = run("diff", *adapters["llama"], "--json")
    assert good.returncode == 0
    assert json.loads(good.stdout)["modules"]


def test_the_help_loads_no_torch():
    code = (
        "import sys; from fedunlearn.doors.adapter import parser; print(parser().format_help(), 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert said.stdout.strip().endswith("False")
    assert "unmerge" in said.stdout


def test_flower_is_loaded_for_rounds_alone(adapters):
    code = "import sys; from fedunlearn.doors.adapter import read, serve; serve(read(sys.argv[1:])); print('flwr' in sys.modules)"
    command = [sys.executable, "-c", code, "diff", *map(str, adapters["llama"])]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        .stdout.strip()
        .endswith("False")
    )
