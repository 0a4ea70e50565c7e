"""Factors and side-car as one plain PEFT folder: exact or its best rank r, and what the next stage makes of it."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from helpers_adapters import add_dense, apart, factors_like
from helpers_eval import byte_tokenizer
from helpers_models import TAKE_ALL, TARGETS, copy_of, drawn, load, lora_args, model_config, some_logits, tiny_base
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from fedunlearn.aggregation.factors import modules_of, scales_of
from fedunlearn.errors import UserError
from fedunlearn.models.adapter_files import CONFIG, PROOF, load_adapter, save_adapter, stacked_of
from fedunlearn.models.adapter_tensors import read_tensors
from fedunlearn.models.export import Stacked, export, unit_scaled
from fedunlearn.models.initial import draw_fresh
from fedunlearn.models.lora import attach_lora, check_trainable
from fedunlearn.models.lora_config import lora_config_of, plain_config
from fedunlearn.models.resident import release, take_probe
from fedunlearn.records.adapter import Adapter

RAGGED = (3, 1, 5, 2, 0)
SHAPES = [
    pytest.param({}, id="alpha 8 of 4"),
    pytest.param({"lora_alpha": 4.0}, id="alpha 4 of 4"),
    pytest.param({"use_rslora": True}, id="rslora"),
    pytest.param({"r": 2, "lora_alpha": 3.0, "use_rslora": True}, id="rslora, alpha 3 of 2"),
]
RANKS = [pytest.param((6,), id="one rank"), pytest.param(RAGGED, id="ragged")]


@pytest.fixture(params=sorted(TARGETS))
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Both tiny bases on disk, with a tokenizer."""
    made = {}
    for kind in TARGETS:
        made[kind] = tmp_path_factory.mktemp(kind)
        tiny_base(kind).save_pretrained(made[kind])
        byte_tokenizer().save_pretrained(made[kind])
    return made


def made_adapter(kind, ranks=RAGGED, patterns=None, **lora):
    """An adapter whose factors act, with a side-car beside them; no model is kept."""
    config = lora_config_of(lora_args(target_modules=TARGETS[kind], **lora), None, "base")
    for key, value in (patterns or {}).items():
        setattr(config, key, value)
    model = attach_lora(tiny_base(kind), config)
    draw_fresh(model, 0)
    generator = torch.Generator().manual_seed(1)
    own = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in read_tensors(model).items()}
    return Adapter(own, plain_config(config), "print", factors_like(own, ranks))


def merged(kind, adapter):
    """The base with s B A of every module and the side-car's product in its weights."""
    base, scales = add_dense(tiny_base(kind), adapter.sidecar), scales_of(adapter.peft_config, adapter.tensors)
    for module in modules_of(adapter.tensors):
        pair = {name: adapter.tensors[name] for name in (module.a, module.b)}
        add_dense(base, pair, scales[module.name])
    return base


def by_peft(kind, folder, place):
    """Logits of a fresh base that plain PEFT put the folder on."""
    base = AutoModelForCausalLM.from_pretrained(place[kind], dtype=torch.float32).eval()
    return some_logits(PeftModel.from_pretrained(base, folder).eval())


def saved(adapter, rank, folder):
    flat, stacked = export(adapter, rank)
    save_adapter(folder, flat, stacked=stacked)
    return flat, stacked


