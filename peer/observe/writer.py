"""Lines go out in a thread of their own: a slow disk or a paused terminal never stops the loop."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

LINES_MAX: Final = 4096  # waiting; beyond that the reader is stuck, and lines are dropped
CLOSE_TIMEOUT_S: Final = 2.0


class LineWriter:
    """Hands lines to `write` one after another, in order, until `close`."""

    def __init__(self, write: Callable[[str], None], name: str) -> None:
        """`write` runs in the thread and may raise OSError; the next line is tried all the same."""
        self.lost = 0
        """Lines that were not written."""
        self.problem: str | None = None
        """Why the last line that failed did."""
        self._write = write
        self._lines: queue.Queue[str | None] = queue.Queue(LINES_MAX)
        # A daemon: whoever paused the terminal must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Never waits and never raises."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.lost += 1
            self.problem = "lines come faster than they can be written"

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Write what waits, for at most about `timeout_s`."""
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write(line)
            except (OSError, ValueError) as error:  # ValueError: the file was closed under us
                self.lost += 1
                self.problem = getattr(error, "strerror", None) or str(error)
