"""Flower's exit codes and lines in words, and that the codes are Flower's."""

import re

import pytest
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.exit import ExitCode

from fedunlearn.sites import exits, fleet
from fedunlearn.sites.exits import why_ended
from fedunlearn.sites.retold import retelling

PEM = b"-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----\n"
CONNECTION = "ERROR : Exit Code: 305\nFailed to initialize the connection to the SuperLink.\n"


@pytest.mark.parametrize(
    ("returncode", "text", "said"),
    [
        (1, f"{CONNECTION}[code: 2004] Failed to activate SuperNode.", "another node is connected with the same key"),
        (1, f"{CONNECTION}[code: 2001] SuperNode authentication is enabled.", "this node showed none"),
        (1, f"{CONNECTION}something else", "could not connect .*exit code 305"),
        (1, "ERROR : Exit Code: 302\nUnable to parse", "private key cannot be used"),
        (1, "Exit Code: 606", "another version of Flower"),
        (1, "Exit Code: 399", "Flower's exit code 399"),
        (
            1,
            "[Errno 98] error while attempting to bind on address ('127.0.0.1', 1): Address already in use",
            "another program listens",
        ),
        (-9, "", "killed by signal 9 .memory may have run out"),
        (-15, "", "killed by signal 15 .from outside"),
        (0, "SuperNode terminated gracefully.", "no longer takes this node's signature"),
        (7, "", "ended with code 7"),
    ],
)
def test_causes(returncode, text, said):
    assert re.search(said, why_ended(returncode, text.split("\n"), is_node=True))


def test_the_codes_are_flower_s():
    codes = {value for name, value in vars(ExitCode).items() if name.isupper()}
    assert set(exits._OF_CODE) <= codes
    assert {*exits._OF_API_CODE, fleet.INTERVAL_REFUSED, fleet.ACTIVATION_FAILED} <= set(ApiErrorCode)
    assert fleet.INTERVAL_REFUSED == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL
    assert fleet.ACTIVATION_FAILED == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED


@pytest.mark.parametrize(
    ("code", "key", "reason", "said"),
    [
        (2003, PEM, "Heartbeat interval 0.0 is out of bounds", "client0.pub asked whether it may connect: yes"),
        (
            2004,
            PEM,
            "SuperNode with node ID 7 could not be activated.",
            "client0.pub was refused: another is connected",
        ),
        (
            2004,
            b"other",
            "No SuperNode found with the given public key.",
            "a key that is not in client_keys was refused",
        ),
    ],
)
def test_refusals_are_retold_by_the_key_s_file(code, key, reason, said):
    line = f"ERROR: [/v1/fleet/activate-node][ApiError:{code}] Attempted to register SuperNode with public key: {key!r}, exception: {reason}"
    assert said in retelling({PEM: "client0.pub"})(line)


def test_a_key_that_nobody_can_have_is_no_fault_of_the_reader():
    """Whoever reaches the server can send any bytes as a key; these would end a literal before its end."""
    key = b"\"', exception: "
    line = f"[/v1/fleet/activate-node][ApiError:2004] Attempted to register SuperNode with public key: {key!r}, exception: No SuperNode found"
    assert "with a key that is not in client_keys was refused" in retelling({PEM: "client0.pub"})(line)


def test_other_lines_stay_as_they_are():
    assert retelling({})("INFO: Activated node_id=3") == "INFO: Activated node_id=3"
    assert "without a registered key" in retelling({})("[/v1/fleet/register-node][ApiError:2001] Attempted")
