"""How units go out: in which order, before anybody said yes, and which of them came too late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from peer.net.transport import Stream, TransportError
from protocols.messages import OutcomeHeader
from protocols.types import PeerId


def batches(start: int, stop: int, missed: Mapping[int, int], size: int) -> list[tuple[int, int]]:
    """Ranges of at most `size` units that cover start..stop-1 in the order to send them.

    What has `missed` most rounds in a row goes first: on a line too thin for a whole contribution
    a round's time carries another part of it each time, and every unit gets its turn.
    """
    ranges: list[tuple[int, int]] = []
    for times in sorted({missed.get(unit, 0) for unit in range(start, stop)}, reverse=True):
        first: int | None = None
        for unit in range(start, stop + 1):
            inside = unit < stop and missed.get(unit, 0) == times
            if first is not None and (not inside or unit - first == size):
                ranges.append((first, unit))
                first = None
            if inside and first is None:
                first = unit
    return ranges


def missed_again(
    missed: Mapping[int, int], outcomes: Iterable[OutcomeHeader], me: PeerId
) -> dict[int, int]:
    """Unit -> how many rounds in a row it came too late, after a round with these outcomes. Units
    that the round did not exchange keep their count."""
    now = dict(missed)
    for header in outcomes:
        for unit in range(header.start, header.stop):
            now.pop(unit, None)
        mine = next((c for c in header.contributors if c.peer == me), None)
        if mine is not None and not mine.mask:
            continue
        for unit in range(header.start, header.stop):
            if mine is None or not mine.covers(unit - header.start):
                now[unit] = missed.get(unit, 0) + 1
    return now


@asynccontextmanager
async def unasked(
    stream: Stream, answer: Coroutine[Any, Any, int]
) -> AsyncIterator[asyncio.Task[int]]:
    """Send in the block what a header has announced, while the `answer` to that is on its way; the
    block may look whether it has come. After the block the stream is finished and the answer here.

    To wait for it first would cost a round trip, and where packets are lost much more: header and
    answer are single packets, and only a timeout tells that one of those is gone. Mostly the answer
    is yes; what is sent in vain else is what a line carries in a round trip.

    Raises:
        whatever `answer` does: also where the block failed, as who refuses may not read on.
    """
    said = asyncio.create_task(answer, name=f"answer of {stream.peer}")
    try:
        yield said
        await stream.finish()
        await said
    except TransportError:
        if _refused(said) is None:
            raise
        said.result()
    finally:
        if _refused(said) is not None:
            # An orderly end: then the connection serves another stream.
            with suppress(TransportError):
                await stream.finish()
        said.cancel()  # without waiting for its end: the stream's close that follows ends it too


def _refused(said: asyncio.Task[int]) -> BaseException | None:
    """Why the far side will not have it, if it has said so."""
    return said.exception() if said.done() and not said.cancelled() else None