class TestExact:
    @pytest.mark.parametrize("ranks", RANKS)
    @pytest.mark.parametrize("lora", SHAPES)
    def test_plain_peft_gives_the_logits_of_factors_and_side_car(self, kind, folders, tmp_path, ranks, lora):
        adapter = made_adapter(kind, ranks, **lora)
        saved(adapter, "exact", tmp_path / "stack")
        wanted = some_logits(merged(kind, adapter))
        assert apart(some_logits(merged(kind, replace(adapter, sidecar={}))), wanted) > 0.05
        assert apart(some_logits(tiny_base(kind)), wanted) > 0.05
        assert apart(by_peft(kind, tmp_path / "stack", folders), wanted) < 1e-5

    @pytest.mark.parametrize("rslora", [False, True])
    def test_an_adapter_whose_own_modules_differ_too(self, kind, folders, tmp_path, rslora):
        """rank_pattern and alpha_pattern of its own: each module's scale is folded in."""
        first, second = TARGETS[kind][0], TARGETS[kind][-1]
        patterns = {"rank_pattern": {first: 2}, "alpha_pattern": {first: 5.0, second: 12.0}}
        adapter = made_adapter(kind, patterns=patterns, use_rslora=rslora)
        assert len(set(scales_of(adapter.peft_config, adapter.tensors).values())) >= 2
        saved(adapter, "exact", tmp_path / "stack")
        assert apart(by_peft(kind, tmp_path / "stack", folders), some_logits(merged(kind, adapter))) < 1e-5

    def test_the_stack_by_hand(self):
        """s = 8 / 2 = 4: B becomes [4 B, B'], A becomes [A; A'], R = 3, so alpha = 3."""
        names = [f"base_model.model.m.lora_{side}.weight" for side in "AB"]
        own = dict(zip(names, (torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 5.0]])), strict=True))
        beside = dict(zip(names, (torch.tensor([[7.0]]), torch.tensor([[11.0]])), strict=True))
        config = {"r": 2, "lora_alpha": 8.0, "use_rslora": False, "peft_type": "LORA"}
        found, stacked = export(Adapter(own, config, "print", beside), "exact")
        assert found.tensors[names[0]].tolist() == [[1.0], [2.0], [7.0]]
        assert found.tensors[names[1]].tolist() == [[12.0, 20.0, 11.0]]
        assert (found.peft_config["r"], found.peft_config["lora_alpha"]) == (3, 3.0)
        assert (found.peft_config["rank_pattern"], found.peft_config["alpha_pattern"]) == ({}, {})
        assert (found.base_fingerprint, found.sidecar, stacked) == ("print", {}, Stacked(r=2, lora_alpha=8.0))

    def test_ragged_modules_are_named_in_patterns(self, kind):
        adapter = made_adapter(kind)
        config = export(adapter, "exact")[0].peft_config
        ranks = {m.name: len(adapter.tensors[m.a]) + len(adapter.sidecar[m.a]) for m in modules_of(adapter.tensors)}
        assert config["r"] == config["lora_alpha"] == max(ranks.values()) == 9
        assert config["rank_pattern"] == {name: rank for name, rank in ranks.items() if rank != 9}
        assert config["alpha_pattern"] == {name: float(rank) for name, rank in config["rank_pattern"].items()}

    def test_under_rslora_alpha_is_the_root(self, kind):
        config = export(made_adapter(kind, use_rslora=True), "exact")[0].peft_config
        assert config["lora_alpha"] == 3.0
        assert config["alpha_pattern"] == {n: math.sqrt(rank) for n, rank in config["rank_pattern"].items()}

    def test_modules_without_a_block_keep_their_factors_scaled(self, kind, folders, tmp_path):
        adapter = made_adapter(kind)
        name = modules_of(adapter.tensors)[0]
        part = replace(adapter, sidecar={k: t for k, t in adapter.sidecar.items() if k not in (name.a, name.b)})
        flat, _ = saved(part, "exact", tmp_path / "stack")
        assert torch.equal(flat.tensors[name.a], adapter.tensors[name.a])
        assert torch.equal(flat.tensors[name.b], 2.0 * adapter.tensors[name.b])
        assert apart(by_peft(kind, tmp_path / "stack", folders), some_logits(merged(kind, part))) < 1e-5

    def test_the_input_stays(self, kind):
        adapter = made_adapter(kind)
        before, config = adapter.tensor_hash, json.dumps(adapter.peft_config, sort_keys=True)
        for rank in ("exact", "r"):
            export(adapter, rank)
        assert Adapter(adapter.tensors, adapter.peft_config, "print", adapter.sidecar).tensor_hash == before
        assert json.dumps(adapter.peft_config, sort_keys=True) == config


