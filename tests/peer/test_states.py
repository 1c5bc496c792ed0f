"""A state from several donors: whatever they do, it is the right one, or it is nobody's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peer import donating, receiving
from peer.donating import SNAPSHOTS_MAX, STREAMS_PER_PEER_MAX, WANTED
from peer.errors import StorageError
from peer.exchange import BYTES, HEADER, LATER, REPLY, WANT, YES, RefusedError
from peer.incoming import Incoming
from peer.net.budget import UploadBudget
from peer.net.memory import MemoryNetwork, MemoryTransport
from peer.net.transport import Frame, Stream, TransportError
from peer.receiving import Fetched, Order, Receiver
from peer.state_chunks import StateGrid
from peer.train.method import ArrayMap
from peer.transfer import Snapshot, StateNote, first_reply, note_bytes_max, note_of, read_note
from protocols.errors import RemoteProtocolError
from protocols.identity import Signer
from protocols.messages import StateQuery, encode
from protocols.schema import pack
from protocols.types import Digest, PeerId
from tests.peer.donors import CHUNK_BYTES, CHUNKS, Change, Giver, Source, after, reached
from tests.protocols.samples import RUN

SLOW_BPS = 8 * 400_000  # so that a transfer has a middle


class Everything(Incoming):
    """Keeps the smallest states, too."""

    def keeps(self, grid: StateGrid) -> bool:
        return True


class Town:
    """Givers and one who takes, on one memory network."""

    def __init__(self, givers: int = 3, *, bps: float | None = None) -> None:
        self.network = MemoryNetwork(latency_s=0.001)
        self.bps = bps
        self.givers: list[Giver] = []
        self.taker = self.network.transport(Signer(b"t" * 32).peer_id)
        self.blamed: list[RemoteProtocolError] = []
        self.troubles: list[str] = []
        self.here_bytes = 0
        for _ in range(givers):
            self.add()

    def add(self, source: Source | None = None, change: Change | None = None) -> Giver:
        seed = bytes([len(self.givers)]) * 32
        transport = self.network.transport(Signer(seed).peer_id, UploadBudget(self.bps))
        giver = Giver(transport, source, change)
        self.givers.append(giver)
        return giver

    @property
    def source(self) -> Source:
        return self.givers[0].source

    def receiver(
        self,
        incoming: Incoming | None = None,
        own: ArrayMap | None = None,
        stood: Mapping[PeerId, Digest] | None = None,
        at_least: int = 0,
    ) -> Receiver:
        def moved(here_bytes: int) -> None:
            self.here_bytes = here_bytes

        return Receiver(
            self.taker,
            self.source.grid,
            Order(RUN, [giver.id for giver in self.givers], at_least=at_least),
            stood=lambda *_: stood or {},
            blame=self.blamed.append,
            moved=moved,
            trouble=self.troubles.append,
            own=own,
            incoming=incoming,
        )

    def check(self, fetched: Fetched, source: Source | None = None) -> None:
        wanted = source or self.source
        assert (fetched.state.round, fetched.state.digest) == (wanted.round, wanted.digest)
        assert fetched.state.ledger == b"ledger"
        for name, array in wanted.arrays.items():
            np.testing.assert_array_equal(fetched.state.arrays[name], array)


def flipped(frame: Frame) -> Frame:
    return replace(frame, payload=bytes([frame.payload[0] ^ 1]) + frame.payload[1:])


# ── from several ─────────────────────────────────────────────────────────────────────────
async def test_every_donor_gives_a_part_and_the_whole_is_right() -> None:
    town = Town(3, bps=SLOW_BPS)
    fetched = await town.receiver().run()
    town.check(fetched)
    assert set(fetched.given) == {giver.id for giver in town.givers}
    assert sum(fetched.given.values()) == CHUNKS * CHUNK_BYTES == town.here_bytes
    assert [giver.source.snapshots for giver in town.givers] == [1, 1, 1]
    await reached(lambda: not any(giver.donor.held for giver in town.givers))


async def test_a_donor_that_vanishes_in_the_middle_costs_no_chunk() -> None:
    town = Town(3, bps=SLOW_BPS)
    getting = asyncio.create_task(town.receiver().run())
    await reached(lambda: town.here_bytes > CHUNKS * CHUNK_BYTES // 3)
    town.network.cut(town.givers[0].id)
    town.check(await getting)
    assert not town.blamed


async def test_a_donor_that_freezes_is_not_waited_for() -> None:
    town = Town(2, bps=SLOW_BPS)
    getting = asyncio.create_task(town.receiver().run())
    await reached(lambda: town.here_bytes > CHUNKS * CHUNK_BYTES // 3)
    town.network.freeze(town.givers[0].id)
    town.check(await getting)
    assert not town.blamed


async def test_a_flipped_bit_is_refused_charged_to_its_sender_and_fetched_elsewhere() -> None:
    town = Town(2, bps=SLOW_BPS)
    liar = town.add(change=after(3, flipped, BYTES))
    fetched = await town.receiver().run()
    town.check(fetched)
    assert [error.peer for error in town.blamed] == [liar.id]
    assert "is not what the digest vouches for" in town.blamed[0].reason
    assert fetched.given[liar.id] == 3 * CHUNK_BYTES


async def test_a_donor_that_ends_early_or_says_something_else_is_done_without() -> None:
    town = Town(1, bps=SLOW_BPS)
    town.add(change=after(2, lambda _: None, BYTES))
    odd = town.add(change=after(2, lambda frame: replace(frame, kind=HEADER), BYTES))
    long = town.add(change=after(2, lambda f: replace(f, payload=f.payload + b"more"), BYTES))
    town.check(await town.receiver().run())
    assert {error.peer for error in town.blamed} == {odd.id, long.id}


async def test_with_no_donor_left_it_fails_in_words() -> None:
    town = Town(0)
    for _ in range(2):
        town.add(change=after(4, flipped, BYTES))
    with pytest.raises(TransportError, match="no donor of its state is left"):
        await town.receiver().run()
    assert {error.peer for error in town.blamed} == {giver.id for giver in town.givers}


async def test_who_is_not_there_yet_comes_in_later_and_who_has_gone_on_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(receiving, "RETRY_S", 0.02)
    town = Town(1, bps=SLOW_BPS)
    behind = town.add(Source(number=6))
    behind.source.arrays["theta"] -= 1.0
    ahead = town.add(Source(number=7))
    ahead.source.move()
    getting = asyncio.create_task(town.receiver().run())
    await reached(lambda: bool(behind.asked))
    behind.source.arrays = town.source.arrays
    behind.source.round = 7
    fetched = await getting
    town.check(fetched)
    assert ahead.id not in fetched.given
    assert len(behind.asked) >= 2


# ── lies about the state ─────────────────────────────────────────────────────────────────
def note_changed(**changes: object) -> Change:
    def change(frame: Frame) -> Frame:
        source = Source()
        note = note_of(snapshot_of(source), source.grid.tensors, leaves_of(source))
        made = replace(note, **changes)  # type: ignore[arg-type]
        return Frame(frame.kind, bytes([YES]) + pack(made))

    return after(0, change, REPLY)


def leaves_of(source: Source) -> tuple[bytes, ...]:
    return source.grid.leaves(source.arrays)


def snapshot_of(source: Source) -> Snapshot:
    return Snapshot(source.round, source.digest, source.arrays, b"ledger")


LEAVES = b"".join(leaves_of(Source()))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"leaves": LEAVES[:-32]}, "leaves where"),
        ({"leaves": LEAVES + bytes(32)}, "leaves where"),
        ({"leaves": LEAVES[:-1]}, "leaves where"),
        ({"leaves": b""}, "leaves where"),
        ({"leaves": LEAVES[32:] + LEAVES[:32]}, "not of its digest"),
        ({"digest": bytes(32)}, "not of its digest"),
        ({"tensors": Source().grid.tensors[:1]}, "other tensors"),
        ({"tensors": ()}, "other tensors"),
    ],
)
async def test_a_note_that_does_not_add_up_is_its_senders_fault(
    changes: dict[str, object], reason: str
) -> None:
    town = Town(0)
    liar = town.add(change=note_changed(**changes))
    with pytest.raises(RemoteProtocolError, match=reason) as caught:
        await town.receiver().run()
    assert caught.value.peer == liar.id
    honest = Town(1, bps=SLOW_BPS)
    helper = honest.add(change=note_changed(**changes))
    honest.check(await honest.receiver().run())
    assert [error.peer for error in honest.blamed] == [helper.id]


def test_every_truncation_of_a_note_is_refused() -> None:
    source = Source()
    data = pack(note_of(snapshot_of(source), source.grid.tensors, leaves_of(source)))
    assert len(data) <= note_bytes_max(source.grid)
    me = Signer(bytes(32)).peer_id
    assert read_note(me, data, source.grid)[0].round == source.round
    for size in range(0, len(data), 7):
        with pytest.raises(RemoteProtocolError):
            read_note(me, data[:size], source.grid)


async def test_a_donor_that_lies_about_everything_is_outvoted() -> None:
    town = Town(0)
    liar = town.add(Source(seed=1))
    honest = [town.add() for _ in range(2)]
    truth = honest[0].source.digest
    told = {liar.id: liar.source.digest, **{giver.id: truth for giver in honest}}
    with pytest.raises(RefusedError, match="stood at another state"):
        await town.receiver(stood=told).run()
    assert not liar.given
    del told[honest[1].id]
    fetched = await town.receiver(stood=told).run()
    town.check(fetched)  # one word against another: digests are compared again in the next round
    assert set(fetched.given) == {liar.id}


async def test_what_members_say_during_a_transfer_counts_at_its_end() -> None:
    town = Town(2, bps=SLOW_BPS)
    told: dict[PeerId, Digest] = {}
    receiver = town.receiver(stood=told)
    receiver._stood = lambda *_: told
    getting = asyncio.create_task(receiver.run())
    await reached(lambda: town.here_bytes > 0)
    told |= {Signer(bytes([90 + i]) * 32).peer_id: Digest(bytes(32)) for i in range(2)}
    with pytest.raises(RefusedError, match="stood at another state"):
        await getting


# ── what is here already ─────────────────────────────────────────────────────────────────
async def test_a_restart_goes_on_with_the_same_state_although_the_donors_went_on(
    tmp_path: Path,
) -> None:
    town = Town(2, bps=SLOW_BPS)
    begun = Source()
    getting = asyncio.create_task(town.receiver(Everything(tmp_path / "in")).run())
    await reached(lambda: town.here_bytes > CHUNKS * CHUNK_BYTES // 2)
    getting.cancel()
    await asyncio.gather(getting, return_exceptions=True)
    for giver in town.givers:
        await reached(lambda giver=giver: bool(giver.given))  # type: ignore[misc]
        giver.source.move()
    left_bytes = CHUNKS * CHUNK_BYTES - town.here_bytes
    incoming = Everything(tmp_path / "in")
    fetched = await town.receiver(incoming).run()
    town.check(fetched, begun)
    assert sum(fetched.given.values()) <= left_bytes
    await asyncio.to_thread(incoming.clear)
    assert not (tmp_path / "in").exists()


async def test_of_a_later_state_only_what_differs_is_fetched(tmp_path: Path) -> None:
    town = Town(1)
    await town.receiver(Everything(tmp_path)).run()
    town.source.move(chunks=5)
    fetched = await town.receiver(Everything(tmp_path), at_least=town.source.round).run()
    town.check(fetched)
    assert sum(fetched.given.values()) == 5 * CHUNK_BYTES
    own = fetched.state.arrays
    town.source.move(chunks=2)
    fetched = await town.receiver(own=own, at_least=town.source.round).run()
    town.check(fetched)
    assert sum(fetched.given.values()) == 2 * CHUNK_BYTES
    same = await town.receiver(own=fetched.state.arrays).run()
    town.check(same)
    assert not same.given


async def test_what_is_on_disk_is_not_believed(tmp_path: Path) -> None:
    town = Town(1)
    await town.receiver(Everything(tmp_path)).run()

    def spoil() -> None:
        path = tmp_path / "state.chunks"
        data = bytearray(path.read_bytes())
        data[10 * CHUNK_BYTES] ^= 1
        path.write_bytes(data[: 40 * CHUNK_BYTES + 1])

    await asyncio.to_thread(spoil)
    fetched = await town.receiver(Everything(tmp_path)).run()
    town.check(fetched)
    assert sum(fetched.given.values()) == (CHUNKS - 40 + 1) * CHUNK_BYTES
    await asyncio.to_thread((tmp_path / "state.note").write_bytes, b"junk")
    town.check(await town.receiver(Everything(tmp_path)).run())


async def test_a_full_disk_is_said_and_the_state_comes_all_the_same(tmp_path: Path) -> None:
    class Full(Everything):
        def put(self, grid: StateGrid, index: int, data: bytes | memoryview) -> None:
            raise StorageError("cannot write: no space left; free some space")

    town = Town(2)
    town.check(await town.receiver(Full(tmp_path)).run())
    assert len(town.troubles) == 1
    assert "the state comes all the same" in town.troubles[0]


def test_small_states_are_not_kept(tmp_path: Path) -> None:
    assert not Incoming(tmp_path).keeps(Source().grid)
    assert Incoming(tmp_path).on_order() is None


# ── what a donor puts up with ────────────────────────────────────────────────────────────
async def ask(taker: MemoryTransport, giver: Giver, query: StateQuery) -> tuple[Stream, StateNote]:
    stream = await taker.open(giver.id, 5.0)
    await stream.send(HEADER, encode(query))
    data = await first_reply(stream, note_bytes_max(giver.source.grid))
    return stream, read_note(giver.id, data, giver.source.grid)[0]


async def drain(stream: Stream) -> None:
    """Until the far side ends it, one way or another."""
    with suppress(TransportError):
        while await stream.receive(CHUNK_BYTES) is not None:
            pass


async def test_snapshots_are_shared_bounded_and_given_up() -> None:
    town = Town(1)
    giver, strangers = town.givers[0], [Signer(bytes([50 + i]) * 32).peer_id for i in range(6)]
    takers = [town.network.transport(peer) for peer in strangers]
    streams = [(await ask(taker, giver, StateQuery(RUN)))[0] for taker in takers[:2]]
    assert (giver.source.snapshots, giver.donor.held) == (1, 1)
    giver.source.move()
    stream, note = await ask(takers[2], giver, StateQuery(RUN))
    assert note.round == 7, "a round more is made good by outcomes"
    streams.append(stream)
    stream, note = await ask(takers[3], giver, StateQuery(RUN, giver.source.round))
    assert note.round == 8
    streams.append(stream)
    giver.source.move()
    assert giver.donor.held == SNAPSHOTS_MAX
    with pytest.raises(RefusedError, match="other rounds") as caught:
        await ask(takers[4], giver, StateQuery(RUN, giver.source.round))
    assert caught.value.status == LATER
    giver.donor.replaced()
    with pytest.raises(RefusedError, match="other rounds"):
        await ask(takers[5], giver, StateQuery(RUN))
    for stream in streams:
        await stream.finish()
        await stream.close()
    await reached(lambda: giver.donor.held == 0)
    stream, note = await ask(takers[5], giver, StateQuery(RUN))
    assert note.round == 9
    await stream.close()


async def test_one_peer_has_so_many_streams_and_no_more() -> None:
    town = Town(1)
    streams = [
        (await ask(town.taker, town.givers[0], StateQuery(RUN)))[0]
        for _ in range(STREAMS_PER_PEER_MAX)
    ]
    with pytest.raises(RefusedError, match="busy") as caught:
        await ask(town.taker, town.givers[0], StateQuery(RUN))
    assert caught.value.status == LATER
    for stream in streams:
        await stream.close()


@pytest.mark.parametrize(
    ("kind", "payload"),
    [(WANT, b""), (WANT, b"abc"), (BYTES, WANTED.pack(0)), (WANT, WANTED.pack(CHUNKS))],
)
async def test_who_asks_for_what_is_not_there_is_refused(kind: int, payload: bytes) -> None:
    town = Town(1)
    stream, _ = await ask(town.taker, town.givers[0], StateQuery(RUN))
    await stream.send(kind, payload)
    await drain(stream)
    await stream.close()
    assert [error.peer for error in town.givers[0].refused] == [town.taker.peer_id]


async def test_who_asks_for_ever_is_refused() -> None:
    town = Town(1)
    giver = town.givers[0]
    stream, _ = await ask(town.taker, giver, StateQuery(RUN))

    reader = asyncio.create_task(drain(stream))
    wishes = b"".join(WANTED.pack(index) for index in range(CHUNKS))
    with suppress(TransportError):
        for _ in range(10):
            await stream.send(WANT, wishes)
    await reader
    await stream.close()
    assert len(giver.refused) == 1


async def test_while_a_round_goes_out_states_trickle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(donating, "ROUND_YIELD_S", 0.05)
    monkeypatch.setattr(donating, "TRICKLE_BYTES", 1000)
    town = Town(1)
    giver = town.givers[0]
    stream, _ = await ask(town.taker, giver, StateQuery(RUN))
    with giver.upload.sending():
        await stream.send(WANT, WANTED.pack(0))
        frame = await stream.receive(CHUNK_BYTES)
        assert frame is not None
        assert len(frame.payload) == 1000
    sizes: list[int] = []
    while sum(sizes) < CHUNK_BYTES - 1000:
        frame = await stream.receive(CHUNK_BYTES)
        assert frame is not None
        sizes.append(len(frame.payload))
    assert max(sizes) > 1000
    await stream.finish()
    await stream.close()
