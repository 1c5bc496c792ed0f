"""Memory with a wall behind it: a read or write one byte too far kills the process, visibly.

Compiled loops check no bounds, so what they touch is placed right before a page that nobody may
touch. The frame under attack lies in a file, where the parent finds it after a crash.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

FRAME_BYTES_MAX: Final = 2**20
_HEAD: Final = struct.Struct("<QII16s")  # frames so far, values, bytes, who reads it
_PAGE: Final = mmap.PAGESIZE
_FRAMES: Final = _PAGE  # where the room for frames starts
_WALL: Final = _FRAMES + FRAME_BYTES_MAX
_PROT_NONE: Final = 0


def _wall_off(memory: mmap.mmap, start: int) -> None:
    """Make the page at `start` untouchable."""
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + start
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(_PAGE), _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")


class Entry(NamedTuple):
    """The frame that was being read."""

    number: int
    """How many came before it."""
    numel: int
    codec: str
    frame: bytes


class Journal:
    """One frame at a time, in a file, ending at a wall."""

    def __init__(self, path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(_WALL + _PAGE)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _WALL + _PAGE)
        _wall_off(self._memory, _WALL)
        self._view = memoryview(self._memory)
        self._readable = self._view.toreadonly()
        self.count = 0

    def put(self, codec: bytes, numel: int, frame: bytes) -> memoryview:
        """The frame, where one byte more does not exist."""
        start = _WALL - len(frame)
        self._view[start:_WALL] = frame
        _HEAD.pack_into(self._memory, 0, self.count, numel, len(frame), codec)
        self.count += 1
        return self._readable[start:_WALL]

    @staticmethod
    def read(path: Path) -> Entry:
        """What the process that wrote it did last."""
        with path.open("rb") as file:
            count, numel, size, codec = _HEAD.unpack(file.read(_HEAD.size))
            file.seek(_WALL - size)
            return Entry(count, numel, codec.rstrip(b"\0").decode(), file.read(size))


class Walled:
    """Vectors of any length up to `values`, each ending at a wall."""

    def __init__(self, values: int) -> None:
        size = -(-4 * values // _PAGE) * _PAGE
        self._memory = mmap.mmap(-1, size + _PAGE)
        _wall_off(self._memory, size)
        self._all = np.frombuffer(self._memory, np.float32, size // 4)

    def vector(self, numel: int) -> Float32:
        """The last `numel` values: every vector shares them."""
        return self._all[len(self._all) - numel :]
