"""A seed log on disk: one file that only grows, and is whole again after any crash.

    "MURMSLG1" | frame(rules) | frame(summary, or nothing) | frame(record) ...
    frame = length (4 bytes, little-endian) | content | SHA-256 of what comes before it in the file

The head of the file takes its name when it is safely on disk; each record is synced before `append`
returns. A frame that a crash or the disk left damaged is cut off when the file is opened, with all
that follows, and said: others have those records.

`to_bytes` and `from_bytes` are the same content where it travels, or lies in another file.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, Final, Self

from peer.errors import StorageError
from peer.finetune.seed_rules import SeedRules
from peer.finetune.seedlog import RECORD_BYTES_MAX, SUMMARY_BYTES_MAX, SeedLog, SeedSummary
from peer.home import complain, write_atomic
from protocols.errors import RemoteProtocolError
from protocols.schema import SchemaError, pack, unpack
from protocols.types import PeerId

if TYPE_CHECKING:
    from types import TracebackType

MAGIC: Final = b"MURMSLG1"
RULES_BYTES_MAX: Final = 4096  # they are some two hundred

_LENGTH: Final = struct.Struct("<I")
_HASH_BYTES: Final = 32
_FRAME_BYTES_MAX: Final = max(RECORD_BYTES_MAX, SUMMARY_BYTES_MAX + 2**20)


class SeedFile:
    """A log and its file, held by one process (the seat's holder). Made by `create` or `open`."""

    def __init__(self, path: Path, log: SeedLog, file: BinaryIO, total: hashlib._Hash) -> None:
        """Use `create` or `open`."""
        self.path = path
        self.log = log
        self.notice: str | None = None
        """What was cut off when the file was opened."""
        self._file = file
        self._total = total

    @classmethod
    def create(cls, path: Path, log: SeedLog) -> Self:
        """Write `log` to a new file, in place of one that may be there.

        Raises:
            StorageError: no room or no permission; what was there is intact.
        """
        raw, total = _whole(log)
        write_atomic(path, raw)
        return cls(path, log, _open(path), total)

    @classmethod
    def open(cls, path: Path, rules: SeedRules) -> Self:
        """Open the log of a run. A damaged end is cut off: see `notice`.

        Raises:
            StorageError: there is none, it can't be read, or it is of other rules.
        """
        file = _open(path)
        try:
            return cls._opened(path, rules, file)
        except BaseException:
            file.close()
            raise

    @classmethod
    def _opened(cls, path: Path, rules: SeedRules, file: BinaryIO) -> Self:
        total = hashlib.sha256(MAGIC)
        try:
            file.seek(0)
            if file.read(len(MAGIC)) != MAGIC:
                raise _DamagedError("not a seed log")
            of = _take(file, total, RULES_BYTES_MAX)
            if of is not None and of != pack(rules):
                raise StorageError(f"{path} is the seed log of another run; move it away")
            said = _take(file, total, _FRAME_BYTES_MAX)
            if of is None or said is None:
                raise _DamagedError("cut short")
            log = SeedLog(rules, unpack(SeedSummary, said) if said else None)
        except (_DamagedError, SchemaError, ValueError) as error:
            raise StorageError(
                f"{path} is damaged ({error}); move it away, and it is fetched again"
            ) from None
        except OSError as error:
            complain(error, path, "read")
        opened = cls(path, log, file, total)
        opened._read_records()
        return opened

    def _read_records(self) -> None:
        whole = self._file.tell()
        try:
            while True:
                before = self._total.copy()
                try:
                    raw = _take(self._file, self._total, RECORD_BYTES_MAX)
                    if raw is None:
                        return
                    self.log.load(raw)
                except (_DamagedError, ValueError) as error:
                    self._total = before
                    end = self._file.seek(0, os.SEEK_END)
                    self.notice = (
                        f"{self.path}: {end - whole} bytes after record {self.log.next - 1} are "
                        f"damaged ({error}) and were cut off; they are fetched again"
                    )
                    self._cut(whole)
                    return
                whole = self._file.tell()
        except OSError as error:
            complain(error, self.path, "read")

    def append(self, sender: PeerId, raw: bytes) -> bool:
        """`SeedLog.append`, and the record is safely on disk when this returns.

        Raises:
            RemoteProtocolError: like `SeedLog.append`.
            StorageError: no room; log and file are as they were.
        """
        record = self.log.check(sender, raw)
        whole = self._file.tell()
        before = self._total.copy()
        try:
            _write(self._file, _frame(self._total, raw))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._total = before
            self._cut(whole)
            complain(error, self.path, "write")
        self.log.take(raw, record)
        return bool(record.bans)

    def compact(self) -> None:
        """Replace the file's records by their summary. Nobody can be taken out of it afterwards.

        Raises:
            StorageError: no room; the file is as it was.
            ValueError: a ban reaches into the summary that the log began with.
        """
        smaller = type(self).create(self.path, SeedLog(self.log.rules, self.log.summary()))
        self._file.close()
        self.log, self._file, self._total = smaller.log, smaller._file, smaller._total

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _cut(self, size: int) -> None:
        """Make the file end after its last whole frame, also for the next append."""
        self._file.seek(size)
        with suppress(OSError):  # what stays is written over, or cut off when the file is opened
            self._file.truncate(size)


def to_bytes(log: SeedLog) -> bytes:
    """What the file of `log` holds: for a checkpoint, and for a late joiner."""
    return _whole(log)[0]


class GrowingBytes:
    """`to_bytes` of a log that grows, without making it anew."""

    def __init__(self, log: SeedLog) -> None:
        raw, self._total = _whole(log)
        self._raw = bytearray(raw)

    def __len__(self) -> int:
        return len(self._raw)

    def __bytes__(self) -> bytes:
        return bytes(self._raw)

    def append(self, record: bytes) -> None:
        """The log has taken this in."""
        self._raw += _frame(self._total, record)

    def piece(self, start: int, stop: int) -> bytes:
        """A copy of a part."""
        return bytes(self._raw[start:stop])


def from_bytes(
    rules: SeedRules,
    sender: PeerId,
    raw: bytes,
    on_record: Callable[[int], None] = lambda _: None,
) -> SeedLog:
    """The log whose file is `raw`, which `sender` gave: every frame whole, every record the next
    one, every entry signed. A summary at its beginning is taken as it is.

    `on_record`: told how many records were checked, one after another. Cost: a signature's
    verification for each entry, some 0.1 ms.

    Raises:
        RemoteProtocolError: naming `sender`, the record, and the entry where one is to blame.
    """
    file, total = io.BytesIO(raw), hashlib.sha256(MAGIC)
    where = "the seed log"
    try:
        if file.read(len(MAGIC)) != MAGIC:
            raise _DamagedError("no seed log at all")
        if _take(file, total, RULES_BYTES_MAX) != pack(rules):
            raise _DamagedError("of another run, or another base")
        said = _take(file, total, _FRAME_BYTES_MAX)
        if said is None:
            raise _DamagedError("cut short")
        where = "the seed log's summary"
        log = SeedLog(rules, unpack(SeedSummary, said) if said else None)
        count = 0
        while True:
            where = f"record {log.next} of the seed log"
            record = _take(file, total, RECORD_BYTES_MAX)
            if record is None:
                return log
            log.append(sender, record)
            count += 1
            on_record(count)
    except (_DamagedError, ValueError) as error:  # SchemaError is one
        raise RemoteProtocolError(sender, f"{where}: {error}") from None


def _whole(log: SeedLog) -> tuple[bytes, hashlib._Hash]:
    total = hashlib.sha256(MAGIC)
    summary = log.summary_before
    contents = [pack(log.rules), b"" if summary is None else pack(summary)]
    contents += [log.record(number) for number in range(log.first, log.next)]
    return MAGIC + b"".join(_frame(total, content) for content in contents), total


class _DamagedError(Exception):
    """A frame that is not what was once written."""


def _frame(total: hashlib._Hash, content: bytes) -> bytes:
    start = _LENGTH.pack(len(content)) + content
    total.update(start)
    digest = total.digest()
    total.update(digest)
    return start + digest


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:  # an unbuffered file may take less at a time
        view = view[file.write(view) :]


def _take(file: IO[bytes], total: hashlib._Hash, size_max: int) -> bytes | None:
    """The next frame's content; None at the end of the file."""
    head = file.read(_LENGTH.size)
    if not head:
        return None
    if len(head) < _LENGTH.size:
        raise _DamagedError("cut short")
    (size,) = _LENGTH.unpack(head)
    if size > size_max:
        raise _DamagedError(f"a frame of {size} bytes")
    content = file.read(size)
    digest = file.read(_HASH_BYTES)
    total.update(head + content)
    if len(content) < size or digest != total.digest():
        raise _DamagedError("not what was written")
    total.update(digest)
    return content


def _open(path: Path) -> BinaryIO:
    try:
        file = path.open("r+b", buffering=0)
        file.seek(0, os.SEEK_END)
    except OSError as error:
        complain(error, path, "open")
    return file
