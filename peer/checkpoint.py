"""State on disk: checkpoints every few rounds, and between them a journal of each round's outcome.

Every file gets its name only when it is whole and synced, and carries a SHA-256 of its content. So
whenever the process dies, the newest valid checkpoint plus the journal after it is the last round
that was reported; a damaged file is passed over for the one before it, and said.

*Round r* here: a checkpoint of round r holds r rounds of history; journal entry r is the outcome
that leads from r rounds to r + 1.

*Lineage*: a number in each file's name that grows when this peer takes back its own history for a
donor's (`replace=True`). The larger (lineage, round) is the newer, so healing needs no deletion
first and is as safe as any other save.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from peer.errors import StorageError
from peer.home import TEMPORARY, atomic_file, complain, make_folder, remove_temporaries, settle
from protocols.limits import STATE_BYTES_MAX, STREAM_HEADER_BYTES_MAX, UNIT_BYTES_MAX, UNITS_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    ArrayMap = dict[str, npt.NDArray[Any]]

CHECKPOINTS_KEPT: Final = 2  # the newest, and the one to fall back on
JOURNAL_ROUNDS_MAX: Final = 1024  # replayed at most; checkpoints come every few rounds
FACTS_BYTES_MAX: Final = 2**20  # epoch, digests, positions: a few KiB
DIGEST_BYTES: Final = 32

_NAME: Final = re.compile(r"(checkpoint|journal)-(\d{6})-(\d{12})(?:\.safetensors)?")
_MAGIC: Final = b"MURMJRN1"
_HEAD: Final = struct.Struct("<8sQIII")  # magic, round, header bytes, digest bytes, units


class Mark(NamedTuple):
    """Where a file stands in history: the larger is the newer."""

    lineage: int
    round: int


@dataclass(frozen=True, slots=True)
class SavedInfo:
    round: int
    path: str
    bytes: int
    seconds: float
    sha256: str
    """Over facts, names, shapes, types and values; stored inside and checked on load."""


class JournalEntry(NamedTuple):
    """One round's outcome, as every peer of the group got it."""

    round: int
    header: bytes
    units: list[bytes]
    digest: bytes
    """Of the outer state after it (32 bytes), or empty."""


@dataclass(slots=True)
class Loaded:
    round: int
    arrays: ArrayMap
    inner: ArrayMap
    facts: dict[str, Any]
    journal: list[JournalEntry]
    """Contiguous: the first entry's round is this checkpoint's round."""
    path: str
    skipped: list[str] = field(default_factory=list)
    """Damaged files that were passed over, each with the reason."""


