"""What programs that run until they are told to stop have in common: peers and bootstrap nodes.

The first Ctrl-C (or SIGTERM, or a closed terminal) asks politely; the second ends the process at
once, whatever the event loop is doing. Nothing is lost then but the work since the last round: the
network daemon dies with our end of its socket, and files are replaced whole or not at all.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, Final, Self, TextIO

from peer.cli.ending import INTERRUPTED
from peer.observe import events as ev
from peer.observe.hub import Hub, as_record
from peer.observe.writer import LineWriter

LEAVING: Final = "leaving: saving and saying goodbye; Ctrl-C again to leave at once"
OUR_LOGGERS: Final = ("peer", "dht", "protocols", "tensorcodecs", "bootstrap", "murmuration")
_SIGNALS: Final = ("SIGINT", "SIGTERM", "SIGHUP")
_SHOW_CURSOR: Final = b"\x1b[?25h\n"  # a live view hides it


class Interrupts:
    """Holds the signals for the block's length. Until `politely` is said, the first one ends all:
    nothing has begun yet, and half-imported libraries are not to be unwound."""

    def __init__(self) -> None:
        self.asked = False
        """Whether somebody asked politely."""
        self._leave: Callable[[], object] | None = None
        self._before: dict[int, Any] = {}
        # Asked now: once the terminal has hung up, nobody can tell that it was one.
        self._terminal = [handle for handle in range(3) if os.isatty(handle)]

    def politely(self, leave: Callable[[], None]) -> None:
        """From now on the first signal calls `leave` in the running event loop."""
        loop = asyncio.get_running_loop()
        self._leave = partial(loop.call_soon_threadsafe, leave)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others can't have signals
            for name in _SIGNALS:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                    self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self._leave is None or self.asked:
            leave_at_once()
        else:
            self.asked = True
            if number == getattr(signal, "SIGHUP", None):
                _write_nowhere(self._terminal)
            self._leave()


def leave_at_once() -> None:
    """End this process now, without unwinding anything."""
    with suppress(OSError, ValueError):
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), _SHOW_CURSOR)
    os._exit(INTERRUPTED)


def _write_nowhere(handles: Iterable[int]) -> None:
    """The terminal was closed: what is written there is lost from now on, and does not fail."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for handle in handles:
        os.dup2(nowhere, handle)
    os.close(nowhere)


def run_loop(main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run `main` on uvloop, or on asyncio's own loop where there is none (Windows)."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main())


@contextmanager
def json_lines(hub: Hub, stream: TextIO) -> Iterator[None]:
    """Every event as one JSON line on `stream` for the block's length."""

    def write(line: str) -> None:
        stream.write(line + "\n")
        stream.flush()

    writer = LineWriter(write, "stdout")

    def tell(event: ev.Event) -> None:
        record = as_record(event, time.time())
        writer.put(json.dumps(record, separators=(",", ":"), default=str))

    stop = hub.listen(tell)
    try:
        yield
    finally:
        stop()
        writer.close()


@contextmanager
def logs_in(hub: Hub, *, verbose: bool = False) -> Iterator[None]:
    """Python's log records as notices, so that nothing writes across the live view.

    Ours from WARNING, other libraries' from ERROR (with `verbose` from WARNING too).
    """
    handler = _ToHub(hub, asyncio.get_running_loop(), logging.WARNING if verbose else logging.ERROR)
    root, hivemind = logging.getLogger(), logging.getLogger("hivemind")
    for own in hivemind.handlers[:]:  # it brings its own way to stderr
        hivemind.removeHandler(own)
    hivemind.propagate = True
    hivemind.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        logging.captureWarnings(False)


class _ToHub(logging.Handler):
    def __init__(self, hub: Hub, loop: asyncio.AbstractEventLoop, others: int) -> None:
        super().__init__(logging.WARNING)
        self._hub = hub
        self._loop = loop
        self._others = others

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.partition(".")[0] in OUR_LOGGERS
        if record.levelno < (logging.WARNING if ours else self._others):
            return
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text = f"{text} ({record.exc_info[1]!r})"
        serious = record.levelno >= logging.ERROR and (ours or record.name == "asyncio")
        notice = ev.Notice("error" if serious else "warning", text if ours else
                           f"{record.name}: {text}")  # fmt: skip
        with suppress(RuntimeError):  # the loop has ended: nobody listens any more
            self._loop.call_soon_threadsafe(self._hub.emit, notice)
