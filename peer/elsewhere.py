"""Alone in a run while others train another one: who did not choose that run is told of theirs.

Who comes while nobody announces a run starts the default one. If those who train were only cut off
at that moment, he would go on alone for ever, and not know it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from dht.directory import Directory
from peer.observe import events as ev
from protocols.types import RunId

LOOK_S: Final = 60.0
_TOLD_MAX: Final = 64  # strangers can announce any number of runs


async def tell_of_others(
    run: RunId, name: str, directory: Directory, alone: Callable[[], bool], emit: ev.Listener,
    *, look_s: float = LOOK_S,
) -> None:  # fmt: skip
    """Until cancelled: look now and then, and tell once of each run in which somebody is while
    nobody else is in ours."""
    told: set[RunId] = set()
    while len(told) < _TOLD_MAX:
        await asyncio.sleep(look_s)
        if not alone():
            continue
        others = [n for n in await directory.runs() if n.run != run and n.run not in told]
        for notice in sorted(others, key=lambda n: (-n.peers, n.run))[:1]:
            told.add(notice.run)
            emit(
                ev.Notice(
                    "warning",
                    f"you train {name!r} alone, while others train {notice.name!r}; to join them,"
                    f" stop this peer and start it again with --run {notice.run[:12]}",
                )
            )
