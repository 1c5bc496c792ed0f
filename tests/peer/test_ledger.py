"""Whole peers in memory keep one account of the data, whoever comes, crashes or leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from peer.cli.account import disagreements, ledger, read_accounts
from peer.home import seats
from peer.observe import events as ev
from protocols.sharding import block_of
from protocols.types import PeerId
from tests.peer.swarm import Swarm, swarm
from tests.toys import ToyData


def accounts(it: Swarm, name: str) -> dict[int, ev.BlocksCounted]:
    return {event.round: event for event in it.all(name, ev.BlocksCounted)}


def trained_by(it: Swarm, told: str, who: PeerId) -> set[tuple[int, int]]:
    """(epoch, block) of everything that `told`'s ledger says `who` has trained."""
    ranges = [r for event in accounts(it, told).values() for r in event.by.get(who, [])]
    again = [r for event in accounts(it, told).values() for r in event.again.get(who, [])]
    run = it.manifest.run_id()
    return {block_of(run, ToyData.blocks, n) for a, b in ranges + again for n in range(a, b)}


async def test_every_block_is_accounted_for_through_a_crash_a_join_and_a_leave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with swarm(tmp_path) as it:
        await it.start("a")
        for name in "bc":
            await it.start(name, via="a")
        await it.until(lambda: any(len(e.by) == 3 for e in it.all("a", ev.BlocksCounted)), 60)

        gone = it.network_id("c")
        await it.crash("c")
        await it.until(
            lambda: all(
                any(e.peer == gone for e in it.all(n, ev.BlocksReissued)) for n in "ab"
            ),
            60,
        )  # fmt: skip
        await it.start("d", via="a")
        new = it.network_id("d")
        await it.until(lambda: any(new in e.by for e in it.all("a", ev.BlocksCounted)), 60)

        await it.stop("b")
        leaver = it.network_id("b")
        sent = [blocks for e in it.all("b", ev.ContributionSent) for blocks in e.blocks]
        last = it.all("b", ev.BlocksCounted)[-1].round
        await it.until(lambda: max(accounts(it, "a")) >= last, 60)
        inside = trained_by(it, "a", leaver)
        cut = set(sent) - inside
        assert len(cut) <= 1, "only the block that it was cut off in is not inside"
        for taken in it.all("a", ev.BlocksReissued):
            if taken.peer == leaver:
                assert sum(b - a for a, b in taken.blocks) <= 1

        seen: set[int] = set()
        for event in accounts(it, "a").values():
            new_ones = [n for pieces in event.by.values() for a, b in pieces for n in range(a, b)]
            assert not seen & set(new_ones)
            seen |= set(new_ones)
            assert event.trained + event.lost + event.elsewhere >= event.floor
            assert event.lost == 0
        assert max(event.trained for event in accounts(it, "a").values()) == len(seen)
    told = [a for name in "abcd" for info in seats(tmp_path / name) for a in read_accounts(info)]
    assert len(told) >= 3, "the one that crashed may not have lived through a round"
    assert [fault for account in told for fault in account.faults()] == []
    assert disagreements(told) == []
    assert ledger(tmp_path / "a", None, False) == 0
    assert "the sums add up" in capsys.readouterr().out


async def test_a_peer_that_comes_back_from_disk_has_the_ledger_of_its_group(tmp_path: Path) -> None:
    async with swarm(tmp_path) as it:
        await it.start("a")
        await it.start("b", via="a")
        await it.until(lambda: any(len(e.by) == 2 for e in it.all("a", ev.BlocksCounted)), 60)
        await it.crash("b")
        await it.until(lambda: len(accounts(it, "a")) > 10, 60)
        before = set(accounts(it, "b"))
        it.network.heal(it.network_id("b"))
        await it.start("b", via="a")
        await it.until(
            lambda: (
                len(set(accounts(it, "b")) - before) > 3
                and any(it.network_id("b") in e.by for e in list(accounts(it, "b").values())[-2:])
            ),
            60,
        )
        common = accounts(it, "a").keys() & accounts(it, "b").keys()
        assert all(accounts(it, "a")[n] == accounts(it, "b")[n] for n in common)
