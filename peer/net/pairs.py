"""What is under way between us and one other peer: calls, and changes of the connection.

Whatever goes over a connection breaks when it is cut. So a change waits for what is in progress,
and what is new waits for the change: any call or stream for a moment, so that it takes the better
way, and a stream for as long as the connection may still be cut.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Change:
    """Of the connection, under way."""

    theirs: bool = False
    """The other side makes it."""
    cuts: bool = False
    """The connection may be cut at any moment: a stream that began now would break."""


@dataclass(slots=True, eq=False)
class Pair:
    """We and another peer."""

    direct: bool | None = None
    """Without a relay, when we last looked."""
    calls: int = 0
    """In progress, both ways, and streams that are being opened from here."""
    talked_s: float = 0.0
    failures: int = 0
    """Of looking for a shorter way, since there was one."""
    not_before_s: float = 0.0
    """No shorter way is looked for until then."""
    improving: bool = False
    """One is being looked for from here."""
    changes: set[Change] = field(default_factory=set)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def held(self) -> bool:
        """The other side makes a change."""
        return any(change.theirs for change in self.changes)

    @property
    def switching(self) -> bool:
        """We make one."""
        return any(not change.theirs for change in self.changes)

    @property
    def cutting(self) -> bool:
        """A stream that began now might break."""
        return any(change.cuts for change in self.changes)

    @contextmanager
    def talking(self) -> Iterator[None]:
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1
            self.tell()

    @contextmanager
    def change(self, change: Change) -> Iterator[Change]:
        self.changes.add(change)
        try:
            yield change
        finally:
            self.changes.discard(change)
            self.tell()

    def tell(self) -> None:
        """Wake whoever waits for something here."""
        self._news.set()
        self._news = asyncio.Event()

    async def until(self, condition: Callable[[], bool], give_up_s: float) -> bool:
        """Wait until `condition` holds, looking whenever something changes; whether it does."""
        while not condition():
            left_s = give_up_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                return False
            news = self._news
            try:
                async with asyncio.timeout(left_s):
                    await news.wait()
            except TimeoutError:
                return condition()
        return True
