"""The real network: a libp2p daemon with its ladder, the bulk lane beside it, the DHT on it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dht.node import HivemindDirectory
from peer.config import PeerConfig
from peer.doctor.serve import ProbeServer, desk_of
from peer.net.budget import UploadBudget
from peer.net.ladder import LadderTransport
from peer.net.laned import LanedTransport
from peer.net.libp2p import CHANGED, unknown_daemon
from peer.net.outside import Told
from peer.observe import events as ev
from protocols.identity import Signer
from protocols.types import PeerId

_log = logging.getLogger(__name__)


class Libp2pNetwork:
    """A transport and a directory that share a daemon."""

    def __init__(
        self, transport: LanedTransport, directory: HivemindDirectory, budget: UploadBudget
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
    """Start the daemon, the lane and the DHT node; 0.3-0.5 s once hivemind is imported.

    Raises:
        NetworkError: a port is taken, or the daemon does not start.
    """
    budget = UploadBudget(config.upload_bps)

    def restarted(reason: str, seconds: float, p2p: Any) -> None:
        if reason != CHANGED:  # that was our own wish, and is told by whoever wished it
            emit(ev.DaemonRestarted(reason, seconds))

    def lane_failed(peer: PeerId, reason: str) -> None:
        emit(ev.Notice("info", f"no bulk lane to {peer} for now ({reason}); libp2p carries it"))

    def lane_refused(peer: PeerId, reason: str) -> None:
        emit(ev.PeerRefused(peer, reason))

    daemon = await LadderTransport.start(
        signer.seed, folder, config.host, config.port, budget=budget, announce=config.announce,
        relay=config.relay, on_restart=restarted, tell=teller(emit),
    )  # fmt: skip
    strange = unknown_daemon()
    if strange is not None:
        emit(ev.Notice("warning", strange))
    try:
        transport = await LanedTransport.start(
            daemon, signer, folder, config.host, config.lane_port,
            enabled=config.lane, on_failed=lane_failed, on_refused=lane_refused,
        )  # fmt: skip
    except BaseException:
        await daemon.close()
        raise
    inner = daemon.inner
    # What is stored at a peer that can only be reached through others is soon lost, or slow.
    directory = await HivemindDirectory.start(
        inner, signer, is_client=lambda: inner.posture.private
    )
    transport.before = ProbeServer(desk_of(daemon, directory.size)).before
    return Libp2pNetwork(transport, directory, budget)


def teller(emit: ev.Listener) -> Told:
    """What is to be known of being reached, as notices for the owner."""

    def tell(level: str, text: str) -> None:
        match level:
            case "info" | "warning":
                emit(ev.Notice(level, text))
            case _:
                _log.debug("%s", text)

    return tell
