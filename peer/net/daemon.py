"""The network daemon as a child process: what it is told at its start, and how it ends.

What it may do is decided by its command line, and only there (`Posture`): a daemon that shall go
through relays, or be one, is another daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from peer.net.p2pd import socket_prefix

STOP_TIMEOUT_S: Final = 3.0  # for a daemon that was asked to go

RELAYED_PEERS_MAX: Final = 64
"""Who may be reached through a relay at a time: each has two or three relays, and 64 idle
connections are nothing."""
CIRCUITS_PER_PEER_MAX: Final = 16  # a group's members, each with a circuit to everybody
CIRCUIT_BYTES_MAX: Final = 2 * 2**30
"""Each way, then the circuit ends and is made anew: some hours of rounds of a thin line."""
CIRCUIT_S_MAX: Final = 2 * 3600
CIRCUIT_BUFFER_BYTES: Final = 64 * 2**10
"""Each way; 16 circuits for each of 64 peers take at most 128 MiB (with 16 MiB, libp2p's default
here, 32 GiB)."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Posture:
    """How a daemon stands to the world outside."""

    relays: bool = False
    """It forwards for others, who can reach it directly."""
    private: bool = False
    """Nobody outside can reach it: it books places at `through` and is reached there."""
    through: tuple[str, ...] = ()
    """Multiaddresses of relays."""
    listens: bool = True
    """It takes in connections at all."""

    @property
    def reachability(self) -> str | None:
        """What libp2p is told rather than finding it out itself, which takes it minutes."""
        return "public" if self.relays else "private" if self.private else None

    def flags(self) -> list[str]:
        """Of the command line, beyond those that hivemind knows."""
        if not self.relays:
            # It finds relays by itself after three minutes; until then it only tries in vain.
            return ["-relayService=0", "-relayDiscovery=0"]
        return [
            "-relayService=1",
            "-relayDiscovery=0",
            f"-relayDataLimit={CIRCUIT_BYTES_MAX}",
            f"-relayTimeLimit={CIRCUIT_S_MAX}s",
            f"-relayMaxCircuits={CIRCUITS_PER_PEER_MAX}",
            f"-relayMaxReservations={RELAYED_PEERS_MAX}",
            f"-relayBufferSize={CIRCUIT_BUFFER_BYTES}",
        ]


class Pending(dict[Any, Any]):
    """hivemind's table of calls, without those that were cancelled a moment ago.

    Its reader asks `id in table` and then sets the result, which on a cancelled future raises and
    ends the reader: from then on no call is ever answered.
    """

    def __contains__(self, key: object) -> bool:
        future = self.get(key)
        return future is not None and not future.done()


class _Daemon(P2P):  # type: ignore[misc]
    """p2pd in a session of its own, so that Ctrl-C in the terminal reaches only us."""

    _UNIX_SOCKET_PREFIX = "/unix" + socket_prefix()
    stopped = False

    def __del__(self) -> None:
        if not self.stopped:  # else there is nothing left to do, and this may run anywhere
            super().__del__()

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        detach = "import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"
        daemon: list[str] = P2P._make_process_args(*args, **kwargs)
        return [sys.executable, "-I", "-S", "-c", detach, *daemon]


async def stop(p2p: Any, reason: str) -> None:
    """End a daemon, whatever state it is in, and everything that waits for it."""
    for future in list(p2p._client.control._pending_calls.values()):
        if not future.done():
            future.set_exception(P2PDaemonError(f"network daemon: {reason}"))
    p2p._terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await p2p._child.wait()
    except TimeoutError:
        p2p._child.kill()
        await p2p._child.wait()
    p2p.stopped = True
    control = p2p._client.control
    tasks = {p2p._reader_task, p2p._listen_task, control._read_task, control._write_task} - {None}
    done, _ = await asyncio.wait(tasks, timeout=STOP_TIMEOUT_S)
    for task in done:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.debug("network daemon: %r", error)  # a broken pipe: that is how it died
    for maddr in (p2p._daemon_listen_maddr, p2p._client_listen_maddr):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(maddr["unix"])  # noqa: PTH108 - a socket file in /tmp: nothing blocks


async def launch(
    key_file: Path, host: str, port: int, announce: tuple[str, ...], posture: Posture
) -> Any:
    """A running daemon, as hivemind's P2P.

    Raises:
        P2PDaemonError, OSError, EOFError: it does not start; nothing of it is left.
    """
    family = "ip6" if ":" in host else "ip4"
    local = host in ("127.0.0.1", "::1", "localhost")
    host = "127.0.0.1" if host == "localhost" else host
    made: list[Any] = []

    class Daemon(_Daemon):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)  # `create` keeps it to itself where it fails

        @staticmethod
        def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
            return [*_Daemon._make_process_args(*args, **kwargs), *posture.flags()]

    creating = asyncio.ensure_future(
        Daemon.create(
            host_maddrs=[f"/{family}/{host}/tcp/{port}"] if posture.listens else None,
            no_listen=not posture.listens,
            announce_maddrs=list(announce) or None,
            identity_path=str(key_file),
            check_if_identity_free=False,  # it parses RSA keys only
            auto_nat=not local,
            nat_port_map=not local,
            use_relay=True,  # for dialling through others; being one is in the posture
            force_reachability=posture.reachability,
            use_auto_relay=bool(posture.private and posture.through),
            trusted_relays=list(posture.through) or None,
        )
    )
    try:
        return await asyncio.shield(creating)
    except asyncio.CancelledError:
        with contextlib.suppress(P2PDaemonError, OSError, EOFError):
            await stop(await creating, "closed")  # cancelled half-way it would live on
        raise
    except (P2PDaemonError, OSError, EOFError):
        for daemon in made:
            if daemon._child is not None:  # reaped here, while the loop still runs
                with contextlib.suppress(ProcessLookupError):
                    daemon._child.kill()
                await daemon._child.wait()
        raise
