"""The log: whole lines, bounded in size, and never in the way."""

from __future__ import annotations

import io
import json
import os
import threading
from typing import TYPE_CHECKING

from peer.observe.events import Notice
from peer.observe.hub import Hub
from peer.observe.jsonl import JsonlLog
from peer.observe.writer import LINES_MAX, LineWriter
from tests.observe.story import LIFE

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_every_event_is_one_line_and_a_restart_appends(tmp_path: Path) -> None:
    out = io.StringIO()
    for _ in range(2):
        with JsonlLog(tmp_path / "log.jsonl", stdout=out, wall=lambda: 12.3456) as log:
            for event in LIFE:
                log(event)
    text = (tmp_path / "log.jsonl").read_text()
    assert out.getvalue() == text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["event"] for line in lines] == [type(event).__name__ for event in LIFE] * 2
    assert {line["t"] for line in lines} == {12.346}
    assert (tmp_path / "log.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_long_log_starts_anew_and_keeps_the_one_before(tmp_path: Path) -> None:
    with JsonlLog(tmp_path / "log.jsonl", bytes_max=1000) as log:
        for number in range(100):
            log(Notice("info", f"word {number}"))
    old, new = tmp_path / "log.jsonl.1", tmp_path / "log.jsonl"
    assert old.stat().st_size <= 1000
    assert new.stat().st_size <= 1000
    lines = (old.read_text() + new.read_text()).splitlines()
    last = [json.loads(line)["text"] for line in lines]
    assert last == [f"word {n}" for n in range(100 - len(last), 100)]
    assert len(list(tmp_path.iterdir())) == 2


def test_half_a_line_of_a_killed_process_spoils_only_itself(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"t":1,"event":"No')
    with JsonlLog(tmp_path / "log.jsonl") as log:
        log(Notice("info", "whole"))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["text"] == "whole"


def test_a_full_disk_is_announced_once_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    said: list[str] = []
    hub.listen(lambda event: said.append(event.text) if isinstance(event, Notice) else None)
    log = JsonlLog(tmp_path / "log.jsonl", announce=hub.emit)
    hub.listen(log)
    written = threading.Semaphore(0)
    full = True
    real_write = os.write

    def write(handle: int, data: bytes) -> int:
        try:
            if full:
                return real_write(handle, data[:5])  # what a full disk does to a line
            return real_write(handle, data)
        finally:
            written.release()

    monkeypatch.setattr(os, "write", write)
    for number in range(4):
        hub.emit(Notice("info", f"lost {number}"))
        assert written.acquire(timeout=5)
    log._writer.close()  # nothing is on its way any more
    hub.emit(Notice("info", "heard"))
    assert sum("the log has gaps" in text for text in said) == 1
    assert any(str(tmp_path) in text for text in said)
    full = False
    with JsonlLog(tmp_path / "log.jsonl") as again:
        again(Notice("info", "room again"))
    assert "room again" in json.loads((tmp_path / "log.jsonl").read_text())["text"]
    log.close()


def test_a_folder_that_is_gone_is_announced_not_raised(tmp_path: Path) -> None:
    said: list[object] = []
    log = JsonlLog(tmp_path / "gone" / "log.jsonl", announce=said.append)
    log(Notice("info", "lost"))
    log._writer.close()
    log(Notice("info", "lost, too"))
    log(Notice("info", "and this"))
    log.close()
    assert len(said) == 1


def test_a_reader_that_stands_still_costs_lines_and_not_time() -> None:
    still = threading.Event()
    got: list[str] = []

    def write(line: str) -> None:
        assert still.wait(5)
        got.append(line)

    writer = LineWriter(write, "test")
    for number in range(LINES_MAX + 100):
        writer.put(str(number))
    assert 99 <= writer.lost <= 100
    still.set()
    writer.close()
    assert got[:3] == ["0", "1", "2"]
    assert len(got) + writer.lost == LINES_MAX + 100