class TestBestRank:
    @pytest.mark.parametrize("lora", SHAPES)
    def test_it_is_the_best_rank_r_of_the_whole_product(self, kind, lora):
        """Eckart and Young: what is missing has the norm of the singular values beyond r, by a dense SVD."""
        adapter = made_adapter(kind, **lora)
        found, stacked = export(adapter, "r")
        scales = scales_of(adapter.peft_config, adapter.tensors)
        assert (stacked, found.sidecar, found.peft_config) == (None, {}, adapter.peft_config)
        for m in modules_of(adapter.tensors):
            whole = scales[m.name] * adapter.tensors[m.b].double() @ adapter.tensors[m.a].double()
            whole = whole + adapter.sidecar[m.b].double() @ adapter.sidecar[m.a].double()
            u, s, vt = torch.linalg.svd(whole)
            r = len(adapter.tensors[m.a])
            best = u[:, :r] * s[:r] @ vt[:r]
            got = scales[m.name] * found.tensors[m.b].double() @ found.tensors[m.a].double()
            assert found.tensors[m.a].shape == adapter.tensors[m.a].shape
            assert (got - best).norm() < 1e-5 * whole.norm()
            assert (whole - got).norm().item() == pytest.approx(s[r:].norm().item(), rel=1e-4, abs=1e-5)

    def test_its_factors_are_balanced(self, kind):
        found, _ = export(made_adapter(kind), "r")
        for m in modules_of(found.tensors):
            rows, columns = found.tensors[m.a].norm(dim=1), found.tensors[m.b].norm(dim=0)
            assert torch.allclose(rows, columns, rtol=1e-4)

    def test_plain_peft_gives_its_logits(self, kind, folders, tmp_path):
        flat, _ = saved(made_adapter(kind), "r", tmp_path / "cut")
        assert apart(by_peft(kind, tmp_path / "cut", folders), some_logits(merged(kind, flat))) < 1e-5
        assert stacked_of(tmp_path / "cut") is None

    def test_what_has_rank_r_already_is_kept_exactly(self, kind):
        """A side-car of zeros: the same product from other factors."""
        adapter = made_adapter(kind)
        still = replace(adapter, sidecar={name: torch.zeros_like(t) for name, t in adapter.sidecar.items()})
        found, _ = export(still, "r")
        for m in modules_of(adapter.tensors):
            wanted = adapter.tensors[m.b].double() @ adapter.tensors[m.a].double()
            assert apart(found.tensors[m.b].double() @ found.tensors[m.a].double(), wanted) < 1e-5

    def test_a_module_of_zeros_stays_zero_and_can_be_learnt(self, kind):
        adapter = made_adapter(kind)
        m = modules_of(adapter.tensors)[0]
        nothing = {name: torch.zeros_like(t) if name in (m.a, m.b) else t for name, t in adapter.sidecar.items()}
        zero = replace(
            adapter, tensors={**adapter.tensors, m.b: torch.zeros_like(adapter.tensors[m.b])}, sidecar=nothing
        )
        found, _ = export(zero, "r")
        assert not found.tensors[m.b].any()
        assert (found.tensors[m.a].norm(dim=1) > 0).all()


@pytest.mark.parametrize("rank", ["exact", "r"])
def test_without_a_side_car_the_adapter_comes_back_as_it_is(kind, rank):
    plain = replace(made_adapter(kind), sidecar={})
    found, stacked = export(plain, rank)
    assert found is plain
    assert stacked is None


class TestUnitScaled:
    def test_by_hand(self):
        """s = 8 / 2 = 4 into B; A stays."""
        names = [f"base_model.model.m.lora_{side}.weight" for side in "AB"]
        own = dict(zip(names, (torch.ones(2, 1), torch.tensor([[3.0, 5.0]])), strict=True))
        found = unit_scaled(Adapter(own, {"r": 2, "lora_alpha": 8.0}, None))
        assert found[names[1]].tolist() == [[12.0, 20.0]]
        assert found[names[0]] is own[names[0]]

    @pytest.mark.parametrize("lora", SHAPES)
    def test_a_stack_is_at_unit_scale_already_bit_by_bit(self, kind, lora):
        flat, _ = export(made_adapter(kind, **lora), "exact")
        assert all(tensor is flat.tensors[name] for name, tensor in unit_scaled(flat).items())


