"""Sums of adapters against the dense sum of their products, by hand and with every way to scale one."""

import math

import pytest
import torch

from fedunlearn.aggregation.arithmetic import added, apart, config_differences, pooled, scaled
from fedunlearn.aggregation.factors import modules_of, scales_of
from fedunlearn.errors import UserError
from fedunlearn.records.adapter import Adapter

HEAD = "base_model.model."
SIZES = {"m.q": (5, 4), "m.k": (3, 4), "m.v": (6, 7)}
"""(d_out, d_in) of each module."""


def made(seed, rank=2, names=("m.q", "m.k", "m.v"), ranks=None, more=None, **config):
    """An adapter with random factors. ranks: of single modules; more: plain tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in names:
        own, (d_out, d_in) = (ranks or {}).get(name, rank), SIZES.get(name, (5, 4))
        tensors[f"{HEAD}{name}.lora_A.weight"] = torch.randn(own, d_in, generator=generator)
        tensors[f"{HEAD}{name}.lora_B.weight"] = torch.randn(d_out, own, generator=generator)
    plain = {HEAD + name: torch.randn(shape, generator=generator) for name, shape in (more or {}).items()}
    known = {"peft_type": "LORA", "r": rank, "lora_alpha": 3.0, "base_model_name_or_path": "base", "target_modules": sorted({n.rpartition(".")[2] for n in names})}  # fmt: skip
    return Adapter({**tensors, **plain}, {**known, "rank_pattern": ranks or {}, **config}, "print")


def dense(adapter):
    """S B A of every module, float64, by its scale."""
    scales, tensors = scales_of(adapter.peft_config, adapter.tensors), adapter.tensors
    return {m.name: scales[m.name] * tensors[m.b].double() @ tensors[m.a].double() for m in modules_of(tensors)}


def far(found, wanted):
    """||found - wanted|| / ||wanted||, pooled."""
    lost = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return math.sqrt(lost / sum(float(one.square().sum()) for one in wanted.values()))


def dense_sum(adapters, weights):
    total = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, product in dense(adapter).items():
            total[name] = total.get(name, 0) + weight * product
    return total


SCALES = [
    pytest.param({}, {}, id="plain"),
    pytest.param({"lora_alpha": 7.0}, {"use_rslora": True}, id="alpha and rslora"),
    pytest.param({"alpha_pattern": {"k": 11.0}}, {"ranks": {"m.q": 1, "m.v": 3}}, id="patterns"),
    pytest.param({"rank": 1}, {"rank": 3, "use_rslora": True, "alpha_pattern": {"m.q": 0.5}}, id="all of it"),
    pytest.param({"names": ("m.q", "m.k")}, {"names": ("m.k", "m.v")}, id="modules of one alone"),
]


class TestAdded:
    @pytest.mark.parametrize(("first", "second"), SCALES)
    def test_exact(self, first, second):
        adapters, weights = [made(1, **first), made(2, **second)], [0.5, -2.0]
        found = added(adapters, weights)
        wanted = dense_sum(adapters, weights)
        assert far(dense(found.adapter), wanted) < 1e-6
        assert found.error < 1e-6
        assert set(scales_of(found.adapter.peft_config, found.adapter.tensors).values()) == {1.0}
        assert found.adapter.base_fingerprint == "print"

    @pytest.mark.parametrize(("first", "second"), SCALES)
    @pytest.mark.parametrize("rank", [1, 2, 9])
    def test_truncated_is_the_best_of_that_rank_and_its_error_is_told(self, first, second, rank):
        adapters, weights = [made(1, **first), made(2, **second)], [1.0, 1.0]
        found, wanted = added(adapters, weights, rank), dense_sum(adapters, weights)
        best = {}
        for name, whole in wanted.items():
            u, s, vt = torch.linalg.svd(whole, full_matrices=False)
            best[name] = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert far(dense(found.adapter), best) < 1e-6
        assert found.error == pytest.approx(far(best, wanted), abs=1e-6)
        assert found.rank <= rank
        for m in modules_of(found.adapter.tensors):
            b, a = found.adapter.tensors[m.b], found.adapter.tensors[m.a]
            assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-4)

    def test_by_hand(self):
        """alpha 3 of r 1: s = 3. 2 * 3 * [1, 2]^T [3, 5] - 1 * 3 * [7, 0]^T [1, 1] as B = [[6, -21], [12, 0]], A = [[3, 5], [1, 1]], r = alpha = 2."""

        def one(b, a):
            return Adapter({f"{HEAD}m.lora_A.weight": torch.tensor([a]), f"{HEAD}m.lora_B.weight": torch.tensor(b)[:, None]}, {"peft_type": "LORA", "r": 1, "lora_alpha": 3.0}, "print")  # fmt: skip

        found = added([one([1.0, 2.0], [3.0, 5.0]), one([7.0, 0.0], [1.0, 1.0])], [2.0, -1.0])
        b, a = (found.adapter.tensors[f"{HEAD}m.lora_{side}.weight"].tolist() for side in "BA")
        assert (b, a) == ([[6.0, -21.0], [12.0, 0.0]], [[3.0, 5.0], [1.0, 1.0]])
        assert (found.adapter.peft_config["r"], found.adapter.peft_config["lora_alpha"], found.rank) == (2, 2.0, 2)

    def test_an_adapter_less_itself_is_zero_and_can_still_be_learnt(self):
        one = made(1)
        for rank in (None, 2):
            found = added([one, one], [1.0, -1.0], rank).adapter
            assert all(product.abs().max() < 1e-6 for product in dense(found).values())
        rows = [t for name, t in found.tensors.items() if "lora_A" in name]
        assert all(bool((row.norm(dim=1) > 0.1).all()) for row in rows)

    def test_where_targets_differ_each_module_is_named(self):
        found = added([made(1, names=("m.q",)), made(2, names=("m.v",), exclude_modules=["x"])], [1.0, 1.0]).adapter
        config = found.peft_config
        assert (config["target_modules"], config["exclude_modules"]) == (["m.q", "m.v"], None)
        assert added([made(1), made(2)], [1.0, 1.0]).adapter.peft_config["target_modules"] == ["k", "q", "v"]

    def test_experts_are_pairs_of_one_rank(self):
        """PEFT's fused form tells their ranks by r alone, so all are padded to it."""
        SIZES.update({f"m.experts.{e}": (5, 4) for e in range(3)})
        names = ("m.q", "m.experts.0", "m.experts.1", "m.experts.2")
        config = {"names": names, "target_modules": ["q"], "target_parameters": ["experts.down_proj"]}
        adapters = [made(1, **config), made(2, rank=3, **config)]
        found = added(adapters, [1.0, 2.0]).adapter
        assert {len(t) for name, t in found.tensors.items() if "lora_A" in name} == {5}
        assert (found.peft_config["r"], found.peft_config["rank_pattern"]) == (5, {})
        assert far(dense(found), dense_sum(adapters, [1.0, 2.0])) < 1e-6
        mixed = added([made(1, **config), made(2, names=("m.v",))], [1.0, 1.0]).adapter
        assert mixed.peft_config["target_modules"] == ["m.q", "m.v"]
        assert mixed.peft_config["target_parameters"] == ["experts.down_proj"]
        assert {len(t) for name, t in mixed.tensors.items() if "lora_A" in name} == {2}

    def test_biases_beside_b_are_added_each_times_its_scale(self):
        """alpha 3 of r 2 and of r 1: 1.5 * 2 b1 + 3 * -1 b2."""
        bias = {"m.q.lora_B.bias": (5,)}
        one, two = made(1, more=bias, lora_bias=True), made(2, rank=1, more=bias, lora_bias=True)
        name = f"{HEAD}m.q.lora_B.bias"
        found = added([one, two], [2.0, -1.0]).adapter
        assert torch.allclose(found.tensors[name], 3.0 * one.tensors[name] - 3.0 * two.tensors[name])
        assert found.peft_config["lora_bias"] is True

    def test_where_some_have_biases_beside_b_the_others_get_zeros(self):
        """PEFT's lora_bias is of all modules of one adapter."""
        one = made(1, names=("m.q",), more={"m.q.lora_B.bias": (5,)}, lora_bias=True)
        for rank in (None, 1):
            found = added([one, made(2, names=("m.q", "m.v"))], [1.0, 1.0], rank).adapter
            assert torch.allclose(found.tensors[f"{HEAD}m.q.lora_B.bias"], 1.5 * one.tensors[f"{HEAD}m.q.lora_B.bias"])
            assert torch.equal(found.tensors[f"{HEAD}m.v.lora_B.bias"], torch.zeros(6))
        assert not any(name.endswith("bias") for name in added([made(1), made(2)], [1.0, 1.0]).adapter.tensors)

    def test_biases_beside_b_and_fused_experts_have_no_config(self):
        one = made(1, names=("m.q",), more={"m.q.lora_B.bias": (5,)}, lora_bias=True)
        with pytest.raises(UserError, match=r"lora_bias in one adapter beside target_parameters in another"):
            added([one, made(2, names=("m.experts.0",), target_parameters=["experts.down_proj"])], [1.0, 1.0])

    def test_values_of_the_base_are_averaged(self):
        plain = {"m.head.weight": (2, 3), "m.q.base_layer.bias": (5,)}
        one, two = made(1, more=plain), made(2, more=plain)
        found = added([one, two], [0.25, 0.75]).adapter
        for name in plain:
            assert torch.allclose(
                found.tensors[HEAD + name], 0.25 * one.tensors[HEAD + name] + 0.75 * two.tensors[HEAD + name]
            )


