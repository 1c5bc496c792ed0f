"""A process of `control`: a peer whose line is never idle, and what its calls come to meanwhile.

Rounds follow each other without training between them, and each peer fetches a state from the next
one, again and again. Every call is noted on both ends; all processes read the same clock.
"""

from __future__ import annotations

import asyncio
import math
import time
import zlib
from contextlib import suppress
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import uvloop

from peer.driver import AppliedFacts, Taken
from peer.exchange import Outcome, RefusedError, included_units
from peer.net.transport import CallHandler, Transport, TransportError
from peer.observe import events as ev
from peer.receiving import Order, Receiver
from peer.state_chunks import StateGrid
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.events import StateReady
from protocols.messages import Plan, decode
from protocols.types import Digest, PeerId
from tensorcodecs import CHUNK_VALUES, Codec
from tests.bench.averaging_ours import RUN, Murmurer, Vector, signer_of
from tests.bench.tensors import Float32, contribution
from tests.bench.worker import Reply, serve_async

_RETRY_S: Final = 0.2
_ROUND_S: Final = 0.3
_EXCHANGE_S: Final = 30.0  # three times what the thinnest line needs


class _Busy(Vector):
    """Contributes at once, whatever round it is; its state has ballast."""

    def __init__(self, numel: int, codec: Codec) -> None:
        super().__init__(numel, codec)
        self.peers: list[PeerId] = []
        self.truth: Float32 = np.empty(0, np.float32)
        self.applied_rounds: list[dict[str, Any]] = []
        self.whole = asyncio.Event()
        """A round held everybody's contribution."""
        self._hashed: tuple[bytes, Digest] = (b"", Digest(b""))
        self.load_ballast(0)

    def load_ballast(self, size: int) -> None:
        self._ballast = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        self.grid = StateGrid(self._arrays())

    def _arrays(self) -> dict[str, npt.NDArray[np.uint8]]:
        return {**super()._arrays(), "ballast": getattr(self, "_ballast", np.empty(0, np.uint8))}

    @property
    def digest(self) -> Digest:
        if self._hashed[0] != self._history:
            self._hashed = (self._history, self.grid.digest(self.grid.leaves(self._arrays())))
        return self._hashed[1]

    async def take(self, number: int) -> Taken:
        self.everybody = True  # with whoever is there
        self.go.set()
        return await super().take(number)

    async def apply(
        self, number: int, outcomes: list[Outcome], plan: Plan | None
    ) -> AppliedFacts | None:
        facts = await super().apply(number, outcomes, plan)
        inside = [included_units(outcomes, peer).mean() for peer in self.peers]
        coverage = float(np.mean(inside)) if inside else 0.0
        error = None
        if coverage == 1.0:
            self.whole.set()
            error = await asyncio.to_thread(self._error)
        self.applied_rounds.append(
            {
                "number": number, "at_s": time.monotonic(), "coverage": coverage, "error": error,
                "digest": self.digest.hex(),
            }
        )  # fmt: skip
        return facts

    def _error(self) -> float:
        """Of the worst unit: rms of (mean here - true mean), where contributions have rms 1."""
        squares = np.square(self.mean - self.truth, dtype=np.float32)
        starts = range(0, len(squares), CHUNK_VALUES)
        return math.sqrt(max(float(squares[at : at + CHUNK_VALUES].mean()) for at in starts))


class _Noted:
    """A transport that notes when what was called, and what came of it."""

    def __init__(self, inner: Transport, own: PeerId) -> None:
        self._inner = inner
        self._own = own
        self.called: list[dict[str, Any]] = []

    async def call(self, peer: PeerId, request: bytes, timeout_s: float) -> bytes:
        note = _note(self._own, request) | {"to": str(peer), "took_s": None}
        self.called.append(note)
        response = await self._inner.call(peer, request, timeout_s)
        note["took_s"] = time.monotonic() - note["at_s"]
        return response

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _note(sender: PeerId, request: bytes) -> dict[str, Any]:
    try:
        kind = type(decode(request, sender)).__name__
    except RemoteProtocolError:
        kind = "other"
    return {"kind": kind, "at_s": time.monotonic(), "crc": zlib.crc32(request)}


