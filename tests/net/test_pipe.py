"""A socket that was taken over from asyncio delivers what was asked for, in bounded memory."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from peer.net.pipe import BUFFER_BYTES_MAX, KERNEL_BYTES, READ_BYTES_MAX, SocketPipe

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connection() -> AsyncIterator[tuple[Ends, Ends]]:
    """Both ends of a unix socket, as asyncio's streams."""
    here, there = socket.socketpair()
    ends = [await asyncio.open_connection(sock=end) for end in (here, there)]
    try:
        yield ends[0], ends[1]
    finally:
        for _, writer in ends:
            writer.transport.abort()
        await asyncio.sleep(0)


SIZES = [1, 13, 8191, 8193, 100_000, READ_BYTES_MAX - 1, READ_BYTES_MAX]


async def test_what_was_asked_for_comes_whole_and_in_order() -> None:
    rng = random.Random(1)
    pieces = [rng.randbytes(rng.choice(SIZES)) for _ in range(60)]
    async with connection() as (one, other):
        left, right = await SocketPipe.take_over(*one), await SocketPipe.take_over(*other)

        async def send() -> None:
            for piece in pieces:
                left.write(piece[:13], memoryview(piece)[13:])
                await left.drain()
                assert left.unsent() == 0

        sending = asyncio.create_task(send())
        for piece in pieces:
            assert await right.read(len(piece)) == piece
        await sending
        assert right.received() == sum(map(len, pieces))


async def test_nothing_is_lost_that_came_before_the_take_over() -> None:
    async with connection() as (one, (reader, writer)):
        one[1].write(b"early" * 30_000)
        assert await reader.readexactly(5) == b"early"  # now asyncio holds some of the rest
        pipe = await SocketPipe.take_over(reader, writer)
        assert await pipe.read(149_995) == b"early" * 29_999


async def test_an_end_before_the_take_over_is_an_end() -> None:
    async with connection() as (one, (reader, writer)):
        one[1].write(b"last words")
        one[1].write_eof()
        await reader.readexactly(1)
        while not reader.at_eof():
            await reader.read(1)
        pipe = await SocketPipe.take_over(reader, writer)
        async with asyncio.timeout(5):
            assert await pipe.read(1) == b""


async def test_last_words_before_the_take_over_are_heard() -> None:
    async with connection() as (one, (reader, writer)):
        one[1].write(b"last words")
        one[1].close()
        assert await reader.readexactly(5) == b"last "
        pipe = await SocketPipe.take_over(reader, writer)
        async with asyncio.timeout(5):
            assert await pipe.read(100) == b"words"


async def test_a_connection_that_is_gone_already_ends_and_takes_nothing() -> None:
    async with connection() as (_, (reader, writer)):
        writer.transport.abort()
        pipe = await SocketPipe.take_over(reader, writer)
        assert await pipe.read(1) == b""
        with pytest.raises(OSError, match="closed"):
            pipe.write(b"hello")
        pipe.close()


async def test_after_the_far_end_one_may_still_send() -> None:
    async with connection() as (one, other):
        pipe = await SocketPipe.take_over(*one)
        other[1].write(b"question")
        other[1].write_eof()
        assert await pipe.read(100) == b"question"
        assert await pipe.read(100) == b""
        pipe.write(b"answer")
        await pipe.drain()
        assert await other[0].readexactly(6) == b"answer"


async def test_a_sender_that_nobody_reads_waits() -> None:
    async with connection() as (one, other):
        left, right = await SocketPipe.take_over(*one), await SocketPipe.take_over(*other)
        data = random.Random(2).randbytes(READ_BYTES_MAX)
        sent = 0

        async def send() -> None:
            nonlocal sent
            while True:
                left.write(data)
                await left.drain()
                sent += 1

        sending = asyncio.create_task(send())
        while not left.unsent() or right.received() < READ_BYTES_MAX:  # noqa: ASYNC110 - kernel
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert right.received() <= BUFFER_BYTES_MAX
        assert sent * len(data) <= BUFFER_BYTES_MAX + 2 * KERNEL_BYTES
        for _ in range(20):  # and goes on once somebody does
            assert await right.read(len(data)) == data
        sending.cancel()


async def test_aborting_wakes_whoever_waits() -> None:
    async with connection() as (one, _):
        pipe = await SocketPipe.take_over(*one)
        reading = asyncio.create_task(pipe.read(1))
        while pipe.unsent() == 0:
            pipe.write(bytes(READ_BYTES_MAX))
        draining = asyncio.create_task(pipe.drain())
        await asyncio.sleep(0)
        pipe.abort()
        assert await reading == b""
        with pytest.raises(OSError, match="closed"):
            await draining
