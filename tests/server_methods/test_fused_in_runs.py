"""FUSED in whole runs: the old adapter stays as it was, beside the new factors."""

import json
import math

import pytest
import torch
from helpers_runs import adapter_tensors, history
from helpers_server_methods import EXACT, KEPT, run_scales
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedunlearn.aggregation.factors import modules_of
from fedunlearn.federation.block_store import BlockStore
from fedunlearn.federation.checkpoint import latest_checkpoint, read_checkpoint


def logits(pocket, folder):
    """Logits of the base with a PEFT folder by plain PEFT: [3, 12, V]."""
    base = AutoModelForCausalLM.from_pretrained(pocket.model, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, folder).eval()(torch.arange(36).reshape(3, 12)).logits.double()


@pytest.mark.parametrize("name", ["always", "exact_flora"])
def test_fused_without_its_new_factors_is_the_adapter_as_it_was(runs, pocket, name, tmp_path):
    overrides = () if name == "always" else EXACT["flora"]
    tuned = runs.tuned(name, *KEPT, *overrides)
    run = runs.unlearned(f"fused_{name}", tuned, "method=fused")
    last = latest_checkpoint(run)
    old = logits(pocket, tuned / "adapter")
    assert float((logits(pocket, run / "adapter") - old).abs().max() / old.abs().max()) > 1e-3
    beside = BlockStore(run / "sidecar").read(last.blocks)
    ranks = {m.name: beside[m.a].shape[0] for m in modules_of(beside)}
    config = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    config |= {"r": max(ranks.values()), "lora_alpha": max(ranks.values()), "rank_pattern": {}, "alpha_pattern": {}}
    assert len(set(ranks.values())) == 1
    (tmp_path / "dropped").mkdir()
    (tmp_path / "dropped" / "adapter_config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    save_file(beside, tmp_path / "dropped" / "adapter_model.safetensors", metadata={"format": "pt"})
    assert float((logits(pocket, tmp_path / "dropped") - old).abs().max() / old.abs().max()) < 1e-5


def test_fused_keeps_the_old_adapter_s_tensors_in_the_side_car(runs):
    """A as it was bit by bit, B times s (a power of two here: bit by bit too), in every round."""
    tuned = runs.tuned("always", *KEPT)
    run = runs.unlearned("fused_kept", tuned, "method=fused", "trainer.federated.keep_rounds=all")
    old, scales = adapter_tensors(tuned), run_scales(tuned)
    for number in (1, 2):
        beside = BlockStore(run / "sidecar").read(read_checkpoint(run / f"rounds/{number:04d}").blocks)
        assert beside.keys() == old.keys()
        for module in modules_of(old):
            assert torch.equal(beside[module.a], old[module.a])
            assert torch.equal(beside[module.b], scales[module.name] * old[module.b])
            assert math.log2(scales[module.name]).is_integer()


def test_fused_trains_everyone_s_retain_rows_and_no_forget_row(runs):
    run = runs.unlearned("fused_always", runs.tuned("always", *KEPT), "method=fused")
    assert {c["client_id"]: (c["role"], c["num_trained"]) for c in history(run)[0]["clients"]} == {
        0: ("finetune", 20), 1: ("finetune", 20), 2: ("finetune", 16), 3: ("finetune", 16),
    }  # fmt: skip
