"""Whole peers in one process: driver, exchange, learner and machine over the in-memory network."""

from __future__ import annotations

import itertools
from pathlib import Path

from peer.observe import events as ev
from protocols.messages import Goodbye, encode
from protocols.types import PeerId
from tests.peer.swarm import Swarm, swarm
from tests.protocols.samples import RUN


def agreed(it: Swarm, names: list[str]) -> None:
    """Digests of every round that several of them finished are equal."""
    seen: dict[int, dict[str, str]] = {}
    for name in names:
        for r in it.finished(name):
            seen.setdefault(r.round, {})[name] = r.digest
    for number, digests in seen.items():
        assert len(set(digests.values())) == 1, f"round {number}: {digests}"


async def test_one_peer_alone_makes_rounds(tmp_path: Path) -> None:
    async with swarm(tmp_path) as it:
        await it.start("a")
        await it.until(lambda: len(it.finished("a")) >= 4)
        assert it.finished("a")[-1].included == 1.0


async def test_peers_that_join_one_after_another_average_and_agree(tmp_path: Path) -> None:
    async with swarm(tmp_path) as it:
        await it.start("a")
        for name in "bcd":
            await it.start(name, via="a")
        await it.until(lambda: any(len(r.spans[0].contributors) == 4 for r in it.finished("a")))
        await it.until(lambda: all(len(it.finished(n)) >= 6 for n in "abcd"))
        agreed(it, list("abcd"))
        assert any(
            len({span.aggregator for span in r.spans}) == 4
            and all(span.coverage == 1.0 for span in r.spans)
            for r in it.finished("b")
        )
        losses = [r.validation_loss for r in it.finished("a") if r.validation_loss is not None]
        assert losses[-1] < 0.5  # of 1 at the start; their mean target is 0.25 off


async def test_a_crashed_peer_costs_no_round_and_its_seat_comes_back(tmp_path: Path) -> None:
    async with swarm(tmp_path) as it:
        await it.start("a")
        for name in "bcd":
            await it.start(name, via="a")
        await it.until(lambda: any(len(r.spans[0].contributors) == 4 for r in it.finished("a")))
        await it.crash("c")
        before = len(it.finished("a"))
        await it.until(lambda: len(it.finished("a")) >= before + 3)
        agreed(it, list("abd"))
        assert any(isinstance(e, ev.MemberSuspected) for e in it.events["a"])


async def test_a_polite_leaver_is_not_waited_for(tmp_path: Path) -> None:
    async with swarm(tmp_path) as it:
        await it.start("a")
        for name in "bc":
            await it.start(name, via="a")
        await it.until(lambda: any(len(r.spans[0].contributors) == 3 for r in it.finished("a")))
        await it.stop("b")
        before = len(it.finished("a"))
        await it.until(lambda: len(it.finished("a")) >= before + 2)
        agreed(it, list("ac"))


async def test_a_frozen_peer_delays_a_round_by_less_than_its_deadline(tmp_path: Path) -> None:
    async with swarm(tmp_path) as it:
        await it.start("a")
        for name in "bcd":
            await it.start(name, via="a")
        await it.until(lambda: any(len(r.spans[0].contributors) == 4 for r in it.finished("a")))
        frozen = it.peers["d"].id
        it.network.freeze(frozen)
        before = len(it.finished("a"))
        await it.until(lambda: len(it.finished("a")) >= before + 3)
        agreed(it, list("abc"))
        it.network.heal(frozen)
        ids = {it.peers[n].id for n in "abcd"}
        await it.until(
            lambda: all(set(it.finished(n)[-1].spans[0].contributors) == ids for n in "abcd"), 60
        )
        # What it did alone while it was cut off is its own; from here on it is in step again.
        for name in "abcd":
            it.forget_rounds(name)
        await it.until(lambda: all(len(it.finished(n)) >= 3 for n in "abcd"))
        agreed(it, list("abcd"))


async def test_a_restarted_peer_goes_on_from_its_journal(tmp_path: Path) -> None:
    async with swarm(tmp_path) as it:
        await it.start("a")
        await it.until(lambda: len(it.finished("a")) >= 7)
        await it.crash("a")
        it.network.heal(it.network_id("a"))
        await it.start("a")
        loaded = it.all("a", ev.CheckpointLoaded)[-1]
        reported = it.finished("a")
        assert loaded.round >= len(reported)


async def test_two_sites_stay_apart(tmp_path: Path) -> None:
    async with swarm(tmp_path) as it:
        await it.start("a", site="x")
        await it.start("b", via="a", site="x")
        await it.start("c", via="a", site="y")
        await it.start("d", via="a", site="y")
        await it.until(lambda: all(len(it.finished(n)) >= 5 for n in "abcd"))
        agreed(it, ["a", "b"])
        agreed(it, ["c", "d"])
        x = {it.peers["a"].id, it.peers["b"].id}
        assert set(it.finished("a")[-1].spans[0].contributors) <= x
        assert not x & set(it.finished("c")[-1].spans[0].contributors)
        await it.crash("a")
        await it.crash("b")
        before = len(it.finished("c"))
        await it.until(lambda: len(it.finished("c")) >= before + 3)


async def test_links_choose_their_codecs_and_say_so(tmp_path: Path) -> None:
    async with swarm(tmp_path, adaptive=True) as it:
        await it.start("a")
        await it.start("b", via="a")
        await it.until(lambda: all(it.all(name, ev.CodecChosen) for name in "ab"))
        seen = {name: len(it.finished(name)) for name in "ab"}
        await it.until(lambda: all(len(it.finished(n)) >= seen[n] + 3 for n in "ab"))
        agreed(it, list("ab"))
        chosen = it.all("a", ev.CodecChosen)[-1]
        assert chosen.peer == it.network_id("b")
        assert chosen.codec in chosen.reason
        assert chosen.bytes > 0


async def test_who_answers_heartbeats_with_nonsense_is_refused_by_name(tmp_path: Path) -> None:
    async with swarm(tmp_path) as it:
        await it.start("a")
        await it.start("b", via="a")
        await it.until(lambda: any(len(r.spans[0].contributors) == 2 for r in it.finished("a")))
        transport = it.transport("b")
        honest, streams = transport._on_call, transport._on_stream
        assert honest is not None
        assert streams is not None
        lies = [b"\x80\x04 no heartbeat", bytes([1, 99]), encode(Goodbye(RUN, ""))]
        answers = itertools.cycle(lies)

        async def nonsense(sender: PeerId, request: bytes) -> bytes:
            await honest(sender, request)
            return next(answers)

        transport.serve(nonsense, streams)
        liar = it.network_id("b")
        await it.until(
            lambda: len({e.reason for e in it.all("a", ev.PeerRefused) if e.peer == liar}) >= 3
        )
        before = len(it.finished("a"))
        await it.until(lambda: len(it.finished("a")) >= before + 2)


async def test_who_cannot_be_reached_aggregates_nothing_while_others_can(tmp_path: Path) -> None:
    async with swarm(tmp_path) as it:
        await it.start("a")
        for name in "bc":
            await it.start(name, via="a")
        hidden = it.peers["c"].id
        await it.until(lambda: any(len(r.spans[0].contributors) == 3 for r in it.finished("a")))
        it.transport("c").reachable = False  # type: ignore[attr-defined]
        await it.until(
            lambda: any(
                len(r.spans[0].contributors) == 3
                and {span.aggregator for span in r.spans} == {it.peers["a"].id, it.peers["b"].id}
                for r in it.finished("a")
            ),
            within_s=90.0,
        )
        assert it.finished("c")
        assert hidden in it.finished("a")[-1].spans[0].contributors