class CheckpointStore:
    """The checkpoints and journal of one run in one folder.

    Its owner (who holds the seat) writes; anyone may read with `read_only`. `save` and `append`
    may run in two threads at once.
    """

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        """Open `folder`, made if need be.

        Raises:
            StorageError: it can't be made.
        """
        self.folder = folder
        self.skipped: list[str] = []
        """What the last `load` passed over; also set where it found nothing valid."""
        self._read_only = read_only
        self._current: Mark | None = None  # the newest valid checkpoint, once looked for
        self._lineage: int | None = None  # of what is written; None: not looked yet
        self._damaged: set[Path] = set()
        if not read_only:
            make_folder(folder)
            remove_temporaries(folder)

    def save(
        self,
        round: int,  # noqa: A002 - the word that the whole project uses
        arrays: Mapping[str, npt.NDArray[Any]],
        inner: Mapping[str, npt.NDArray[Any]],
        facts: Mapping[str, Any],
        *,
        replace: bool = False,
    ) -> SavedInfo:
        """Write a checkpoint and drop what it makes needless; the newest two stay.

        `facts` is JSON. With `replace` the state is a donor's that takes the place of this
        peer's own history, whatever its round.

        Cost: one pass of SHA-256 and one write; arrays are copied only where not contiguous.

        Raises:
            StorageError: no room or no permission (what was there stays), or there is a newer
                valid checkpoint and `replace` is not set.
        """
        begun = time.monotonic()
        self._must_be_ours()
        newest = self._newest()
        if newest and round < newest.round and not replace:
            raise StorageError(
                f"{self.folder} already holds round {newest.round}, newer than {round}; it is"
                " kept. To begin this run afresh, move that folder away"
            )
        mark = Mark(self._our_lineage() + replace, round)
        path = self.folder / f"{_stem('checkpoint', mark)}.safetensors"
        tensors = {f"outer/{name}": np.asarray(a, order="C") for name, a in arrays.items()}
        tensors |= {f"inner/{name}": np.asarray(a, order="C") for name, a in inner.items()}
        text = json.dumps({**mark._asdict(), "facts": dict(facts)}, sort_keys=True)
        if len(text) > FACTS_BYTES_MAX:
            raise ValueError(f"facts of {len(text)} bytes, at most {FACTS_BYTES_MAX} allowed")
        digest = _hash(text, tensors)
        size = self._write(path, tensors, {"murmuration": text, "sha256": digest})
        self._current, self._lineage = mark, mark.lineage
        self._damaged.discard(path)
        self._prune()
        return SavedInfo(round, str(path), size, time.monotonic() - begun, digest)

    def append(
        self,
        round: int,  # noqa: A002
        header: bytes,
        units: Sequence[bytes],
        digest: bytes,
    ) -> None:
        """Note the outcome that leads from `round` to `round + 1`. It survives from here on.

        Raises:
            StorageError: no room or no permission; earlier rounds are intact.
        """
        self._must_be_ours()
        longest = max(map(len, units), default=0)
        if not _fits(len(header), len(digest), len(units), longest):
            raise ValueError("a journal entry of a size that could not be read back")
        mark = Mark(self._our_lineage(), round)
        path = self.folder / _stem("journal", mark)
        total = hashlib.sha256()
        with atomic_file(path) as file:
            head = _HEAD.pack(_MAGIC, round, len(header), len(digest), len(units))
            lengths = struct.pack(f"<{len(units)}I", *map(len, units))
            for piece in (head, lengths, header, digest, *units):
                total.update(piece)
                file.write(piece)
            file.write(total.digest())
        self._damaged.discard(path)

    def load(self) -> Loaded | None:
        """The newest valid checkpoint with the journal after it; None if there is none.

        Raises:
            StorageError: files are there but may not be read.
        """
        loaded = self._look()
        if loaded is not None and self._current is not None:
            loaded.journal = self._journal_after(self._current)
            loaded.skipped = list(self.skipped)
        return loaded

    def path_of_latest(self) -> Path | None:
        """The newest valid checkpoint's file (tensors named `outer/...` and `inner/...`)."""
        mark = self._newest()
        return self.folder / f"{_stem('checkpoint', mark)}.safetensors" if mark else None

    # ── inside ───────────────────────────────────────────────────────────────────────────

    def _must_be_ours(self) -> None:
        if self._read_only:
            raise ValueError("this store was opened to read only")

    def _files(self, kind: str) -> list[tuple[Mark, Path]]:
        """All files of a kind, the newest first."""
        found = []
        try:
            for path in self.folder.iterdir():
                match = _NAME.fullmatch(path.name)
                if match and match[1] == kind:
                    found.append((Mark(int(match[2]), int(match[3])), path))
        except FileNotFoundError:
            return []
        except OSError as error:
            complain(error, self.folder, "read")
        return sorted(found, reverse=True)

    def _look(self) -> Loaded | None:
        """Find and read the newest valid checkpoint, and settle the lineage to write in."""
        self.skipped = []
        self._damaged.clear()
        self._current, loaded = None, None
        for mark, path in self._files("checkpoint"):
            try:
                loaded = _read_checkpoint(path, mark)
            except _DamagedError as error:
                self._skip(path, error)
                continue
            self._current = mark
            break
        if self._current:
            self._lineage = self._current.lineage
        else:  # a fresh history is newer than all the damage there may be
            marks = [mark for mark, _ in self._files("checkpoint") + self._files("journal")]
            self._lineage = max(marks).lineage + 1 if marks else 0
        return loaded

    def _newest(self) -> Mark | None:
        if self._lineage is None:
            self._look()
        return self._current

    def _our_lineage(self) -> int:
        if self._lineage is None:
            self._look()
        return self._lineage or 0

    def _skip(self, path: Path, error: _DamagedError) -> None:
        self._damaged.add(path)
        self.skipped.append(f"{path.name}: {error}")

    def _write(self, path: Path, tensors: ArrayMap, about: dict[str, str]) -> int:
        """One synced safetensors file under its final name; its size."""
        room: Path | None = None
        try:
            # In a folder of its own: the library may have temporary files too, and a killed
            # process leaves them behind.
            room = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self.folder))
            file = room / path.name
            safetensors.numpy.save_file(tensors, file, metadata=about)
            handle = os.open(file, os.O_RDWR)
            try:
                os.fsync(handle)
                size = os.fstat(handle).st_size
            finally:
                os.close(handle)
            settle(file, path)
        except safetensors.SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise  # not the disk's fault: a type that the format doesn't know
            complain(OSError(int(code[1]), os.strerror(int(code[1]))), path, "write")
        except OSError as error:
            complain(error, path, "write")
        finally:
            if room is not None:
                shutil.rmtree(room, ignore_errors=True)
        return size

    def _prune(self) -> None:
        """Drop all but the newest valid checkpoints, and the journal before the oldest kept."""
        files = [item for item in self._files("checkpoint") if item[1] not in self._damaged]
        kept = files[:CHECKPOINTS_KEPT]
        old = [path for _, path in files[CHECKPOINTS_KEPT:]] + list(self._damaged)
        old += [path for mark, path in self._files("journal") if mark < kept[-1][0]]
        for path in old:
            with suppress(OSError):  # it can go another time
                path.unlink()
        self._damaged.clear()

    def _journal_after(self, start: Mark) -> list[JournalEntry]:
        """Entries start.round, start.round + 1, ... of the lineage, up to the first gap."""
        paths = {mark.round: path for mark, path in self._files("journal")
                 if mark.lineage == start.lineage}  # fmt: skip
        entries: list[JournalEntry] = []
        for number in range(start.round, start.round + JOURNAL_ROUNDS_MAX):
            if number not in paths:
                break
            try:
                entries.append(_read_journal(paths[number], number))
            except _DamagedError as error:
                self._skip(paths[number], error)
                break
        return entries


