"""A peer answers probes within limits, and can't be used against anybody."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from peer.doctor import messages as m
from peer.doctor import serve
from peer.doctor.kernel import Connection
from peer.doctor.serve import Desk, ProbeServer, dial
from protocols.errors import RemoteProtocolError
from protocols.types import PeerId

WHO, ANOTHER = PeerId("12D3KooWasker"), PeerId("12D3KooWother")
NONCE = bytes(range(16))


class Watch:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def time(self) -> float:
        return 1_700_000_000.0 + self.now_s

    def monotonic(self) -> float:
        return self.now_s


class Office:
    """A server of probes, and what it sees of those who ask."""

    def __init__(self, *seen: str) -> None:
        self.watch = Watch()
        self.seen = list(seen)
        self.passed: list[bytes] = []
        server = ProbeServer(Desk(self._seen, self._connection, lambda: 5), self.watch)
        self._handler = server.before(self._on_call)

    async def _seen(self, peer: PeerId) -> list[str]:
        return self.seen

    async def _connection(self, peer: PeerId) -> Connection | None:
        here, there = m.Place("198.18.0.7", 1), m.Place("45.9.0.7", 40001)
        return Connection(here, there, 500, 15, 20_000, 1400, 1)

    async def _on_call(self, sender: PeerId, request: bytes) -> bytes:
        self.passed.append(request)
        return b"the driver's"

    async def ask(self, request: m.Request, kind: type[m.A], who: PeerId = WHO) -> m.A | m.Wait:
        return m.read_answer(who, kind, await self._handler(who, m.write_request(request)))

    async def raw(self, data: bytes) -> bytes:
        return await self._handler(WHO, data)


@asynccontextmanager
async def listener(greeting: bytes) -> AsyncIterator[int]:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_a_hello_tells_the_time_and_where_the_asker_is_seen() -> None:
    office = Office("/ip4/45.9.0.7/tcp/40001")
    hello = await office.ask(m.Hello(), m.HelloAnswer)
    assert hello == m.HelloAnswer(1_700_001_000_000, ("/ip4/45.9.0.7/tcp/40001",), 5)


async def test_a_path_is_what_the_kernel_counts() -> None:
    answer = await Office().ask(m.Path(), m.PathAnswer)
    assert answer == m.PathAnswer(500, 15, 20_000, 1400)


async def test_other_calls_pass_and_bad_probes_are_refused() -> None:
    office = Office()
    assert await office.raw(b"\x01plan") == b"the driver's"
    assert office.passed == [b"\x01plan"]
    with pytest.raises(RemoteProtocolError):
        await office.raw(m.PREFIX + b"\x63")


@pytest.mark.parametrize(
    ("greeting", "outcome"),
    [
        (NONCE, m.Dialled.NONCE),
        (serve.LIBP2P_GREETING, m.Dialled.LIBP2P),
        (b"SSH-2.0-OpenSSH_9.9\r\n", m.Dialled.OPEN),
    ],
)
async def test_dialling_back_says_who_greets(greeting: bytes, outcome: m.Dialled) -> None:
    async with listener(greeting) as port:
        office = Office("/ip4/127.0.0.1/tcp/40001")
        answer = await office.ask(m.DialMe(port, NONCE), m.DialAnswer)
        assert answer == m.DialAnswer(outcome, "127.0.0.1")


async def test_zeros_are_nobodys_nonce() -> None:
    async with listener(bytes(16)) as port:
        assert await dial(m.Place("127.0.0.1", port), bytes(16)) is m.Dialled.OPEN


async def test_a_shut_port_is_refused() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # taken, and nobody listens
        office = Office("/ip4/127.0.0.1/tcp/1")
        answer = await office.ask(m.DialMe(holder.getsockname()[1], NONCE), m.DialAnswer)
    assert answer == m.DialAnswer(m.Dialled.REFUSED, "127.0.0.1")


async def test_nobody_is_dialled_but_at_the_address_of_its_own_connection() -> None:
    relayed = "/ip4/45.9.1.1/tcp/31337/p2p/12D3KooWrelay/p2p-circuit"
    for office in (Office(), Office(relayed)):
        answer = await office.ask(m.DialMe(31337, NONCE), m.DialAnswer)
        assert answer == m.DialAnswer(m.Dialled.RELAYED, "")


@pytest.mark.parametrize("port", [0, 22, 25, 1023])
async def test_other_services_ports_are_not_dialled(port: int) -> None:
    answer = await Office("/ip4/127.0.0.1/tcp/1").ask(m.DialMe(port, NONCE), m.DialAnswer)
    assert answer == m.DialAnswer(m.Dialled.DECLINED, "")


async def test_an_address_is_dialled_a_few_times_a_minute_whoever_asks() -> None:
    async with listener(NONCE) as port:
        office = Office("/ip4/127.0.0.1/tcp/1")
        outcomes = [
            await office.ask(m.DialMe(port, NONCE), m.DialAnswer, PeerId(f"12D3KooW{n}"))
            for n in range(serve.DIALS_PER_PERIOD + 1)
        ]
        assert [type(x) for x in outcomes] == [m.DialAnswer] * serve.DIALS_PER_PERIOD + [m.Wait]
        office.watch.now_s += serve.PERIOD_S
        assert isinstance(await office.ask(m.DialMe(port, NONCE), m.DialAnswer), m.DialAnswer)


async def test_bytes_are_given_up_to_an_allowance_for_each_and_for_all() -> None:
    office = Office("/ip4/45.9.0.7/tcp/40001")
    piece = m.Exchange(b"", m.PIECE_BYTES_MAX)

    async def drain(who: PeerId) -> int:
        await office.ask(m.Hello(), m.HelloAnswer, who)
        given = 0
        while isinstance(got := await office.ask(piece, m.ExchangeAnswer, who), m.ExchangeAnswer):
            given += len(got.payload)
        return given

    piece_bytes = m.PIECE_BYTES_MAX
    one = await drain(WHO)
    assert serve.BYTES_PER_PERIOD - piece_bytes < one <= serve.BYTES_PER_PERIOD
    total = one + sum([await drain(PeerId(f"12D3KooW{n}")) for n in range(4)])
    assert serve.BYTES_PER_PERIOD_ALL - piece_bytes < total <= serve.BYTES_PER_PERIOD_ALL
    office.watch.now_s += serve.PERIOD_S
    assert await drain(WHO) == one


async def test_no_bytes_go_over_a_relay_or_to_who_has_not_said_hello() -> None:
    piece = m.Exchange(b"x", 1)
    office = Office("/ip4/45.9.0.7/tcp/40001")
    assert isinstance(await office.ask(piece, m.ExchangeAnswer), m.Wait)
    office = Office("/ip4/45.9.1.1/tcp/1/p2p/12D3KooWrelay/p2p-circuit")
    await office.ask(m.Hello(), m.HelloAnswer)
    assert isinstance(await office.ask(piece, m.ExchangeAnswer), m.Wait)


async def test_calls_are_counted_and_one_asker_does_not_use_up_anothers() -> None:
    office = Office()
    for _ in range(serve.CALLS_PER_PERIOD):
        assert isinstance(await office.ask(m.Hello(), m.HelloAnswer), m.HelloAnswer)
    assert isinstance(await office.ask(m.Hello(), m.HelloAnswer), m.Wait)
    assert isinstance(await office.ask(m.Hello(), m.HelloAnswer, ANOTHER), m.HelloAnswer)


def test_tables_of_strangers_are_bounded() -> None:
    watch = Watch()
    allowance = serve.Allowance(5, watch, keys_max=3)
    for n in range(100):
        allowance.take(n)
    assert len(allowance._left) == 3
    assert allowance.left(99) == 4
    assert allowance.left(0) == 5
