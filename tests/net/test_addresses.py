"""What counts as an address, and which daemon we trust."""

from __future__ import annotations

import subprocess
import sys

import pytest

from peer.net.multiaddress import peer_of
from peer.net.p2pd import unknown_daemon
from protocols.identity import Signer

PEER = Signer(b"s" * 32).peer_id


@pytest.mark.parametrize(
    "where",
    [
        "/ip4/192.0.2.7/tcp/31337",
        "/ip6/2001:db8::1/tcp/1",
        "/dns4/example.org/tcp/31337",
        f"/ip4/192.0.2.7/tcp/1/p2p/{PEER}/p2p-circuit",
    ],
)
def test_an_address_names_its_peer(where: str) -> None:
    assert peer_of(f"{where}/p2p/{PEER}") == PEER


@pytest.mark.parametrize(
    "address",
    ["", "localhost:31337", "/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/1/p2p/", "/p2p/Qm1"]
    + [f"{where}/p2p/{Signer(b's' * 32).peer_id}" for where in ("/ip4/1.2.3/tcp/1", "/x/1", "x")],
)
def test_what_is_no_address_is_a_value_error(address: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        peer_of(address)


def test_the_daemon_is_the_one_that_we_know() -> None:
    assert unknown_daemon() is None


def test_peers_in_memory_need_neither_hivemind_nor_torch() -> None:
    code = (
        "import sys, peer.net.memory, dht.memory; "
        "sys.exit(bool({'hivemind', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
