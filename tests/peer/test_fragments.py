"""Whole peers whose rounds exchange a fragment each."""

from __future__ import annotations

from pathlib import Path

from peer.observe import events as ev
from protocols.fragments import Fragments
from tensorcodecs import CHUNK_VALUES
from tests.peer.swarm import swarm, toy_manifest
from tests.peer.test_swarm import agreed

UNITS = 4


async def test_peers_take_turns_join_crash_come_back_and_leave(tmp_path: Path) -> None:
    manifest = toy_manifest(round_s=1.6, fragments=4)
    cut = Fragments.cut([1] * UNITS, 4)
    async with swarm(tmp_path, manifest, size=UNITS * CHUNK_VALUES) as it:
        await it.start("a")
        for name in "bc":
            await it.start(name, via="a")
        await it.until(lambda: any(len(r.spans[0].contributors) == 3 for r in it.finished("a")))
        await it.until(lambda: len(it.finished("a")) >= 12)
        await it.crash("c")
        before = len(it.finished("a"))
        await it.until(lambda: len(it.finished("a")) >= before + 3)
        it.forget_rounds("c")
        it.network.heal(it.network_id("c"))
        await it.start("c", via="a")
        loaded = it.all("c", ev.CheckpointLoaded)
        assert loaded, "a checkpoint and the journal of fragments after it"
        await it.until(lambda: len(it.finished("c")) >= 5)
        await it.until(
            lambda: any(
                it.network_id("c") in r.spans[0].contributors for r in it.finished("a")[before:]
            )
        )
        await it.stop("b")
        last = len(it.finished("a"))
        await it.until(lambda: len(it.finished("a")) >= last + 4)
        agreed(it, list("abc"))
        sizes = {}
        for r in it.finished("a"):
            spans = sorted((span.start, span.stop) for span in r.spans)
            units = [unit for start, stop in spans for unit in range(start, stop)]
            assert units == list(cut.of(r.round)), f"round {r.round}"
            sizes[r.round] = sum(span.bytes for span in r.spans)
        # A round carries a quarter of what a turn of all four does.
        turns = [
            [sizes[n + i] for i in range(4)] for n in sizes if all(n + i in sizes for i in range(4))
        ]
        assert turns
        assert all(max(turn) <= 0.3 * sum(turn) for turn in turns if min(turn) > 0)
        losses = [r.validation_loss for r in it.finished("a") if r.validation_loss is not None]
        assert losses[-1] < losses[0]
        assert len(losses) < len(it.finished("a")) / 2, "evaluated once in a turn"
