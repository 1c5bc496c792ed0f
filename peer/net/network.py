"""The real network: one libp2p daemon, and the DHT on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dht.node import HivemindDirectory
from peer.config import PeerConfig
from peer.net.budget import UploadBudget
from peer.net.libp2p import Libp2pTransport, unknown_daemon
from peer.observe import events as ev
from protocols.identity import Signer


class Libp2pNetwork:
    """A transport and a directory that share a daemon."""

    def __init__(
        self, transport: Libp2pTransport, directory: HivemindDirectory, budget: UploadBudget
    ) -> None:
        self.transport = transport
        self.directory = directory
        self.budget = budget

    async def close(self) -> None:
        await self.directory.close()
        await self.transport.close()


async def open_libp2p(
    config: PeerConfig, folder: Path, signer: Signer, emit: ev.Listener
) -> Libp2pNetwork:
    """Start the daemon and the DHT node; 0.3-0.5 s once hivemind is imported.

    Raises:
        NetworkError: the port is taken, or the daemon does not start.
    """
    budget = UploadBudget(config.upload_bps)

    def restarted(reason: str, seconds: float, p2p: Any) -> None:
        emit(ev.DaemonRestarted(reason, seconds))

    transport = await Libp2pTransport.start(
        signer.seed, folder, config.host, config.port,
        budget=budget, announce=config.announce, on_restart=restarted,
    )  # fmt: skip
    strange = unknown_daemon()
    if strange is not None:
        emit(ev.Notice("warning", strange))
    directory = await HivemindDirectory.start(transport, signer)
    return Libp2pNetwork(transport, directory, budget)