class Crammer(Murmurer):
    """The command handlers."""

    def learner(self, numel: int, codec: Codec) -> Vector:
        return _Busy(numel, codec)

    async def begin_with(self, *, ballast: int, **arguments: Any) -> Reply:
        """`start`, with so many bytes of ballast in the state."""
        self._heard: list[dict[str, Any]] = []
        self._suspected: list[str] = []
        self._moved = 0
        self._ballast = ballast
        return await self.start(exchange_s=_EXCHANGE_S, round_s=_ROUND_S, **arguments)

    def started(self) -> None:
        """Before the driver runs: everything that it calls or is called with is noted."""
        transport = self._net.transport
        before = transport.before

        def heard(handler: CallHandler) -> CallHandler:
            inner = before(handler)

            async def noted(sender: PeerId, request: bytes) -> bytes:
                self._heard.append(_note(sender, request) | {"from": str(sender)})
                return await inner(sender, request)

            return noted

        transport.before = heard
        self._noted = _Noted(transport, self._signer.peer_id)
        self._driver.transport = self._noted
        self._busy.load_ballast(self._ballast)

    @property
    def _busy(self) -> _Busy:
        assert isinstance(self._learner, _Busy)
        return self._learner

    def _note(self, event: ev.Event) -> None:
        super()._note(event)
        if isinstance(event, ev.MemberSuspected):
            self._suspected.append(f"{event.peer}: {event.reason}")

    async def prepare(self, *, number: int) -> Reply:
        """The tensor of all rounds, and the mean that each must give."""
        values = self._busy.values
        truth = np.zeros(len(values), np.float32)
        for index in range(self._size):
            contribution(self._seed, number, index, values)
            truth += values / np.float32(self._size)
        self._busy.truth = truth
        return await super().prepare(number=number)

    async def meet(self) -> Reply:
        """Once everybody is known."""
        await self._meeting
        self._busy.peers = [signer_of(self._seed, i).peer_id for i in range(self._size)]
        return {"peer": str(self._signer.peer_id)}

    async def settle(self) -> Reply:
        """Take part in rounds from now on; once one held everybody's contribution.

        All begin at once, and their lines are idle: how a group comes about is another matter.
        """
        self._driver.feed(StateReady(self._busy.round, self._busy.digest))
        await self._busy.whole.wait()
        return {}

    async def cram(self) -> Reply:
        """From now on this peer's line is never idle, nor its neighbour's."""
        donor = self._busy.peers[(self._index + 1) % self._size]
        self._fetching = asyncio.create_task(self._fetch(donor))
        return {}

    async def _fetch(self, donor: PeerId) -> None:
        """The donor's state, thrown away when it is here, for ever."""
        while True:
            before = 0

            def moved(here: int) -> None:
                nonlocal before
                self._moved += here - before
                before = here

            receiver = Receiver(
                self._net.transport, self._busy.grid, Order(RUN, [donor]), moved=moved
            )
            with suppress(TransportError, RefusedError, RemoteProtocolError):
                await receiver.run()
            await asyncio.sleep(_RETRY_S)

    async def begin(self) -> Reply:
        """From now on it counts."""
        self._noted.called.clear()
        self._heard.clear()
        self._suspected.clear()
        self._busy.applied_rounds.clear()
        self._moved = 0
        self._streams = dict(self._net.transport.counters.opened)
        return {}

    async def end(self) -> Reply:
        """What has been noted since then; calls without an answer yet included."""
        now_s = time.monotonic()
        opened = self._net.transport.counters.opened
        return {
            "now_s": now_s,
            "called": [note for note in self._noted.called if self._judged(note, now_s)],
            "heard": self._heard,
            "suspected": self._suspected,
            "rounds": self._busy.applied_rounds,
            "moved": self._moved,
            "streams": {c: opened[c] - self._streams.get(c, 0) for c in ("lane", "libp2p")},
            "lane": self._net.transport.counters.plain(),
            "told": [str(event) for event in self._events[-5:]],
        }

    @staticmethod
    def _judged(note: dict[str, Any], now_s: float) -> bool:
        """Whether a call is over, one way or the other."""
        return note["took_s"] is not None or now_s - note["at_s"] > limits.CALL_TIMEOUT_S


async def main() -> None:
    peer = Crammer()
    handlers: dict[str, Any] = {
        "start": peer.begin_with, "prepare": peer.prepare, "meet": peer.meet, "settle": peer.settle,
        "cram": peer.cram, "begin": peer.begin, "end": peer.end,
    }  # fmt: skip
    await serve_async(handlers)


if __name__ == "__main__":
    torch.set_num_threads(1)
    uvloop.run(main())
