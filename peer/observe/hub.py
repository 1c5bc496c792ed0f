"""Where events meet their listeners.

The program announces, logs and views listen; neither knows the other. A listener that raises is a
bug in this program, and no reason to stop training: it is logged once and hears no more.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final

from peer.observe.state import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from peer.observe.events import Event, Listener

EVENTS_KEPT: Final = 256  # a few rounds: what `peer status` shows of the past

_log = logging.getLogger("murmuration")


class Hub:
    """Hands every event to every listener, in order, also those announced by listeners.

    Belongs to the event loop's thread.
    """

    def __init__(self, *, keep: int = EVENTS_KEPT, wall: Callable[[], float] = time.time) -> None:
        self.state = State()
        self.counts: Counter[str] = Counter()
        """Event name -> how many there were."""
        self._recent: deque[tuple[float, Event]] = deque(maxlen=keep)
        self._listeners: list[Listener] = []
        self._waiting: deque[Event] = deque()
        self._busy = False
        self._wall = wall

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Add a listener; the returned function takes it away again."""
        self._listeners.append(listener)
        return lambda: self._forget(listener)

    def emit(self, event: Event) -> None:
        """Announce `event`. What a listener announces meanwhile comes after it."""
        self._waiting.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._waiting:
                self._deliver(self._waiting.popleft())
        finally:
            self._busy = False

    def snapshot(self) -> dict[str, Any]:
        """What there is to know now, as JSON values: `peer status`, `/healthz`."""
        summary: dict[str, Any] = plain(self.state.summary())
        return {**summary, "counts": dict(self.counts)}

    def recent(self) -> list[dict[str, Any]]:
        """The last events, oldest first, each as in the JSONL log."""
        return [as_record(event, t) for t, event in self._recent]

    def _deliver(self, event: Event) -> None:
        wall_s = self._wall()
        self.counts[type(event).__name__] += 1
        self._recent.append((wall_s, event))
        self.state.apply(event, wall_s)
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception:  # any bug of a listener's: heard once, and the listener goes
                self._forget(listener)
                _log.exception("listener %r failed on %r and is removed", listener, event)

    def _forget(self, listener: Listener) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)


def as_record(event: Event, wall_s: float) -> dict[str, Any]:
    """An event as one JSON object: `{"t": seconds since 1970, "event": name, ...fields}`."""
    return {"t": round(wall_s, 3), "event": type(event).__name__, **plain(event)}


def plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists, and None for a number that JSON does not have."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
