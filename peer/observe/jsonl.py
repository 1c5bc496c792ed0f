"""The log: every event one JSON line, `{"t": 1731000000.123, "event": "RoundFinished", ...}`."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Final, TextIO

from peer.observe.events import Event, Notice
from peer.observe.hub import as_record
from peer.observe.writer import LineWriter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LOG_BYTES_MAX: Final = 64 * 2**20  # then it becomes `log.jsonl.1`, and the one before goes


class JsonlLog:
    """A listener that appends to a file, and to `stdout` where one is given.

    It never raises: where the disk is full, lines are lost, and that is announced once.
    """

    def __init__(
        self,
        path: Path,
        *,
        stdout: TextIO | None = None,
        announce: Callable[[Event], None] | None = None,
        wall: Callable[[], float] = time.time,
        bytes_max: int = LOG_BYTES_MAX,
    ) -> None:
        """`announce` (the hub's `emit`) hears of trouble with the log."""
        self.path = path
        self._announce = announce
        self._wall = wall
        self._complained = False
        self._file = _LogFile(path, bytes_max)
        self._writer = LineWriter(self._file.write, "log")
        self._stdout = LineWriter(_printer(stdout), "log-stdout") if stdout else None

    def __call__(self, event: Event) -> None:
        line = json.dumps(as_record(event, self._wall()), separators=(",", ":"), default=str)
        self._writer.put(line)
        if self._stdout:
            self._stdout.put(line)
        if self._writer.problem and not self._complained:
            self._complained = True
            text = (
                f"cannot write {self.path}: {self._writer.problem}; the log has gaps, training"
                " goes on. Free some space on that disk"
            )
            if self._announce:
                self._announce(Notice("warning", text))

    def close(self) -> None:
        self._writer.close()
        if self._stdout:
            self._stdout.close()
        self._file.close()

    def __enter__(self) -> JsonlLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _LogFile:
    """Appends whole lines or nothing, and starts anew when it is long. Used by one thread."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        self._path = path
        self._bytes_max = bytes_max
        self._handle: int | None = None
        self._size = 0

    def write(self, line: str) -> None:
        """Raises OSError where the line can't be written whole; then nothing of it is."""
        data = line.encode() + b"\n"
        if self._handle is not None and self._size + len(data) > self._bytes_max:
            self.close()
            self._path.replace(self._path.with_name(self._path.name + ".1"))
        if self._handle is None:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._handle = os.open(self._path, flags, 0o600)
            self._size = os.fstat(self._handle).st_size
            if self._size and os.pread(self._handle, 1, self._size - 1) != b"\n":
                data = b"\n" + data  # a killed process left half a line
        try:
            written = os.write(self._handle, data)
            if written < len(data):
                raise OSError("no room for a whole line")
            self._size += written
        except OSError:
            os.ftruncate(self._handle, self._size)
            raise

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _printer(stream: TextIO) -> Callable[[str], None]:
    def write(line: str) -> None:
        stream.write(line + "\n")
        stream.flush()

    return write
