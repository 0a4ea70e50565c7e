"""What a task is made of: parts by hash, which of them travel, where a client keeps them, and the server's side-car blocks."""

import logging

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save

from fedunlearn.aggregation.factors import modules_of
from fedunlearn.errors import UserError
from fedunlearn.federation.block_store import BlockStore
from fedunlearn.federation.part_store import PartStore, joined
from fedunlearn.federation.parts import Depot, Part
from fedunlearn.federation.wire import blob_of
from fedunlearn.records.adapter import hash_tensors
from fedunlearn.records.shape import ClientShape

NAMES = [f"base_model.model.{m}.lora_{side}.weight" for m in ("one", "two") for side in "AB"]
A_NAMES, B_NAMES = NAMES[0::2], NAMES[1::2]
SCALES = {"one": 2.0, "two": 2.0}
TWO_OF_4 = ClientShape(rank=2, lora_alpha=1.0)


def factors(rank=4, seed=0):
    """Two modules, [5, 3] and [6, 2]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"one": (5, 3), "two": (6, 2)}
    made = {}
    for name in NAMES:
        d_out, d_in = sizes[name.split(".")[2]]
        shape = (rank, d_in) if ".lora_A." in name else (d_out, rank)
        made[name] = torch.randn(shape, generator=generator)
    return made


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def depot(tmp_path, **changed):
    """A round whose global adapter has moved on from the start; no side-car unless given."""
    usual = {
        "adapter": factors(seed=1),
        "blocks": (),
        "start": factors(seed=0),
        "start_blocks": (),
        "store": BlockStore(tmp_path / "sidecar"),
        "scales": SCALES,
        "halves": False,
        "dtype": torch.float32,
    }
    return Depot(**{**usual, **changed})


class TestPart:
    def test_it_is_named_by_its_numbers_and_travels_whole(self):
        part = Part(factors())
        assert part.hash == hash_tensors(factors())
        assert same(safetensors.torch.load(blob_of(part.packed)), factors())

    def test_it_is_packed_once(self):
        part = Part(factors())
        assert part.packed is part.packed

    def test_a_block_is_read_from_the_run_s_folder_when_it_is_sent(self, tmp_path):
        store = BlockStore(tmp_path)
        name = store.keep(factors(2))
        (block,) = depot(tmp_path, store=store, blocks=(name,)).shipment(None, False).sidecar
        assert block.hash == name == hash_tensors(factors(2))
        assert same(safetensors.torch.load(blob_of(block.packed)), factors(2))


class TestShipment:
    def test_the_plain_round_sends_the_adapter_each_time(self, tmp_path):
        shipment = depot(tmp_path).shipment(None, False)
        (whole,) = shipment.adapter
        assert same(shipment.start, factors(seed=1))
        assert same(whole.tensors, factors(seed=1))
        assert (shipment.keep, shipment.apart) == (frozenset(), frozenset())
        assert (shipment.sidecar, shipment.reference, shipment.reference_sidecar) == ((), (), ())
        assert list(shipment.lacking(())) == [whole.hash]
        assert shipment.lacking([whole.hash]) == {}

    def test_halves_are_parts_of_their_own_and_kept(self, tmp_path):
        shipment = depot(tmp_path, halves=True).shipment(None, False)
        a, b = shipment.adapter
        assert (sorted(a.tensors), sorted(b.tensors)) == (sorted(A_NAMES), sorted(B_NAMES))
        assert shipment.keep == {a.hash, b.hash}
        assert list(shipment.lacking([a.hash])) == [b.hash]
        assert same(shipment.start, factors(seed=1))

    def test_a_half_that_rested_is_not_sent_again(self, tmp_path):
        """Round 2 moved B alone: A's hash is that of round 1."""
        before = depot(tmp_path, halves=True).shipment(None, False)
        moved = {name: t + 1 if name in B_NAMES else t for name, t in factors(seed=1).items()}
        after = depot(tmp_path, halves=True, adapter=moved).shipment(None, False)
        lacking = after.lacking(before.keep)
        assert [sorted(part.tensors) for part in lacking.values()] == [sorted(B_NAMES)]

    def test_the_reference_comes_beside_it_is_kept_and_counted_apart(self, tmp_path):
        shipment = depot(tmp_path).shipment(None, True)
        (reference,) = shipment.reference
        assert same(reference.tensors, factors(seed=0))
        assert shipment.keep == shipment.apart == {reference.hash}
        assert set(shipment.lacking(())) == {shipment.adapter[0].hash, reference.hash}
        assert set(shipment.lacking(shipment.keep)) == {shipment.adapter[0].hash}

    @pytest.mark.parametrize("halves", [False, True])
    def test_in_the_first_round_the_reference_is_the_adapter_and_is_sent_once(self, tmp_path, halves):
        shipment = depot(tmp_path, adapter=factors(seed=0), halves=halves).shipment(None, True)
        hashes = {part.hash for part in shipment.adapter}
        assert hashes == {part.hash for part in shipment.reference}
        assert set(shipment.lacking(())) == shipment.keep == hashes
        assert shipment.apart == frozenset()

    def test_a_reference_s_half_that_the_adapter_still_has_is_none_of_its_own_bytes(self, tmp_path):
        """Under mask b the adapter's A is the reference's: only the reference's B is apart."""
        frozen = {name: factors(seed=0)[name] if name in A_NAMES else t for name, t in factors(seed=1).items()}
        shipment = depot(tmp_path, adapter=frozen, halves=True).shipment(None, True)
        assert shipment.apart == {shipment.reference[1].hash}
        assert len(shipment.lacking(())) == 3

    def test_side_car_blocks_are_kept_and_those_of_the_reference_alone_are_apart(self, tmp_path):
        store = BlockStore(tmp_path / "sidecar")
        old, new = store.keep(factors(1, 7)), store.keep(factors(2, 8))
        room = depot(tmp_path, blocks=(old, new), start_blocks=(old,))
        plain, full = room.shipment(None, False), room.shipment(None, True)
        assert [block.hash for block in plain.sidecar] == [block.hash for block in full.sidecar] == [old, new]
        assert plain.reference_sidecar == ()
        assert [block.hash for block in full.reference_sidecar] == [old]
        assert plain.keep == {old, new}
        assert full.apart == {full.reference[0].hash}
        gone = depot(tmp_path, blocks=(new,), start_blocks=(old,)).shipment(None, True)
        assert gone.apart == {gone.reference[0].hash, old}
        assert set(gone.lacking([new])) == {gone.adapter[0].hash, gone.reference[0].hash, old}

    def test_a_smaller_rank_gets_the_first_rows_and_columns_at_its_own_scale(self, tmp_path):
        """s = 2, s_k = 1 / 2 at rank 2: both factors times sqrt(4) = 2, and s_k B_k A_k = 2 B[:, :2] A[:2]."""
        shipment = depot(tmp_path).shipment(TWO_OF_4, True)
        for whole, found in (
            (factors(seed=1), shipment.start),
            (factors(seed=0), shipment.reference[0].tensors),
        ):
            for name, tensor in whole.items():
                first = tensor[:2] if name in A_NAMES else tensor[:, :2]
                assert torch.allclose(found[name], 2.0 * first, rtol=1e-6)
                assert found[name].is_contiguous()
        blob_of(shipment.adapter[0].packed)

    def test_the_adapter_s_own_rank_and_scale_are_the_same_parts_bit_by_bit(self, tmp_path):
        own = ClientShape(rank=4, lora_alpha=8.0)
        shipment = depot(tmp_path).shipment(own, True)
        assert shipment.adapter[0].hash == hash_tensors(factors(seed=1))
        assert shipment.reference[0].hash == hash_tensors(factors(seed=0))

    def test_at_the_adapter_s_scale_a_smaller_rank_is_cut_bit_by_bit_and_travels(self, tmp_path):
        """alpha 4 at rank 2 is s = 2 as well: the cut is a view of the adapter, of which only its own entries travel."""
        (part,) = depot(tmp_path).shipment(ClientShape(rank=2, lora_alpha=4.0), False).adapter
        wanted = {n: t[:2] if n in A_NAMES else t[:, :2] for n, t in factors(seed=1).items()}
        assert same(part.tensors, wanted)
        blob = blob_of(part.packed)
        assert same(safetensors.torch.load(blob), wanted)
        assert len(blob) < 4 * sum(t.numel() for t in wanted.values()) + 1000

    def test_each_rank_s_parts_are_made_once_a_round(self, tmp_path):
        room = depot(tmp_path)
        assert room.shipment(TWO_OF_4, True).adapter[0] is room.shipment(TWO_OF_4, False).adapter[0]
        assert room.shipment(None, False).adapter[0] is room.shipment(None, True).adapter[0]
        assert room.shipment(None, False).adapter[0].hash != room.shipment(TWO_OF_4, False).adapter[0].hash

    def test_in_bfloat16_all_of_the_adapter_is(self, tmp_path):
        """The block stays float32: it is frozen, and rounding it would add up."""
        store = BlockStore(tmp_path / "sidecar")
        room = depot(tmp_path, dtype=torch.bfloat16, halves=True, blocks=(store.keep(factors(1)),))
        shipment = room.shipment(TWO_OF_4, True)
        sent = [*shipment.start.values(), *(t for part in shipment.reference for t in part.tensors.values())]
        assert {tensor.dtype for tensor in sent} == {torch.bfloat16}
        (block,) = shipment.sidecar
        assert {t.dtype for t in safetensors.torch.load(blob_of(block.packed)).values()} == {torch.float32}


