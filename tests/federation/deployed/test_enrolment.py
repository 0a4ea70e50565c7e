"""Writing a run down on a node: as its site says, as its policy allows, each refusal by name; and nothing that came over the wire is opened."""

import ctypes
import json
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from helpers_deployed import MODEL, ThinGrid, client_site, run_deployed, submitted, write_sites
from helpers_families import base_of
from helpers_runs import history
from safetensors.torch import load_file, save_file

import fedunlearn
from fedunlearn.errors import UserError
from fedunlearn.federation.client_app import close_sites, make_client_app
from fedunlearn.federation.deployed import enrolment, thin_client
from fedunlearn.federation.deployed.brief import pack_brief, unpack_brief
from fedunlearn.federation.deployed.enrolment import enrol, enrolment_of
from fedunlearn.federation.faults import CLIENT_RAISED
from fedunlearn.federation.local_grid import call_client
from fedunlearn.models.fingerprint import fingerprint_base

ARGS = ("model", "model_args", "pretrained_model_name_or_path")


class HeardError(Exception):
    """The roll call's content has been seen: the run need not go on."""


class HearingGrid(ThinGrid):
    """Keeps the first roll call."""

    def _answer(self, message):
        self.brief = unpack_brief(message.content)
        raise HeardError


@pytest.fixture(scope="module")
def briefs(pocket, tmp_path_factory):
    """The briefs that a server really sends, of fine-tuning and of unlearning; and a site's YAML."""
    folder = tmp_path_factory.mktemp("sites")
    paths, said = write_sites(folder, pocket), {}
    for kind in ("finetune", "unlearn"):
        grid = HearingGrid(paths)
        with pytest.raises(HeardError):
            run_deployed(folder, submitted(pocket, kind, kind), grid)
        said[kind] = grid.brief
    return said


@pytest.fixture
def site(tmp_path, pocket):
    return client_site(write_sites(tmp_path, pocket)[0])


def changed(brief, keys, value):
    """The same brief with another value in its config."""
    config = json.loads(json.dumps(brief.config))
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return replace(brief, config=config)


def refused(site, brief):
    """Why a run was not written down; nothing of it is there."""
    with pytest.raises(UserError) as caught:
        enrol(site, 5, brief)
    assert not (Path(site.work_dir) / "runs").exists()
    return list(caught.value.faults)


def test_a_run_is_written_down_with_this_machines_places(site, briefs, pocket):
    brief = briefs["unlearn"]
    enrolment = enrol(site, 5, brief)
    assert enrolment == enrolment_of(site, 5)
    assert enrolment.exists
    assert not enrolment_of(site, 6).exists
    config = enrolment.read_config()
    assert config["model"]["model_args"]["pretrained_model_name_or_path"] == str(pocket.model)
    assert config["tofu_path"] == str(pocket.data)
    assert config["paths"]["saves_dir"] == f"{site.work_dir}/runs/5/saves"
    inside = enrolment.folder / "saves" / "unlearn" / "run"
    assert (inside / "partition.json").read_text() == brief.partition
    assert (inside / "request.json").read_text() == brief.request
    told = {key: value for key, value in brief.config.items() if key not in {"model", "tofu_path", "task_name", "paths", "launcher", "partition"}}  # fmt: skip
    assert {key: config[key] for key in told} == told  # what the server asks for otherwise stays as it was


def test_a_run_that_is_called_again_is_written_down_anew(site, briefs):
    enrol(site, 5, briefs["finetune"])
    enrol(site, 5, replace(briefs["finetune"], partition="{}"))
    assert (enrolment_of(site, 5).folder / "saves/finetune/run/partition.json").read_text() == "{}"
    assert [path.name for path in (Path(site.work_dir) / "runs").iterdir()] == ["5"]


def test_old_runs_are_forgotten(site, briefs, monkeypatch):
    monkeypatch.setattr(enrolment, "KEPT_RUNS", 3)
    made = [enrol(site, number, briefs["finetune"]) for number in (7, 5, 9, 1, 8)]
    assert [one.exists for one in made] == [False, False, True, True, True]


def test_runs_on_one_base_loaded_alike_share_a_worker(site, briefs):
    keys = {
        run: enrol(site, run, brief).worker_key
        for run, brief in enumerate(
            (
                briefs["finetune"],
                changed(briefs["finetune"], ("trainer", "args", "seed"), 5),
                changed(briefs["finetune"], ("model", "model_args", "torch_dtype"), "bfloat16"),
            )
        )
    }
    assert keys[0] == keys[1] != keys[2]


def test_another_version_is_refused(site, briefs):
    assert refused(site, replace(briefs["finetune"], version="0.0.1")) == [
        f"this node has fedunlearn {fedunlearn.__version__}, the server 0.0.1: install the same version on both"
    ]


