"""What a run begins with and what each round leaves on disk: all of it comes back, and what is damaged or another's is told."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from helpers_runs import adapter_bytes, finetune, history

from fedunlearn.aggregation.base import ServerState
from fedunlearn.errors import UserError
from fedunlearn.federation import rounds
from fedunlearn.federation.block_store import FOLDER, BlockStore
from fedunlearn.federation.checkpoint import (
    MOMENTS,
    Checkpoint,
    append_history,
    cut_history,
    latest_checkpoint,
    read_history,
    round_folder,
    save_checkpoint,
)
from fedunlearn.federation.flower_strategy import StrategyState
from fedunlearn.federation.start import began_with, load_start, save_start
from fedunlearn.models.adapter_files import WEIGHTS, load_adapter, save_adapter
from fedunlearn.models.source import BEGAN, START
from fedunlearn.records.adapter import Adapter, hash_tensors
from fedunlearn.records.partition import OwnedRows
from fedunlearn.records.rounds import ClientRows

NAMES = [f"base_model.model.{m}.lora_{side}.weight" for m in ("one", "two") for side in "AB"]
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8.0, "target_modules": ["one", "two"]}
OWNED = (
    OwnedRows(client_id=0, forget=(), retain=(0, 1, 2), num_owned=3),
    OwnedRows(client_id=1, forget=(4, 5), retain=(3,), num_owned=3),
)
STRATEGY = "fedunlearn.aggregation.fedadam.FedAdam"


def factors(rank=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn((rank, 3) if "lora_A" in n else (5, rank), generator=generator) for n in NAMES}


ADAPTER = Adapter(factors(), CONFIG, "print")
BESIDE = ADAPTER.replace(factors(), factors(2, 9))


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


class TestStart:
    @pytest.mark.parametrize("adapter", [ADAPTER, BESIDE])
    def test_it_comes_back(self, tmp_path, adapter):
        save_start(tmp_path, adapter, OWNED)
        start = load_start(tmp_path)
        assert start.adapter == adapter
        assert start.adapter.tensor_hash == adapter.tensor_hash
        assert start.rows == (
            ClientRows(client_id=0, num_owned=3, num_forget=0, num_retain=3),
            ClientRows(client_id=1, num_owned=3, num_forget=2, num_retain=1),
        )
        assert start.blocks == began_with(tmp_path) == ((hash_tensors(adapter.sidecar),) if adapter.sidecar else ())

    def test_the_factors_alone_are_an_adapter_folder_and_the_side_car_a_block(self, tmp_path):
        save_start(tmp_path, BESIDE, OWNED)
        assert load_adapter(tmp_path / START)[0] == ADAPTER
        assert same(BlockStore(tmp_path / FOLDER).read(began_with(tmp_path)), BESIDE.sidecar)

    def test_without_side_car_there_is_no_such_folder(self, tmp_path):
        save_start(tmp_path, ADAPTER, OWNED)
        assert sorted(path.name for path in tmp_path.iterdir()) == [BEGAN, START]

    @pytest.mark.parametrize(
        "text",
        [
            None,
            "",
            "[]",
            "{}",
            '{"sidecar": []}',
            '{"sidecar": [], "rows": [{"client_id": 0}]}',
            '{"sidecar": 3, "rows": []}',
        ],
    )
    def test_what_it_began_with_missing_or_damaged(self, tmp_path, text):
        save_start(tmp_path, ADAPTER, OWNED)
        (tmp_path / BEGAN).unlink() if text is None else (tmp_path / BEGAN).write_text(text)
        with pytest.raises(UserError, match=r"began\.json' is missing or damaged .*: overwrite=true starts anew"):
            load_start(tmp_path)

    def test_a_damaged_adapter_or_block_is_told(self, tmp_path):
        save_start(tmp_path, BESIDE, OWNED)
        (block,) = (tmp_path / FOLDER).iterdir()
        whole = block.read_bytes()
        block.write_bytes(whole[:-1])
        with pytest.raises(UserError, match=r"side-car block .* is damaged .*: start anew with overwrite=true"):
            load_start(tmp_path)
        block.write_bytes(whole)
        (tmp_path / START / WEIGHTS).write_bytes(b"")
        with pytest.raises(UserError, match="is corrupt or truncated"):
            load_start(tmp_path)


def checkpoint(number=1, **changed):
    """A state in every kind that is kept."""
    usual = {
        "state": ServerState(
            adapter=factors(seed=number),
            moments={"m": factors(seed=20 + number), "v": {NAMES[1]: torch.ones(5, 4)}},
            round=number,
        ),
        "strategy": STRATEGY,
        "carried": {"one": torch.randn(2, 2, dtype=torch.float64)},
        "holds": {0: frozenset({"x", "y"}), 11: frozenset()},
    }
    return Checkpoint(**{**usual, **changed})


def checked(found, saved):
    """Every field, tensors bit by bit."""
    assert found.state.round == saved.state.round
    assert same(found.state.adapter, saved.state.adapter)
    assert found.state.moments.keys() == saved.state.moments.keys()
    assert all(same(found.state.moments[name], kept) for name, kept in saved.state.moments.items())
    assert (found.strategy, found.blocks, found.holds) == (saved.strategy, saved.blocks, saved.holds)
    assert same(found.carried, saved.carried)
    assert (found.foreign is None) == (saved.foreign is None)
    if saved.foreign is not None:
        assert same(found.foreign.arrays, saved.foreign.arrays)
        assert (found.foreign.kinds, found.foreign.unsaved) == (saved.foreign.kinds, saved.foreign.unsaved)
    assert found.adapter_hash == saved.adapter_hash


@pytest.fixture
def run(tmp_path):
    """A run's folder whose start has a side-car."""
    save_start(tmp_path, BESIDE, OWNED)
    return tmp_path