class TestPartStore:
    PART, OTHER = {"a": torch.tensor([1.0, 2.0])}, {"b": torch.ones(3).bfloat16()}
    NAME, SECOND = hash_tensors(PART), hash_tensors(OTHER)

    @pytest.fixture
    def store(self, tmp_path):
        return PartStore(tmp_path / "clients" / "3")

    @staticmethod
    def kept(store):
        return sorted(path.name for path in store.folder.glob("*")) if store.folder.is_dir() else []

    def test_what_is_received_is_found_and_kept_where_the_task_says_so(self, store):
        received = {self.NAME: save(self.PART), self.SECOND: save(self.OTHER)}
        found, missing = store.obtain([self.NAME, self.SECOND], received, [self.NAME])
        assert missing == ()
        assert same(found[self.NAME], self.PART)
        assert same(found[self.SECOND], self.OTHER)
        assert self.kept(store) == [f"part-{self.NAME}.safetensors"]

    def test_what_is_kept_need_not_come_again(self, store):
        store.obtain([self.NAME], {self.NAME: save(self.PART)}, [self.NAME])
        found, missing = store.obtain([self.NAME], {}, [self.NAME])
        assert missing == ()
        assert same(found[self.NAME], self.PART)

    def test_what_is_not_to_be_kept_is_read_once_more_and_then_gone(self, store):
        store.obtain([self.NAME], {self.NAME: save(self.PART)}, [self.NAME])
        found, missing = store.obtain([self.NAME], {}, [self.SECOND])
        assert missing == ()
        assert same(found[self.NAME], self.PART)
        assert self.kept(store) == []
        assert store.obtain([self.NAME], {}, []) == ({}, (self.NAME,))

    def test_what_is_lacking_is_named_once_in_order(self, store):
        wanted = sorted([self.NAME, self.SECOND, "f" * 64, self.NAME])
        found, missing = store.obtain(wanted, {self.NAME: save(self.PART)}, [])
        assert list(found) == [self.NAME]
        assert missing == tuple(sorted([self.SECOND, "f" * 64]))

    def test_what_is_kept_and_not_wanted_this_time_stays(self, store):
        store.obtain([self.NAME], {self.NAME: save(self.PART)}, [self.NAME])
        store.obtain([self.SECOND], {self.SECOND: save(self.OTHER)}, [self.NAME])
        assert self.kept(store) == [f"part-{self.NAME}.safetensors"]

    def test_other_files_in_the_folder_are_left_alone(self, store):
        store.folder.mkdir(parents=True)
        (store.folder / "notes.txt").write_text("mine")
        store.obtain([self.NAME], {self.NAME: save(self.PART)}, [])
        assert self.kept(store) == ["notes.txt"]

    @pytest.mark.parametrize(
        ("blob", "said"),
        [
            (b"", "that came is damaged"),
            (b"nothing of the kind", "that came is damaged"),
            (save(PART)[:-1], "that came is damaged"),
            (
                save(PART).replace(b'"F32"', b'"F4"').replace(b"[2]", b"[16]"),
                "that came is damaged",
            ),  # torch's reader knows none
            (save({"a": torch.tensor([1.0, 2.5])}), "is not what it is named by"),
            (save({"c": torch.tensor([1.0, 2.0])}), "is not what it is named by"),
            (save({"a": torch.tensor([1.0, 2.0]).double()}), "is not what it is named by"),
        ],
    )
    def test_what_comes_wrong_is_asked_for_anew_and_never_kept(self, store, caplog, blob, said):
        with caplog.at_level(logging.WARNING):
            assert store.obtain([self.NAME], {self.NAME: blob}, [self.NAME]) == ({}, (self.NAME,))
        assert self.kept(store) == []
        assert said in caplog.text
        assert "asked for anew" in caplog.text

    def test_what_comes_wrong_and_is_kept_here_is_read_from_the_disk(self, store):
        store.obtain([self.NAME], {self.NAME: save(self.PART)}, [self.NAME])
        found, missing = store.obtain([self.NAME], {self.NAME: b"nothing of the kind"}, [self.NAME])
        assert missing == ()
        assert same(found[self.NAME], self.PART)

    @pytest.mark.parametrize("blob", [b"", save(PART)[:-1], save(OTHER)])
    def test_what_went_bad_on_the_disk_is_deleted_and_asked_for_anew(self, store, caplog, blob):
        store.obtain([self.NAME], {self.NAME: save(self.PART)}, [self.NAME])
        (file,) = store.folder.iterdir()
        file.write_bytes(blob)
        with caplog.at_level(logging.WARNING):
            assert store.obtain([self.NAME], {}, [self.NAME]) == ({}, (self.NAME,))
        assert "asked for anew" in caplog.text
        assert self.kept(store) == []
        found, missing = store.obtain([self.NAME], {self.NAME: save(self.PART)}, [self.NAME])
        assert missing == ()
        assert same(found[self.NAME], self.PART)
        assert same(load_file(file), self.PART)

    def test_two_clients_keep_their_own(self, tmp_path):
        first, second = (PartStore(tmp_path / str(client)) for client in (0, 1))
        first.obtain([self.NAME], {self.NAME: save(self.PART)}, [self.NAME])
        assert second.obtain([self.NAME], {}, [self.NAME]) == ({}, (self.NAME,))
        assert first.obtain([self.NAME], {}, [self.NAME])[1] == ()

    def test_halves_are_joined(self):
        parts = {"x": {"a": torch.ones(1)}, "y": {"b": torch.zeros(1)}, "z": {"c": torch.zeros(1)}}
        assert list(joined(["x", "y"], parts)) == ["a", "b"]


