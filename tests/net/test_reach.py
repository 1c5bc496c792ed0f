"""What strangers can ask about being reached, what is done about it, and what is believed."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from peer.net import reach
from peer.net.daemon import Posture
from peer.net.libp2p import Libp2pTransport
from peer.net.multiaddress import at, is_relayed, place_of, relay_in
from peer.net.outside import FILE, RELAY_TESTS_MAX, Outside, Verdict, remembered
from peer.net.punch import BANNER, listens, poke
from peer.net.rates import PEERS_MAX, Rates
from peer.net.reach import Agreed, Come, Coming, Cut, Introduce, Look, Seen
from peer.net.reach_helper import ReachHelper
from peer.net.relays import KNOWN_MAX, KNOWN_S, RelayTable, fault_of_relay
from peer.net.transport import TransportError
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.identity import Signer
from protocols.schema import pack
from protocols.types import PeerId


def signer(name: str) -> Signer:
    return Signer(hashlib.sha256(name.encode()).digest())


ME, ASKER, OTHER, RELAY = (signer(name).peer_id for name in ("me", "asker", "other", "relay"))
CIRCUIT = f"/ip4/198.51.100.1/tcp/443/p2p/{RELAY}/p2p-circuit"


class FakeLine:
    """Connections as they are told, and calls that are answered from a table."""

    def __init__(self, connections: Mapping[PeerId, list[str]]) -> None:
        self.open = dict(connections)
        self.calls: list[tuple[PeerId, reach.Question]] = []
        self.answers: dict[PeerId, bytes | Exception] = {}

    async def connections(self) -> Mapping[PeerId, list[str]]:
        return self.open

    async def call(self, peer: PeerId, request: bytes, timeout_s: float) -> bytes:
        self.calls.append((peer, reach.read_question(ME, request)))
        answer = self.answers.get(peer, TransportError(peer, "nobody there"))
        if isinstance(answer, Exception):
            raise answer
        return answer


async def no_meeting(introducer: PeerId, come: Come) -> Coming:
    raise RemoteProtocolError(introducer, "not now")


async def agree_to_all(peer: PeerId) -> bool:
    return True


def helper(line: FakeLine, table: RelayTable | None = None) -> ReachHelper:
    return ReachHelper(line, table or RelayTable(), list, no_meeting, agree_to_all)


# ── addresses ────────────────────────────────────────────────────────────────────────────
def test_places_and_relays_are_read_out_of_addresses() -> None:
    assert place_of(f"/ip4/203.0.113.7/tcp/4001/p2p/{OTHER}") == ("203.0.113.7", 4001)
    assert place_of("/ip6/2001:db8::1/tcp/1") == ("2001:db8::1", 1)
    assert at(("2001:db8::1", 1)) == "/ip6/2001:db8::1/tcp/1"
    relayed = f"{CIRCUIT}/p2p/{OTHER}"
    assert is_relayed(relayed)
    assert place_of(relayed) is None
    assert relay_in(relayed) == f"/ip4/198.51.100.1/tcp/443/p2p/{RELAY}"
    assert relay_in("/ip4/198.51.100.1/tcp/443") is None


@pytest.mark.parametrize(
    "address",
    ["", "/ip4/300.1.1.1/tcp/1", "/ip4/1.2.3.4/udp/1", "/ip4/1.2.3.4/tcp/0",
     "/ip4/1.2.3.4/tcp/65536", "/dns4/example.org/tcp/1", "/ip4/1.2.3.4/tcp/1x"],
)  # fmt: skip
def test_what_is_no_place_is_none(address: str) -> None:
    assert place_of(address) is None


# ── on the wire ──────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "question",
    [
        Look((443, 31337), offers=True, addresses=(f"/ip4/203.0.113.7/tcp/443/p2p/{ASKER}",)),
        Introduce(OTHER, reachable=False, opened=True, addresses=()),
        Come(ASKER, reachable=True, opened=False, addresses=(), place="/ip4/203.0.113.7/tcp/1"),
        Cut(),
    ],
)
def test_questions_come_back_as_they_were(question: reach.Question) -> None:
    assert reach.read_question(ASKER, reach.write_question(question)) == question


@pytest.mark.parametrize(
    "request_bytes",
    [
        reach.ASK,
        reach.ASK + b"x" + pack(Look((), False, ())),
        reach.ASK + b"l",
        reach.ASK + b"l" + pack(Look((1, 2, 3), False, ())),
        reach.ASK + b"l" + pack(Look((65536,), False, ())),
        reach.ASK + b"l" + pack(Look((), False, ("/" * (limits.ADDRESS_CHARS_MAX + 1),))),
        reach.ASK + b"i" + pack(Introduce("x" * 65, False, False, ())),
        reach.ASK + b"i" + pack(Introduce(OTHER, False, False, ("",) * (limits.ADDRESSES_MAX + 1))),
        reach.ASK + b"k" + pack(Agreed(yes=True)),
        reach.ASK + b"l" + bytes(reach.REACH_BYTES_MAX + 1),
    ],
)
def test_hostile_questions_are_refused_by_name(request_bytes: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        reach.read_question(ASKER, request_bytes)
    assert caught.value.peer == ASKER


@pytest.mark.parametrize(
    "answer",
    [b"", b"\xc0", bytes(reach.REACH_BYTES_MAX + 1), pack(Seen("", True, True, ("/",) * 9))],
)
def test_hostile_answers_are_refused_by_name(answer: bytes) -> None:
    for read in (reach.read_seen, reach.read_coming, reach.read_agreed):
        with pytest.raises(RemoteProtocolError) as caught:
            read(OTHER, answer)
        assert caught.value.peer == OTHER


# ── rates and tables ─────────────────────────────────────────────────────────────────────
def test_strangers_may_ask_so_often_each_and_all_together() -> None:
    rates = Rates(burst=2, each_s=10.0, all_burst=3, all_each_s=1.0)
    assert [rates.take(ASKER, 0.0) for _ in range(3)] == [True, True, False]
    assert rates.take(OTHER, 0.0)
    assert not rates.take(ME, 0.0), "all together have had enough"
    assert rates.take(ME, 1.0)
    assert not rates.take(ASKER, 9.0)
    assert rates.take(ASKER, 10.0)


def test_rates_remember_only_so_many() -> None:
    rates = Rates(burst=1, each_s=1.0, all_burst=10**6, all_each_s=1e-6)
    for number in range(PEERS_MAX + 10):
        rates.take(PeerId(f"{number}"), 0.0)
    assert len(rates._peers) == PEERS_MAX


def test_relays_are_kept_under_their_own_direct_addresses_and_for_a_while() -> None:
    table = RelayTable()
    good = f"/ip4/198.51.100.1/tcp/443/p2p/{RELAY}"
    table.add(RELAY, (good, f"/ip4/198.51.100.1/tcp/443/p2p/{OTHER}", f"{CIRCUIT}/p2p/{RELAY}"), 0)
    assert table.addresses(1.0) == {RELAY: (good,)}
    assert table.told(1.0, ASKER) == (good,)
    assert table.told(1.0, RELAY) == (), "it knows itself"
    assert table.addresses(KNOWN_S + 1) == {}
    table.hear((good, "nonsense", f"/ip4/198.51.100.1/tcp/443/p2p/{ME}"), ME, 2.0)
    assert list(table.addresses(3.0)) == [RELAY]
    for number in range(KNOWN_MAX + 5):
        peer = signer(f"{number}").peer_id
        table.add(peer, (f"/ip4/198.51.100.1/tcp/443/p2p/{peer}",), 4.0)
    assert len(table.addresses(5.0)) == KNOWN_MAX


# ── packets beside the daemon's ──────────────────────────────────────────────────────────
@pytest.mark.asyncio
async def test_only_a_libp2p_listener_counts_as_listening() -> None:
    async def banner(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(BANNER)
        await reader.read()
        writer.close()

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-something else\r\n")
        await reader.read()
        writer.close()

    for serve, expected in ((banner, True), (other, False)):
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        place = server.sockets[0].getsockname()[:2]
        assert await listens(place) is expected
        server.close()
        await server.wait_closed()
    assert not await listens(place), "nobody is there any more"


def test_a_poke_leaves_the_port_as_it_was() -> None:
    with socket.socket() as near, socket.socket() as far:
        for sock in (near, far):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("127.0.0.1", 0))
            sock.listen()
        assert poke("127.0.0.1", near.getsockname()[1], far.getsockname())
        with socket.create_connection(near.getsockname(), 5), near.accept()[0]:
            pass
    assert not poke("127.0.0.1", 1, ("::1", 5)), "other family"


# ── helping ──────────────────────────────────────────────────────────────────────────────
@pytest.mark.asyncio
async def test_who_talks_through_a_relay_is_not_dialled_back_but_told_of_relays() -> None:
    table = RelayTable()
    address = f"/ip4/198.51.100.1/tcp/443/p2p/{RELAY}"
    table.add(RELAY, (address,), asyncio.get_running_loop().time())
    line = FakeLine({ASKER: [CIRCUIT]})
    question = Look((4001,), offers=True, addresses=(f"/ip4/203.0.113.7/tcp/1/p2p/{ASKER}",))
    answer = await helper(line, table).answer(ASKER, reach.write_question(question))
    assert reach.read_seen(ME, answer) == Seen("", False, False, (address,))
    assert ASKER not in table.addresses(0.0), "nobody has reached it"


@pytest.mark.asyncio
async def test_an_introduction_tells_each_where_the_other_is_seen() -> None:
    line = FakeLine({ASKER: ["/ip4/203.0.113.7/tcp/5"], OTHER: ["/ip4/203.0.113.8/tcp/6"]})
    line.answers[OTHER] = pack(Coming(dials=False, opened=True, place="/ip4/6.6.6.6/tcp/6"))
    own, strange = (f"/ip4/203.0.113.7/tcp/4001/p2p/{peer}" for peer in (ASKER, RELAY))
    wish = Introduce(OTHER, reachable=False, opened=False, addresses=(own, strange))
    answer = await helper(line).answer(ASKER, reach.write_question(wish))
    assert reach.read_coming(ME, answer) == Coming(False, True, "/ip4/203.0.113.8/tcp/6")
    assert line.calls == [(OTHER, Come(ASKER, False, False, (own,), "/ip4/203.0.113.7/tcp/5"))]


@pytest.mark.asyncio
async def test_an_introduction_to_nobody_or_to_somebody_unwilling_is_refused() -> None:
    line = FakeLine({ASKER: ["/ip4/203.0.113.7/tcp/5"]})
    wish = reach.write_question(Introduce(OTHER, False, False, ()))
    with pytest.raises(RemoteProtocolError, match="is not here"):
        await helper(line).answer(ASKER, wish)
    line.answers[OTHER] = RemoteProtocolError(OTHER, "not now")
    with pytest.raises(RemoteProtocolError, match="would not"):
        await helper(line).answer(ASKER, wish)
    with pytest.raises(RemoteProtocolError, match="is no peer"):
        await helper(line).answer(ASKER, reach.write_question(Introduce("me", False, False, ())))


@pytest.mark.asyncio
@pytest.mark.parametrize("question", [Look((), False, ()), Cut()])
async def test_who_asks_too_often_is_refused(question: reach.Question) -> None:
    asked = helper(FakeLine({}))
    coded = reach.write_question(question)
    refused = None
    for _ in range(100):
        try:
            await asked.answer(ASKER, coded)
        except RemoteProtocolError as error:
            refused = error
            break
    assert refused is not None
    assert refused.peer == ASKER
    assert "too many" in refused.reason
    assert await asked.answer(OTHER, coded)


@pytest.mark.asyncio
async def test_who_wants_to_cut_hears_whether_it_may() -> None:
    answer = await helper(FakeLine({})).answer(ASKER, reach.write_question(Cut()))
    assert reach.read_agreed(ME, answer) == Agreed(yes=True)


# ── what is believed ─────────────────────────────────────────────────────────────────────
def judged(
    tmp_path: Path, seen: dict[PeerId, Seen], dialled: set[PeerId]
) -> tuple[Verdict, Outside]:
    inner = Libp2pTransport.__new__(Libp2pTransport)
    outside = Outside(inner, RelayTable(), tmp_path, "0.0.0.0", False, lambda level, text: None)
    outside.dialled |= dialled
    return outside._judge(seen), outside


def view(host: str, port: int, reached: bool) -> Seen:
    return Seen(f"/ip4/{host}/tcp/{port}", reached, False, ())


def test_no_counts_only_from_those_in_the_open_and_yes_from_everybody(tmp_path: Path) -> None:
    no, yes = view("11.0.0.1", 5, False), view("11.0.0.1", 5, True)
    assert judged(tmp_path, {OTHER: no}, set())[0] is Verdict.UNKNOWN
    assert judged(tmp_path, {OTHER: no}, {OTHER})[0] is Verdict.UNREACHABLE
    assert judged(tmp_path, {OTHER: yes}, set())[0] is Verdict.REACHABLE
    assert judged(tmp_path, {OTHER: no, RELAY: yes}, {OTHER})[0] is Verdict.REACHABLE
    assert judged(tmp_path, {}, set())[0] is Verdict.UNKNOWN


def test_who_sees_us_from_outside_knows_better_than_a_neighbour(tmp_path: Path) -> None:
    seen = {OTHER: view("192.168.1.7", 4001, True), RELAY: view("11.0.0.1", 5, False)}
    assert judged(tmp_path, seen, {OTHER, RELAY})[0] is Verdict.UNREACHABLE
    assert judged(tmp_path, {OTHER: seen[OTHER]}, {OTHER})[0] is Verdict.REACHABLE


def test_different_ports_for_everybody_are_a_symmetric_nat(tmp_path: Path) -> None:
    one, two = view("11.0.0.1", 5, False), view("11.0.0.1", 6, False)
    assert judged(tmp_path, {OTHER: one, RELAY: two}, {OTHER, RELAY})[1].standing.symmetric
    assert not judged(tmp_path, {OTHER: one, RELAY: one}, {OTHER})[1].standing.symmetric


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"private": true, "through": ["x"]}', "\0"])
def test_a_broken_memory_of_relays_is_no_memory(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert remembered(tmp_path, relays=True) == Posture(relays=True)


# ── a relay tests itself ─────────────────────────────────────────────────────────────────
@pytest.mark.asyncio(loop_factories=["uvloop"])
async def test_a_relay_finds_that_it_carries_and_another_daemon_that_it_does_not(
    tmp_path: Path,
) -> None:
    transport = await Libp2pTransport.start(
        signer("me").seed, tmp_path, "127.0.0.1", posture=Posture(relays=True)
    )
    try:
        fault = await fault_of_relay(transport, "127.0.0.1", 30.0)
        for _ in range(RELAY_TESTS_MAX):
            if fault is None:
                break  # else the wrong limits, as now and then: another daemon cures it
            await transport.change(Posture(relays=True))
            fault = await fault_of_relay(transport, "127.0.0.1", 30.0)
        assert fault is None
        await transport.change(Posture())  # with libp2p's limits at best
        assert await fault_of_relay(transport, "127.0.0.1", 5.0) is not None
    finally:
        await transport.close()
