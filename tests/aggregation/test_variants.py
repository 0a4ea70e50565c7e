"""What may be made of adapters that are more than pairs: the table in the docs is the code's, every refusal says why and how on, and trimming trims all."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers_reduce import FLOAT64
from test_plain_tensors import OFF, SHAPES, made, with_plain

from fedunlearn.aggregation.combinations import Combination, OwnSteps, Variant, variant_faults, variant_of
from fedunlearn.aggregation.reduce import reduce_round
from fedunlearn.aggregation.reducers.trimmed_mean import TrimmedMean
from fedunlearn.records.rounds import Trained

ROOT = Path(__file__).resolve().parents[2]
DORA, PISSA, ADALORA = Variant(dora=True), Variant(initial="pissa"), Variant(adalora=True)
COLUMNS = {
    "rsLoRA, gaussian": [Variant(), Variant(initial="gaussian")],
    "DoRA": [DORA],
    "bias, modules_to_save": [Variant(bias=True), Variant(modules_to_save=True), Variant(bias=True, modules_to_save=True)],
    "lora_bias": [Variant(lora_bias=True)],
    "orthogonal": [Variant(initial="orthogonal")],
    "AdaLoRA": [ADALORA, Variant(adalora=True, bias=True), Variant(adalora=True, modules_to_save=True)],
    "pissa, olora": [PISSA, Variant(initial="pissa_niter_4"), Variant(initial="olora")],
}  # fmt: skip
PRODUCT_METHOD = OwnSteps(name="Negation", changes=True, fresh=False)
FRESH_METHOD = OwnSteps(name="Fused", changes=False, fresh=True)
REPLAY = OwnSteps(name="Rollback", changes=False, fresh=False)


def preset(name, **changed):
    """What configs/aggregation has under that name, with FedAvg."""
    plain = yaml.safe_load((ROOT / "configs" / "aggregation" / f"{name}.yaml").read_text())
    kept = {key: plain[key] for key in ("weights", "mask", "reducer", "residual", "gauge", "sidecar_rank")}
    beside = {"strategy": "FedAvg", "moments": False, "sends_mean": True, "foreign": False, "robust": "Off", "reweighs": False, "ranks_differ": False}  # fmt: skip
    return Combination(**{**kept, **beside, **changed})


PRESETS = sorted(path.stem for path in (ROOT / "configs" / "aggregation").glob("*.yaml"))


def table():
    """The docs' table: aggregation -> what stands under each column."""
    lines = (ROOT / "docs" / "lora.md").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| aggregation | rsLoRA"))
    heads = [cell.strip() for cell in lines[first].strip("|").split("|")][1:]
    rows = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = dict(zip(heads, cells, strict=True))
    return rows


class TestTheTable:
    def test_it_has_every_preset_and_every_variant(self):
        rows = table()
        assert sorted(rows)[1:] == PRESETS
        assert all(list(row) == list(COLUMNS) for row in rows.values())

    @pytest.mark.parametrize("name", PRESETS)
    def test_what_it_says_of_a_preset_is_what_the_code_does(self, name):
        said = table()[name]
        for column, variants in COLUMNS.items():
            allowed = {not variant_faults(preset(name), variant, None) for variant in variants}
            assert allowed == {said[column] == "yes"}, column

    @pytest.mark.parametrize("name", ["flora", "flexlora", "hetlora"])
    def test_and_of_ranks_that_differ(self, name):
        said = next(row for first, row in table().items() if first.startswith("any"))
        for column, variants in COLUMNS.items():
            allowed = {not variant_faults(preset(name, ranks_differ=True), variant, None) for variant in variants}
            assert allowed == {said[column] == "yes"}, column