class TestBlockStore:
    @pytest.fixture
    def store(self, tmp_path):
        return BlockStore(tmp_path / "sidecar")

    def test_a_block_is_named_by_its_hash_and_written_once(self, store):
        name = store.keep(factors(2))
        (path,) = store.folder.iterdir()
        before = path.stat().st_mtime_ns, path.stat().st_ino
        assert store.keep(factors(2)) == name == path.stem == hash_tensors(factors(2))
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == before

    def test_factors_that_do_not_lie_in_one_piece_are_kept_too(self, store):
        turned = {name: t.T.contiguous().T for name, t in factors(2).items()}
        assert not turned[NAMES[0]].is_contiguous()
        assert same(store.read([store.keep(turned)]), factors(2))

    def test_a_side_car_is_its_blocks_side_by_side(self, store):
        """By the product: sum of the blocks' B A."""
        blocks = [factors(2, 1), factors(3, 2)]
        whole = store.read([store.keep(block) for block in blocks])
        for a, b in zip(A_NAMES, B_NAMES, strict=True):
            assert (whole[a].shape[0], whole[b].shape[1]) == (5, 5)
            wanted = sum(block[b].double() @ block[a].double() for block in blocks)
            assert torch.allclose(whole[b].double() @ whole[a].double(), wanted, atol=1e-6)

    def test_none_is_nothing(self, store):
        assert store.read([]) == {}
        assert store.of_module([], modules_of(NAMES)[0]) is None
        assert store.rank_of([], modules_of(NAMES)) == {"one": 0, "two": 0}

    def test_one_module_is_read_in_float64(self, store):
        names = [store.keep(block) for block in (factors(2, 1), factors(3, 2))]
        whole = store.read(names)
        for module in modules_of(NAMES):
            part = store.of_module(names, module)
            assert (part.left.dtype, part.right.dtype) == (torch.float64, torch.float64)
            assert torch.equal(part.left, whole[module.b].double())
            assert torch.equal(part.right, whole[module.a].double())

    def test_ranks_add_up_module_by_module(self, store):
        """A block of ragged ranks 2 and 0, and one of rank 3 in both."""
        ragged = {
            name: t if ".one." in name else (t[:0] if name in A_NAMES else t[:, :0]) for name, t in factors(2).items()
        }
        names = [store.keep(ragged), store.keep(factors(3, 2))]
        assert store.rank_of(names, modules_of(NAMES)) == {"one": 5, "two": 3}
        assert store.of_module(names, modules_of(NAMES)[1]).rank == 3
        assert store.read(names)[A_NAMES[1]].shape == (3, 2)

    def test_what_no_checkpoint_names_is_dropped(self, store):
        first, second, third = (store.keep(factors(2, seed)) for seed in range(3))
        store.drop_all_but([first, third, "unknown"])
        assert sorted(path.stem for path in store.folder.iterdir()) == sorted([first, third])
        store.drop_all_but([])
        assert list(store.folder.iterdir()) == []
        with pytest.raises(UserError, match=r"cannot be read .*start anew with overwrite=true"):
            store.read([second])

    def test_dropping_where_nothing_was_ever_kept(self, store):
        store.drop_all_but([])
        assert not store.folder.exists()

    @pytest.mark.parametrize("damage", ["gone", "empty", "cut", "another"])
    @pytest.mark.parametrize("use", ["read", "of_module", "rank_of"])
    def test_a_block_that_is_gone_or_damaged_is_told(self, store, damage, use):
        """Only `read` looks at every byte and so knows another block by its hash; the others trust what has a sound header."""
        good, bad = store.keep(factors(2, 1)), store.keep(factors(2, 2))
        path = store.folder / f"{bad}.safetensors"
        {
            "gone": path.unlink,
            "empty": lambda: path.write_bytes(b""),
            "cut": lambda: path.write_bytes(path.read_bytes()[:-1]),
            "another": lambda: path.write_bytes(save(factors(2, 3))),
        }[damage]()
        calls = {
            "read": lambda: store.read([good, bad]),
            "of_module": lambda: store.of_module([good, bad], modules_of(NAMES)[0]),
            "rank_of": lambda: store.rank_of([good, bad], modules_of(NAMES)),
        }
        if damage == "another" and use != "read":
            calls[use]()
            return
        with pytest.raises(UserError, match=rf"side-car block '.*{bad}.*' .*: start anew with overwrite=true"):
            calls[use]()

    def test_a_block_of_other_modules_is_told(self, store):
        name = store.keep({key.replace(".two.", ".three."): t for key, t in factors(2).items()})
        for call in (
            lambda: store.of_module([name], modules_of(NAMES)[1]),
            lambda: store.rank_of([name], modules_of(NAMES)),
        ):
            with pytest.raises(UserError, match=r"is gone or damaged .*start anew"):
                call()
