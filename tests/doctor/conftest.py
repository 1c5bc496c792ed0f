"""Two peers of libp2p on this machine that take probes, once for all tests that ask them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dht.node import HivemindDirectory
from peer.doctor.serve import ProbeServer, desk_of
from peer.net.libp2p import Libp2pTransport
from peer.net.transport import Stream
from protocols.errors import RemoteProtocolError
from protocols.identity import Signer
from protocols.types import PeerId

HOST = "127.0.0.1"


async def _nothing(sender: PeerId, request: bytes) -> bytes:
    raise RemoteProtocolError(sender, "probes only")


async def _no_stream(stream: Stream) -> None:
    await stream.close()


@pytest.fixture
async def willing(tmp_path: Path) -> AsyncIterator[Libp2pTransport]:
    """A peer that answers probes, and is a node of the DHT."""
    seed = os.urandom(32)
    transport = await Libp2pTransport.start(seed, tmp_path / "willing", HOST)
    directory = await HivemindDirectory.start(transport, Signer(seed))
    probes = ProbeServer(desk_of(transport, directory.size))
    transport.serve(probes.before(_nothing), _no_stream)
    yield transport
    await directory.close()
    await transport.close()


@pytest.fixture
async def unwilling(tmp_path: Path) -> AsyncIterator[Libp2pTransport]:
    """One of an older version."""
    transport = await Libp2pTransport.start(os.urandom(32), tmp_path / "unwilling", HOST)
    transport.serve(_nothing, _no_stream)
    yield transport
    await transport.close()
