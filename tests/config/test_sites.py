"""What a machine says of itself, from its YAML: what is read, and how each fault is told."""

import stat
import subprocess
import sys

import pytest
import yaml

from fedunlearn.config.addresses import Address, parse_address
from fedunlearn.config.sites import ClientSite, Policy, ServerSite, SiteData, make_work_dir, read_site
from fedunlearn.errors import UserError

POLICY = {"models": ["m"], "max_steps": 5, "score_forget_rows": False, "max_task_seconds": 60}


@pytest.fixture
def folder(tmp_path):
    for name in ("data", "base", "keys"):
        (tmp_path / name).mkdir()
    for name in ("ca.crt", "node.key", "server.crt", "server.key"):
        (tmp_path / name).write_text("x")
    write(tmp_path / "policy.yaml", POLICY)
    return tmp_path


def write(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def client(**changes):
    return {
        "client_id": 2,
        "superlink": "server.example:8443",
        "ca": "ca.crt",
        "key": "node.key",
        "data": {"tofu_path": "data"},
        "models": {"m": "base"},
        "work_dir": "work",
        "policy": "policy.yaml",
        **changes,
    }


def server(**changes):
    return {
        "listen": "127.0.0.1:8000",
        "tls": {"ca": "ca.crt", "certificate": "server.crt", "key": "server.key"},
        "client_keys": "keys",
        "saves_root": "saves",
        "data": {"muse_path": "data"},
        "models": {"m": "base"},
        "work_dir": "work",
        **changes,
    }


def faults(path, kind):
    with pytest.raises(UserError) as caught:
        read_site(path, kind)
    return list(caught.value.faults)


def only_fault(path, kind):
    found = faults(path, kind)
    assert len(found) == 1, found
    return found[0]


def test_a_client_is_read_with_paths_from_its_yaml_s_folder(folder, monkeypatch):
    monkeypatch.chdir("/")
    site = read_site(write(folder / "client.yaml", client()), ClientSite)
    assert site.ca == str(folder / "ca.crt")
    assert site.models == {"m": str(folder / "base")}
    assert site.data.tofu_path == str(folder / "data")
    assert site.work_dir == str(folder / "work")
    assert site.policy == Policy(models=("m",), max_steps=5, score_forget_rows=False, max_task_seconds=60.0)
    assert (site.listen, site.device, site.worker.idle_minutes) == ("127.0.0.1:9094", None, 30.0)
    assert site.superlink_address == Address(host="server.example", port=8443)


def test_a_server_is_read_and_its_database_lies_in_its_work_dir(folder):
    site = read_site(write(folder / "server.yaml", server(log_file="logs/s.log")), ServerSite)
    assert site.tls is not None
    assert site.tls.key == str(folder / "server.key")
    assert site.database_path == folder / "work" / "superlink.sqlite"
    assert site.log_file == str(folder / "logs" / "s.log")


def test_every_fault_of_a_client_is_told_at_once(folder):
    bad = client(
        client_id=-1,
        superlink="http://a:1",
        listen="0.0.0.0:9",
        device="gpu",
        policy="none.yaml",
        superlnk="x",
        ca="none.crt",
    )
    found = "\n".join(faults(write(folder / "client.yaml", bad), ClientSite))
    for part in (
        "superlnk='x' is an unknown key; did you mean 'superlink'?",
        "client_id=-1",
        "superlink='http://a:1' is no address",
        "listen='0.0.0.0:9' must be on loopback",
        "device='gpu'",
        "ca='none.crt'",
        "policy='none.yaml'",
    ):
        assert found.count(part) == 1, part
    assert len(found.splitlines()) == 7
    assert all(str(folder / "client.yaml") in line for line in found.splitlines())


def test_a_policy_s_faults_are_told_with_its_site_s(folder):
    write(folder / "policy.yaml", {**POLICY, "max_steps": 0, "allowed_targets": ["os"], "max_stepps": 3})
    found = faults(write(folder / "client.yaml", client(client_id="two")), ClientSite)
    assert any("policy.max_stepps=3" in fault for fault in found)
    assert any("client_id='two'" in fault for fault in found)
    write(folder / "policy.yaml", {**POLICY, "max_steps": 0, "allowed_targets": ["os"]})
    found = faults(folder / "policy.yaml", Policy)
    assert [fault.partition(": ")[2][:15] for fault in found] == ["max_steps=0 mus", "allowed_targets"]


def test_the_other_one_s_yaml_is_told_as_such_and_nothing_else(folder):
    (found,) = faults(write(folder / "server.yaml", server()), ClientSite)
    assert "server.yaml is a server's YAML: start that with scripts/superlink.py" in found
    (found,) = faults(write(folder / "client.yaml", client()), ServerSite)
    assert "client.yaml is a client's YAML: start that with scripts/supernode.py" in found


def test_data_that_is_not_there_is_told_only_when_asked(folder):
    site = read_site(write(folder / "client.yaml", client(data={"tofu_path": "later"})), ClientSite)
    assert str(folder / "later") in (site.data.missing() or "")
    (folder / "later").mkdir()
    assert site.data.missing() is None


def test_a_server_s_data_must_be_there_and_is_told_with_the_rest(folder):
    found = faults(write(folder / "server.yaml", server(data={"muse_path": "later"}, listen="x")), ServerSite)
    assert any("data.muse_path" in fault and "later" in fault for fault in found)
    assert any("listen='x' is no address" in fault for fault in found)


@pytest.mark.parametrize("data", [{}, {"tofu_path": "data", "muse_path": "data"}])
def test_exactly_one_benchmark(folder, data):
    assert "exactly one of the two" in only_fault(write(folder / "client.yaml", client(data=data)), ClientSite)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (ClientSite, {"insecure": True, "ca": None, "key": None}, "goes with loopback only"),
        (ClientSite, {"insecure": True, "superlink": "127.0.0.1:8000", "key": None}, "leave ca out"),
        (ClientSite, {"key": None}, "key is missing"),
        (ClientSite, {"listen": "[::1]:0"}, "is no address"),
        (ClientSite, {"models": {"m": "none"}}, "models.m='none'"),
        (ClientSite, {"worker": {"idle_minutes": 0}}, "worker.idle_minutes=0.0 must be above 0"),
        (ServerSite, {"tls": None}, "tls is missing"),
        (ServerSite, {"client_keys": None}, "client_keys is missing"),
        (ServerSite, {"insecure": True}, "leave tls out"),
        (ServerSite, {"listen": "0.0.0.0:8000"}, "opens Flower's Control API"),
        (
            ServerSite,
            {"listen": "0.0.0.0:8000", "insecure": True, "tls": None, "client_keys": None},
            "goes with loopback only",
        ),
    ],
)
def test_values_that_do_not_go_together(folder, kind, changes, said):
    data = client(**changes) if kind is ClientSite else server(**changes)
    assert any(said in fault for fault in faults(write(folder / "site.yaml", data), kind))


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (ClientSite, client(insecure=True, superlink="localhost:8000", ca=None, key=None)),
        (ClientSite, client(ca=None, superlink="[::1]:8443")),
        (ServerSite, server(insecure=True, tls=None, client_keys=None)),
        (ServerSite, server(listen="0.0.0.0:8000", open_control=True)),
    ],
)
def test_values_that_go_together(folder, kind, data):
    assert isinstance(read_site(write(folder / "site.yaml", data), kind), kind)