class TestCheckpoint:
    def test_moments_carried_and_holds_come_back(self, run):
        saved = checkpoint()
        save_checkpoint(run, saved, BESIDE, 2)
        checked(latest_checkpoint(run), saved)

    def test_blocks_come_back_and_the_factors_are_no_result_by_themselves(self, run):
        store = BlockStore(run / FOLDER)
        saved = checkpoint(blocks=(store.keep(factors(2, 30)), store.keep(factors(1, 31))))
        save_checkpoint(run, saved, BESIDE, 2)
        found = latest_checkpoint(run)
        checked(found, saved)
        assert not (round_folder(run, 1) / "adapter").exists()
        assert same(load_adapter(round_folder(run, 1) / "factors")[0].tensors, saved.state.adapter)
        assert store.read(found.blocks)[NAMES[0]].shape == (3, 3)

    def test_without_blocks_the_round_s_adapter_is_a_folder_that_can_be_named(self, run):
        save_checkpoint(run, checkpoint(), ADAPTER, 2)
        adapter, _ = load_adapter(round_folder(run, 1) / "adapter")
        assert adapter == ADAPTER.replace(factors(seed=1))

    @pytest.mark.parametrize(
        "foreign",
        [
            StrategyState(),
            StrategyState(
                arrays={"v.b": torch.tensor([1.0, 2.0], dtype=torch.float64), "n": torch.tensor(3)},
                kinds={"v": ["dict", [["b", "v.b"], ["a", None]]], "n": ["array", "n"]},
                unsaved=("meter",),
            ),
        ],
    )
    def test_a_flower_strategy_s_state_comes_back(self, run, foreign):
        saved = checkpoint(foreign=foreign, strategy="flwr.serverapp.strategy.FedAdam")
        save_checkpoint(run, saved, BESIDE, 2)
        checked(latest_checkpoint(run), saved)

    def test_nothing_but_the_adapter(self, run):
        saved = Checkpoint(state=ServerState(adapter=factors(), round=1), strategy=STRATEGY)
        save_checkpoint(run, saved, BESIDE, 1)
        checked(latest_checkpoint(run), saved)
        assert sorted(path.name for path in round_folder(run, 1).iterdir()) == ["adapter", "checkpoint.json"]

    def test_tensors_that_do_not_lie_in_one_piece(self, run):
        """A server's step may give a transposed view."""
        turned = {name: t.T.contiguous().T for name, t in factors(seed=3).items()}
        saved = checkpoint(carried=turned, state=replace(checkpoint().state, moments={"v": turned}))
        save_checkpoint(run, saved, BESIDE, 1)
        checked(latest_checkpoint(run), saved)

    def test_the_newest_are_kept_and_with_them_their_blocks(self, run):
        """The start's block stays for as long as the run: the reference is made of it."""
        store, names = BlockStore(run / FOLDER), []
        for number in (1, 2, 3):
            names.append(store.keep(factors(1, 40 + number)))
            save_checkpoint(run, checkpoint(number, blocks=(names[-1],)), BESIDE, 2)
        assert sorted(path.name for path in (run / "rounds").iterdir()) == ["0002", "0003"]
        assert {path.stem for path in store.folder.iterdir()} == {*names[1:], *began_with(run)}
        assert latest_checkpoint(run).state.round == 3

    def test_a_round_saved_again_takes_the_place_of_the_first(self, run):
        for seed in (1, 2):
            save_checkpoint(run, checkpoint(1, carried={"x": torch.tensor([float(seed)])}), BESIDE, 2)
        assert latest_checkpoint(run).carried["x"].item() == 2.0

    def test_none_is_there_yet(self, run):
        assert latest_checkpoint(run) is None

    def test_the_hash_sees_factors_and_blocks(self):
        hashes = {
            one.adapter_hash
            for one in (
                checkpoint(),
                checkpoint(2),
                checkpoint(blocks=("x",)),
                checkpoint(blocks=("x", "y")),
                checkpoint(blocks=("y", "x")),
            )
        }
        assert len(hashes) == 5
        assert checkpoint().adapter_hash == hash_tensors(factors(seed=1))
        assert checkpoint(strategy="other", holds={}).adapter_hash == checkpoint().adapter_hash

    @pytest.mark.parametrize("name", ["checkpoint.json", "moments.safetensors", "carried.safetensors"])
    @pytest.mark.parametrize("damage", ["gone", "empty", "cut"])
    def test_damage_is_told_with_the_way_out(self, run, name, damage):
        save_checkpoint(run, checkpoint(), BESIDE, 2)
        path = round_folder(run, 1) / name
        {
            "gone": path.unlink,
            "empty": lambda: path.write_bytes(b""),
            "cut": lambda: path.write_bytes(path.read_bytes()[:-2]),
        }[damage]()
        with pytest.raises(
            UserError,
            match=r"checkpoint '.*0001' is damaged \(.*\): delete that folder, resume=true then goes on from the round before",
        ):
            latest_checkpoint(run)

    @pytest.mark.parametrize(
        "key", ["round", "strategy", "moments", "blocks", "carried", "holds", "foreign", "files", "adapter_hash"]
    )
    def test_a_key_that_is_missing_is_told(self, run, key):
        save_checkpoint(run, checkpoint(), BESIDE, 2)
        path = round_folder(run, 1) / "checkpoint.json"
        said = json.loads(path.read_text())
        del said[key]
        path.write_text(json.dumps(said))
        with pytest.raises(UserError, match=rf"is damaged \('{key}'\)"):
            latest_checkpoint(run)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("round", 0),
            ("round", -1),
            ("round", 2),
            ("round", True),
            ("round", "1"),
            ("round", None),
            ("strategy", 3),
            ("moments", "mv"),
            ("moments", ["m"]),
            ("moments", []),
            ("moments", ["m", "n", "v"]),
            ("blocks", {}),
            ("blocks", [1]),
            ("carried", False),
            ("carried", "yes"),
            ("holds", []),
            ("holds", {"x": []}),
            ("holds", {"-1": []}),
            ("holds", {"0": "x"}),
            ("foreign", []),
            ("foreign", {"kinds": [], "unsaved": []}),
            ("files", []),
            ("files", {}),
            ("files", {"moments.safetensors": "0"}),
            ("adapter_hash", "0"),
        ],
    )
    def test_a_value_that_no_round_writes_is_told(self, run, key, value):
        save_checkpoint(run, checkpoint(), BESIDE, 2)
        path = round_folder(run, 1) / "checkpoint.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        with pytest.raises(
            UserError, match=r"checkpoint '.*0001' is damaged \(.*\): delete that folder, resume=true then"
        ):
            latest_checkpoint(run)

    @pytest.mark.parametrize("name", ["moments", "carried", "strategy"])
    def test_a_file_that_was_edited_is_told(self, run, name):
        """Another number in a file that can be read as ever."""
        foreign = StrategyState(arrays={"n": torch.ones(2)}, kinds={"n": ["ndarray", "n"]})
        save_checkpoint(run, checkpoint(foreign=foreign), BESIDE, 2)
        path = round_folder(run, 1) / f"{name}.safetensors"
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file({key: tensor + 1 for key, tensor in tensors.items()}, path)
        with pytest.raises(
            UserError, match=rf"is damaged \({name}\.safetensors is not the one that was written: its sha256 differs\)"
        ):
            latest_checkpoint(run)

    def test_a_file_that_was_laid_beside_it_is_told(self, run):
        save_checkpoint(run, checkpoint(), BESIDE, 2)
        safetensors.torch.save_file({"n": torch.ones(2)}, round_folder(run, 1) / "strategy.safetensors")
        with pytest.raises(UserError, match=r"is damaged \(strategy\.safetensors was not written by that round\)"):
            latest_checkpoint(run)

    def test_another_adapter_with_a_proof_of_its_own_is_told(self, run):
        save_checkpoint(run, checkpoint(), BESIDE, 2)
        save_adapter(round_folder(run, 1) / "adapter", ADAPTER.replace(factors(seed=9)))
        with pytest.raises(
            UserError, match=r"is damaged \(adapter_hash and carried in checkpoint\.json are not what lies"
        ):
            latest_checkpoint(run)

    def test_a_damaged_adapter_is_told(self, run):
        save_checkpoint(run, checkpoint(), BESIDE, 2)
        (round_folder(run, 1) / "adapter" / WEIGHTS).write_bytes(b"")
        with pytest.raises(UserError, match="is corrupt or truncated"):
            latest_checkpoint(run)