def test_a_model_that_the_policy_does_not_list_is_refused(site, briefs):
    for named in ("another", "/etc", None, ["x"], {"a": 1}):
        (told,) = refused(site, changed(briefs["finetune"], ARGS, named))
        assert told == f"this node's policy does not allow model {str(named)!r}; it allows ['{MODEL}'] (policy: models)"


def test_a_model_that_the_site_has_no_folder_for_is_refused(site, briefs):
    allowing = replace(site, policy=replace(site.policy, models=(MODEL, "another")))
    (told,) = refused(allowing, changed(briefs["finetune"], ARGS, "another"))
    assert told == "this node has no folder for model 'another': name it in its site YAML (models)"


@pytest.mark.parametrize("mode", ["eval", "probe", "", None, ["train"], {"train": 1}])
def test_another_mode_is_refused(site, briefs, mode):
    (told,) = refused(site, changed(briefs["finetune"], ("mode",), mode))
    assert told == f"the server asks for mode={str(mode)!r}; a node trains and unlearns"


@pytest.mark.parametrize("place", [("trainer", "method"), ("strategy", "_target_"), ("eval", "x"), ("eval", "deep")])
def test_a_class_that_the_policy_does_not_allow_is_refused_wherever_it_stands(site, briefs, place):
    value = {"_target_": "os.system"} if place[-1] != "deep" else [[{"a": {"_target_": "os.system"}}]]
    brief = changed(briefs["finetune"], place, "os.system" if place[-1] == "_target_" else value)
    assert refused(site, brief) == [
        "the server's config names the class 'os.system', which this node's policy does not allow (policy: allowed_targets)"
    ]
    enrol(replace(site, policy=replace(site.policy, allowed_targets=("os.system",))), 5, brief)


@pytest.mark.parametrize("name", ["fedunlearnx.Y", "fedunlearn", "xfedunlearn.Y", "flwr.serverapp.Z"])
def test_a_name_that_only_looks_like_ours_is_refused(site, briefs, name):
    (told,) = refused(site, changed(briefs["finetune"], ("strategy", "_target_"), name))
    assert f"names the class {name!r}" in told


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("data", "alternates_path"), "/etc/passwd"),
        (("data", "alternates_path"), "builtin"),
        (("data", "idk_path"), "/etc/passwd"),
        (("data", "idk_path"), ["x"]),
        (("model", "tokenizer_args", "pretrained_model_name_or_path"), "/etc"),
        (("model", "tokenizer_args", "pretrained_model_name_or_path"), "builtin"),
        (("model", "tokenizer_args", "pretrained_model_name_or_path"), ""),
    ],
)
def test_files_of_one_machine_are_refused(site, briefs, keys, value):
    assert refused(site, changed(briefs["unlearn"], keys, value)) == [
        f"the server's config names the file {'.'.join(keys)}={str(value)!r}, which only it has: leave it null"
    ]


def test_our_own_refusals_are_no_file(site, briefs):
    enrolment = enrol(site, 5, changed(briefs["unlearn"], ("data", "idk_path"), "builtin"))
    assert enrolment.read_config()["data"]["idk_path"] == "builtin"


def test_data_of_another_kind_are_refused(site, briefs):
    assert refused(site, changed(briefs["unlearn"], ("muse_path",), "muse")) == [
        "the run is about MUSE, this node's site YAML names no data.muse_path"
    ]


@pytest.mark.parametrize("keys", [("model",), ("partition",), ("launcher",)])
@pytest.mark.parametrize("value", [None, [], "x", 1])
def test_a_config_without_its_blocks_is_refused(site, briefs, keys, value):
    assert f"the server's config has no {'.'.join(keys)}" in refused(site, changed(briefs["finetune"], keys, value))


def test_a_config_that_is_empty_is_refused_with_all_that_it_lacks(site, briefs):
    told = refused(site, replace(briefs["finetune"], config={}))
    assert len(told) == 6


def test_every_reason_is_told_at_once(site, briefs):
    brief = changed(changed(briefs["unlearn"], ("strategy", "_target_"), "os.system"), ARGS, "another")
    told = refused(site, changed(brief, ("data", "alternates_path"), "/x"))
    assert [any(word in line for line in told) for word in ("'another'", "'os.system'", "'/x'")] == [True] * 3


def test_the_thin_client_tells_every_reason_in_one_line(tmp_path, pocket, briefs):
    """The server shows a refusal's first line."""
    path = write_sites(tmp_path, pocket)[0]
    brief = changed(changed(briefs["unlearn"], ("strategy", "_target_"), "os.system"), ARGS, "another")
    message = Message(pack_brief(brief), 2, "query")
    message.metadata.__dict__["_message_id"] = "asked"
    context = Context(1, 2, {"site": str(path), "supernode-pid": os.getpid()}, RecordDict(), {})
    reply = thin_client.app(message, context)
    assert reply.error.code == CLIENT_RAISED
    assert "'another'" in reply.error.reason
    assert "'os.system'" in reply.error.reason
    assert "\n" not in reply.error.reason