def test_a_key_given_twice_is_refused(folder):
    text = yaml.safe_dump(client()) + "client_id: 3\n"
    assert "client_id given twice" in only_fault(write(folder / "client.yaml", text), ClientSite)


@pytest.mark.parametrize(("text", "said"), [("a: [", "no valid YAML"), ("- 1", "holds a list"), ("", "holds nothing")])
def test_what_is_no_mapping_is_refused(folder, text, said):
    assert said in only_fault(write(folder / "client.yaml", text), ClientSite)


def test_a_file_that_is_not_there(tmp_path):
    assert "cannot be read" in only_fault(tmp_path / "none.yaml", ServerSite)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("a.example:1", Address(host="a.example", port=1)),
        ("[::1]:65535", Address(host="::1", port=65535)),
        ("a:0", None),
        ("a:65536", None),
        ("::1:80", None),
        ("[a]:80", None),
        (":80", None),
        ("https://a:80", None),
        ("a", None),
        ("a:８", None),
        ("a..b:80", None),
        (f"{'a' * 64}:80", None),
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address
    assert address is None or str(address) == text


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.8.0.1", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("a.localhost.example", False)],
)
def test_loopback(host, is_loopback):
    assert Address(host=host, port=1).is_loopback is is_loopback


def test_a_work_dir_is_its_user_s_alone(tmp_path):
    made = make_work_dir(str(tmp_path / "a" / "work"))
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert make_work_dir(str(made)) == made
    made.chmod(0o755)
    with pytest.raises(UserError, match="chmod 700"):
        make_work_dir(str(made))


def test_site_data_names_the_folder_that_is_given():
    assert str(SiteData(muse_path="/m").path) == "/m"


def test_reading_a_site_imports_neither_torch_nor_flower():
    code = "import sys, fedunlearn.config.sites; print(sorted({'torch', 'transformers', 'flwr'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