class TestHistory:
    def test_a_line_that_was_cut_off_is_left_out(self, tmp_path):
        for number in (1, 2, 3):
            append_history(tmp_path, {"round": number})
        with (tmp_path / "history.jsonl").open("a") as file:
            file.write('{"round": 4, "cli')
        assert [line["round"] for line in read_history(tmp_path)] == [1, 2, 3]
        cut_history(tmp_path, 2)
        assert (tmp_path / "history.jsonl").read_text() == '{"round": 1}\n{"round": 2}\n'

    def test_where_there_is_none(self, tmp_path):
        assert read_history(tmp_path) == []
        cut_history(tmp_path, 0)
        assert read_history(tmp_path) == []


def stopped(pocket, saves, monkeypatch, *overrides):
    """A run of two rounds that was stopped after its first."""
    real = rounds.save_checkpoint

    def stop(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(pocket, saves, "stopped", *overrides)
    return saves / "finetune" / "stopped"


class TestResume:
    ADAM = ("strategy=fedadam", "strategy.server_lr=0.1")

    def test_the_state_of_another_strategy_is_refused(self, pocket, saves, monkeypatch):
        """By its name: FedYogi's m and v have FedAdam's names and shapes."""
        run = stopped(pocket, saves, monkeypatch, *self.ADAM)
        path = round_folder(run, 1) / "checkpoint.json"
        said = json.loads(path.read_text())
        assert (said["strategy"], said["moments"]) == (STRATEGY, ["m", "v"])
        path.write_text(json.dumps({**said, "strategy": "fedunlearn.aggregation.fedyogi.FedYogi"}))
        before = path.read_bytes(), history(run)
        with pytest.raises(
            UserError,
            match=r"round 1 on disk holds the state of strategy fedunlearn\.aggregation\.fedyogi\.FedYogi, this run has "
            r"fedunlearn\.aggregation\.fedadam\.FedAdam: go on with the strategy it was begun with, or start anew with overwrite=true",
        ):
            finetune(pocket, saves, "stopped", *self.ADAM, "resume=true")
        assert (path.read_bytes(), history(run)) == before

    @pytest.mark.parametrize("kept", [(), ("v",)])
    def test_moments_that_are_not_the_strategy_s_are_refused(self, pocket, saves, monkeypatch, kept):
        """All of the file made anew, hash and all: what the strategy keeps still is not there, though it has stepped."""
        run = stopped(pocket, saves, monkeypatch, *self.ADAM)
        path, moments = round_folder(run, 1) / "checkpoint.json", round_folder(run, 1) / MOMENTS
        flat = {k: t for k, t in safetensors.torch.load_file(moments).items() if k.split("/")[0] in kept}
        moments.unlink()
        if flat:
            safetensors.torch.save_file(flat, moments)
        files = {MOMENTS: hashlib.sha256(moments.read_bytes()).hexdigest()} if flat else {}
        path.write_text(json.dumps({**json.loads(path.read_text()), "moments": list(kept), "files": files}))
        said = (
            r"0001' is damaged \(it holds the moments .*, FedAdam keeps \['m', 'v'\]\): delete that folder, resume=true"
        )
        with pytest.raises(UserError, match=said):
            finetune(pocket, saves, "stopped", *self.ADAM, "resume=true")

    def test_the_way_out_of_a_damaged_checkpoint_is_one(self, pocket, saves, monkeypatch):
        run = stopped(pocket, saves, monkeypatch, *self.ADAM)
        whole = finetune(pocket, saves, "whole", *self.ADAM)
        (round_folder(run, 1) / MOMENTS).write_bytes(b"")
        with pytest.raises(UserError, match=r"delete that folder, resume=true then goes on"):
            finetune(pocket, saves, "stopped", *self.ADAM, "resume=true")
        shutil.rmtree(round_folder(run, 1))
        assert adapter_bytes(finetune(pocket, saves, "stopped", *self.ADAM, "resume=true")) == adapter_bytes(whole)

    @pytest.mark.parametrize(
        "overrides",
        [
            ADAM,
            ("aggregation=fedex",),
            ("aggregation=flora", "aggregation.sidecar_rank=3"),
            ("aggregation=flexlora", "aggregation.residual=feedback"),
            ("aggregation=rolora", "strategy=fedavgm"),
        ],
        ids=["moments", "blocks", "recompressed", "feedback", "halves and moments"],
    )
    def test_what_is_kept_beside_the_adapter_ends_bit_equal(self, pocket, saves, monkeypatch, overrides):
        whole = finetune(pocket, saves, "whole", *overrides)
        stopped(pocket, saves, monkeypatch, *overrides)
        resumed = finetune(pocket, saves, "stopped", *overrides, "resume=true")
        assert adapter_bytes(whole) == adapter_bytes(resumed)
        assert [line["adapter_hash"] for line in history(whole)] == [line["adapter_hash"] for line in history(resumed)]

    def test_a_damaged_checkpoint_can_be_deleted_and_the_run_goes_on(self, pocket, saves, monkeypatch):
        whole = finetune(pocket, saves, "whole", *self.ADAM)
        run = stopped(pocket, saves, monkeypatch, *self.ADAM)
        (round_folder(run, 1) / "moments.safetensors").write_bytes(safetensors.torch.save({})[:-1])
        with pytest.raises(UserError, match="is damaged"):
            finetune(pocket, saves, "stopped", *self.ADAM, "resume=true")
        shutil.rmtree(round_folder(run, 1))
        assert adapter_bytes(finetune(pocket, saves, "stopped", *self.ADAM, "resume=true")) == adapter_bytes(whole)
