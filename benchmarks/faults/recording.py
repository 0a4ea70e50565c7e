"""One real round of seven clients on a tiny pocket, recorded once: what every run of the matrix begins with and replays."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from flwr.app import Message, MessageType
from flwr.clientapp import ClientApp

from fedunlearn.config.launcher import Launcher
from fedunlearn.config.run import TrainRun
from fedunlearn.data.ownership import FILE
from fedunlearn.data.pocket.build import PocketRecipe, ensure_pocket
from fedunlearn.data.pocket.pretrain import BaseRecipe
from fedunlearn.data.pocket.world import WorldSize
from fedunlearn.data.requests import FILE as REQUEST
from fedunlearn.doors.compose import ComposedConfig, compose
from fedunlearn.doors.prepare import prepare
from fedunlearn.federation.checkpoint import ADAPTER, round_folder
from fedunlearn.federation.client_app import close_sites, make_client_app
from fedunlearn.federation.local_grid import SERVER_NODE, LocalGrid
from fedunlearn.federation.rounds import run_rounds
from fedunlearn.federation.start import BEGAN, START
from fedunlearn.federation.wire import ADAPTER as SENT
from fedunlearn.federation.wire import REPLY, RollCallReply, TrainReply, blob_of, unpack_scalars
from fedunlearn.models.adapter_files import load_adapter, save_adapter
from fedunlearn.models.resident import release
from fedunlearn.records.adapter import Adapter, Tensors

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NUM_CLIENTS, NUM_ROUNDS, RANK = 7, 2, 4
RECIPE = PocketRecipe(
    world=WorldSize(rows_per_author=4, num_crowd=20),
    base=BaseRecipe(vocab_size=400, hidden_size=32, intermediate_size=64, num_layers=2, steps=20, warmup_steps=4),
)
SMALL = (
    f"trainer.federated.num_clients={NUM_CLIENTS}",
    f"trainer.federated.num_rounds={NUM_ROUNDS}",
    "trainer.args.max_steps=2",  # as many for those who own fewer rows
    "trainer.args.per_device_train_batch_size=8",
    f"model.model_args.lora_config.r={RANK}",
    "model.model_args.lora_config.target_modules=[q_proj,up_proj]",  # one square, one not
    "eval.at_end=false",
)
DELTAS, SAID = "deltas.safetensors", "said.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class Recorded:
    """start: the global adapter after the first real round. deltas: what each client's second round added to it. said, declared: beside it."""

    folder: Path
    start: Adapter
    deltas: Mapping[int, Tensors]
    said: Mapping[int, TrainReply]
    declared: Mapping[int, RollCallReply]

    @classmethod
    def load(cls, folder: Path) -> "Recorded":
        """Reads a record; its folder is also what a run's folder begins as."""
        saved = json.loads((folder / SAID).read_text(encoding="utf-8"))
        flat = safetensors.torch.load_file(folder / DELTAS)
        deltas: dict[int, dict] = {client: {} for client in range(NUM_CLIENTS)}
        for key, tensor in flat.items():
            client, _, name = key.partition("/")
            deltas[int(client)][name] = tensor
        return cls(
            folder=folder,
            start=load_adapter(folder / START)[0],
            deltas=deltas,
            said={
                k: TrainReply(**{**one, "loss_trace": tuple(one["loss_trace"]), "missing": ()})
                for k, one in enumerate(saved["said"])
            },
            declared={k: RollCallReply(**one) for k, one in enumerate(saved["declared"])},
        )

    def begin(self, folder: Path) -> None:
        """Makes the folder of a run that begins where the record does."""
        shutil.copytree(self.folder / START, folder / START)
        for name in (FILE, REQUEST, BEGAN):
            shutil.copy(self.folder / name, folder / name)


class RecordingGrid(LocalGrid):
    """Keeps the last reply of every client by message type."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__(app, NUM_CLIENTS)
        self.kept: dict[tuple[str, int], Message] = {}

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        self.kept[message.metadata.message_type, message.metadata.dst_node_id - SERVER_NODE - 1] = reply
        return reply


def composed_for(place: Path, *overrides: str, unlearns: bool = False) -> ComposedConfig:
    """Composes a run of seven clients that fine-tune, or unlearn; later overrides win."""
    paths = (
        f"tofu_path={place}/pocket/seed7/data",
        f"model.model_args.pretrained_model_name_or_path={place}/pocket/seed7/model",
        f"paths.saves_dir={place}/saves",
        f"paths.cache_dir={place}/saves/cache",
        f"paths.pocket_dir={place}/saves/pocket",
        "task_name=recorded",
    )
    file, kind = ("unlearn-lora.yaml", "unlearn") if unlearns else ("train-lora.yaml", "finetune")
    return compose(CONFIGS, file, [f"experiment={kind}/tofu/pocket", *paths, *SMALL, *overrides])


def run_for(place: Path, *overrides: str, unlearns: bool = False) -> TrainRun:
    """The same as a record, with a launcher under which the round loop itself keeps the time: a client may fall silent."""
    run = composed_for(place, *overrides, unlearns=unlearns).run
    assert isinstance(run, TrainRun)
    return replace(run, launcher=Launcher())


def record(place: Path) -> Recorded:
    """Builds the pocket, trains two rounds for real, and keeps what seven clients said in the second."""
    torch.set_num_threads(1)
    ensure_pocket(7, place / "pocket", RECIPE)
    composed = composed_for(place)
    prepared = prepare(composed)
    grid = RecordingGrid(make_client_app(json.dumps(composed.plain, sort_keys=True)))
    try:
        run_rounds(grid, prepared.run, prepared.folder, False)
    finally:
        close_sites()
        release()
    return _keep(grid, prepared.folder, place / "recorded")


def _keep(grid: RecordingGrid, run: Path, folder: Path) -> Recorded:
    before, _ = load_adapter(round_folder(run, 1) / ADAPTER)
    save_adapter(folder / START, before)
    for name in (FILE, REQUEST, BEGAN):
        shutil.copy(run / name, folder / name)
    flat, said, declared = {}, [], []
    for client in range(NUM_CLIENTS):
        content = grid.kept[MessageType.TRAIN, client].content
        sent = safetensors.torch.load(blob_of(content[SENT]))
        flat.update({f"{client}/{name}": tensor - before.tensors[name] for name, tensor in sent.items()})
        said.append(asdict(unpack_scalars(TrainReply, content[REPLY])))
        declared.append(asdict(unpack_scalars(RollCallReply, grid.kept[MessageType.QUERY, client].content[REPLY])))
    safetensors.torch.save_file(flat, folder / DELTAS)
    (folder / SAID).write_text(json.dumps({"said": said, "declared": declared}), encoding="utf-8")
    return Recorded.load(folder)