class TestNextStage:
    """A stacked folder is the side-car beneath fresh factors of the shape it was made with."""

    @pytest.fixture(autouse=True)
    def _release(self):
        yield
        release()

    @pytest.fixture
    def stack(self, kind, folders, tmp_path):
        """A run's result with its proof, as the door saves it: probe and hashes of the model that held factors and side-car."""
        made = load(model_config(folders[kind], {"target_modules": TARGETS[kind]}))
        own = drawn(made.take())
        whole = own.replace(own.tensors, factors_like(own.tensors, RAGGED))
        flat, stacked = export(whole, "exact")
        made.put(whole)
        save_adapter(tmp_path / "stack", flat, take_probe(made), stacked)
        logits = some_logits(made.model)
        release()
        return tmp_path / "stack", flat, logits

    def test_the_logits_are_the_same_and_the_factors_fresh(self, kind, stack):
        folder, flat, logits = stack
        made = load(model_config(folder, TAKE_ALL), seed=3)
        assert apart(some_logits(made.model), logits) < 1e-5
        check_trainable(made.model)
        fresh = made.take()
        assert not any(t.any() for name, t in fresh.tensors.items() if ".lora_B." in name)
        assert {len(t) for name, t in fresh.tensors.items() if ".lora_A." in name} == {4}
        assert (fresh.peft_config["r"], fresh.peft_config["lora_alpha"]) == (4, 8.0)
        assert (fresh.peft_config["rank_pattern"], fresh.peft_config["alpha_pattern"]) == ({}, {})
        assert fresh == made.start
        assert all(torch.equal(made.start.sidecar[name], tensor) for name, tensor in flat.tensors.items())
        assert made.start.base_fingerprint == flat.base_fingerprint == made.fingerprint

    def test_plain_peft_loads_what_the_door_saved(self, kind, folders, stack):
        folder, _, logits = stack
        assert apart(by_peft(kind, folder, folders), logits) < 1e-5

    def test_the_fresh_factors_come_from_the_seed(self, stack):
        folder, _, _ = stack
        first, same, other = (load(model_config(folder, TAKE_ALL), seed=seed).start for seed in (3, 3, 4))
        assert first == same
        assert first != other
        assert first.sidecar.keys() == other.sidecar.keys()

    def test_it_is_proven_in_silence(self, stack, caplog):
        with caplog.at_level(logging.WARNING):
            load(model_config(stack[0], TAKE_ALL))
        assert not [record for record in caplog.records if record.name.startswith("fedunlearn")]

    def test_one_whose_logits_differ_is_refused(self, stack, tmp_path):
        """The tensors are those that were saved; the scale in the config is not, and a proof of an earlier version says nothing of it."""
        folder = copy_of(stack[0], tmp_path)
        proof = json.loads((folder / PROOF).read_text())
        del proof["config_hash"]
        (folder / PROOF).write_text(json.dumps(proof))
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, "alpha_pattern": {}}))
        with pytest.raises(UserError, match=r"does not give the logits recorded with it \(tolerance 1e-05"):
            load(model_config(folder, TAKE_ALL))

    def test_the_yaml_s_own_values_agree_with_what_the_factors_were(self, kind, stack):
        made = load(model_config(stack[0], {"r": 4, "lora_alpha": 8.0, "target_modules": TARGETS[kind]}))
        assert made.start.sidecar

    @pytest.mark.parametrize(("key", "value", "was"), [("r", 9, 4), ("r", 2, 4), ("lora_alpha", 9.0, 8.0)])
    def test_a_yaml_that_disagrees_is_refused(self, stack, key, value, was):
        """9 is the stack's own rank: what is trained are factors of rank 4 above it."""
        said = rf"lora_config\.{key}={value} differs from the loaded adapter's {was}: set that value or null"
        with pytest.raises(UserError, match=said):
            load(model_config(stack[0], {**TAKE_ALL, key: value}))

    def test_another_adapter_after_it_has_no_side_car(self, kind, folders, stack):
        """The model is kept between stages: the stack must not act beneath what is loaded next."""
        beneath = load(model_config(stack[0], TAKE_ALL))
        plain = load(model_config(folders[kind], {"target_modules": TARGETS[kind]}))
        assert plain.model is beneath.model
        assert plain.start.sidecar == {}
        assert torch.equal(some_logits(plain.model), some_logits(tiny_base(kind)))

    def test_put_brings_an_adapter_s_own_side_car_and_takes_it_away(self, kind, folders, stack):
        made = load(model_config(folders[kind], {"target_modules": TARGETS[kind]}))
        own = drawn(made.take())
        plain = some_logits(made.model)
        made.put(own.replace(own.tensors, factors_like(own.tensors, RAGGED)))
        assert apart(some_logits(made.model), stack[2]) < 1e-5
        made.put(made.start)
        assert torch.equal(some_logits(made.model), plain)

    def test_a_second_stage_stacks_upon_the_first(self, kind, stack, tmp_path):
        """The next result holds the first stack, what was trained above it, and one shape for the stage after."""
        made = load(model_config(stack[0], TAKE_ALL))
        own = drawn(made.take(), seed=8)
        assert own.sidecar
        made.put(own)
        wanted = some_logits(made.model)
        flat, stacked = export(own, "exact")
        save_adapter(tmp_path / "second", flat, take_probe(made), stacked)
        release()
        again = load(model_config(tmp_path / "second", TAKE_ALL))
        assert apart(some_logits(again.model), wanted) < 1e-5
        assert stacked_of(tmp_path / "second") == Stacked(r=4, lora_alpha=8.0)

    def test_a_copy_without_proof_is_a_plain_adapter_of_its_rank(self, kind, stack, tmp_path):
        """Foreign: nobody says that it is a stack, so it is trained as it stands, at its own rank and scale."""
        folder = copy_of(stack[0], tmp_path)
        (folder / PROOF).unlink()
        made = load(model_config(folder, TAKE_ALL))
        assert stacked_of(folder) is None
        assert made.start.sidecar == {}
        assert {len(t) for name, t in made.start.tensors.items() if ".lora_A." in name} > {4}
        assert apart(some_logits(made.model), stack[2]) < 1e-5

    def test_this_run_s_dropout_is_that_of_the_fresh_factors(self, stack):
        made = load(model_config(stack[0], {**TAKE_ALL, "lora_dropout": 0.5}))
        assert made.start.peft_config["lora_dropout"] == 0.5
        assert {m.p for m in made.model.modules() if isinstance(m, nn.Dropout) and m.p} == {0.5}

    def test_on_a_bfloat16_base_it_stays_float32(self, stack):
        made = load(model_config(stack[0], TAKE_ALL, torch_dtype="bfloat16"))
        assert {t.dtype for t in made.start.sidecar.values()} == {torch.float32}
        assert all(torch.equal(made.start.sidecar[name], tensor) for name, tensor in stack[1].tensors.items())


