"""A state that is long on its way is worth something when it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peer import backlog as backlogs
from peer.backlog import Backlog
from peer.clock import SYSTEM
from peer.donating import Donor
from peer.exchange import Exchange, Outcome, content_digest
from peer.net.budget import UploadBudget
from peer.net.memory import MemoryNetwork
from peer.observe import events as ev
from peer.train.pretrain import MeanReducer
from protocols import limits
from protocols.messages import OUTCOME_DOMAIN, OutcomeHeader
from protocols.records import sign
from tensorcodecs import CHUNK_VALUES, get_codec
from tests.peer.swarm import swarm, toy_manifest
from tests.protocols.samples import GROUP, RUN, signer


async def test_a_state_that_took_more_rounds_than_anybody_keeps_is_not_fetched_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "OUTCOME_ROUNDS_KEPT", 4)
    monkeypatch.setattr(backlogs, "LOOK_S", 0.05)  # rounds are shorter here than anywhere
    asked, gate = asyncio.Event(), asyncio.Event()
    give: Callable[..., Any] = Donor._give

    async def gated(self: Donor, *given: Any) -> int:
        asked.set()
        await gate.wait()
        return int(await give(self, *given))

    async with swarm(tmp_path, toy_manifest(round_s=0.2)) as it:
        await it.start("a")
        await it.start("b", via="a")
        await it.until(lambda: any(len(r.spans[0].contributors) == 2 for r in it.finished("a")))
        monkeypatch.setattr(Donor, "_give", gated)
        await it.start("c", via="a")
        async with asyncio.timeout(30.0):
            await asked.wait()
        begun = it.peers["a"].round
        await it.until(lambda: it.peers["a"].round >= begun + 10)
        gate.set()
        await it.until(lambda: bool(it.all("c", ev.StateReceived)))
        await it.until(lambda: len(it.all("c", ev.CaughtUp)) >= 6)
        await it.until(lambda: any(len(r.spans[0].contributors) == 3 for r in it.finished("a")))
        assert len(it.all("c", ev.StateReceived)) == 1
        first = it.all("c", ev.StateReceived)[0].round
        caught = [event.round for event in it.all("c", ev.CaughtUp)]
        assert caught[:6] == list(range(first, first + 6)), "more than anybody kept"


def outcome(number: int, size: int = 1000) -> Outcome:
    units = (bytes([number]) * size, b"", b"x" * size)
    header = OutcomeHeader(
        RUN, GROUP, number, 3, 0, 0, 3, (), content_digest(units), 2 * size, 0.1, b""
    )
    return Outcome(header, sign(signer(0), OUTCOME_DOMAIN, header), units)


async def test_what_is_too_much_for_memory_is_on_disk_and_there_is_an_end_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlogs, "MEMORY_BYTES_MAX", 5000)
    transport = MemoryNetwork().transport(signer(0).peer_id, UploadBudget())
    exchange = Exchange(transport, signer(0), MeanReducer([CHUNK_VALUES], get_codec("q4")))
    folder = tmp_path / "incoming" / "outcomes"
    folder.mkdir(parents=True)
    (folder / "outcomes-000000000001").write_bytes(b"of an earlier process")
    grown: list[int] = []
    kept = Backlog(
        7, exchange, None, SYSTEM,  # type: ignore[arg-type]
        bytes_max=9000, folder=folder, blame=lambda _: None, grown=lambda: grown.append(1),
    )  # fmt: skip
    for number in range(7, 11):
        assert await kept._keep(number, [outcome(number)])
    assert not await kept._keep(11, [outcome(11)]), "another state would be cheaper"
    assert (kept.until, len(grown)) == (11, 4)
    assert sorted(path.name for path in folder.iterdir()) == [
        "outcomes-000000000009",
        "outcomes-000000000010",
    ]
    assert await kept.take(6) == []
    assert await kept.take(8) == [outcome(8)]
    assert await kept.take(8) == []
    assert await kept.take(9) == [outcome(9)]
    path = folder / "outcomes-000000000010"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert await kept.take(10) == [], "the disk has lost it"
    assert await kept._keep(11, [outcome(11)])
    await asyncio.to_thread(kept.clear)
    assert not folder.exists()
    await exchange.close()
