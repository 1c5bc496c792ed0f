"""Relays: which are known, and whether this one carries anything.

Who relays says so when it asks to be dialled back; whoever then reached it keeps it in a table and
names it to others who ask. Nothing is believed: a relay that does not carry is left for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
from collections import OrderedDict
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from peer.errors import NetworkError, StorageError
from peer.net.daemon import Posture
from peer.net.libp2p import Libp2pTransport
from peer.net.multiaddress import CIRCUIT, is_address_of, is_relayed, peer_of
from peer.net.reach import RELAYS_TOLD_MAX
from peer.net.transport import Stream, TransportError
from protocols.errors import RemoteProtocolError
from protocols.types import PeerId

KNOWN_MAX: Final = 64
KNOWN_S: Final = 1800.0  # two looks at its reachability and a half
TEST_BYTES: Final = 2**20  # eight times what a relay with libp2p's own limits would carry
TEST_TIMEOUT_S: Final = 15.0  # of which a busy machine needs most for starting two daemons
BOOKING_POLL_S: Final = 0.1


class RelayTable:
    """Addresses of relays, the latest heard of first."""

    def __init__(self) -> None:
        self._known: OrderedDict[PeerId, tuple[tuple[str, ...], float]] = OrderedDict()

    def add(self, peer: PeerId, addresses: tuple[str, ...], now_s: float) -> None:
        """Only direct addresses of `peer` itself count."""
        good = tuple(a for a in addresses if is_address_of(a, peer) and not is_relayed(a))
        if good:
            self._known.pop(peer, None)
            self._known[peer] = (good, now_s + KNOWN_S)
        while len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)

    def hear(self, addresses: tuple[str, ...], own: PeerId, now_s: float) -> None:
        """What somebody else has told: `/ip4/.../p2p/ID`."""
        for address in addresses:
            with contextlib.suppress(ValueError):
                peer = peer_of(address)
                if peer != own:
                    self.add(peer, (address,), now_s)

    def forget(self, peer: PeerId) -> None:
        self._known.pop(peer, None)

    def addresses(self, now_s: float) -> dict[PeerId, tuple[str, ...]]:
        """By peer."""
        live = {p: where for p, (where, until_s) in self._known.items() if until_s > now_s}
        return dict(reversed(live.items()))

    def told(self, now_s: float, asker: PeerId) -> tuple[str, ...]:
        """What to name to somebody who asks: one address each."""
        found = [where[0] for peer, where in self.addresses(now_s).items() if peer != asker]
        return tuple(found[:RELAYS_TOLD_MAX])


async def fault_of_relay(
    relay: Libp2pTransport, host: str, timeout_s: float = TEST_TIMEOUT_S
) -> str | None:
    """Why `relay` does not carry what it should, or None where it does; about a second.

    A throw-away peer of ours books a place there and another one sends it a stream. The daemon has
    two relay services under one name, and now and then the one with libp2p's limits answers: it
    breaks off after 128 KiB.
    """
    place = "127.0.0.1" if host in ("0.0.0.0", "localhost") else host
    place = "::1" if host == "::" else place
    here = f"/{'ip6' if ':' in place else 'ip4'}/{place}/tcp/{relay.port}/p2p/{relay.peer_id}"
    if not relay.port:
        return "its own port is not known; give it with --port"
    try:
        async with asyncio.timeout(timeout_s), AsyncExitStack() as stack:
            # Removed by a thread: a slow disk must not hold up the event loop.
            folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="relay-test-"))
            stack.push_async_callback(asyncio.to_thread, _remove, folder)
            guest = Posture(private=True, through=(here,), listens=False)
            booked, sender = await asyncio.gather(
                _throw_away(stack, folder / "a", place, guest),
                _throw_away(stack, folder / "b", place, Posture(listens=False)),
            )
            booked.serve(_no_calls, _count)
            await sender.connect(here, TEST_TIMEOUT_S)
            through = f"{here}{CIRCUIT}/p2p/{booked.peer_id}"
            while True:  # until the place is booked
                try:
                    await sender.connect(through, TEST_TIMEOUT_S)
                    break
                except TransportError:
                    await asyncio.sleep(BOOKING_POLL_S)
            stream = await sender.open(booked.peer_id, TEST_TIMEOUT_S)
            await stream.send(1, bytes(TEST_BYTES))
            await stream.finish()
            answer = await stream.receive(64)
            await stream.close()
            if answer is None or answer.payload != b"%d" % TEST_BYTES:
                return "what went through it did not arrive whole"
            return None
    except TimeoutError:
        return f"nothing went through it within {timeout_s:g} s"
    except (TransportError, RemoteProtocolError, NetworkError, StorageError, OSError) as error:
        return str(error)


async def _throw_away(
    stack: AsyncExitStack, folder: Path, host: str, posture: Posture
) -> Libp2pTransport:
    peer = await Libp2pTransport.start(secrets.token_bytes(32), folder, host, posture=posture)
    stack.push_async_callback(peer.close)
    return peer


async def _no_calls(sender: PeerId, request: bytes) -> bytes:
    raise RemoteProtocolError(sender, "nobody is at home")


async def _count(stream: Stream) -> None:
    total = 0
    while (frame := await stream.receive(TEST_BYTES)) is not None:
        total += len(frame.payload)
    await stream.send(1, b"%d" % total)


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    folder.rmdir()
