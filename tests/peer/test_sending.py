"""What a header announces is on its way before the answer to it, and ends when that is no."""

from __future__ import annotations

import asyncio

import pytest

from peer.exchange import HAVE, HEADER, LATER, UNITS, RefusedError, answer, refuse, reply
from peer.net.memory import MemoryNetwork, MemoryTransport
from peer.net.transport import Stream, TransportError
from peer.sending import unasked
from protocols.identity import Signer
from protocols.types import PeerId

A = Signer(b"a" * 32).peer_id
B = Signer(b"b" * 32).peer_id
PIECE = bytes(100_000)


async def nobody_calls(sender: PeerId, request: bytes) -> bytes:
    return b""


def pair() -> tuple[MemoryTransport, MemoryTransport]:
    network = MemoryNetwork()
    return network.transport(A), network.transport(B)


async def test_units_arrive_at_one_who_has_not_answered_yet() -> None:
    a, b = pair()
    seen: list[int] = []

    async def slow_to_answer(stream: Stream) -> None:
        for kind in (HEADER, UNITS):
            frame = await stream.receive(len(PIECE))
            assert frame is not None
            assert frame.kind == kind
            seen.append(kind)
        await reply(stream, 0)
        assert await stream.receive(0) is None

    b.serve(nobody_calls, slow_to_answer)
    stream = await a.open(B, 1)
    await stream.send(HEADER, b"")
    async with unasked(stream, answer(stream)) as said:
        await stream.send(UNITS, PIECE)
    assert said.result() == 0
    assert seen == [HEADER, UNITS]
    await stream.close()


@pytest.mark.parametrize("status", [LATER, HAVE])
async def test_an_answer_other_than_yes_ends_the_sending_in_order(status: int) -> None:
    a, b = pair()
    ended = asyncio.Event()
    sent = 0

    async def unwilling(stream: Stream) -> None:
        await stream.receive(0)
        await refuse(stream, status, "not now")
        while await stream.receive(len(PIECE)) is not None:
            pass
        ended.set()

    b.serve(nobody_calls, unwilling)
    stream = await a.open(B, 1)
    await stream.send(HEADER, b"")

    async def send() -> int:
        nonlocal sent
        async with unasked(stream, answer(stream)) as said:
            while not (said.done() and said.result() == HAVE):
                await stream.send(UNITS, PIECE)
                sent += 1
                await asyncio.sleep(0)
        return said.result()

    if status == HAVE:
        assert await send() == HAVE
    else:
        with pytest.raises(RefusedError, match="not now"):
            await send()
    await stream.close()
    await ended.wait()
    assert sent < 100


async def test_a_refusal_counts_more_than_the_broken_stream_behind_it() -> None:
    a, b = pair()
    broken = asyncio.Event()

    async def rude(stream: Stream) -> None:
        await stream.receive(0)
        await reply(stream, LATER, "not now")
        await broken.wait()
        await stream.close()

    b.serve(nobody_calls, rude)
    stream = await a.open(B, 1)
    await stream.send(HEADER, b"")

    async def send() -> None:
        async with unasked(stream, answer(stream)) as said:
            await asyncio.wait({said})
            broken.set()
            raise TransportError(B, "broke")

    with pytest.raises(RefusedError, match="not now"):
        await send()
    await stream.close()


async def test_what_fails_here_leaves_no_task_behind() -> None:
    a, b = pair()

    async def mute(stream: Stream) -> None:
        while await stream.receive(len(PIECE)) is not None:
            pass

    b.serve(nobody_calls, mute)
    stream = await a.open(B, 1)
    await stream.send(HEADER, b"")
    with pytest.raises(ValueError, match="bad luck"):
        async with unasked(stream, answer(stream)) as said:
            raise ValueError("bad luck")
    await stream.close()
    await asyncio.wait({said})
    assert said.cancelled()
