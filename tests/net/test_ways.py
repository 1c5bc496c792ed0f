"""The way to a peer is found again at once when it was cut; real daemons on loopback."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from peer.net.ladder import LadderTransport
from tests.net.peers import ECHO, backwards, echo, nobody_answers, until_connected

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])


@asynccontextmanager
async def running(folder: Path, name: str) -> AsyncIterator[LadderTransport]:
    seed = hashlib.sha256(name.encode()).digest()
    ladder = await LadderTransport.start(seed, folder / name, "127.0.0.1")
    ladder.serve(backwards, echo)
    try:
        yield ladder
    finally:
        await ladder.close()


@asynccontextmanager
async def cut_with_a_daemon_that_cannot_dial(
    folder: Path,
) -> AsyncIterator[tuple[LadderTransport, LadderTransport]]:
    """Two that both know a third, and were connected; for 5 s, while an address that does not
    answer is waited for, the first one's daemon takes that closed connection for a new one."""
    async with AsyncExitStack() as stack:
        one, two, third = [
            await stack.enter_async_context(running(folder, name))
            for name in ("one", "two", "third")
        ]
        nowhere, dialled = await stack.enter_async_context(nobody_answers())
        waiting = asyncio.create_task(one.inner.dial(two.peer_id, [nowhere], 15))
        async with asyncio.timeout(15):
            await dialled.wait()
        await until_connected(one.inner, two.peer_id, two.addresses())
        one.remember(two.peer_id, two.addresses())
        await one.inner.disconnect(two.peer_id)
        for ladder in (one, two):
            await ladder.connect(third.addresses()[0], 15)
        yield one, two
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_stream_is_opened_though_the_daemon_cannot_dial_now(tmp_path: Path) -> None:
    async with cut_with_a_daemon_that_cannot_dial(tmp_path) as (one, two):
        stream = await one.open(two.peer_id, 15)
        await stream.send(ECHO, b"hello")
        frame = await stream.receive(10)
        assert frame is not None
        assert frame.payload == b"hello"
        await stream.finish()
        await stream.close()


async def test_a_call_is_answered_though_the_daemon_cannot_dial_now(tmp_path: Path) -> None:
    async with cut_with_a_daemon_that_cannot_dial(tmp_path) as (one, two):
        assert await one.call(two.peer_id, b"abc", 15) == b"cba"
