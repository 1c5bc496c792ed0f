"""How bytes reach another peer: the one interface that the driver knows.

Two ways to talk: a unary `call` for control (small, answered, never queued behind bulk) and a
`Stream` of framed pieces for bulk. The sender's identity is authenticated by the transport. Three
things implement it: `libp2p` (hivemind's daemon), `memory` (one process) and the simulator.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from protocols.errors import RemoteProtocolError
from protocols.types import PeerId


class TransportError(Exception):
    """`peer` could not be reached, or did not answer in time. Never fatal by itself."""

    def __init__(self, peer: PeerId, reason: str) -> None:
        super().__init__(f"{peer}: {reason}")
        self.peer = peer
        self.reason = reason


Posted = bytes | TransportError | RemoteProtocolError
"""How a message fared: what it was answered with, or why it was not taken."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One piece of a stream: a small integer that says what it is, and its bytes."""

    kind: int
    payload: bytes


class Stream(Protocol):
    """An open two-way stream of frames. Every wait has a deadline on progress.

    The side that opened it closes first (`close`); the other waits for that end, so that nothing
    in flight is lost (libp2p's daemon resets a stream whose handler closes early).
    """

    peer: PeerId
    bytes_out: int
    bytes_in: int

    async def send(self, kind: int, payload: bytes | memoryview) -> None:
        """Send one frame (split on the wire as needed), at the pace of the upload budget.

        Raises:
            TransportError: the stream broke, or nothing moved for `PROGRESS_TIMEOUT_S`.
        """

    async def receive(self, payload_bytes_max: int) -> Frame | None:
        """The next frame, or None at the sender's orderly end.

        Raises:
            TransportError: the stream broke, or nothing came for `PROGRESS_TIMEOUT_S`.
            RemoteProtocolError: a frame larger than `payload_bytes_max`, or a wrong checksum.
        """

    async def finish(self) -> None:
        """Say that no more frames will be sent from this side."""

    async def close(self) -> None:
        """Close this side. Never raises, never waits for long."""


CallHandler = Callable[[PeerId, bytes], Awaitable[bytes]]
"""(sender, request) -> response. May raise RemoteProtocolError: the caller is told the reason."""

StreamHandler = Callable[[Stream], Awaitable[None]]
"""Owns the stream until it returns. Exceptions close the stream."""


class Transport(Protocol):
    """Calls and streams between authenticated peers."""

    peer_id: PeerId

    def serve(self, on_call: CallHandler, on_stream: StreamHandler) -> None:
        """Set the handlers; before this, inbound traffic is refused."""

    def addresses(self) -> list[str]:
        """Multiaddresses (with /p2p/ID) under which others may reach this peer."""

    async def connect(self, address: str, timeout_s: float) -> PeerId:
        """Open a connection to a multiaddress and learn who is there.

        Raises:
            TransportError: nobody answers there, or somebody else does.
            ValueError: not a multiaddress that ends in /p2p/ID.
        """

    async def call(self, peer: PeerId, request: bytes, timeout_s: float) -> bytes:
        """One small request and its answer.

        Raises:
            TransportError: unreachable, too late, or just starting or ending.
            RemoteProtocolError: the far side refused, with its reason.
        """

    async def open(self, peer: PeerId, timeout_s: float) -> Stream:
        """A new stream to `peer`.

        Raises:
            TransportError: unreachable or too late.
        """

    async def close(self) -> None:
        """Close everything that this transport opened."""