class TestFolder:
    def test_a_side_car_is_not_saved_without_export(self, tmp_path):
        with pytest.raises(ValueError, match="an adapter with a side-car is no PEFT folder: export it first"):
            save_adapter(tmp_path / "a", made_adapter("llama"))
        assert not (tmp_path / "a").exists()

    def test_what_a_stack_was_is_read_back(self, tmp_path):
        saved(made_adapter("llama", r=3, lora_alpha=7.5), "exact", tmp_path / "a")
        assert stacked_of(tmp_path / "a") == Stacked(r=3, lora_alpha=7.5)
        assert json.loads((tmp_path / "a" / PROOF).read_text())["stacked"] == {"lora_alpha": 7.5, "r": 3}

    def test_a_plain_folder_and_a_foreign_one_are_no_stacks(self, adapter_folder, tmp_path):
        assert stacked_of(adapter_folder) is None
        folder = copy_of(adapter_folder, tmp_path)
        (folder / PROOF).unlink()
        assert stacked_of(folder) is None

    def test_a_proof_of_before_stacks_is_read(self, adapter_folder, tmp_path):
        folder = copy_of(adapter_folder, tmp_path)
        proof = json.loads((folder / PROOF).read_text())
        (folder / PROOF).write_text(json.dumps({key: value for key, value in proof.items() if key != "stacked"}))
        assert stacked_of(folder) is None
        assert load_adapter(folder)[0] == load_adapter(adapter_folder)[0]

    @pytest.mark.parametrize(
        "junk", ['{"r": 4}', '{"r": "four", "lora_alpha": 8}', "[4, 8]", '{"r": 4, "lora_alpha": null}']
    )
    def test_a_damaged_word_about_the_stack_is_refused(self, adapter_folder, tmp_path, junk):
        folder = copy_of(adapter_folder, tmp_path)
        proof = json.loads((folder / PROOF).read_text())
        (folder / PROOF).write_text(json.dumps({**proof, "stacked": json.loads(junk)}))
        with pytest.raises(UserError, match=r"is corrupt .*copy it again"):
            stacked_of(folder)
        with pytest.raises(UserError, match=r"is corrupt or truncated .*copy it again"):
            load_adapter(folder)

    def test_a_proof_that_is_no_text_is_refused(self, adapter_folder, tmp_path):
        folder = copy_of(adapter_folder, tmp_path)
        (folder / PROOF).write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match=r"is corrupt .*copy it again"):
            stacked_of(folder)
