"""Flower's command lines: Flower's own parsers are asked what they make of them."""

import subprocess
import sys
import tomllib

import pytest
import yaml
from federation_here import edit, trial
from flwr.common.config import parse_config_args
from flwr.supercore.cli.flower_superexec import _parse_args as superexec_parser
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink as superlink_parser
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode as supernode_parser

from fedunlearn.config.addresses import Address
from fedunlearn.config.sites import ClientSite, ServerSite, read_site
from fedunlearn.errors import UserError
from fedunlearn.sites import commands


@pytest.fixture
def folder(tmp_path):
    return trial(tmp_path / "a folder, with 'spaces'", port=8123)


def server(folder, **changes):
    path = edit(folder / "server" / "server.yaml", **changes)
    return read_site(path, ServerSite), path


def client(folder, **changes):
    path = edit(folder / "client1" / "client1.yaml", **changes)
    return read_site(path, ClientSite), path


def test_the_superlink_s(folder):
    site, path = server(folder, log_file="s.log")
    command = commands.superlink_command(site, path)
    args = superlink_parser().parse_args(command.argv[1:])
    assert (args.host, args.port, args.insecure, args.enable_supernode_auth) == ("127.0.0.1", 8123, False, True)
    assert (args.ssl_ca_certfile, args.ssl_keyfile) == (str(path.parent / "ca.crt"), str(path.parent / "server.key"))
    assert (args.isolation, args.database) == ("process", str(path.parent / "work" / "superlink.sqlite"))
    assert (args.runtime_dependency_install, args.log_file) == (False, str(path.parent / "s.log"))
    assert command.environment["FEDUNLEARN_SITE"] == str(path)


def test_the_superlink_s_without_tls(folder):
    site, path = server(folder, insecure=True, tls=None, client_keys=None)
    args = superlink_parser().parse_args(commands.superlink_command(site, path).argv[1:])
    assert (args.insecure, args.enable_supernode_auth, args.ssl_certfile) == (True, False, None)
    assert superexec_parser().parse_args(commands.superexec_command(site, path).argv[1:]).insecure is True


@pytest.mark.parametrize(
    ("listen", "reached"),
    [("127.0.0.1:8123", "127.0.0.1:8123"), ("0.0.0.0:8123", "127.0.0.1:8123"), ("[::]:8123", "[::1]:8123")],
)
def test_the_superexec_s(folder, listen, reached):
    site, path = server(folder, listen=listen, open_control=True)
    command = commands.superexec_command(site, path)
    args = superexec_parser().parse_args(command.argv[1:])
    assert (args.runtime_api_address, args.root_certificates) == (reached, str(path.parent / "ca.crt"))
    assert args.runtime_dependency_install is False
    assert command.environment["FEDUNLEARN_SITE"] == str(path)


def test_the_supernode_s(folder):
    site, path = client(folder)
    command = commands.supernode_command(site, path, 4321)
    args = supernode_parser().parse_args(command.argv[1:])
    assert (args.superlink, args.root_certificates) == ("localhost:8123", str(path.parent / "ca.crt"))
    assert args.auth_supernode_private_key == str(path.parent / "node.key")
    assert f"{args.host}:{args.port}" == site.listen
    assert args.runtime_dependency_install is False
    assert parse_config_args([args.node_config]) == {"site": str(path), "supernode-pid": 4321}
    assert "FEDUNLEARN_SITE" not in command.environment


def test_a_supernode_s_without_tls_and_with_the_machine_s_authorities(folder):
    site, path = client(folder, insecure=True, ca=None, key=None)
    args = supernode_parser().parse_args(commands.supernode_command(site, path, 1).argv[1:])
    assert (args.insecure, args.root_certificates, args.auth_supernode_private_key) == (True, None, None)


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb"])
def test_a_path_that_flower_cannot_be_given(tmp_path, name):
    with pytest.raises(UserError, match="rename the folder"):
        commands.node_config(tmp_path / name / "client.yaml", 1)


def test_flower_writes_below_the_work_dir_and_asks_nobody(folder):
    (server_site, server_path), (client_site, client_path) = server(folder), client(folder)
    for command, work_dir in (
        (commands.superlink_command(server_site, server_path), server_site.work_dir),
        (commands.supernode_command(client_site, client_path, 1), client_site.work_dir),
    ):
        assert command.environment["FLWR_HOME"].startswith(work_dir)
        assert command.environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert command.environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
        assert command.environment["PATH"].startswith(sys.executable.rpartition("/")[0])
        assert "PATH=" not in command.shown()


def test_flower_s_own_configuration():
    address = Address(host="127.0.0.1", port=8123)
    ca = 'a "folder"\\ca.crt'
    assert tomllib.loads(commands.flower_config(address, ca))["superlink"] == {
        "default": commands.CONNECTION,
        commands.CONNECTION: {"address": "127.0.0.1:8123", "root-certificates": ca},
    }
    plain = tomllib.loads(commands.flower_config(address, None))["superlink"][commands.CONNECTION]
    assert plain == {"address": "127.0.0.1:8123", "insecure": True}


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ('Stopping run 7 ...\n{"success": true}', {"success": True}),
        ("no answer", {}),
        ("{half", {}),
        ("[1]", {}),
    ],
)
def test_the_answer_of_a_command(said, answer):
    assert commands.answer_in(said) == answer


def test_registering_is_asked_of_the_site_s_own_superlink(folder):
    site, path = server(folder)
    words = commands.register_command(site, path, path.parent / "client_keys" / "client0.pub").argv[1:]
    assert words == (
        "supernode",
        "register",
        str(path.parent / "client_keys" / "client0.pub"),
        "site",
        "--format",
        "json",
    )
    assert commands.unregister_command(site, path, 7).argv[1:5] == ("supernode", "unregister", "7", "site")


def test_an_example_has_no_absolute_path_of_its_own_folder(folder):
    held = yaml.safe_load((folder / "server" / "server.yaml").read_text())
    assert not [value for key, value in held.items() if key not in ("data", "models") and str(folder) in str(value)]


def test_starting_a_site_imports_neither_torch_nor_flower():
    names = "checks, commands, fetch, node, server, certificates"
    code = f"import sys; from fedunlearn.sites import {names}; print(sorted({{'torch', 'transformers', 'flwr'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
