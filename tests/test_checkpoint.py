"""Checkpoints: whatever kills the process, the last round that was reported comes back."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from peer.checkpoint import CheckpointStore, Loaded
from peer.errors import StorageError

ROOT = Path(__file__).parents[1]

SAVER = """
import sys
from pathlib import Path
import numpy as np
from peer.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]))
found = store.load()
round = found.round + len(found.journal) if found else 0
while True:
    value = {"w": np.full(200_000, round, np.float32)}
    if round % 3 == 0:
        store.save(round, value, value, {"round": round})
    store.append(round, b"header", [round.to_bytes(8, "big") * 5000], b"d" * 32)
    round += 1
    print(round, flush=True)
"""

SAVER_WITHOUT_ROOM = """
import resource, sys
from pathlib import Path
import numpy as np
from peer.checkpoint import CheckpointStore
from peer.errors import StorageError
store = CheckpointStore(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for write in (
    lambda: store.save(2, {"w": np.zeros(10_000)}, {}, {}),
    lambda: store.append(1, b"", [bytes(100_000)], b""),
):
    try:
        write()
    except StorageError as error:
        print(error)
"""


def state(number: int) -> dict[str, np.ndarray]:
    return {
        "w": np.full((3, 4), number, np.float32),
        "steps": np.array(number, np.int64),
        "none": np.zeros((0, 2), np.float16),
    }


def save(store: CheckpointStore, number: int, *, replace: bool = False) -> None:
    store.save(number, state(number), {"m": np.ones(5)}, {"epoch": number + 1}, replace=replace)


def append(store: CheckpointStore, number: int) -> None:
    store.append(number, b"header", [b"a" * number, b"", b"b"], bytes(32))


def loaded(folder: Path) -> Loaded:
    found = CheckpointStore(folder, read_only=True).load()
    assert found is not None
    return found


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    assert store.load() is None
    save(store, 7)
    for number in (7, 8):
        append(store, number)
    found = loaded(tmp_path / "run")
    assert (found.round, found.facts, found.skipped) == (7, {"epoch": 8}, [])
    for name, array in state(7).items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)
    np.testing.assert_array_equal(found.inner["m"], np.ones(5))
    assert found.journal == [
        (7, b"header", [b"a" * 7, b"", b"b"], bytes(32)),
        (8, b"header", [b"a" * 8, b"", b"b"], bytes(32)),
    ]


def test_strided_arrays_keep_their_values(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    store.save(0, {"t": array.T, "half": array[:, ::2]}, {}, {})
    found = loaded(tmp_path)
    np.testing.assert_array_equal(found.arrays["t"], array.T)
    np.testing.assert_array_equal(found.arrays["half"], array[:, ::2])


def test_the_newest_two_stay_and_the_journal_reaches_back_to_the_older(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for number in range(9):
        if number % 2 == 0:
            save(store, number)
        append(store, number)
    assert [n for n in names(tmp_path) if n.startswith("checkpoint")] == [
        "checkpoint-000000-000000000006.safetensors",
        "checkpoint-000000-000000000008.safetensors",
    ]
    assert [n[-1] for n in names(tmp_path) if n.startswith("journal")] == ["6", "7", "8"]


def test_any_flipped_byte_sends_us_to_the_checkpoint_before_and_is_said(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for number in (1, 2, 3):
        if number != 2:
            save(store, number)
        append(store, number)
    path = tmp_path / "checkpoint-000000-000000000003.safetensors"
    whole = path.read_bytes()
    rng = random.Random(1)
    header = 8 + int.from_bytes(whole[:8], "little")
    # Padding is the one place where a flip changes nothing that counts.
    padded = len(whole[8:header].rstrip()) + 8
    places = [rng.randrange(padded) for _ in range(60)]
    places += [rng.randrange(header, len(whole)) for _ in range(60)]
    for where in places:
        flip(path, where)
        found = loaded(tmp_path)
        assert found.round == 1, f"byte {where} of {len(whole)}"
        assert [entry.round for entry in found.journal] == [1, 2, 3]
        assert "checkpoint-000000-000000000003" in found.skipped[0]
        path.write_bytes(whole)
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        assert loaded(tmp_path).round == 1


def test_a_damaged_journal_ends_where_the_damage_is_and_is_said(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 0)
    for number in range(4):
        append(store, number)
    path = tmp_path / "journal-000000-000000000002"
    whole = path.read_bytes()
    for where in range(len(whole)):
        flip(path, where)
        found = loaded(tmp_path)
        assert [entry.round for entry in found.journal] == [0, 1], f"byte {where}"
        assert "journal-000000-000000000002" in found.skipped[0]
        path.write_bytes(whole[:where])
        assert len(loaded(tmp_path).journal) == 2
        path.write_bytes(whole)
    assert len(loaded(tmp_path).journal) == 4


def test_a_journal_that_claims_to_be_huge_costs_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 0)
    append(store, 0)
    path = tmp_path / "journal-000000-000000000000"
    data = path.read_bytes()
    path.write_bytes(data[:24] + b"\xff\xff\x3f\x00" + data[28:])
    found = loaded(tmp_path)
    assert (found.journal, len(found.skipped)) == ([], 1)


def test_a_rewritten_journal_entry_is_not_taken_for_the_damaged_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 0)
    append(store, 0)
    flip(tmp_path / "journal-000000-000000000000", 40)
    found = store.load()
    assert found
    assert found.journal == []
    append(store, 0)
    save(store, 1)
    flip(tmp_path / "checkpoint-000000-000000000001.safetensors", -1)
    assert [entry.round for entry in loaded(tmp_path).journal] == [0]


def test_older_state_never_takes_the_place_of_newer(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 5)
    restarted = CheckpointStore(tmp_path)
    with pytest.raises(StorageError, match="newer than 3"):
        save(restarted, 3)
    save(restarted, 5)  # the same round again is fine: its inner state may have moved on
    assert loaded(tmp_path).round == 5


def test_healing_takes_back_our_own_history_and_its_journal(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)
    for number in (5, 6, 7):
        append(store, number)
    save(store, 6, replace=True)
    found = loaded(tmp_path)
    assert (found.round, found.journal) == (6, [])
    append(store, 6)
    assert [entry.round for entry in loaded(tmp_path).journal] == [6]
    save(store, 7)
    save(store, 8)
    assert names(tmp_path) == [
        "checkpoint-000001-000000000007.safetensors",
        "checkpoint-000001-000000000008.safetensors",
    ]


def test_when_all_is_damaged_that_is_said_and_a_new_history_can_begin(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 5)
    flip(tmp_path / "checkpoint-000000-000000000005.safetensors", -1)
    store = CheckpointStore(tmp_path)
    assert store.load() is None
    assert len(store.skipped) == 1
    save(store, 2)
    assert loaded(tmp_path).round == 2
    assert len(names(tmp_path)) == 1


def test_a_full_disk_is_said_and_costs_nothing_that_was_there(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    before = names(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SAVER_WITHOUT_ROOM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=20,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    checkpoint, journal = done.stdout.splitlines()
    assert "checkpoint-000000-000000000002.safetensors: File too large; free some" in checkpoint
    assert "journal-000000-000000000001: File too large; free some" in journal
    assert names(tmp_path) == before
    assert loaded(tmp_path).round == 1


def test_a_reader_leaves_the_writers_unfinished_files_alone(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 1)
    (tmp_path / ".tmp-half").mkdir()
    (tmp_path / ".tmp-half" / "checkpoint").write_bytes(b"half")
    reader = CheckpointStore(tmp_path, read_only=True)
    assert reader.path_of_latest() == tmp_path / "checkpoint-000000-000000000001.safetensors"
    assert (tmp_path / ".tmp-half").exists()
    with pytest.raises(ValueError, match="read only"):
        save(reader, 2)
    CheckpointStore(tmp_path)
    assert not (tmp_path / ".tmp-half").exists()


def test_looking_into_a_folder_that_is_not_there_finds_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "none", read_only=True)
    assert store.load() is None
    assert store.path_of_latest() is None


def test_kill_at_any_moment_loses_nothing_that_was_reported(tmp_path: Path) -> None:
    rng = random.Random(7)
    reported = 0
    for kill in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout
        first = int(process.stdout.readline())
        assert first > reported
        # Kill at a random moment after a random number of rounds: during a save, or between.
        lines = [first] + [int(process.stdout.readline()) for _ in range(rng.randrange(4))]
        timer = threading.Timer(rng.random() * 0.02, process.send_signal, [signal.SIGKILL])
        timer.start()
        lines += map(int, process.stdout.read().split())
        process.wait(timeout=10)
        timer.join()
        process.stdout.close()
        reported = lines[-1]
        found = loaded(tmp_path)
        assert not found.skipped, f"kill {kill}"
        assert found.round + len(found.journal) >= reported, f"kill {kill}"
        assert (found.arrays["w"] == found.round).all()
        for entry in found.journal:
            assert entry.units == [entry.round.to_bytes(8, "big") * 5000]
    CheckpointStore(tmp_path)
    assert not [name for name in names(tmp_path) if name.startswith(".")]
