"""Who started the default run because nobody was there is told of a run that others train."""

from __future__ import annotations

import asyncio
import hashlib
import random

from dht.memory import MemoryBoard, MemoryDirectory
from peer.elsewhere import tell_of_others
from peer.observe import events as ev
from protocols.types import PeerId, RunId


def _run(name: str) -> RunId:
    return RunId(hashlib.sha256(name.encode()).hexdigest())


MINE, THEIRS = _run("default"), _run("theirs")


async def _announce(board: MemoryBoard, who: str, name: str) -> MemoryDirectory:
    directory = MemoryDirectory(board, PeerId(who), random.Random(who))
    assert await directory.publish_manifest(_run(name), name.encode(), name)
    return directory


async def test_whoever_is_alone_is_told_once_of_each_other_run() -> None:
    board = MemoryBoard()
    mine = await _announce(board, "me", "default")
    said: asyncio.Queue[ev.Event] = asyncio.Queue()
    alone = False
    looked = asyncio.Semaphore(0)

    def is_alone() -> bool:
        looked.release()
        return alone

    async def looks(times: int) -> None:
        async with asyncio.timeout(10):
            for _ in range(times):
                await looked.acquire()

    work = asyncio.create_task(
        tell_of_others(MINE, "default", mine, is_alone, said.put_nowait, look_s=0.01)
    )
    try:
        await _announce(board, "other", "theirs")
        await looks(5)
        assert said.empty()  # in company nobody wonders
        alone = True
        async with asyncio.timeout(10):
            notice = await said.get()
        assert isinstance(notice, ev.Notice)
        assert notice.level == "warning"
        assert "'theirs'" in notice.text
        assert f"--run {THEIRS[:12]}" in notice.text
        await _announce(board, "third", "a third")
        async with asyncio.timeout(10):
            notice = await said.get()
        assert isinstance(notice, ev.Notice)
        assert "'a third'" in notice.text
        await looks(5)
        assert said.empty()
    finally:
        work.cancel()
