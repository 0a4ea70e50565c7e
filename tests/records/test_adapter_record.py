"""The adapter as it travels: what its hash sees, equality, and what `replace` refuses."""

import hashlib
import struct

import pytest
import torch

from fedunlearn.records.adapter import Adapter, Weights, hash_tensors

CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}


def tensors():
    return {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[0.5], [0.25]])}


def test_hash_by_hand():
    """sha256 of a line "name dtype shape" and the little-endian floats, tensor by tensor in name order."""
    a = b"a torch.float32 (2, 1)\n" + struct.pack("<2f", 0.5, 0.25)
    b = b"b torch.float32 (2,)\n" + struct.pack("<2f", 1.0, 2.0)
    assert hash_tensors(tensors()) == hashlib.sha256(a + b).hexdigest()


def test_the_hash_does_not_see_order_strides_or_gradients():
    plain = tensors()
    other = {"a": torch.tensor([[0.5, 0.25]]).t(), "b": torch.tensor([1.0, 2.0], requires_grad=True)}
    assert hash_tensors(dict(reversed(plain.items()))) == hash_tensors(plain) == hash_tensors(other)


@pytest.mark.parametrize(
    "changed",
    [
        {"b": torch.tensor([1.0, 2.0000002])},
        {"b": torch.tensor([[1.0, 2.0]])},
        {"b": torch.tensor([1.0, 2.0]).bfloat16()},
        {"b": torch.tensor([2.0, 1.0])},
        {"c": torch.tensor([1.0])},
    ],
)
def test_the_hash_sees_value_shape_type_order_of_entries_and_names(changed):
    assert hash_tensors({**tensors(), **changed}) != hash_tensors(tensors())


def test_plus_and_minus_zero_are_different_bytes():
    assert hash_tensors({"w": torch.tensor([0.0])}) != hash_tensors({"w": torch.tensor([-0.0])})


def test_tensors_stand_in_name_order_whatever_came():
    adapter = Adapter(tensors(), CONFIG, "base")
    assert list(adapter.tensors) == ["a", "b"]
    assert adapter.tensor_hash == hash_tensors(tensors())


def test_equality_goes_by_tensors_config_and_base():
    adapter = Adapter(tensors(), CONFIG, "base")
    same = Adapter(dict(reversed(tensors().items())), dict(reversed(CONFIG.items())), "base")
    assert adapter == same
    assert hash(adapter) == hash(same)
    assert adapter != Adapter(tensors(), CONFIG, None)
    assert adapter != Adapter(tensors(), {**CONFIG, "r": 3}, "base")
    assert adapter != Adapter({**tensors(), "b": torch.zeros(2)}, CONFIG, "base")
    assert adapter != "adapter"


def test_replace_keeps_config_and_base_and_leaves_the_old_one_alone():
    adapter = Adapter(tensors(), CONFIG, "base")
    other = adapter.replace({"a": torch.zeros(2, 1), "b": torch.zeros(2)})
    assert other.peft_config == CONFIG
    assert other.base_fingerprint == "base"
    assert other.tensors["b"].tolist() == [0.0, 0.0]
    assert adapter.tensors["b"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"a": torch.zeros(2, 1)}, "differ in name, first 'b'"),
        ({**tensors(), "aa": torch.zeros(1)}, "differ in name, first 'aa'"),
        ({**tensors(), "b": torch.zeros(1, 2)}, r"'b' has shape \(1, 2\) instead of \(2,\)"),
    ],
)
def test_replace_refuses_other_names_and_shapes(values, said):
    with pytest.raises(ValueError, match=said):
        Adapter(tensors(), CONFIG, "base").replace(values)


class TestSideCar:
    BESIDE = {"d": torch.tensor([3.0]), "c": torch.tensor([[1.5]])}

    def test_without_one_the_hash_is_that_of_the_factors(self):
        assert Weights(tensors()).hash == Adapter(tensors(), CONFIG, "base").tensor_hash == hash_tensors(tensors())

    def test_the_hash_by_hand(self):
        """sha256 of the two hashes with a blank between them."""
        text = f"{hash_tensors(tensors())} {hash_tensors(self.BESIDE)}"
        wanted = hashlib.sha256(text.encode()).hexdigest()
        assert Weights(tensors(), self.BESIDE).hash == wanted
        assert Adapter(tensors(), CONFIG, "base", self.BESIDE).tensor_hash == wanted

    def test_the_hash_sees_it_and_which_side_a_tensor_stands_on(self):
        hashes = {
            Weights(*sides).hash
            for sides in (
                (tensors(), {}),
                (tensors(), self.BESIDE),
                (tensors(), {**self.BESIDE, "c": torch.tensor([[1.25]])}),
                (self.BESIDE, tensors()),
                ({**tensors(), **self.BESIDE}, {}),
            )
        }
        assert len(hashes) == 5

    def test_it_stands_in_name_order_and_is_part_of_equality(self):
        adapter = Adapter(tensors(), CONFIG, "base", self.BESIDE)
        assert list(adapter.sidecar) == ["c", "d"]
        assert adapter == Adapter(tensors(), CONFIG, "base", dict(reversed(self.BESIDE.items())))
        assert adapter != Adapter(tensors(), CONFIG, "base")
        assert (adapter.weights.factors, adapter.weights.sidecar) == (adapter.tensors, adapter.sidecar)

    def test_replace_keeps_it_unless_another_is_given(self):
        adapter = Adapter(tensors(), CONFIG, "base", self.BESIDE)
        assert adapter.replace(tensors()) == adapter
        assert adapter.replace(tensors(), {}) == Adapter(tensors(), CONFIG, "base")
        assert adapter.replace(tensors(), {"e": torch.ones(1)}).sidecar["e"].item() == 1.0
        assert list(adapter.sidecar) == ["c", "d"]
