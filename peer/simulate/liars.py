"""Peers that lie: an honest peer's code on a transport that changes what it says.

What a liar can do is what anybody with a modified program can: it holds its own key and no other.
"""

from __future__ import annotations

import random
from collections import deque
from contextlib import suppress
from dataclasses import replace
from typing import Final

from peer.exchange import HEADER, UNITS, content_digest
from peer.simulate.network import Machine, SimNetwork, SimStream, SimTransport
from peer.simulate.scenario import Lie
from protocols.errors import RemoteProtocolError
from protocols.identity import Signer
from protocols.messages import (
    OUTCOME_DOMAIN,
    ContributionHeader,
    OutcomeHeader,
    OutcomePush,
    decode_header,
    encode,
    open_signed,
)
from protocols.records import sign
from protocols.types import PeerId

LIE_SHARE: Final = 0.3
REMEMBERED_MAX: Final = 64


class LyingTransport(SimTransport):
    """`SimTransport` of a liar."""

    post = None  # type: ignore[assignment]  # every word goes through `call`

    def __init__(
        self, network: SimNetwork, machine: Machine, lie: Lie, signer: Signer, rng: random.Random
    ) -> None:
        super().__init__(network, machine)
        self.lie = lie
        self.signer = signer
        self.rng = rng
        self._said: deque[tuple[PeerId, bytes]] = deque(maxlen=REMEMBERED_MAX)

    async def call(self, peer: PeerId, request: bytes, timeout_s: float) -> bytes:
        if self.lie in (Lie.replay, Lie.stale) and self._said and self.rng.random() < LIE_SHARE:
            to, old = self._said[0] if self.lie is Lie.stale else self.rng.choice(self._said)
            with suppress(RemoteProtocolError):  # seen through; it was worth a try
                await super().call(peer if self.lie is Lie.replay else to, old, timeout_s)
        self._said.append((peer, request))
        return await super().call(peer, request, timeout_s)

    async def open(self, peer: PeerId, timeout_s: float) -> SimStream:
        stream = await super().open(peer, timeout_s)
        return _Twisted(stream, self)  # type: ignore[return-value]


class _Twisted:
    """A stream that a liar opened."""

    def __init__(self, stream: SimStream, liar: LyingTransport) -> None:
        self._stream = stream
        self._liar = liar
        self._twist = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    async def send(self, kind: int, payload: bytes | memoryview) -> None:
        await self._stream.send(kind, self._twisted(kind, bytes(payload)))

    def _twisted(self, kind: int, payload: bytes) -> bytes:
        liar = self._liar
        if kind == HEADER:
            header = decode_header(payload, liar.peer_id)
            if isinstance(header, OutcomePush) and liar.lie is Lie.equivocate:
                return self._other_outcome(header, payload)
            late = liar.lie is Lie.stale and liar.rng.random() < LIE_SHARE
            if late and isinstance(header, ContributionHeader) and header.round > 0:
                return encode(replace(header, round=header.round - 1))
        if kind == UNITS and liar.lie is Lie.corrupt and liar.rng.random() < LIE_SHARE:
            at = liar.rng.randrange(len(payload))
            return payload[:at] + bytes([payload[at] ^ 0x40]) + payload[at + 1 :]
        if kind == UNITS and self._twist:
            return _emptied(payload)
        return payload

    def _other_outcome(self, push: OutcomePush, payload: bytes) -> bytes:
        """Half of the members get "nothing changed", properly signed."""
        if self._stream.peer[-1] < "a":
            return payload
        header = open_signed(push.outcome, OUTCOME_DOMAIN, OutcomeHeader, self._liar.peer_id)
        if push.outcome.signer != self._liar.peer_id:
            return payload
        self._twist = True
        nothing = [b""] * (header.stop - header.start)
        other = replace(header, contributors=(), content=content_digest(nothing), content_bytes=0)
        return encode(OutcomePush(push.epoch, sign(self._liar.signer, OUTCOME_DOMAIN, other)))


def _emptied(payload: bytes) -> bytes:
    """The same units, each of no bytes."""
    parts, at = bytearray(), 0
    while at < len(payload):
        length = int.from_bytes(payload[at + 4 : at + 8], "little")
        parts += payload[at : at + 4] + bytes(4)
        at += 8 + length
    return bytes(parts)
