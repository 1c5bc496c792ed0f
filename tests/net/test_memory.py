"""The in-memory transport keeps the interface's promises, also when peers are cut off or frozen."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from peer.net.budget import UploadBudget
from peer.net.framing import FramedStream
from peer.net.memory import MemoryNetwork, MemoryTransport
from peer.net.transport import Stream, TransportError
from protocols import limits
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.identity import Signer
from protocols.types import PeerId
from tests.net.peers import ECHO, PAYLOAD_BYTES_MAX, backwards, echo

pytestmark = pytest.mark.usefixtures("no_blocking")

A = Signer(b"a" * 32).peer_id
B = Signer(b"b" * 32).peer_id


def pair(latency_s: float = 0.0) -> tuple[MemoryNetwork, MemoryTransport, MemoryTransport]:
    network = MemoryNetwork(latency_s)
    a, b = network.transport(A), network.transport(B)
    a.serve(backwards, echo)
    b.serve(backwards, echo)
    return network, a, b


async def test_a_call_is_answered_and_knows_its_caller() -> None:
    _, a, b = pair()
    assert await a.connect(b.addresses()[0], 1) == B
    assert await a.call(B, b"abc", 1) == b"cba"
    assert await b.call(A, b"who", 1) == B.encode()


async def test_a_refusal_reaches_the_caller_with_its_reason() -> None:
    _, a, _ = pair()
    with pytest.raises(RemoteProtocolError, match="not today") as caught:
        await a.call(B, b"refuse", 1)
    assert caught.value.peer == B


async def test_a_request_too_large_is_our_fault() -> None:
    _, a, _ = pair()
    with pytest.raises(LocalProtocolError):
        await a.call(B, bytes(limits.CONTROL_BYTES_MAX + 1), 1)


async def test_who_does_not_serve_yet_is_not_there_and_is_blamed_for_nothing() -> None:
    network = MemoryNetwork()
    a, _ = network.transport(A), network.transport(B)
    with pytest.raises(TransportError, match="not ready"):
        await a.call(B, b"abc", 1)
    stream = await a.open(B, 1)
    with pytest.raises(TransportError, match="not ready"):
        await stream.receive(10)
    await stream.close()


async def test_a_bug_in_a_handler_is_reported_here_and_hidden_there() -> None:
    _, a, b = pair()

    async def buggy(sender: PeerId, request: bytes) -> bytes:
        raise ZeroDivisionError("a secret")

    async def buggy_stream(stream: Stream) -> None:
        raise ZeroDivisionError("another")

    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    b.serve(buggy, buggy_stream)
    with pytest.raises(RemoteProtocolError, match="internal error"):
        await a.call(B, b"abc", 1)
    stream = await a.open(B, 1)
    with pytest.raises(TransportError):
        await stream.receive(10)
    await asyncio.sleep(0)
    assert [str(report["exception"]) for report in reports] == ["a secret", "another"]


async def test_streams_carry_bulk_both_ways_without_loss() -> None:
    _, a, _ = pair()
    stream = await a.open(B, 1)
    pieces = [random.Random(seed).randbytes(2**20 + seed) for seed in range(20)]

    async def send() -> None:
        for piece in pieces:
            await stream.send(ECHO, piece)
        await stream.finish()

    sending = asyncio.create_task(send())
    back = []
    while (frame := await stream.receive(PAYLOAD_BYTES_MAX)) is not None:
        back.append(frame.payload)
    await sending
    await stream.close()
    assert back == pieces


async def test_nothing_is_lost_when_the_opener_closes_at_once() -> None:
    _, a, b = pair(latency_s=0.001)
    got: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def count(stream: Stream) -> None:
        total = 0
        while (frame := await stream.receive(PAYLOAD_BYTES_MAX)) is not None:
            total += len(frame.payload)
        got.set_result(total)

    b.serve(backwards, count)
    stream = await a.open(B, 1)
    await stream.send(1, bytes(3 * 2**20))
    await stream.finish()
    await stream.close()
    assert await got == 3 * 2**20


async def test_a_stream_closed_without_finish_is_not_an_orderly_end() -> None:
    _, a, b = pair()
    got: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def collect(stream: Stream) -> None:
        try:
            while await stream.receive(PAYLOAD_BYTES_MAX) is not None:
                pass
            got.set_result("the end")
        except TransportError:
            got.set_result("cut short")

    b.serve(backwards, collect)
    stream = await a.open(B, 1)
    await stream.send(1, b"half")
    await stream.close()
    assert await got == "cut short"


async def test_a_peer_that_is_cut_off_breaks_calls_and_streams_at_once() -> None:
    network, a, _ = pair()
    stream = await a.open(B, 1)
    waiting = asyncio.create_task(stream.receive(10))
    await asyncio.sleep(0)
    network.cut(B)
    with pytest.raises(TransportError):
        await waiting
    with pytest.raises(TransportError):
        await a.call(B, b"abc", 1)
    network.heal(B)
    assert await a.call(B, b"abc", 1) == b"cba"


async def test_a_frozen_peer_costs_no_more_than_the_deadline() -> None:
    network, a, _ = pair()
    stream = await a.open(B, 1)
    assert isinstance(stream, FramedStream)
    stream.progress_timeout_s = 0.05
    network.freeze(B)
    with pytest.raises(TransportError, match=r"no answer within 0.05 s"):
        await a.call(B, b"abc", 0.05)
    with pytest.raises(TransportError, match="took nothing"):
        await stream.send(1, bytes(2**23))
    await stream.close()
    network.heal(B)
    assert await a.call(B, b"abc", 1) == b"cba"


async def test_one_stranger_cannot_take_all_streams() -> None:
    _, a, b = pair()
    release = asyncio.Event()

    async def hold(stream: Stream) -> None:
        await release.wait()

    b.serve(backwards, hold)
    streams = [await a.open(B, 1) for _ in range(limits.STREAMS_PER_PEER_MAX)]
    await asyncio.sleep(0)
    refused = await a.open(B, 1)
    with pytest.raises(TransportError, match="too many streams"):
        await refused.receive(10)
    release.set()
    for stream in streams:
        assert await stream.receive(10) is None
        await stream.finish()
        await stream.close()
    await refused.close()


async def test_a_link_has_its_latency() -> None:
    network, a, _ = pair()
    network.set_latency(A, B, 0.02)
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    await a.call(B, b"abc", 1)
    assert 0.035 <= loop.time() - start_s < 0.5  # uvloop counts milliseconds


async def test_streams_are_sent_at_the_pace_of_the_budget() -> None:
    network = MemoryNetwork()
    budget = UploadBudget(80e6)  # 10 MB/s
    a, b = network.transport(A, budget), network.transport(B)
    b.serve(backwards, echo)
    stream = await a.open(B, 1)
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    await stream.send(1, bytes(3 * 10**6))
    assert loop.time() - start_s >= 0.15  # 0.3 s less the burst and the last piece
    assert budget.bytes_up >= 3 * 10**6
    await stream.finish()
    await stream.close()


async def test_closing_leaves_no_task_behind() -> None:
    _, a, b = pair()
    await a.open(B, 1)
    await asyncio.sleep(0)
    await b.close()
    await a.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
