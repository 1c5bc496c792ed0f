"""What a peer knows again after a restart, on a real disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peer.home import write_atomic
from peer.past import PAST_BYTES_MAX, PastFile
from protocols.events import Remembered
from protocols.types import GroupName, PeerId


class _Clock:
    now_s = 1000.0

    def time(self) -> float:
        return self.now_s

    def monotonic(self) -> float:
        return self.now_s


def _past(firm: int) -> Remembered:
    return Remembered(GroupName("g"), 7, firm, (PeerId("a"), PeerId("b")), 0.0)


async def test_the_latest_word_is_found_again_and_has_aged(tmp_path: Path) -> None:
    clock, said = _Clock(), list[str]()
    file = PastFile(tmp_path / "past.json", said.append, clock)
    assert file.load() is None
    for firm in range(1, 40):
        file.keep(_past(firm))
    await file.close()
    clock.now_s += 7.5
    again = PastFile(tmp_path / "past.json", said.append, clock).load()
    assert again == Remembered(GroupName("g"), 7, 39, (PeerId("a"), PeerId("b")), 7.5)
    clock.now_s = 1.0  # a calendar that was set back
    found = PastFile(tmp_path / "past.json", said.append, clock).load()
    assert found is not None
    assert found.silent_s == 0.0
    assert not said


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        json.dumps({"group": "g", "epoch": 2, "firm": "x", "members": [], "at_s": 1}).encode(),
        json.dumps({"group": "g", "epoch": 2, "firm": 1, "members": 3, "at_s": 1}).encode(),
        b"x" * (PAST_BYTES_MAX + 1),
    ],
)
def test_a_broken_file_is_told_and_forgotten(tmp_path: Path, content: bytes) -> None:
    said: list[str] = []
    write_atomic(tmp_path / "past.json", content)
    assert PastFile(tmp_path / "past.json", said.append).load() is None
    assert len(said) == 1
    assert "past.json" in said[0]
    assert "forgets" in said[0]


async def test_a_disk_that_takes_nothing_is_told_once(tmp_path: Path) -> None:
    said: list[str] = []
    file = PastFile(tmp_path / "gone" / "past.json", said.append)
    for firm in range(3):
        file.keep(_past(firm))
        await file.close()
    assert len(said) == 1