REFUSED = [
    (DORA, {"reducer": "product"}, None, "use_dora=true beside aggregation.reducer=product: a weight is there its magnitude times a direction"),
    (DORA, {"residual": "sidecar"}, None, "use_dora=true beside aggregation.residual=sidecar: what is left over is a product"),
    (DORA, {"gauge": "procrustes"}, None, "use_dora=true beside aggregation.gauge=procrustes: it turns or refactors pairs, and a weight is there its magnitude times"),
    (DORA, {"gauge": "orthonormal"}, None, "use_dora=true beside aggregation.gauge=orthonormal"),
    (DORA, {"mask": "alternate"}, None, "use_dora=true beside aggregation.mask=alternate"),
    (DORA, {"weights": "product_norm"}, None, "use_dora=true beside aggregation.weights=product_norm: .*choose weights=owned"),
    (DORA, {"robust": "Krum", "reweighs": True}, None, "use_dora=true beside robust Krum: it compares products.*choose robust=off"),
    (DORA, {"ranks_differ": True}, None, "use_dora=true beside partition.ranks or lora_alphas: .*leave them null"),
    (DORA, {}, REPLAY, "use_dora=true beside method Rollback, a server-side one, .*choose a local method"),
    (ADALORA, {"reducer": "product"}, None, r"peft_type=ADALORA beside aggregation.reducer=product: an update is there B diag\(E\) A.*choose aggregation=fedit"),
    (ADALORA, {"reducer": "trimmed_mean"}, None, "peft_type=ADALORA beside aggregation.reducer=trimmed_mean"),
    (ADALORA, {"residual": "sidecar"}, None, "peft_type=ADALORA beside aggregation.residual=sidecar: what is left over is a product, and an update is there B diag"),
    (ADALORA, {"residual": "feedback"}, None, "peft_type=ADALORA beside aggregation.residual=feedback"),
    (ADALORA, {"gauge": "procrustes"}, None, "peft_type=ADALORA beside aggregation.gauge=procrustes: it turns or refactors pairs, and an update is there B diag"),
    (ADALORA, {"gauge": "balanced"}, None, "peft_type=ADALORA beside aggregation.gauge=balanced"),
    (ADALORA, {"mask": "b"}, None, "peft_type=ADALORA beside aggregation.mask=b: a factor that rests has no update"),
    (ADALORA, {"mask": "alternate"}, None, "peft_type=ADALORA beside aggregation.mask=alternate"),
    (ADALORA, {"weights": "product_norm"}, None, "peft_type=ADALORA beside aggregation.weights=product_norm: .*choose weights=owned"),
    (ADALORA, {"robust": "Krum", "reweighs": True}, None, "peft_type=ADALORA beside robust Krum: it compares products.*choose robust=off"),
    (ADALORA, {"strategy": "flwr.X", "foreign": True, "sends_mean": False}, None, "peft_type=ADALORA beside strategy flwr.X: .*choose strategy=fedavg"),
    (ADALORA, {"ranks_differ": True}, None, "peft_type=ADALORA beside partition.ranks or lora_alphas: the server gives out the ranks.*leave them null"),
    (ADALORA, {}, REPLAY, "peft_type=ADALORA beside method Rollback, a server-side one, .*choose a local method"),
    (Variant(dora=True, lora_bias=True), {}, None, "use_dora=true beside lora_bias=true: PEFT has no layer of both"),
    (Variant(initial="gaussian", lora_bias=True), {}, None, "init_lora_weights=gaussian beside lora_bias=true: PEFT knows"),
    (Variant(bias=True, modules_to_save=True), {}, PRODUCT_METHOD, "bias, modules_to_save beside method Negation: .*what they learnt of the forget rows would stay"),
    (Variant(lora_bias=True), {}, FRESH_METHOD, "lora_bias beside method Fused"),
    (Variant(lora_bias=True), {"ranks_differ": True}, None, "lora_bias=true beside partition.ranks or lora_alphas: a bias acts times each client's own scale"),
    (PISSA, {"ranks_differ": True}, None, "init_lora_weights=pissa beside partition.ranks or lora_alphas: .*leave them null, or choose"),
    (PISSA, {"sidecar_rank": 4, "residual": "sidecar"}, None, "init_lora_weights=pissa beside aggregation.sidecar_rank=4: .*leave it null"),
    (Variant(initial="olora", experts=True), {}, None, "init_lora_weights=olora beside target_parameters: a side-car cannot stand beside fused experts"),
    (Variant(experts=True), {"residual": "sidecar"}, None, "target_parameters beside aggregation.residual=sidecar"),
    (Variant(experts=True), {}, PRODUCT_METHOD, "target_parameters beside method Negation"),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "changed", "method", "said"), REFUSED)
def test_each_refusal_says_why_and_how_on(variant, changed, method, said):
    faults = variant_faults(preset("fedit", **changed), variant, method)
    assert len(faults) == 1
    assert re.match(said, faults[0])
    assert re.search(r"choose |leave |set ", faults[0])
    assert not variant_faults(
        preset("fedit"), dataclasses.replace(variant, lora_bias=False, initial="True", experts=False), None
    )


@pytest.mark.parametrize("variant", [Variant(bias=True), Variant(modules_to_save=True), Variant(experts=True), PISSA])
def test_methods_that_average_as_fine_tuning_did_go_with_all_but_dora(variant):
    assert not variant_faults(preset("fedit"), variant, REPLAY)


def test_robust_weights_and_flower_s_strategies_go_with_plain_tensors():
    for changed in ({"robust": "Krum", "reweighs": True}, {"strategy": "flwr.X", "foreign": True, "sends_mean": False}):
        assert not variant_faults(
            preset("fedit", **changed), Variant(bias=True, modules_to_save=True, lora_bias=True), None
        )


class TestReading:
    def test_peft_s_defaults_and_null_are_plain_lora(self):
        defaults = {"use_dora": False, "lora_bias": False, "bias": "none", "modules_to_save": None, "init_lora_weights": True, "target_parameters": []}  # fmt: skip
        assert variant_of(defaults) == Variant()
        assert variant_of(dict.fromkeys(defaults)) == dataclasses.replace(Variant(), initial="None")
        assert not variant_faults(
            preset("flora", ranks_differ=True), variant_of(dict.fromkeys(defaults)), PRODUCT_METHOD
        )

    def test_each_key_arrives(self):
        config = {"use_dora": True, "lora_bias": True, "bias": "lora_only", "modules_to_save": ["lm_head"], "init_lora_weights": "olora", "target_parameters": ["mlp.experts.down_proj"]}  # fmt: skip
        assert variant_of({"peft_type": "ADALORA"}) == Variant(adalora=True, initial="None")
        assert variant_of({"peft_type": "LORA"}) == Variant(initial="None")
        assert variant_of(config) == Variant(dora=True, lora_bias=True, bias=True, modules_to_save=True, initial="olora", experts=True)  # fmt: skip


def test_the_trimmed_mean_trims_plain_tensors_too():
    """Of four clients one is cut off at each end: whoever sends 1000 everywhere sets nothing."""
    case = with_plain(made(4, trained=Trained.B))
    hostile = max(case.clients)
    for name in SHAPES:
        case.clients[hostile][name].fill_(1000.0)
    reduced = reduce_round(dataclasses.replace(OFF, reducer=TrimmedMean(0.25)), case.cohort())
    for name in SHAPES:
        ordered = torch.stack([case.clients[k][name] for k in case.clients]).sort(0).values
        assert torch.allclose(reduced.mean[name], ordered[1:3].mean(0), rtol=0, atol=FLOAT64)
        assert reduced.mean[name].abs().max() < 10
