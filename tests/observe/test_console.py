"""What a volunteer reads: round by round, unspoiled by strangers, at any width."""

from __future__ import annotations

import io
import os
import pty
import re
import time
from typing import TYPE_CHECKING

from rich.console import Console

from peer.observe import words
from peer.observe.console import LiveView, PlainLines, open_console
from peer.observe.events import MemberSuspected, Notice, PeerRefused
from peer.observe.hub import Hub
from peer.observe.view import sparkline
from peer.observe.words import Teller
from tests.observe.story import ANN, BOB, FINISHED, JOIN, LIFE, ME, finished, progress

if TYPE_CHECKING:
    import pytest

    from peer.observe.events import Event

HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold red]x[/]\r\nround 99  loss 0.00 \u202e" + "A" * 5000


def plain(events: list[Event], *, verbose: bool = False) -> list[str]:
    lines: list[str] = []
    hub = Hub()
    hub.listen(PlainLines(lines.append, verbose=verbose))
    for event in events:
        hub.emit(event)
    return lines


def picture(events: list[Event], width: int = 100) -> str:
    hub = Hub()
    view = LiveView(hub.state)
    hub.listen(view)
    for event in events:
        hub.emit(event)
    console = Console(file=io.StringIO(), record=True, width=width)
    console.print(view.frame())
    return console.export_text()


def test_a_round_is_one_line() -> None:
    assert plain([FINISHED]) == [
        "round 41  loss 2.310  val 2.402  averaged 2 of 3  0.8 s  up 1.2 MB down 3.4 MB"
    ]
    assert plain([finished(loss=None, validation_loss=None, roster=[ME], spans=[])]) == [
        "round 41  alone  0.8 s  up 1.2 MB down 3.4 MB"
    ]


def test_a_round_without_our_work_says_so() -> None:
    assert "averaged 2 of 3, without this peer's work" in plain([finished(included=0.0)])[0]
    assert "averaged 2 of 3, 50% of this peer's work" in plain([finished(included=0.5)])[0]


def test_verbose_says_more_and_both_name_peers_by_their_end() -> None:
    few, many = plain(LIFE), plain(LIFE, verbose=True)
    assert set(few) < set(many)
    assert "refused …bob222: a stale epoch" in " ".join(few)
    assert not any(BOB in line for line in many)


def test_the_command_to_join_is_printed_exactly() -> None:
    assert f"  {JOIN}" in plain(LIFE)


def test_strangers_cannot_write_on_the_terminal() -> None:
    hostile: list[Event] = [PeerRefused(HOSTILE, HOSTILE), Notice("warning", HOSTILE)]
    hostile.append(progress(group=HOSTILE, members=[HOSTILE], aggregators=[], phase=HOSTILE))
    for line in plain(hostile, verbose=True):
        assert line.isprintable()
        assert len(line) < 700
    text = picture(hostile)
    assert "[bold red]x[/]" in text
    assert all(c.isprintable() or c == "\n" for c in text)


def test_a_flood_of_complaints_becomes_a_trickle() -> None:
    now_s = 0.0
    teller = Teller(clock=lambda: now_s)
    told = [teller.tell(PeerRefused(f"peer{n % 500:06d}", "junk")) for n in range(10_000)]
    assert sum(line is not None for line in told) <= 10
    assert teller.tell(MemberSuspected(ANN, "gone")) is not None
    now_s = 61.0
    line = teller.tell(PeerRefused("peer000000", "junk"))
    assert line is not None
    assert "more like this" in line.text
    assert len(teller._told) <= 20


def test_the_view_holds_what_matters() -> None:
    text = picture(LIFE[:12])
    for wanted in (
        "Murmuration · default · 3.15 M parameters on cpu",
        "2.310", "validation 2.402", "1,240 tokens/s",
        "41  epoch 3  training", "s left",
        "round 41 averaged 2 of 3 in 0.8 s  3 peers agree on cdcdcdcd",
        "up 1 kB", "down 2 kB", "waited 1.2%",
        "site:a, 3 members  …myself (this peer)  ★▲…ann111  ▲…bob222",
        "/ip4/10.0.0.7/tcp/1/p2p/…bob222 does not answer",
    ):  # fmt: skip
        assert wanted in text, wanted


def test_every_moment_can_be_drawn_at_every_width() -> None:
    for moments in range(len(LIFE) + 1):
        for width in (20, 40, 80, 200):
            lines = picture(LIFE[:moments], width).splitlines()
            assert max(map(len, lines)) <= width


def test_the_sparkline_falls_with_the_loss() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0] * 100, 4) == "▁▁▁▁"
    assert sparkline([3.0]) == ""
    assert len(sparkline([float(i) for i in range(599)])) == 24


def test_sizes_are_short_and_rounded_up_in_time() -> None:
    sizes = [0, 999, 999.9, 1_234_000, 999_999_999, 7.3e12]
    assert [words.size(n) for n in sizes] == ["0 B", "999 B", "1 kB", "1.23 MB", "1 GB", "7.3 TB"]


def test_without_a_terminal_lines_come_out_plain() -> None:
    out = io.StringIO()
    hub = Hub()
    with open_console(hub, stream=out):
        for event in LIFE:
            hub.emit(event)
    assert out.getvalue().splitlines() == plain(LIFE)


def test_a_terminal_shows_the_view_and_the_command_to_join_in_one_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    hub = Hub()
    shown = b""
    with os.fdopen(theirs, "w") as stream, open_console(hub, stream=stream):
        for event in LIFE[:12]:
            hub.emit(event)
        deadline_s = time.monotonic() + 10
        while b"bob222 does not" not in shown or JOIN.encode() not in shown:
            assert time.monotonic() < deadline_s, shown
            try:
                shown += os.read(ours, 2**16)
            except BlockingIOError:
                time.sleep(0.01)
    os.close(ours)
    assert re.search(rb"averaged .*2 of 3", shown)
