"""Frames arrive whole and in order, or the stream says whose fault it is."""

from __future__ import annotations

import asyncio
import random
import zlib

import pytest

from peer.net.budget import UploadBudget
from peer.net.framing import END, HEADER, FramedStream
from peer.net.transport import Frame, TransportError
from protocols import limits
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.types import PeerId

PEER = PeerId("somebody")
LIMIT = 2**20


class Wire:
    """A pipe whose two ends are the same: what is written can be read."""

    def __init__(self, *, stuck: bool = False) -> None:
        self._reader = asyncio.StreamReader(limit=2**30)
        self._stuck = asyncio.get_running_loop().create_future() if stuck else None
        self._written = 0

    async def read(self, n: int) -> bytes:
        try:
            return await self._reader.readexactly(n)
        except asyncio.IncompleteReadError as error:
            return error.partial

    def received(self) -> int:
        return self._written

    def write(self, *data: bytes | memoryview) -> None:
        for piece in data:
            self._reader.feed_data(bytes(piece))
            self._written += len(piece)

    async def drain(self) -> None:
        if self._stuck is not None:
            await self._stuck

    def unsent(self) -> int:
        return self._written if self._stuck else 0

    def close(self) -> None:
        if not self._reader.at_eof():
            self._reader.feed_eof()
        if self._stuck is not None and not self._stuck.done():
            self._stuck.set_exception(ConnectionResetError("closed"))

    abort = close


def stream(wire: Wire, budget: UploadBudget | None = None) -> FramedStream:
    return FramedStream(
        wire, PEER, budget or UploadBudget(), opened_here=True, progress_timeout_s=0.05
    )


def header(left: int, piece: bytes, kind: int = 1) -> bytes:
    return promise(left, len(piece), kind)


def promise(left: int, length: int, kind: int = 1) -> bytes:
    """A header with the right checksum, whatever follows it."""
    fields = HEADER.pack(left, length, kind, 0)[:-4]
    return fields + zlib.crc32(fields).to_bytes(4)


async def drain(both: FramedStream) -> None:
    while await both.receive(LIMIT) is not None:
        pass


SIZES = [0, 1, 4096, 4097, limits.FRAME_BYTES_MAX, limits.FRAME_BYTES_MAX + 1, LIMIT]


@pytest.mark.parametrize("bits_per_s", [None, 1e12, 2e9])
async def test_frames_arrive_whole_and_in_order(bits_per_s: float | None) -> None:
    wire = Wire()
    both = stream(wire, UploadBudget(bits_per_s))
    rng = random.Random(1)
    sent = [Frame(kind % 126, rng.randbytes(size)) for kind, size in enumerate(SIZES)]
    for frame in sent:
        await both.send(frame.kind, frame.payload)
    await both.finish()
    received = []
    while (frame_in := await both.receive(LIMIT)) is not None:
        received.append(frame_in)
    assert received == sent
    assert all(type(frame.payload) is bytes for frame in received)
    assert await both.receive(LIMIT) is None
    assert both.bytes_in == both.bytes_out > sum(SIZES)


async def test_any_buffer_can_be_sent() -> None:
    both = stream(Wire())
    await both.send(1, memoryview(bytearray(range(200)))[50:100])
    frame = await both.receive(LIMIT)
    assert frame is not None
    assert frame.payload == bytes(range(50, 100))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (header(LIMIT + 1, b"x"), "at most"),
        (header(3, b"four"), "piece of 4 bytes"),
        (promise(limits.FRAME_BYTES_MAX + 9, limits.FRAME_BYTES_MAX + 1), "piece of"),
        (header(5, b""), "piece of 0 bytes"),
        (header(0, b"", kind=200), "unknown kind"),
        (header(3, b"abc", kind=END), "unknown kind"),
        (HEADER.pack(3, 3, 1, 7) + b"abc", "checksum"),
        (header(6, b"abc") + b"abc" + header(3, b"def", kind=2) + b"def", "goes on as kind 2"),
        (header(6, b"abc") + b"abc" + header(9, b"def") + b"def", "at most 3"),
        (header(6, b"abc") + b"abc" + header(2, b"de") + b"de", "should have 3 bytes left"),
    ],
)
async def test_a_malformed_frame_is_the_senders_fault(data: bytes, why: str) -> None:
    wire = Wire()
    wire.write(data)
    both = stream(wire)
    with pytest.raises(RemoteProtocolError, match=why) as caught:
        await both.receive(LIMIT)
    assert caught.value.peer == PEER
    with pytest.raises(TransportError):  # nothing after it can be trusted
        await both.receive(LIMIT)


@pytest.mark.parametrize("cut", [1, HEADER.size, HEADER.size + 5, 2 * HEADER.size + 20])
async def test_a_stream_that_is_cut_short_does_not_look_finished(cut: int) -> None:
    wire = Wire()
    data = b"0123456789"
    whole = header(20, data) + data + header(10, data) + data + header(0, b"", kind=END)
    wire.write(whole[:cut])
    wire.close()
    both = stream(wire)
    with pytest.raises(TransportError, match="cut short"):
        await drain(both)


async def test_silence_has_an_end() -> None:
    with pytest.raises(TransportError, match="sent nothing"):
        await stream(Wire()).receive(LIMIT)


async def test_a_receiver_that_takes_nothing_has_an_end() -> None:
    with pytest.raises(TransportError, match="took nothing"):
        await stream(Wire(stuck=True)).send(1, b"x" * 100_000)


async def test_after_finish_nothing_more_can_be_sent() -> None:
    both = stream(Wire())
    await both.finish()
    await both.finish()
    with pytest.raises(LocalProtocolError):
        await both.send(1, b"")


async def test_a_refusal_carries_its_reason() -> None:
    both = stream(Wire())
    await both.refuse("too many streams")
    with pytest.raises(TransportError, match="refused: too many streams"):
        await both.receive(LIMIT)


async def test_a_trickle_of_bytes_makes_the_same_frame() -> None:
    wire = Wire()
    payload = random.Random(2).randbytes(300)
    data = header(300, payload) + payload

    async def trickle() -> None:
        for byte in data:
            wire.write(bytes([byte]))
            await asyncio.sleep(0)

    feeding = asyncio.create_task(trickle())
    frame = await stream(wire).receive(LIMIT)
    await feeding
    assert frame == Frame(1, payload)
