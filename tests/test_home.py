"""Seats: one identity per running peer, kept over restarts, on any disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peer import home
from peer.errors import StorageError, UsageError

SITTER = """
import sys
from pathlib import Path
from peer.home import open_seat
seat = open_seat(Path(sys.argv[1]))
print(seat.name, seat.identity().peer_id, flush=True)
sys.stdin.read()
"""


def sitter(folder: Path) -> tuple[subprocess.Popen[str], str, str]:
    """Another process that sits down, and the seat and identity it got."""
    process = subprocess.Popen(
        [sys.executable, "-c", SITTER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=str(Path(home.__file__).parents[1]),
    )
    assert process.stdout
    name, identity = process.stdout.readline().split()
    return process, name, identity


def end(process: subprocess.Popen[str], how: int) -> None:
    process.send_signal(how)
    process.communicate(timeout=10)


def test_the_second_peer_takes_the_second_seat_and_a_killed_one_gets_its_own_back(
    tmp_path: Path,
) -> None:
    first, name, identity = sitter(tmp_path)
    try:
        assert name == "seat-1"
        with home.open_seat(tmp_path) as second:
            assert second.name == "seat-2"
            assert second.identity().peer_id != identity
            assert [(s.name, s.running) for s in home.seats(tmp_path)] == [
                ("seat-1", True),
                ("seat-2", True),
            ]
    finally:
        end(first, signal.SIGKILL)
    with home.open_seat(tmp_path) as again:
        assert (again.name, again.identity().peer_id) == ("seat-1", identity)
        assert [s.running for s in home.seats(tmp_path)] == [True, False]


def test_two_peers_in_one_process_do_not_share_a_seat(tmp_path: Path) -> None:
    with home.open_seat(tmp_path) as one, home.open_seat(tmp_path) as two:
        assert one.folder != two.folder


def test_a_named_seat_is_one_persons(tmp_path: Path) -> None:
    with home.open_seat(tmp_path, "gpu-box") as seat:
        assert seat.folder == tmp_path / "gpu-box"
        with pytest.raises(UsageError, match="peer leave"):
            home.open_seat(tmp_path, "gpu-box")
    with pytest.raises(UsageError):
        home.open_seat(tmp_path, "../elsewhere")
    home.open_seat(tmp_path, "gpu-box").close()


def test_looking_at_no_home_finds_no_seats_and_makes_no_folder(tmp_path: Path) -> None:
    assert home.seats(tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_seat_ten_comes_after_seat_two(tmp_path: Path) -> None:
    for name in ("seat-10", "seat-2"):
        home.open_seat(tmp_path, name).close()
    assert [s.name for s in home.seats(tmp_path)] == ["seat-2", "seat-10"]


def test_nobody_else_can_read_a_seat_or_its_key(tmp_path: Path) -> None:
    with home.open_seat(tmp_path / "new") as seat:
        seat.identity()
        assert seat.folder.stat().st_mode & 0o777 == 0o700
        assert (seat.folder / "identity.key").stat().st_mode & 0o777 == 0o600


def test_a_key_open_to_others_is_closed_again_and_said(tmp_path: Path) -> None:
    with home.open_seat(tmp_path) as seat:
        before = seat.identity().peer_id
        (seat.folder / "identity.key").chmod(0o644)
        assert seat.identity().peer_id == before
        assert (seat.folder / "identity.key").stat().st_mode & 0o777 == 0o600
        assert "0600" in seat.notices[0]


def test_a_key_of_the_wrong_size_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with home.open_seat(tmp_path) as seat:
        (seat.folder / "identity.key").write_bytes(b"short")
        with pytest.raises(StorageError, match="move it away"):
            seat.identity()
        assert (seat.folder / "identity.key").read_bytes() == b"short"


def test_memory_survives_a_restart(tmp_path: Path) -> None:
    with home.open_seat(tmp_path) as seat:
        seat.remember(via=("/ip4/1.2.3.4/tcp/1/p2p/x", "/b", "/b"), port=4001, run="ab" * 32)
    with home.open_seat(tmp_path) as seat:
        assert seat.memory == home.Memory(
            via=("/ip4/1.2.3.4/tcp/1/p2p/x", "/b"), port=4001, run="ab" * 32
        )
        assert seat.notices == []


@pytest.mark.parametrize(
    "bad", [b"", b"{", b"[]", b"\xff\xfe", b'{"port": "x"}', b'{"via": 3}', b"[" * 50000]
)
def test_a_damaged_memory_is_said_and_started_afresh(tmp_path: Path, bad: bytes) -> None:
    home.open_seat(tmp_path).close()
    (tmp_path / "seat-1" / "memory.json").write_bytes(bad)
    with home.open_seat(tmp_path) as seat:
        assert seat.memory == home.Memory()
        assert "--via" in seat.notices[0]
        seat.remember(port=1)
    with home.open_seat(tmp_path) as seat:
        assert (seat.memory.port, seat.notices) == (1, [])


def test_only_a_run_id_names_a_run_folder(tmp_path: Path) -> None:
    with home.open_seat(tmp_path) as seat:
        assert seat.run_folder("0a" * 32).is_dir()
        for bad in ("../../etc", "0a" * 31, "0A" * 32, ""):
            with pytest.raises(UsageError):
                seat.run_folder(bad)


def test_a_full_disk_leaves_what_was_there_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    home.write_atomic(path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"file: No space left on device; free some space"):
        home.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_home_that_is_a_file_is_the_owners_business(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="MURMURATION_HOME"):
        home.open_seat(tmp_path / "file")


def test_leftovers_of_a_killed_write_are_cleared(tmp_path: Path) -> None:
    home.open_seat(tmp_path).close()
    (tmp_path / "seat-1" / ".tmp-left").write_bytes(b"half")
    home.open_seat(tmp_path).close()
    assert not (tmp_path / "seat-1" / ".tmp-left").exists()


def test_the_environment_says_where_home_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    monkeypatch.delenv("MURMURATION_HOME", raising=False)
    assert str(home.home_folder()) == "/data/murmuration"
    monkeypatch.setenv("MURMURATION_HOME", "/mine")
    assert str(home.home_folder()) == "/mine"
    monkeypatch.delenv("MURMURATION_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "")
    assert home.home_folder() == Path.home() / ".local/share/murmuration"