def test_other_bases_are_refused_by_name_and_the_others_go_on(tmp_path, pocket):
    """One of other weights, and one of another architecture, which the run's adapter does not even fit."""
    paths = write_sites(tmp_path, pocket)
    changed, foreign = (shutil.copytree(pocket.model, tmp_path / name) for name in ("changed", "foreign"))
    tensors = load_file(weights := changed / "model.safetensors")
    save_file({**tensors, (name := sorted(tensors)[0]): tensors[name] + 1e-3}, weights, {"format": "pt"})
    (foreign / "model.safetensors").unlink()
    base_of("gpt2").save_pretrained(foreign)
    for path, other in ((paths[2], changed), (paths[3], foreign)):
        path.write_text(path.read_text().replace(str(pocket.model), str(other)))
    run = run_deployed(tmp_path, submitted(pocket, "finetune", "ft"), ThinGrid(paths))
    told = json.loads((run / "roll_call.json").read_text())["refused"]
    assert "client 2 has base_fingerprint=" in told[0]
    assert f"here (fingerprint {fingerprint_base(foreign)[:12]}..) is refused; " in told[1]
    assert "matches no module" in told[1]
    assert [[client["client_id"] for client in line["clients"]] for line in history(run)] == [[0, 1]] * 2


# --- paths of the server's config are nobody's here

IN_OPEN = 0x20
_heard: list[str] | None = None


def _hear(event, args):
    if _heard is not None and event in ("open", "os.listdir", "os.scandir", "glob.glob", "import"):
        _heard.append(os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else "")


sys.addaudithook(_hear)


@contextmanager
def watched(*folders):
    """Inside the block, every path that Python opens or lists, there or not; and by the kernel whatever is opened in these folders, in any language."""
    global _heard
    libc = ctypes.CDLL(None, use_errno=True)
    told = libc.inotify_init1(os.O_NONBLOCK)
    for folder in folders:
        assert libc.inotify_add_watch(told, os.fsencode(folder), IN_OPEN) >= 0
    _heard = seen = []
    try:
        yield seen
    finally:
        _heard = None
        with suppress(BlockingIOError):
            while events := os.read(told, 65536):
                seen.append(f"canary: {events!r}")
        os.close(told)


def leaves(value, at=()):
    """The keys of every text and every null of a config."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*at, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from leaves(inner, (*at, place))
    elif value is None or isinstance(value, str):
        yield at


@pytest.fixture(scope="module")
def canaries(pocket, tmp_path_factory):
    """A file, and a folder that has all that a model, a data set or a run has: whoever looks at it can open it."""
    folder = tmp_path_factory.mktemp("canary") / "canary"
    shutil.copytree(pocket.model, folder)
    shutil.copytree(pocket.data, folder, dirs_exist_ok=True)
    (folder.parent / "canary.jsonl").write_text('{"row": 0, "alternate": "x", "idk": "I do not know."}\n')
    return str(folder), str(folder.parent / "canary.jsonl")


def serve(site, brief):
    """What a node does at a roll call, in this process; gives what it says."""
    try:
        config = enrol(site, 5, brief).read_config()
    except UserError as error:
        return str(error)
    message = Message(RecordDict(), 2, "query")
    message.metadata.__dict__["_message_id"] = "asked"
    context = Context(1, 2, {"partition-id": 0, "num-partitions": 4}, RecordDict(), {})
    reply = call_client(make_client_app(json.dumps(config)), context, message)
    close_sites()
    return reply.error.reason if reply.has_error() else "there"


@pytest.mark.parametrize("kind", ["finetune", "unlearn"])
def test_no_path_of_the_servers_config_is_opened_on_a_client(site, briefs, canaries, kind):
    """Each text and each null of the config in turn is a path; then all that may be one at once."""
    folder, file = canaries
    assert serve(site, briefs[kind]) == "there"
    said, every = {}, briefs[kind]
    for keys in leaves(briefs[kind].config):
        canary = file if keys[-1] in ("alternates_path", "idk_path", "retain_logs_path") else folder
        with watched(Path(file).parent, folder) as seen:
            said[keys] = serve(site, changed(briefs[kind], keys, canary))
        assert not [path for path in seen if "canary" in path], keys
        if said[keys] == "there":
            every = changed(every, keys, canary)
    assert {answer == "there" for answer in said.values()} == {True, False}  # some are not read, some refused
    with watched(Path(file).parent, folder) as seen:
        assert serve(site, every) == "there"
    assert not [path for path in seen if "canary" in path]


def test_the_watch_sees_what_is_opened(site, briefs, canaries):
    """The site's own model or data, were they the canaries."""
    folder, file = canaries
    for own in (replace(site, models={MODEL: folder}), replace(site, data=replace(site.data, tofu_path=folder))):
        with watched(Path(file).parent, folder) as seen:
            assert serve(own, briefs["finetune"]) == "there"
        assert any(path.startswith("canary: ") for path in seen)
        assert any(path.startswith(folder) for path in seen)
