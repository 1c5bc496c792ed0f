"""A seed log on disk: whole again after any crash, and never two runs in one file."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peer.errors import StorageError
from peer.finetune import seedfile
from peer.finetune.seedfile import SeedFile
from peer.finetune.seedlog import SeedLog
from protocols.errors import RemoteProtocolError
from tests.finetune.seed_runs import entry, filled, rules, signer

SENDER = signer(9).peer_id
ROOT = Path(__file__).parents[2]


def stored(path: Path, log: SeedLog) -> None:
    with SeedFile.create(path, SeedLog(log.rules)) as file:
        for number in range(log.next):
            file.append(SENDER, log.record(number))


@pytest.mark.parametrize("method", ["decomfl", "kseed"])
def test_a_log_is_the_same_after_a_restart_and_goes_on(tmp_path: Path, method: str) -> None:
    path, log = tmp_path / "seeds.log", filled(rules(method), 7)
    with SeedFile.create(path, SeedLog(log.rules)) as file:
        for number in range(4):
            file.append(SENDER, log.record(number))
    with SeedFile.open(path, log.rules) as file:
        assert (file.log.next, file.notice) == (4, None)
        for number in range(4, 7):
            file.append(SENDER, log.record(number))
    with SeedFile.open(path, log.rules) as file:
        assert file.log.head == log.head
        file.log.verify()


def test_created_at_once_or_record_by_record_the_file_is_the_same(tmp_path: Path) -> None:
    log = filled(rules(), 5)
    stored(tmp_path / "one", log)
    SeedFile.create(tmp_path / "other", log).close()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_wherever_a_crash_cuts_the_file_the_records_before_are_kept(tmp_path: Path) -> None:
    log, path = filled(rules(), 3), tmp_path / "seeds.log"
    stored(path, log)
    whole = path.read_bytes()
    sizes = []
    for count in range(4):
        short = SeedLog(log.rules)
        for number in range(count):
            short.append(SENDER, log.record(number))
        SeedFile.create(tmp_path / "short", short).close()
        sizes.append(len((tmp_path / "short").read_bytes()))
    assert sizes[-1] == len(whole)
    for size in range(sizes[0], len(whole) + 1, 7):
        path.write_bytes(whole[:size])
        kept = max(n for n in range(4) if sizes[n] <= size)
        with SeedFile.open(path, log.rules) as file:
            assert file.log.next == kept, size
            assert (file.notice is None) == (size in sizes)
            for number in range(kept, 3):
                file.append(SENDER, log.record(number))
        assert path.read_bytes() == whole


def test_a_flipped_bit_costs_the_records_from_there_on_and_is_said(tmp_path: Path) -> None:
    log, path = filled(rules(), 3), tmp_path / "seeds.log"
    stored(path, log)
    whole = path.read_bytes()
    begin = len(whole) - len(log.record(2)) - len(log.record(1)) - 2 * 36
    for at in range(begin, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with SeedFile.open(path, log.rules) as file:
            assert file.log.next in (1, 2)
            assert file.notice is not None
            assert "cut off" in file.notice


def test_a_damaged_head_is_not_taken_for_a_log(tmp_path: Path) -> None:
    log, path = filled(rules(), 1), tmp_path / "seeds.log"
    stored(path, log)
    whole = path.read_bytes()
    for at in range(0, 100, 9):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(StorageError, match="move it away"):
            SeedFile.open(path, log.rules)
    SeedFile.create(path, SeedLog(log.rules)).close()
    for size in range(len(path.read_bytes())):
        path.write_bytes(whole[:size])
        with pytest.raises(StorageError, match="damaged"):
            SeedFile.open(path, log.rules)


def test_another_runs_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "seeds.log"
    stored(path, filled(rules(), 1))
    with pytest.raises(StorageError, match="another run"):
        SeedFile.open(path, rules(lr=0.5))
    with pytest.raises(StorageError, match="cannot open"):
        SeedFile.open(tmp_path / "none", rules())


def test_a_bad_record_is_not_written(tmp_path: Path) -> None:
    path, log = tmp_path / "seeds.log", filled(rules(), 3)
    stored(path, log)
    before = path.read_bytes()
    with SeedFile.open(path, log.rules) as file:
        with pytest.raises(RemoteProtocolError):
            file.append(SENDER, log.record(1))
        assert path.read_bytes() == before


def test_a_full_disk_leaves_log_and_file_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, log = tmp_path / "seeds.log", filled(rules(), 3)
    with SeedFile.create(path, SeedLog(log.rules)) as file:
        file.append(SENDER, log.record(0))
        before, head = path.read_bytes(), file.log.head

        def half(target: Any, data: bytes) -> None:
            target.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "no space left")

        with monkeypatch.context() as patch:
            patch.setattr(seedfile, "_write", half)
            with pytest.raises(StorageError, match="free some space"):
                file.append(SENDER, log.record(1))
        assert (path.read_bytes(), file.log.head) == (before, head)
        file.append(SENDER, log.record(1))
        file.append(SENDER, log.record(2))
    with SeedFile.open(path, log.rules) as file:
        assert (file.log.head, file.notice) == (log.head, None)


@pytest.mark.parametrize("method", ["decomfl", "kseed"])
def test_a_compacted_file_is_smaller_and_goes_on(tmp_path: Path, method: str) -> None:
    path, log = tmp_path / "seeds.log", filled(rules(method), 20)
    stored(path, log)
    size = path.stat().st_size
    with SeedFile.open(path, log.rules) as file:
        file.compact()
        assert path.stat().st_size < size / 4
        assert file.log.head == log.head
        entries = {signer(1).peer_id: entry(file.log, 1, {0: 1.0})}
        raw = file.log.make(entries)
        file.append(SENDER, raw)
    log.append(SENDER, raw)
    with SeedFile.open(path, log.rules) as file:
        assert (file.log.first, file.log.next) == (20, 21)
        assert file.log.summary() == log.summary()


WRITER = """
import sys
from pathlib import Path
from peer.finetune.seedfile import SeedFile
from peer.finetune.seedlog import SeedLog
from tests.finetune.seed_runs import entry, rules, signer
file = SeedFile.create(Path(sys.argv[1]), SeedLog(rules()))
while True:
    raw = file.log.make({signer(1).peer_id: entry(file.log, 1, {0: 1.0})})
    file.append(signer(1).peer_id, raw)
    print(file.log.next, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_reported(tmp_path: Path) -> None:
    path = tmp_path / "seeds.log"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'codecs'}"},
    )  # fmt: skip
    assert writer.stdout is not None
    reported = 0
    while reported < 20:
        reported = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    rest, _ = writer.communicate(timeout=30)
    reported = max([reported, *map(int, rest.split())])
    with SeedFile.open(path, rules()) as file:
        assert file.log.next in (reported, reported + 1)
        file.log.verify()