class TestScaled:
    @pytest.mark.parametrize("factor", [2.5, -1.0, 0.0])
    def test_the_product_is_scaled(self, factor):
        one = made(1, alpha_pattern={"k": 11.0}, use_rslora=True, more={"m.q.lora_B.bias": (5,)})
        found = scaled(one, factor)
        for name, product in dense(found).items():
            assert torch.allclose(product, factor * dense(one)[name], rtol=1e-6)
        bias = f"{HEAD}m.q.lora_B.bias"
        assert torch.allclose(found.tensors[bias], factor * one.tensors[bias])
        assert found.peft_config == one.peft_config

    def test_twice_negated_is_itself_bit_by_bit(self):
        one = made(1)
        assert scaled(one, -1.0) != one
        assert scaled(scaled(one, -1.0), -1.0) == one


class TestApart:
    def test_by_hand(self):
        """3 * [2, 0]^T [1, 0] and 3 * [0, 1]^T [1, 1]: norms 6 and 3 sqrt(2), apart sqrt(54), at a right angle."""

        def one(b, a):
            return Adapter({f"{HEAD}m.lora_A.weight": torch.tensor([a]), f"{HEAD}m.lora_B.weight": torch.tensor(b)[:, None]}, {"peft_type": "LORA", "r": 1, "lora_alpha": 3.0}, "print")  # fmt: skip

        (found,) = apart(one([2.0, 0.0], [1.0, 0.0]), one([0.0, 1.0], [1.0, 1.0]))
        assert (found.first, found.second) == (pytest.approx(6.0), pytest.approx(3 * math.sqrt(2)))
        assert found.difference == pytest.approx(math.sqrt(54))
        assert (found.relative, found.cosine) == (pytest.approx(math.sqrt(54) / 6), pytest.approx(0.0, abs=1e-12))

    @pytest.mark.parametrize(("first", "second"), SCALES)
    def test_against_the_dense_products(self, first, second):
        adapters = made(1, **first), made(2, **second)
        one, two = map(dense, adapters)
        found = {each.name: each for each in apart(*adapters)}
        for name, each in found.items():
            x, y = (side.get(name, torch.zeros(SIZES[name], dtype=torch.float64)) for side in (one, two))
            assert (each.first, each.second) == (pytest.approx(float(x.norm())), pytest.approx(float(y.norm())))
            assert each.difference == pytest.approx(float((x - y).norm()))
            if each.first > 0 and each.second > 0:
                assert each.cosine == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())))
        whole = pooled(list(found.values()), "all")
        assert whole.difference == pytest.approx(math.sqrt(sum(each.difference**2 for each in found.values())))

    def test_a_small_difference_keeps_its_digits(self):
        """A change of one in ten million of B, which a difference of Gram matrices would lose."""
        one = made(1, names=("m.q",))
        moved = one.replace(
            {n: t.double() * (1 + 1e-7) if "lora_B" in n else t.double() for n, t in one.tensors.items()}
        )
        same = one.replace({n: t.double() for n, t in one.tensors.items()})
        assert apart(same, moved)[0].relative == pytest.approx(1e-7, rel=1e-6)
        (none,) = apart(one, one)
        assert (none.difference, none.cosine) == (0.0, pytest.approx(1.0))

    def test_plain_tensors_too(self):
        one = made(1, names=("m.q",), more={"m.head.weight": (2, 3)})
        two = one.replace({n: 2 * t if "head" in n else t for n, t in one.tensors.items()})
        found = {each.name: each for each in apart(one, two)}
        assert found["m.q"].difference == 0.0
        assert found[f"{HEAD}m.head.weight"].relative == pytest.approx(1.0)

    def test_a_saved_weight_is_no_update_and_without_the_other_s_nothing_is_known_of_it(self):
        head = {"m.head.weight": (2, 3)}
        one, two = made(1, names=("m.q",), more=head), made(2, names=("m.q",))
        found = {each.name: each for each in apart(one, two)}
        lone = found[f"{HEAD}m.head.weight"]
        assert (lone.second, lone.difference, lone.relative, lone.product) == (0.0, None, None, False)
        assert lone.first == pytest.approx(float(one.tensors[f"{HEAD}m.head.weight"].norm()))
        assert pooled(list(found.values()), "all").difference == found["m.q"].difference
        both = apart(one, made(2, names=("m.q",), more=head))
        assert pooled(both, "all").difference == found["m.q"].difference

    def test_a_zero_adapter_has_no_direction(self):
        (found,) = apart(scaled(made(1, names=("m.q",)), 0.0), made(2, names=("m.q",)))
        assert (found.first, found.relative, found.cosine) == (0.0, None, None)

    def test_configs(self):
        found = config_differences({"r": 1, "list": ["b", "a"], "x": None}, {"r": 2, "list": ["a", "b"], "y": 3})
        assert found == {"r": (1, 2), "y": (None, 3)}


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"more": {"m.q.lora_magnitude_vector": (5,)}}, "is a magnitude of DoRA: .* products of them are no sum"),
            ({"more": {"m.q.lora_E": (5,)}}, "belongs to a variant whose product is not s B A"),
            ({"more": {"m.head.weight": (2, 3)}}, "so it has no sum or multiple, only an average"),
            ({"peft_type": "ADALORA"}, "peft_type='ADALORA': only LoRA adapters"),
        ],
    )
    def test_what_has_no_sum(self, change, said):
        odd = made(1, **change)
        with pytest.raises(UserError, match=said):
            added([odd, made(2)], [1.0, 1.0])
        with pytest.raises(UserError, match=said):
            scaled(odd, 2.0)

    def test_an_average_wants_all(self):
        with pytest.raises(UserError, match="stands in some of the adapters only"):
            added([made(1, more={"m.head.weight": (2, 3)}), made(2)], [0.5, 0.5])

    def test_other_bases(self):
        one = made(1)
        with pytest.raises(UserError, match=r"belong to different bases .*another, print"):
            added([one, Adapter(one.tensors, one.peft_config, "another")], [1.0, 1.0])
        with pytest.raises(UserError, match=r"name different bases .*base, else"):
            added([one, Adapter(one.tensors, {**one.peft_config, "base_model_name_or_path": "else"}, None)], [1.0, 1.0])
        unknown = added([one, Adapter(one.tensors, one.peft_config, None)], [1.0, 1.0])
        assert unknown.adapter.base_fingerprint is None

    def test_other_sizes(self):
        one = made(1, names=("m.q",))
        wide = Adapter({n: torch.randn(2, 9) if "lora_A" in n else t for n, t in one.tensors.items()}, one.peft_config, "print")  # fmt: skip
        for asked in (lambda: added([one, wide], [1.0, 1.0]), lambda: apart(one, wide)):
            with pytest.raises(UserError, match=r"m.q has another size in each adapter"):
                asked()

    @pytest.mark.parametrize("weights", [[1.0], [float("nan"), 1.0]])
    def test_weights(self, weights):
        with pytest.raises(UserError, match=r"give one for each|weight nan is no finite number"):
            added([made(1), made(2)], weights)
        with pytest.raises(UserError, match="weight inf"):
            scaled(made(1), float("inf"))

    def test_a_side_car(self):
        one = made(1)
        with pytest.raises(UserError, match="side-car beside it"):
            added([Adapter(one.tensors, one.peft_config, "print", one.tensors)], [1.0])
