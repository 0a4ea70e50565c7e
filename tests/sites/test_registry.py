"""Which node has which client's key, from the folder of keys and what the SuperLink was told."""

import json

from federation_here import edit, trial

from fedunlearn.config.sites import ServerSite, read_site
from fedunlearn.sites.registry import clients_by_node, registry_path


def key_of(folder, name):
    return " ".join((folder / "server" / "client_keys" / name).read_text().split()[:2])


def test_a_node_is_the_client_whose_key_it_has(tmp_path):
    folder = trial(tmp_path)
    site = read_site(folder / "server" / "server.yaml", ServerSite)
    keys = folder / "server" / "client_keys"
    names = sorted(path.name for path in keys.iterdir())
    assert names[:2] == ["client0.pub", "client1.pub"]
    assert clients_by_node(site) == {}  # nothing was told yet
    path = registry_path(site)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({key_of(folder, "client0.pub"): 2**63, key_of(folder, "client1.pub"): 7, "gone": 9}))
    assert clients_by_node(site) == {2**63: 0, 7: 1}
    (keys / "client1.pub").rename(keys / "client12.pub")
    assert clients_by_node(site) == {2**63: 0, 7: 12}
    (keys / "client12.pub").rename(keys / "guest.pub")
    assert clients_by_node(site) == {2**63: 0}  # a key of another name is anybody's


def test_where_nodes_have_no_keys_none_is_looked_up(tmp_path):
    path = edit(trial(tmp_path) / "server" / "server.yaml", insecure=True, client_keys=None, tls=None)
    assert clients_by_node(read_site(path, ServerSite)) == {}
