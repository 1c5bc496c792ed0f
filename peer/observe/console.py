"""What a volunteer sees: a live view on a terminal, plain lines everywhere else.

Both write in a thread of their own, so a paused terminal never pauses training.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from peer.observe import events as ev
from peer.observe.view import render
from peer.observe.words import Line, Teller, clean
from peer.observe.writer import LineWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import RenderableType

    from peer.observe.hub import Hub
    from peer.observe.state import State

FRAMES_PER_S: Final = 4
NOTICES_SHOWN: Final = 6


@contextmanager
def open_console(
    hub: Hub, *, stream: TextIO | None = None, verbose: bool = False, live: bool | None = None
) -> Iterator[None]:
    """Show the hub's events on `stream` (stdout) for the block's length.

    `live` None: a live view if the stream is a terminal that can show it, else plain lines.
    """
    out = stream or sys.stdout
    console = Console(file=out, highlight=False)
    if live is None:
        live = console.is_terminal and not console.is_dumb_terminal
    shown: Live | None = None
    if live:
        view = LiveView(hub.state, verbose=verbose)
        shown = Live(get_renderable=view.frame, console=console, refresh_per_second=FRAMES_PER_S)
        shown.start()
        writer = LineWriter(lambda line: console.print(Text(line), soft_wrap=True), "console")
        stop = hub.listen(view)
        stop_lines = hub.listen(Lasting(writer.put))
    else:
        writer = LineWriter(lambda line: _print(out, line), "console")
        stop = hub.listen(PlainLines(writer.put, verbose=verbose))
        stop_lines = stop
    try:
        yield
    finally:
        stop()
        stop_lines()
        writer.close()
        if shown is not None:
            shown.stop()


class PlainLines:
    """A listener: one line per round, and the notices between."""

    def __init__(self, put: Callable[[str], None], *, verbose: bool = False) -> None:
        self._put = put
        self._teller = Teller(verbose=verbose)

    def __call__(self, event: ev.Event) -> None:
        line = self._teller.tell(event)
        if line is not None:
            self._put(line.text if line.level == "info" else f"{line.level}: {line.text}")
        if isinstance(event, ev.Started):
            for text in _how_to_join(event):
                self._put(text)


class Lasting:
    """A listener: what must stay on the terminal above the live view, to scroll back to or copy.

    The command to join is longer than most terminals are wide, so it is printed as one line that
    the terminal itself wraps; inside the view it could not be copied.
    """

    def __init__(self, put: Callable[[str], None]) -> None:
        self._put = put

    def __call__(self, event: ev.Event) -> None:
        if isinstance(event, ev.Started):
            for text in _how_to_join(event):
                self._put(text)
        elif isinstance(event, ev.Notice) and event.level == "error":
            self._put(f"error: {clean(event.text)}")


class LiveView:
    """A listener that collects notices, and draws frames from them and the hub's state."""

    def __init__(self, state: State, *, verbose: bool = False) -> None:
        self._state = state
        self._teller = Teller(verbose=verbose)
        self._notices: tuple[tuple[str, Line], ...] = ()

    def __call__(self, event: ev.Event) -> None:
        line = self._teller.tell(event)
        if line is not None and not isinstance(event, ev.RoundFinished | ev.Started):
            noted = (time.strftime("%H:%M:%S"), line)
            self._notices = (*self._notices[1 - NOTICES_SHOWN :], noted)

    def frame(self) -> RenderableType:
        """The view now. Called in the live view's thread."""
        return render(self._state, self._notices)


def _how_to_join(event: ev.Started) -> list[str]:
    command = clean(event.join_command)
    return ["another machine joins with:", f"  {command}", ""] if command else []


def _print(out: TextIO, line: str) -> None:
    out.write(line + "\n")
    out.flush()
