"""A process of `wan_goodput`: worker 1 sends a contribution to one span, worker 0 aggregates it."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvloop

from peer.config import PeerConfig
from peer.exchange import HEADER, Exchange
from peer.net.lane import LaneStream
from peer.net.network import open_libp2p
from peer.net.transport import Stream
from peer.train.flat import FrozenWork
from peer.train.pretrain import MeanReducer
from protocols import limits
from protocols.messages import ContributionHeader, Plan, Seat, Span, decode_header
from protocols.types import Digest, GroupName, PeerId, RunId
from tensorcodecs import CHUNK_VALUES, get_codec
from tests.bench.averaging_ours import signer_of
from tests.bench.worker import Reply, serve_async

_RUN: Final = RunId("be" * 32)
_CODEC: Final = get_codec("q4")
_GROUP: Final = GroupName("bench")
_EXCHANGE_S: Final = 60.0


class Spanner:
    """The command handlers."""

    async def start(
        self, *, index: int, size: int, via: list[str], seed: int, size_bytes: int, host: str
    ) -> Reply:
        self._index, self._signers = index, [signer_of(seed, i) for i in range(size)]
        signer = self._signers[index]
        folder = Path(tempfile.mkdtemp())
        self._net = await open_libp2p(PeerConfig(host=host), folder, signer, lambda event: None)
        values = np.random.default_rng(seed).standard_normal(CHUNK_VALUES, np.float32)
        self._unit = _CODEC.encode_many(values)[0]
        self._units = max(1, size_bytes // len(self._unit))
        reducer = MeanReducer([CHUNK_VALUES] * self._units, _CODEC)
        self._exchange = Exchange(self._net.transport, signer, reducer)
        self._arrived: asyncio.Queue[tuple[float, float, str]] = asyncio.Queue(1)
        self._net.transport.serve(self._on_call, self._on_stream)
        for address in via:
            await self._net.transport.connect(address, 10.0)
        return {"addresses": self._net.transport.addresses()}

    async def _on_call(self, sender: PeerId, request: bytes) -> bytes:
        return b""

    async def _on_stream(self, stream: Stream) -> None:
        frame = await stream.receive(limits.STREAM_HEADER_BYTES_MAX)
        assert frame is not None
        assert frame.kind == HEADER
        header = decode_header(frame.payload, stream.peer)
        assert isinstance(header, ContributionHeader)
        begun_s = time.monotonic()
        assert await self._exchange.receive_contribution(stream, header)
        over = "lane" if isinstance(stream, LaneStream) else "libp2p"
        await self._arrived.put((begun_s, time.monotonic(), over))

    async def span(self, *, number: int) -> Reply:
        """One contribution: the receiver's clock says how long it took."""
        units = self._units
        receiver, sender = (signer.peer_id for signer in self._signers)
        if self._index == 0:
            told_s = time.monotonic()
            begun_s, done_s, over = await self._arrived.get()
            self._exchange.drop_span(number, 0, units)
            return {
                "bytes": units * len(self._unit), "seconds": done_s - begun_s,
                "opened_s": done_s - told_s, "over": over,
            }  # fmt: skip
        plan = Plan(
            _RUN, _GROUP, 1, number, (Seat(receiver, 1), Seat(sender, 1)),
            (Span(0, units, receiver, 1),), 0, int(_EXCHANGE_S * 1000), Digest(bytes(32)),
        )  # fmt: skip
        coded = [self._unit] * units
        work = FrozenWork(1.0, lambda start, stop, codec: coded[start:stop])
        self._exchange.offer(number, work)
        assert await self._exchange.send_contribution(plan, 0, receiver)
        return {}


async def main() -> None:
    spanner = Spanner()
    handlers: dict[str, Any] = {"start": spanner.start, "span": spanner.span}
    await serve_async(handlers)


if __name__ == "__main__":
    uvloop.run(main())