class _DamagedError(Exception):
    """A file that is not what was once written."""


def _stem(kind: str, mark: Mark) -> str:
    return f"{kind}-{mark.lineage:06d}-{mark.round:012d}"


def _hash(about: str, tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 over what a checkpoint says, whatever the order in its file."""
    total = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        array = tensors[name]
        total.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _read_checkpoint(path: Path, mark: Mark) -> Loaded:
    try:
        size = path.stat().st_size
        if size > STATE_BYTES_MAX:
            raise _DamagedError(f"{size} bytes, at most {STATE_BYTES_MAX} allowed")
        with safetensors.safe_open(path, framework="numpy") as file:
            about: dict[str, str] = file.metadata() or {}
            tensors: ArrayMap = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise _DamagedError(f"not a whole safetensors file ({error})") from None
    except PermissionError as error:
        complain(error, path, "read")
    except (OSError, ValueError) as error:
        raise _DamagedError(str(error)) from None
    text = about.get("murmuration", "")
    if len(text) > FACTS_BYTES_MAX or _hash(text, tensors) != about.get("sha256"):
        raise _DamagedError("its content does not match its SHA-256")
    said = json.loads(text)
    if Mark(said["lineage"], said["round"]) != mark:
        raise _DamagedError("it carries another file's name")
    parts: dict[str, ArrayMap] = {"outer": {}, "inner": {}}
    for name, array in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = array
    return Loaded(mark.round, parts["outer"], parts["inner"], said["facts"], [], str(path))


def _read_journal(path: Path, number: int) -> JournalEntry:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            pieces = _Pieces(file, size)
            head = pieces.take(_HEAD.size)
            magic, said, header_bytes, digest_bytes, count = _HEAD.unpack(head)
            if magic != _MAGIC or said != number:
                raise _DamagedError("not the journal of this round")
            if not _fits(header_bytes, digest_bytes, count, 0):
                raise _DamagedError("lengths beyond their bounds")
            lengths = struct.unpack(f"<{count}I", pieces.take(4 * count))
            if not _fits(header_bytes, digest_bytes, count, max(lengths, default=0)):
                raise _DamagedError("lengths beyond their bounds")
            header, digest = pieces.take(header_bytes), pieces.take(digest_bytes)
            units = [pieces.take(length) for length in lengths]
            if file.read() != pieces.total.digest():
                raise _DamagedError("its content does not match its SHA-256")
    except PermissionError as error:
        complain(error, path, "read")
    except OSError as error:
        raise _DamagedError(str(error)) from None
    return JournalEntry(number, header, units, digest)


class _Pieces:
    """Reads a file piece by piece, never beyond its own size, and hashes what it read."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.total = hashlib.sha256()
        self._file = file
        self._left = size - self.total.digest_size

    def take(self, length: int) -> bytes:
        if length > self._left:
            raise _DamagedError("it is cut short")
        data = self._file.read(length)
        self._left -= length
        self.total.update(data)
        return data


def _fits(header_bytes: int, digest_bytes: int, units: int, unit_bytes: int) -> bool:
    return (
        header_bytes <= STREAM_HEADER_BYTES_MAX
        and digest_bytes in (0, DIGEST_BYTES)
        and units <= UNITS_MAX
        and unit_bytes <= UNIT_BYTES_MAX
    )
