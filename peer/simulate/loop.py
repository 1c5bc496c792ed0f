"""An event loop whose clock jumps to whatever happens next.

Everything that waits (asyncio's timers, timeouts, queues) runs on it unmodified; a day takes as
long as its events take to compute. Callbacks run in the order in which they became due, so the
same program gives the same history on every machine. Work for threads is done on the spot.

A *process* groups what one simulated machine runs: it can be frozen like with SIGSTOP, when its
callbacks and timers are kept until it goes on.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import Context, ContextVar, copy_context
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

PROCESS: Final[ContextVar[int]] = ContextVar("process", default=-1)
"""Which simulated process the running code belongs to; tasks hand it on to theirs."""

GARBAGE_MIN: Final = 1024  # cancelled timers are swept once there are so many, and half are


class StandstillError(RuntimeError):
    """Nothing is due and nothing ever will be: somebody waits for what can't come."""


class Entry:
    """A callback to run: all that asyncio wants of a handle, at half of what its own costs."""

    __slots__ = ("args", "callback", "context", "over", "timed_on")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = context if context is not None else copy_context()
        self.over = False
        """It was run, or cancelled."""
        self.timed_on: VirtualLoop | None = None
        """Whose timers it stands among."""

    def cancel(self) -> None:
        if not self.over:
            self.over = True
            self.callback, self.args = _nothing, ()  # what it held may go
            if self.timed_on is not None:
                self.timed_on.cancelled_timers += 1

    def cancelled(self) -> bool:
        return self.callback is _nothing


def _nothing() -> None:
    pass


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module. Use `run_until_complete`."""

    def __init__(self, start_s: float = 1.0) -> None:
        """`start_s`: where the clock begins; a little after 0, which often means "never"."""
        super().__init__()
        self._now_s = start_s
        self._timers: list[tuple[float, int, Entry]] = []
        self._count = 0
        self.cancelled_timers = 0
        self._due: deque[Entry] = deque()
        self._parked: dict[int, list[Entry]] = {}
        """Frozen process -> what it should have run meanwhile."""
        self._charged_s = 0.0
        self._executor_free_s: WeakKeyDictionary[Executor, float] = WeakKeyDictionary()
        self.events = 0
        """Callbacks run so far."""

    # ── processes ────────────────────────────────────────────────────────────────────────
    def freeze(self, process: int) -> None:
        """Nothing of `process` runs until `thaw`."""
        self._parked.setdefault(process, [])

    def thaw(self, process: int) -> None:
        """Everything that came due meanwhile runs now, in order."""
        self._due.extend(self._parked.pop(process, ()))

    def charge(self, seconds: float) -> None:
        """The work at hand takes so long: where it runs in an executor, its end is delayed."""
        self._charged_s += seconds

    # ── what asyncio asks of a loop ──────────────────────────────────────────────────────
    def time(self) -> float:
        return self._now_s

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Entry:
        entry = Entry(callback, args, context)
        self._due.append(entry)
        return entry

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Entry:
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> Entry:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> Entry:
        entry = Entry(callback, args, context)
        entry.timed_on = self
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, entry))
        return entry

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Done on the spot; what the work charged passes before it is known."""
        future: asyncio.Future[T] = self.create_future()
        self._charged_s = 0.0
        try:
            result = func(*args)
        except Exception as error:  # the caller's, as from a thread
            future.set_exception(error)
            return future
        if self._charged_s <= 0:
            future.set_result(result)
            return future
        start_s = self._now_s
        if executor is not None:
            start_s = max(start_s, self._executor_free_s.get(executor, 0.0))
            self._executor_free_s[executor] = start_s + self._charged_s
        self.call_at(start_s + self._charged_s, _resolve, future, result)
        self._charged_s = 0.0
        return future

    def close(self) -> None:
        self._timers.clear()
        self._due.clear()
        self._parked.clear()
        super().close()

    def _process_events(self, event_list: Any) -> None:
        """There are no sockets."""

    def _write_to_self(self) -> None:
        """There are no threads to wake it."""

    # ── one turn ─────────────────────────────────────────────────────────────────────────
    def _run_once(self) -> None:
        due, timers = self._due, self._timers
        if not due:
            self._advance()
        now_s = self._now_s
        while timers and timers[0][0] <= now_s:
            entry = heapq.heappop(timers)[2]
            entry.timed_on = None
            if entry.over:
                self.cancelled_timers -= 1
            else:
                due.append(entry)
        for _ in range(len(due)):
            entry = due.popleft()
            if entry.over:
                continue
            if self._parked:
                parked = self._parked.get(entry.context.get(PROCESS, -1))
                if parked is not None:
                    parked.append(entry)
                    continue
            self.events += 1
            entry.over = True
            try:
                entry.context.run(entry.callback, *entry.args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # as asyncio's own loop: it goes on
                self.call_exception_handler(
                    {"message": f"{entry.callback!r} failed", "exception": error}
                )

    def _advance(self) -> None:
        """Jump to the next timer."""
        timers = self._timers
        if self.cancelled_timers > GARBAGE_MIN and self.cancelled_timers > len(timers) // 2:
            timers[:] = [timer for timer in timers if not timer[2].over]
            heapq.heapify(timers)
            self.cancelled_timers = 0
        while timers and timers[0][2].over:
            heapq.heappop(timers)
            self.cancelled_timers -= 1
        if timers:
            self._now_s = max(self._now_s, timers[0][0])
        elif not self._stopping:  # type: ignore[attr-defined]
            raise StandstillError("nothing is due and nothing ever will be")


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


class LoopClock:
    """`peer.clock.Clock` of one simulated machine: the loop's time, and a calendar of its own."""

    def __init__(self, loop: VirtualLoop, epoch_s: float, skew_s: float = 0.0) -> None:
        """`epoch_s`: seconds since 1970 when the loop's clock stood at 0; `skew_s`: how far this
        machine's calendar is ahead."""
        self._loop = loop
        self._offset_s = epoch_s + skew_s

    def monotonic(self) -> float:
        return self._loop.time()

    def time(self) -> float:
        return self._offset_s + self._loop.time()
